"""A/B comparison: measure two configurations in fresh processes in alternating order, and test whether they differ.

The order is A B, B A, A B, … (ABBA), so that drift over time affects both sides alike. Each process gives one value, so
effects that are constant within a process (memory layout, placement of threads) show up in the spread. Both sides may
be the same configuration: the result is then the difference that this machine shows where there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..analysis import comparison as comparison_analysis
from ..analysis.comparison import Comparison
from ..config.spec import BenchSpec, parse
from ..measure.journal import read_result
from ..records import reading
from ..records.cell import Options, as_text
from ..records.errors import MeasurementError, UsageError
from ..records.results import RunResult
from ..reports import artifacts
from ..sweeps.local_executor import LocalExecutor
from ..sweeps.planning import plan_in_turns
from ..sweeps.progress import ProgressListener
from ..sweeps.sweep import SweepResult, execute
from ..tracking import runs
from ..tracking.store import open_store

DEFAULT_PAIRS = 6
"""Pairs of processes: six give five degrees of freedom and a t quantile of 2.6."""


@dataclass(frozen=True)
class ABResult:
    """Result of `run_ab`: the sweep of both sides, and the comparison of B against A."""

    sweep: SweepResult
    comparison: Comparison


def parse_side(text: str) -> dict[str, str]:
    """Parse one side, such as `quant=int4 batch_size=4`, into parameters. Raises UsageError."""
    found: dict[str, str] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        if not equals:
            raise UsageError(
                f"A side of an A/B comparison is not written as name=value: {part}. "
                "Give for example quant=int4 or 'quant=int4 batch_size=4'."
            )
        found[name] = value
    return found


def run_ab(
    a: Mapping[str, object],
    b: Mapping[str, object],
    common: Mapping[str, object],
    *,
    pairs: int = DEFAULT_PAIRS,
    noise: float = 0.01,
    tracking_uri: str | None = None,
    experiment: str | None = None,
    watcher: ProgressListener | None = None,
) -> ABResult:
    """Measure A and B in `pairs` fresh processes each, in alternating order, and compare them pair by pair.

    `a` and `b` are the parameters in which the sides differ, `common` those that they share. Each side is one
    configuration, so lists are refused. Differences below `noise` (a ratio) are called noise. Raises LlmbenchError for
    an error found before anything starts, MeasurementError if either side could not be measured.
    """
    sides_asked, options = parse_sides(a, b, common, pairs)
    executor = open_executor_of_sides(sides_asked, options)
    planned = plan_in_turns(sides_asked, options, executor.machine)
    done = execute(planned, executor, (tracking_uri, experiment), watcher)
    if done.outcome == "interrupted":
        raise KeyboardInterrupt
    if done.outcome != "ok":
        failed = next((row for row in done.rows if row.outcome != "ok"), done.rows[0])
        raise MeasurementError(
            f"The sides could not be compared: {failed.outcome}: {failed.message} "
            f"The results so far are in {done.folder}."
        )
    first, second = sides(done)
    # Sides with different interpreters compare software on purpose.
    other = {"software"} if first.cell.worker_python != second.cell.worker_python else set()
    comparison = comparison_analysis.compare(
        first,
        second,
        noise=noise,
        paired=True,
        allow=frozenset({"workload", *other}),
    )
    artifacts.write_comparisons([comparison], done.folder / "ab")
    if done.parent_id:
        runs.log_folder(open_store(tracking_uri, experiment), done.parent_id, done.folder / "ab", "comparison")
    return ABResult(done, comparison)


def parse_sides(
    a: Mapping[str, object], b: Mapping[str, object], common: Mapping[str, object], pairs: int
) -> tuple[list[BenchSpec], Options]:
    """Return the requests of A and B, each for `pairs` processes, and the options of the command; see `run_ab`.

    Earlier results are never reused. Raises UsageError for fewer than 2 pairs, a list on a side, or a cluster.
    """
    if pairs < 2:
        raise UsageError(
            f"There are too few pairs for a test: {pairs}. Give at least 2; the default is {DEFAULT_PAIRS}."
        )
    requests = [parse({**common, **side, "processes": pairs}) for side in (a, b)]
    for spec in requests:
        _require_one_cell(spec)
    options = dataclasses.replace(parse(common).options, rerun=True)
    if options.on != "here":
        raise UsageError(
            "The sides of an A/B comparison take turns on one machine, not on a cluster: "
            f"on={options.on}. Leave it out."
        )
    return requests, options


def open_executor_of_sides(requests: Sequence[BenchSpec], options: Options) -> LocalExecutor:
    """Return the executor of both sides: this machine. Raises MissingError if it lacks a device."""
    return LocalExecutor(options, dict.fromkeys(str(spec.axes["device"][0]) for spec in requests))


def sides(done: SweepResult) -> tuple[RunResult, RunResult]:
    """Read the results of A and B. Raises JournalError if one was not written."""
    first, second = (read_result(done.folder / name / "artifacts") for name in _folders(done.folder))
    return first, second


def _require_one_cell(spec: BenchSpec) -> None:
    """Raise UsageError if a side has a list."""
    if spec.varied:
        name = spec.varied[0]
        raise UsageError(
            f"{name} has several values: {','.join(as_text(name, v) for v in spec.axes[name])}. "
            "Each side is one configuration: give one value."
        )


def _folders(folder: Path) -> list[str]:
    return [str(name) for name in reading.read_own_json(folder / "sweep.json")["order"]]
