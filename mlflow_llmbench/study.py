"""The whole study by one command: a sweep where one is asked for, results that are there already, and everything that both say together."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import artifacts, doctor, findings, machine, registry, sweep, tracking
from .errors import LlmbenchError, MeasurementError, UsageError
from .evidence import load_results
from .findings import Findings
from .records import RunResult
from .scaling_study import check_share
from .spec import parse
from .sweep import SweepResult
from .watcher import Watcher

PRESET = "quick"
"""The grid of a study unless another is named."""


@dataclass(frozen=True)
class StudyResult:
    """What `run_study` returns. `sweep` is None where nothing was measured, `found` where that was interrupted.

    `folder` holds study/ and scaling/ (None where they were only logged), `run_id` is the run that holds them (None where there is none).
    """

    sweep: SweepResult | None
    found: Findings | None
    folder: Path | None
    run_id: str | None

    @property
    def exit_code(self) -> int:
        """That of the sweep, 0 without one."""
        return self.sweep.exit_code if self.sweep else 0


def run_study(
    parameters: Mapping[str, object] | None = None,
    *,
    of: Sequence[str] = (),
    share: float = 0.5,
    prices: Mapping[str, float] | None = None,
    accept_suspect: str | None = None,
    output: str | None = None,
    log: str | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    watcher: Watcher | None = None,
) -> StudyResult:
    """Measure the sweep that `parameters` ask for (None: none), take in the results named in `of`, and keep the study of all of them.

    It is written beside the sweep, or into `output`, and logged on the run `log`, else on that of the sweep, else on that of the first
    sweep in `of` that the store knows. Other arguments are those of `findings.find`. Raises LlmbenchError; after a sweep only for
    what is wrong with the study itself, and what was measured is kept.
    """
    check_share(share)
    if log:
        tracking.require_run(tracking.open_store(tracking_uri, experiment), log.removeprefix("runs:/"))
    others = [result for reference in of for result in load_results(reference, tracking_uri)]
    if parameters is None:
        if not others:
            raise UsageError(
                "A study needs results. Give the parameters of a sweep, such as --model opt-125m,pythia-70m, or --of SWEEP."
            )
        found = _find(others, share, prices, accept_suspect)
        store = tracking.open_store(tracking_uri, experiment)
        run_id = log.removeprefix("runs:/") if log else _parent(store, others)
        return StudyResult(None, found, *_keep(found, output, store, run_id))
    asked = {"preset": PRESET, **parameters}
    _refuse_streams(asked)
    done = sweep.run(tracking_uri=tracking_uri, experiment=experiment, watcher=watcher, **asked)
    if done.outcome == "interrupted":
        return StudyResult(done, None, None, None)
    try:
        found = _find([*load_results(str(done.folder)), *others], share, prices, accept_suspect)
    except LlmbenchError as error:
        raise MeasurementError(
            f"The cells were measured and could not be studied: {error} They are in {done.folder}."
        ) from None
    uploaded = done.run_ids and not done.not_uploaded
    own = (done.parent_id or done.run_ids[0]) if uploaded else None
    run_id = log.removeprefix("runs:/") if log else own
    kept_in = tracking.open_store(tracking_uri, experiment, own) if run_id else None
    return StudyResult(done, found, *_keep(found, output or str(done.folder), kept_in, run_id))


def _refuse_streams(parameters: Mapping[str, object]) -> None:
    """Raise UsageError where every cell would be a stream of requests: none of them has a place in a study, and measuring takes long."""
    ways = parse({name: value for name, value in parameters.items() if value is not None}).axes["batching"]
    if None not in ways:
        raise UsageError(
            f"A study is of batches of one shape, and batching={','.join(map(str, ways))} measures streams of requests. "
            "Compare ways of batching with `llmbench run`, whose report sets them side by side, or leave batching out."
        )


def _find(
    results: Sequence[RunResult], share: float, prices: Mapping[str, float] | None, accept_suspect: str | None
) -> Findings:
    """The findings; why energy cannot be read is known of this machine alone."""
    here = machine.environment()["hashes"]["hardware"]
    counters = doctor.energy_item(machine.RAPL)
    no_energy = (
        f"Here: {counters.found}. {counters.advice}"
        if any(r.hashes.hardware == here for r in results) and counters.advice
        else ""
    )
    return findings.find(results, share=share, prices=prices, accept_suspect=accept_suspect, no_energy=no_energy)


def _parent(store: tracking.Store, results: Sequence[RunResult]) -> str | None:
    """The run of the first sweep that the store has."""
    parents = (registry.parent_of_sweep(store, sweep) for sweep in dict.fromkeys(result.sweep for result in results))
    return next((parent for parent in parents if parent), None)


def _keep(
    found: Findings, output: str | None, store: tracking.Store | None, run_id: str | None
) -> tuple[Path | None, str | None]:
    """Write the study into a folder of its own, log that, and copy it to where a person may have other files."""
    with tempfile.TemporaryDirectory() as scratch:
        artifacts.write_study(found, Path(scratch))
        if output:
            shutil.copytree(scratch, output, dirs_exist_ok=True)
        if store and run_id:
            for under in ("study", "scaling"):
                tracking.log_folder(store, run_id, Path(scratch) / under, under)
    return Path(output) if output else None, run_id


def parse_prices(text: str) -> dict[str, float]:
    """`0.5` for all machines, or `EPYC=0.5,A100=2.4` by a part of their names, as money per hour; `none` for no price. Raises UsageError."""
    found: dict[str, float] = {}
    for part in text.split(",") if text.lower() != "none" else ():
        name, _, amount = part.rpartition("=")
        try:
            found[name.strip()] = float(amount)
        except ValueError:
            found[name.strip()] = -1.0
        if not 0 < found[name.strip()] < float("inf"):
            raise UsageError(
                f"--price is not a price per hour: {part}. Give --price 0.5, or by hardware --price EPYC=0.5,A100=2.4."
            )
    return found
