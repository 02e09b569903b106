"""Measure a run or a registered version again on this machine, and judge whether the results agree."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass

from ..analysis import comparison as comparison_analysis
from ..analysis.comparability import Difference, differences
from ..analysis.comparison import Comparison
from ..analysis.decisions.equivalence import DEFAULT_MARGIN, INVALID, Reproduction, changed_facts, judge_reproduction
from ..analysis.decisions.gate import quality_text
from ..analysis.summary import summarize
from ..analysis.verdict import judge
from ..config.cells import config_hash
from ..config.request_fields import variables_of
from ..config.spec import parse
from ..measure.journal import read_result, write_json, write_text
from ..records.errors import MeasurementError, NotComparable, UsageError
from ..records.invocation import command_text, option_name
from ..records.metrics import PERPLEXITY
from ..records.results import RunResult
from ..reports import artifacts
from ..reports.reproduction import HEADING, reproduction_cells, reproduction_json, reproduction_markdown
from ..reports.result import command
from ..sweeps.executor import MachineFacts
from ..sweeps.planning import PlannedCell, plan
from ..sweeps.progress import ProgressListener
from ..sweeps.sweep import SweepResult, execute, open_executor
from ..system import calibrations
from ..tracking import registry, runs
from ..tracking.latest import resolve
from ..tracking.load_results import load_results
from ..tracking.store import open_store, open_store_if_any

PERMISSIONS = ("trust_remote_code", "allow_pickle")
"""Parameters that allow code or pickles to be loaded. They are not taken over from a run and must be given again."""


@dataclass(frozen=True)
class Original:
    """The original to reproduce: its result, its run id if the store has it, and its name in messages."""

    result: RunResult
    run_id: str | None
    name: str


@dataclass(frozen=True)
class Reproduced:
    """Result of `reproduce`. `sweep` is None if nothing was measured because the original is not valid."""

    original: Original
    found: Reproduction
    sweep: SweepResult | None = None
    comparison: Comparison | None = None

    @property
    def run_id(self) -> str | None:
        """Id of the new run, None if there is none."""
        return (self.sweep.run_ids[0] or None) if self.sweep else None


def find_original(reference: str | os.PathLike[str], tracking_uri: str | None = None) -> Original:
    """Load the one result behind a run id, `runs:/ID`, sweep, folder or `models:/NAME@ALIAS`.

    Raises UsageError if there are several.
    """
    reference, _ = resolve(reference, tracking_uri)
    if reference.startswith("models:/"):
        store = open_store(tracking_uri, reads=True)
        version = registry.registered_at(store, reference)
        return Original(registry.result_of(store, version.run_id), version.run_id, version.uri)
    results = load_results(reference, tracking_uri)
    if len(results) != 1:
        raise UsageError(
            f"{reference} has {len(results)} cells, but only one can be measured again at a time. "
            "Give the run of one cell."
        )
    found = open_store_if_any(tracking_uri)
    run_id = registry.run_behind(found, reference, results[0]) if found else None
    return Original(results[0], run_id, f"run {run_id}" if run_id else reference)


def parameters_again(
    result: RunResult, permissions: frozenset[str] = frozenset(), url: str | None = None
) -> dict[str, object]:
    """Return the parameters that measure a result's configuration again, each with a single value.

    `permissions` are those of `PERMISSIONS` that the user gives again; `url` is the present address of the server.
    Raises UsageError if the run needs one of these and it is not given, if its server was started by a command, or if
    `url` is given but no server was measured, or if its requests refer to variables of the environment.
    """
    needed = [name for name in PERMISSIONS if getattr(result.cell, name) and name not in permissions]
    if needed:
        option = option_name(needed[0])
        raise UsageError(
            f"It was measured with {needed[0]}=true, which is not taken over from a run. "
            f"If you trust the model {result.cell.model}, add {option}."
        )
    if result.cell.launch:
        raise UsageError(
            "It was measured on a server that a command started, and a command is not taken over from a run. "
            f"If you trust it: {command(result.cell)}"
        )
    if result.cell.url and not url:
        raise UsageError(
            f"It was measured on the server {result.cell.url}, and an address is not taken over from a run. "
            f"Add --url {result.cell.url}, or its present address."
        )
    if names := variables_of(result.cell.extra_body, result.cell.headers):
        raise UsageError(
            f"Its requests had the value of {', '.join(names)}, and values of the environment are not sent for a run. "
            f"If you trust it: {command(result.cell)}"
        )
    if url and not result.cell.url:
        raise UsageError(f"--url is given, but no server was measured: {url}. Leave it out.")
    parameters = artifacts.parameters_of(result) | ({"url": url} if url else {})
    return {name: [text] for name, text in parameters.items()}


def require_same(original: RunResult, planned: PlannedCell) -> None:
    """Raise NotComparable if the model or the workload is no longer that of the original."""
    if not planned.cell.url:
        _require_model(original, planned)
    if planned.hashes.workload != original.hashes.workload:
        raise NotComparable(
            f"The workload {planned.cell.workload} has changed since the run was measured. "
            "Restore the file, or the release that it came with."
        )


def _require_model(original: RunResult, planned: PlannedCell) -> None:
    """Raise NotComparable if the configuration is another; the number of processes may differ."""
    before = dataclasses.replace(original.cell, processes=planned.cell.processes)
    if config_hash(before, original.model) != planned.hashes.config:
        raise NotComparable(
            f"The model {planned.cell.model} has changed since the run was measured: "
            f"{original.model.name} {original.model.revision} → {planned.model.name} {planned.model.revision}. "
            f"Restore the old files, or measure the present ones with `{command_text('run')}`."
        )


def unlike_here(original: RunResult, planned: PlannedCell, machine: MachineFacts) -> list[Difference]:
    """Return the differences of this machine and its software from where the original was measured."""
    here = planned.environment or machine.environment
    hashes = dataclasses.replace(original.hashes, **here["hashes"])
    return differences(original, dataclasses.replace(original, environment=here, hashes=hashes))


def distrusted(name: str, result: RunResult) -> str | None:
    """Return the reason why a result cannot be compared with another (failed or invalid); None if it can."""
    if result.failure:
        return f"The {name} has no result: it ended with {result.outcome} at stage {result.failure.stage}."
    verdict = judge(result, summarize(result))
    return (
        f"The {name} is invalid ({', '.join(reason.code for reason in verdict.reasons)})."
        if verdict.word == "invalid"
        else None
    )


def reproduce(
    reference: str | os.PathLike[str],
    *,
    margin: float = DEFAULT_MARGIN,
    permissions: frozenset[str] = frozenset(),
    url: str | None = None,
    output_dir: str | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    watcher: ProgressListener | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Reproduced:
    """Measure `reference` again on this machine, and compare it with the original within `margin` (a ratio).

    Before measuring, `say` gets a line on what differs here. The new run is linked to the original and holds the
    comparison under `reproduction/`. `permissions` and `url` are as in `parameters_again`. Raises UsageError,
    NotComparable if model or workload have changed, MeasurementError if nothing was measured.
    """
    if not 0 < margin < 1:
        raise UsageError(f"The margin is not a ratio between 0 and 1: {margin}. Give 0.05 for ±5 %.")
    original = find_original(reference, tracking_uri)
    if why := distrusted("original", original.result):
        return Reproduced(original, Reproduction(INVALID, f"{why} There is nothing to reproduce.", margin))
    where = {"output_dir": [output_dir]} if output_dir else {}
    spec = parse(parameters_again(original.result, permissions, url) | where | {"rerun": True})
    with contextlib.closing(open_executor(spec, watcher)) as executor:
        planned = plan(spec, executor.machine)
        planned.require_packages()
        [cell] = planned.cells
        require_same(original.result, cell)
        unlike = ", ".join(map(str, unlike_here(original.result, cell, planned.machine)))
        say(
            f"This machine or its software differs from where {original.name} was measured: {unlike}."
            if unlike
            else f"This machine and its software are those of {original.name}."
        )
        experiment = experiment or _experiment_of(original, tracking_uri)
        sweep = execute(planned, executor, (tracking_uri, experiment), watcher)
    again = read_again(sweep)
    done = _judged(original, again, sweep, margin)
    if done.run_id:
        _keep(done, tracking_uri)
    return done


def read_again(sweep: SweepResult) -> RunResult:
    """Read the result of the only cell of a sweep. Raises MeasurementError if it has none."""
    if sweep.outcome == "interrupted":
        raise KeyboardInterrupt
    if sweep.outcome != "ok" or sweep.rows[0].outcome != "ok":
        raise MeasurementError(
            f"It could not be measured again: {sweep.rows[0].outcome}: {sweep.rows[0].message} "
            f"The files are in {sweep.folder}."
        )
    [folder] = [file.parent for file in sweep.folder.glob("*/artifacts/result.json")]
    return read_result(folder)


def _judged(original: Original, again: RunResult, sweep: SweepResult, margin: float) -> Reproduced:
    if why := distrusted("reproduction", again):
        return Reproduced(original, Reproduction(INVALID, f"{why} Measure again.", margin), sweep)
    allow = frozenset({"hardware", "software"})
    comparison = comparison_analysis.compare(
        original.result,
        again,
        allow=allow,
        called=("the original", "the reproduction"),
        calibrations=calibrations.kept(),
    )
    one_text = quality_text(original.result) == quality_text(again)
    metrics = [
        {k: v for k, v in summarize(r).items() if one_text or k != PERPLEXITY.key()} for r in (original.result, again)
    ]
    found = judge_reproduction(comparison, margin, (metrics[0], metrics[1]))
    if changed := changed_facts(original.result, again):
        found = dataclasses.replace(found, notes=(*found.notes, changed))
    if not one_text:
        found = dataclasses.replace(
            found,
            notes=(
                *found.notes,
                "Perplexity is not compared: a run does not keep the text it was measured on; another one was used.",
            ),
        )
    return Reproduced(original, found, sweep, comparison)


def _experiment_of(original: Original, tracking_uri: str | None) -> str | None:
    """Return the name of the original's experiment, None if its run is not in the store."""
    if original.run_id is None:
        return None
    client = open_store(tracking_uri).client
    return str(client.get_experiment(client.get_run(original.run_id).info.experiment_id).name)


def _keep(done: Reproduced, tracking_uri: str | None) -> None:
    """Write the comparison beside the new result and log it on the new run; link both runs by tags."""
    assert done.sweep and done.run_id
    folder = done.sweep.folder / "reproduction"
    write_json(
        folder / "reproduction.json",
        {**reproduction_json(done.found), "original": done.original.name, "original_run_id": done.original.run_id},
    )
    write_text(folder / "reproduction.md", reproduction_markdown(done.found))
    write_json(folder / "table.json", {"columns": HEADING, "data": reproduction_cells(done.found)})
    if done.comparison:
        artifacts.write_comparisons([done.comparison], folder)
    store = open_store(tracking_uri, own=done.run_id)
    runs.log_folder(store, done.run_id, folder, "reproduction")
    runs.set_tags(
        store,
        done.run_id,
        {"reproduces": done.original.run_id or done.original.name, "reproduction": done.found.verdict},
    )
    if done.original.run_id:
        runs.set_tags(store, done.original.run_id, {"reproduced_by": done.run_id, "reproduction": done.found.verdict})
