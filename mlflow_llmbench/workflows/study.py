"""The whole study in one command: measure a sweep if requested, add existing results, and report on all of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..analysis.scaling import findings
from ..analysis.scaling.findings import Findings
from ..analysis.scaling.study import check_share
from ..config.spec import parse
from ..records.errors import LlmbenchError, MeasurementError, UsageError
from ..records.invocation import command_text
from ..records.results import RunResult
from ..reports import artifacts
from ..reports.study_result import StudyResult
from ..sweeps import sweep
from ..sweeps.progress import ProgressListener
from ..system import calibrations, machine
from ..tracking import registry, runs
from ..tracking.load_results import Given, load_all, load_results
from ..tracking.search import require_run
from ..tracking.store import Store, open_store, open_store_if_any
from . import doctor

HOURS_PER_YEAR = 24 * 365.25

PRESET = "quick"
"""Preset of a study's grid unless another is given."""


def run_study(
    parameters: Mapping[str, object] | None = None,
    *,
    of: Given | Iterable[Given] = (),
    share: float = 0.5,
    prices: Mapping[str, float] | None = None,
    accept_suspect: str | None = None,
    output: str | None = None,
    log: str | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    watcher: ProgressListener | None = None,
) -> StudyResult:
    """Measure the sweep of `parameters` (None: no sweep), add the results named in `of`, and study all of them.

    The study is written beside the sweep, or into `output`. It is logged on the run `log`, else on the sweep's run,
    else on the run of the first sweep in `of` that the store has. `share`, `prices` and `accept_suspect` are those of
    `findings.find`. Raises LlmbenchError; if the study fails after a sweep, the sweep's results are kept.
    """
    check_share(share)
    if log:
        require_run(open_store(tracking_uri, experiment, reads=True), log.removeprefix("runs:/"))
    others = load_all(of, tracking_uri)
    if parameters is None:
        if not others:
            raise UsageError(
                "A study needs results. Give the parameters of a sweep, such as --model opt-125m,pythia-70m, "
                "or --of SWEEP."
            )
        found = _find(others, share, prices, accept_suspect)
        store = open_store_if_any(tracking_uri, experiment)
        run_id = log.removeprefix("runs:/") if log else _parent(store, others) if store else None
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
            f"The cells were measured but could not be studied: {error} Their results are in {done.folder}."
        ) from None
    uploaded = done.run_ids and not done.not_uploaded
    own = (done.parent_id or done.run_ids[0]) if uploaded else None
    run_id = log.removeprefix("runs:/") if log else own
    kept_in = open_store(tracking_uri, experiment, own) if run_id else None
    return StudyResult(done, found, *_keep(found, output or str(done.folder), kept_in, run_id))


def _refuse_streams(parameters: Mapping[str, object]) -> None:
    """Raise UsageError if every cell would be a stream of requests, which a study cannot use, before measuring them."""
    ways = parse({name: value for name, value in parameters.items() if value is not None}).axes["batching"]
    if None not in ways:
        raise UsageError(
            f"A study uses batches of one shape, but batching={','.join(map(str, ways))} measures streams of requests. "
            f"Compare ways of batching with `{command_text('run')}`, whose report shows them side by side, "
            "or leave batching out."
        )


def _find(
    results: Sequence[RunResult], share: float, prices: Mapping[str, float] | None, accept_suspect: str | None
) -> Findings:
    """Return the findings. The reason why energy cannot be read is known only for results of this machine."""
    here = machine.environment()["hashes"]["hardware"]
    counters = doctor.energy_item(machine.RAPL)
    no_energy = (
        f"Here: {counters.found}. {counters.advice}"
        if any(r.hashes.hardware == here for r in results) and counters.advice
        else ""
    )
    return findings.find(
        results,
        share=share,
        prices=prices,
        accept_suspect=accept_suspect,
        no_energy=no_energy,
        calibrations=calibrations.kept(),
    )


def _parent(store: Store, results: Sequence[RunResult]) -> str | None:
    """Return the parent run of the first sweep that the store has, None if it has none."""
    parents = (registry.parent_of_sweep(store, sweep) for sweep in dict.fromkeys(result.sweep for result in results))
    return next((parent for parent in parents if parent), None)


def _keep(
    found: Findings, output: str | None, store: Store | None, run_id: str | None
) -> tuple[Path | None, str | None]:
    """Write the study into a temporary folder and log that; copy it to `output`, which may hold other files."""
    with tempfile.TemporaryDirectory() as scratch:
        artifacts.write_study(found, Path(scratch))
        if output:
            shutil.copytree(scratch, output, dirs_exist_ok=True)
        if store and run_id:
            for under in ("study", "scaling"):
                runs.log_folder(store, run_id, Path(scratch) / under, under)
    return Path(output) if output else None, run_id


def parse_prices(text: str) -> dict[str, float]:
    """Parse prices in money per hour: `0.5` for all machines, `EPYC=0.5,A100=2.4` by a part of their names, or `none`.

    `1600/3y` is a purchase price over a lifetime of years in which the machine always runs. Returns prices per hour by
    part of the name, "" for all. Raises UsageError.
    """
    found: dict[str, float] = {}
    for part in text.split(",") if text.lower() != "none" else ():
        name, _, amount = part.rpartition("=")
        try:
            paid, over, years = amount.partition("/")
            if over and not years.endswith("y"):
                raise ValueError(years)
            found[name.strip()] = float(paid) / (float(years[:-1]) * HOURS_PER_YEAR if over else 1)
        except (ValueError, ZeroDivisionError):
            found[name.strip()] = -1.0
        if not 0 < found[name.strip()] < float("inf"):
            raise UsageError(
                f"--price is not a price per hour: {part}. Give --price 0.5, or by hardware --price EPYC=0.5,A100=2.4, "
                "or what it cost over its years: --price 1600/3y."
            )
    return found
