"""Calibrate a machine: measure by how much processes of one configuration differ, and keep it for comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..analysis.process_noise import calibration_of
from ..analysis.summary import summarize
from ..analysis.verdict import judge
from ..config.spec import parse
from ..records.calibration import Calibration
from ..records.cell import as_text
from ..records.errors import MeasurementError, UsageError
from ..records.results import RunResult
from ..sweeps import sweep
from ..sweeps.progress import ProgressListener
from ..sweeps.sweep import SweepResult
from ..system import calibrations
from ..tracking.load_results import Given, load_all, load_results

DEFAULT_PROCESSES = 10
"""Processes of a calibration: nine degrees of freedom and a t quantile of 2.3."""

DEFAULT_REPETITIONS = 20
"""Repetitions in each process, so that they hardly add to the differences between processes."""


@dataclass(frozen=True)
class Calibrated:
    """Result of `calibrate`: the calibration, its file, and the sweep that measured it (None if results were given)."""

    calibration: Calibration
    file: Path
    sweep: SweepResult | None


def calibrate(
    parameters: Mapping[str, object] | None = None,
    *,
    of: Given | Iterable[Given] = (),
    tracking_uri: str | None = None,
    experiment: str | None = None,
    watcher: ProgressListener | None = None,
) -> Calibrated:
    """Measure one configuration in several fresh processes, and keep the noise between them.

    `parameters` are those of `run`; processes and repetitions are 10 and 20 unless given. With `of`, references of
    existing results (see `load_results`) of three or more processes each are used instead, and nothing is measured.
    A calibration replaces an older one of this hardware, backend and device. Raises UsageError for several cells, or
    results that cannot be used; MeasurementError if the measurement failed or is invalid; JournalError if the file
    cannot be written.
    """
    done = None
    if of:
        if parameters:
            name = next(iter(parameters))
            raise UsageError(f"Existing results are given, and a parameter to measure: {name}. Give either of them.")
        results = load_all(of, tracking_uri)
    else:
        done = _measure(parameters or {}, tracking_uri, experiment, watcher)
        results = load_results(done.folder)
    found = dataclasses.replace(calibration_of(results), verdicts=tuple(_trusted(result) for result in results))
    return Calibrated(found, calibrations.keep(found), done)


def _measure(
    parameters: Mapping[str, object], tracking_uri: str | None, experiment: str | None, watcher: ProgressListener | None
) -> SweepResult:
    """Measure the one cell of the parameters."""
    asked = {"processes": DEFAULT_PROCESSES, "repetitions": DEFAULT_REPETITIONS, **parameters, "rerun": True}
    spec = parse(asked)
    if spec.varied:
        name = spec.varied[0]
        raise UsageError(
            f"{name} has several values: {','.join(as_text(name, v) for v in spec.axes[name])}. "
            "A calibration measures one configuration: give one value."
        )
    done = sweep.run(tracking_uri=tracking_uri, experiment=experiment, watcher=watcher, **asked)
    if done.outcome == "interrupted":
        raise KeyboardInterrupt
    if done.outcome != "ok":
        raise MeasurementError(
            f"The machine was not calibrated: {done.rows[0].outcome}: {done.rows[0].message} "
            f"The results so far are in {done.folder}."
        )
    return done


def _trusted(result: RunResult) -> str:
    """Return the verdict on a result in a word. Raises MeasurementError if it is invalid.

    A suspect one can be used: a disturbed machine differs more from process to process, which errs to the safe side.
    """
    verdict = judge(result, summarize(result))
    if verdict.word == "invalid":
        codes = ", ".join(reason.code for reason in verdict.reasons)
        raise MeasurementError(f"The result is invalid, and was not used to calibrate: {codes}. Measure it again.")
    return verdict.word
