"""Fit scaling laws to stored results by reference, and keep the study with a run or in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..analysis.scaling import study as analysis
from ..analysis.scaling.study import ScalingStudy
from ..records.errors import UsageError
from ..reports import artifacts
from ..system import calibrations
from ..tracking.load_results import Given, load_all
from .destination import NOT_KEPT, Destination

PREDICTABLE = ("batch_size", "prompt_tokens")
"""Settings at whose values a study can predict."""


def scaling(
    references: Given | Iterable[Given],
    *,
    share: float = 0.5,
    at: Sequence[tuple[str, float]] = (),
    destination: Destination = NOT_KEPT,
    tracking_uri: str | None = None,
    on_result: Callable[[ScalingStudy], None] = lambda study: None,
) -> ScalingStudy:
    """Study the results of `references` (one or several, see `load_results`) together.

    `share` is the part of the best throughput per instance that a batch size must keep, `at` are points (setting,
    value) to predict at. `on_result` gets the study before it is written and logged. Raises UsageError, NotFitted, or
    the errors of `load_results`.
    """
    study = analysis.study_scaling(load_all(references, tracking_uri), share, list(at), calibrations.kept())
    on_result(study)
    destination.keep(lambda folder: artifacts.write_scaling(study, folder), "scaling", tracking_uri)
    return study


def parse_points(text: str) -> list[tuple[str, float]]:
    """Parse `batch_size=6,12` into (setting, value) pairs to predict at. Raises UsageError."""
    name, _, values = text.partition("=")
    if name not in PREDICTABLE:
        raise UsageError(f"--at takes {' or '.join(PREDICTABLE)} and a list: {text}. Give --at batch_size=6,12.")
    try:
        return [(name, float(value)) for value in values.split(",")]
    except ValueError:
        raise UsageError(f"--at has a value that is not a number: {text}. Give --at {name}=6,12.") from None
