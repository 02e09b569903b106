"""Tune: search a grid of configurations for the best one for a goal within limits, with few measurements."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..analysis.decisions.candidates import MEMORY, Limit
from ..analysis.decisions.limits import read_limits
from ..analysis.decisions.recommend import GOALS, QUALITY_MEASURES, Recommendation
from ..analysis.summary import summarize
from ..analysis.verdict import judge
from ..config.parameter_types import TuneParameters
from ..config.signatures import with_parameters
from ..config.spec import COMMANDS, BenchSpec, parse, with_backend
from ..measure.journal import write_json
from ..records.cell import PARAMETERS, as_text, list_text
from ..records.errors import LlmbenchError, UsageError
from ..records.invocation import parameter_text
from ..records.metric import GB
from ..records.text import known_words, short_number_text
from ..reports.tuning import TuningPlan, TuningResult, configuration_name, tuning_json
from ..sweeps.executor import Executor
from ..sweeps.planning import Plan, PlannedCell, plan
from ..sweeps.progress import NullListener, ProgressListener, listening
from ..sweeps.run_recorder import Destination
from ..sweeps.search import TuningSearch
from ..sweeps.sweep import SweepResult, execute, open_executor
from ..tracking import registry
from ..tracking.store import open_store
from . import recommend

if TYPE_CHECKING:
    from typing_extensions import Unpack

ONE_WORKLOAD = (
    "workload", "prompt_tokens", "output_tokens", "prefix_tokens", "prefix_count", "history", "request_rate",
)  # fmt: skip
"""Parameters of the work itself. Configurations are compared on the same work, so each of them has one value."""

SHARE = 3
"""A search measures one of so many configurations unless it is told how many."""

LEAST_TRIALS = 2

GOAL = "throughput"
"""Goal unless another is given."""

LACKS = "its result lacks the figure"


@with_parameters(TuneParameters, COMMANDS["tune"])
def tune(
    *,
    goal: str = GOAL,
    max_memory: str | None = None,
    max_ttft: str | None = None,
    max_tpot: str | None = None,
    min_quality: str | None = None,
    trials: int | str | None = None,
    accept_suspect: str | None = None,
    progress: bool | ProgressListener | None = None,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    **parameters: Unpack[TuneParameters],
) -> TuningResult:
    """Search configurations for the best one for a goal within limits, and measure about a third of them.

        tune(model="opt-125m", quant="bf16,int8,int4", batch_size=[1, 2, 4, 8, 16], max_tpot="60ms")

    Lists make the grid, as in `run`; with `launch` or `url` a server is measured, as in `online`. `goal` and the limits
    are those of `llmbench recommend`, by whose rule the winner is chosen. `trials`: most configurations to measure. The
    same call again goes on where it was stopped. The other arguments are those of `run`.

    Raises LlmbenchError, with a message of one line, for an error found before anything is measured.
    """
    limits = read_limits(max_memory, max_ttft, max_tpot, min_quality)
    own = {
        "goal": goal, "max_memory": max_memory, "max_ttft": max_ttft, "max_tpot": max_tpot, "min_quality": min_quality,
        "trials": None if trials is None else str(trials), "accept_suspect": accept_suspect,
    }  # fmt: skip
    with listening(progress) as listener:
        return search(
            dict(parameters),
            {name: text for name, text in own.items() if text is not None},
            limits,
            destination=(tracking_uri, experiment),
            listener=listener,
        )


def search(
    parameters: Mapping[str, object],
    own: Mapping[str, str],
    limits: Sequence[Limit],
    *,
    destination: Destination = (None, None),
    listener: ProgressListener | None = None,
    on_plan: Callable[[TuningPlan], None] = lambda plan: None,
) -> TuningResult:
    """Tune. `own` are the options of the search as text: goal, limits, trials, accept_suspect.

    `on_plan` gets what will be done before anything is measured. Raises as `tune` does.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    spec = parse(with_backend(given))
    _check(spec, own.get("goal", GOAL), limits)
    asked = {name: _text(spec, name) for name in PARAMETERS if name in given} | dict(own)
    with contextlib.closing(open_executor(spec, listener)) as executor:
        return search_with(executor, spec, own, limits, asked, destination, listener, on_plan)


def search_with(
    executor: Executor,
    spec: BenchSpec,
    own: Mapping[str, str],
    limits: Sequence[Limit],
    asked: Mapping[str, str],
    destination: Destination = (None, None),
    listener: ProgressListener | None = None,
    on_plan: Callable[[TuningPlan], None] = lambda plan: None,
) -> TuningResult:
    """Tune with an executor, as `search` does; `asked` are the parameters that the user gave, as text."""
    goal, accepted = own.get("goal", GOAL), own.get("accept_suspect")
    grid = plan(spec, executor.machine)
    grid.require_packages()
    excluded = _excluded(grid, limits)
    count = _trials(own.get("trials"), len(grid.cells) - len(excluded))
    names = {planned.folder: configuration_name(planned.cell, grid.varied) for planned in grid.cells}
    left_out = {names[folder]: why for folder, why in excluded.items()}
    told = TuningPlan(goal, tuple(limits), grid.varied, len(grid.cells), left_out, count, asked)
    on_plan(told)
    searched = TuningSearch(grid, GOALS[goal], limits, count, excluded, accepted)
    done = execute(searched.first(), executor, destination, listener, search=searched)
    found = _recommend(done, told, accepted, destination[0], listener or NullListener())
    return _keep(_result(searched, done, told, names, *found), destination)


def _text(spec: BenchSpec, name: str) -> str:
    """Return a parameter as the user could give it."""
    return list_text(name, spec.axes[name]) if name in spec.axes else as_text(name, getattr(spec.options, name))


def _check(spec: BenchSpec, goal: str, limits: Sequence[Limit]) -> None:
    """Raise UsageError for a search that could find nothing, before a model is looked for."""
    if goal not in GOALS:
        raise UsageError(f"Unknown goal: {goal}. {known_words(goal, GOALS)}")
    options = spec.options
    for name in ("on", "twin", "find"):
        if getattr(options, name) != PARAMETERS[name].default:
            raise UsageError(f"tune measures one configuration after another here, and {name} is given. Leave it out.")
    if not spec.varied:
        raise UsageError(
            "There is one configuration, so nothing to search. Give lists: quant=bf16,int4 batch_size=1,4,16."
        )
    if several := next((name for name in ONE_WORKLOAD if len(spec.axes[name]) > 1), None):
        raise UsageError(
            f"tune compares configurations on one workload, and {several} has several values: "
            f"{list_text(several, spec.axes[several])}. Give one, and tune for each."
        )
    if None in spec.axes["batching"] and len(spec.axes["batching"]) > 1:
        raise UsageError("batching=none measures single batches, and the others a stream of requests. Leave none out.")
    if goal == "cost" and options.price_per_hour is None:
        raise UsageError("goal=cost needs a price. Give price_per_hour, the money that this machine costs per hour.")
    if goal == "goodput" and all(spec.axes[name] == (None,) for name in ("slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms")):
        raise UsageError("goal=goodput counts requests within SLOs. Give slo_ttft_ms, slo_tpot_ms, slo_e2e_ms or slo.")
    if any(limit.measure in QUALITY_MEASURES.values() for limit in limits) and options.quality == "none":
        raise UsageError(
            f"min_quality limits the quality, which is not measured. Add {parameter_text('quality', 'auto')}."
        )


def _excluded(grid: Plan, limits: Sequence[Limit]) -> dict[str, str]:
    """Return the folders of the cells that are not tried, with the reason. Raises UsageError if less than two are left.

    They are refused by the plan, or by estimate need more memory than the limit of it.
    """
    found = {one.folder: one.refusal.sentence for one in grid.cells if one.refusal}
    budget = next((limit for limit in limits if limit.measure is MEMORY), None)
    if budget and not grid.spec.options.force:
        for one in grid.cells:
            if one.folder not in found and (one.predicted_bytes or 0) / GB > budget.bound:
                found[one.folder] = _beyond(one, budget)
    if len(found) == len(grid.cells):
        raise UsageError(f"No configuration can be tried. The first: {next(iter(found.values()))}")
    return found


def _beyond(one: PlannedCell, budget: Limit) -> str:
    needed = short_number_text((one.predicted_bytes or 0) / GB)
    return (
        f"{one.name} needs about {needed} GB by estimate, and the limit is {budget}. To try it all the same: "
        f"{parameter_text('force', 'true')}."
    )


def _trials(text: str | None, open_cells: int) -> int:
    """Return how many cells to measure: a third of them unless a number is given. Raises UsageError."""
    if text is None:
        return min(max(open_cells // SHARE, LEAST_TRIALS), open_cells)
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"trials is not a whole number from 1 on: {text}. Leave it out for a third of the grid.")
    return min(int(text), open_cells)


def _recommend(
    done: SweepResult, told: TuningPlan, accepted: str | None, tracking_uri: str | None, listener: ProgressListener
) -> tuple[Recommendation | None, str]:
    """Choose among what was measured, and keep that with the sweep. Returns the choice and the command to register it.

    An error of the store is a note: what was measured is kept.
    """
    found: list[Recommendation] = []
    try:
        kept = recommend.recommend(
            [str(done.folder)],
            told.goal,
            told.limits,
            accept_suspect=accepted,
            tracking_uri=tracking_uri,
            own=done.parent_id,
            on_result=found.append,
        )
        return kept.found, kept.registration
    except LlmbenchError as error:
        listener.note(f"The recommendation is not kept: {error}")
        return (found[0] if found else None), ""


def _result(
    searched: TuningSearch,
    done: SweepResult,
    told: TuningPlan,
    names: Mapping[str, str],
    found: Recommendation | None,
    registration: str,
) -> TuningResult:
    name_of = {number: names[folder] for folder, number in searched.number.items()}
    trials, results = searched.trials, searched.results
    silent: dict[str, str] = {}
    doubtful: dict[str, str] = {}
    failed: dict[str, str] = {}
    for number, trial in trials.items():
        result, name = results[number], name_of[number]
        if trial.failed:
            failed[name] = result.failure.message if result.failure else result.outcome
        elif trial.value is None or trial.doubtful:
            verdict = judge(result, summarize(result))
            codes = ", ".join(reason.code for reason in verdict.reasons)
            (doubtful if trial.doubtful else silent)[name] = f"{verdict.word} ({codes})" if codes else LACKS
    chances = sorted(searched.chances().items(), key=lambda one: -one[1])
    unseen = searched.grid.unseen([number for number, trial in trials.items() if trial.value is not None])
    return TuningResult(
        told,
        done,
        found,
        len(trials),
        sum(bool(result.linked) for result in results.values()),
        silent,
        doubtful,
        failed,
        {name_of[number]: chance for number, chance in chances},
        {name: [as_text(name, value) for value in values] for name, values in unseen.items()},
        registration,
    )


def _keep(result: TuningResult, destination: Destination) -> TuningResult:
    """Write tuning.json beside the sweep, and log it on its run if the store answers."""
    with contextlib.suppress(LlmbenchError):
        data = tuning_json(result)
        write_json(Path(result.sweep.folder) / "tuning.json", data)
        if result.sweep.parent_id and not result.sweep.not_uploaded:
            store = open_store(*destination, own=result.sweep.parent_id)
            with tempfile.TemporaryDirectory() as scratch:
                write_json(Path(scratch) / "tuning.json", data)
                registry.log_folder(store, result.sweep.parent_id, Path(scratch))
    return result
