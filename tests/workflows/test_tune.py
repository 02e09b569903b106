"""Tuning in scripted worlds, whose best configuration is known, and by whole commands with the fake backend."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench import recommend, tune
from mlflow_llmbench.analysis.decisions.limits import read_limits
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.reports.tuning import TuningResult, format_tuning, reach
from mlflow_llmbench.sweeps.planning import plan
from mlflow_llmbench.sweeps.sweep import execute
from mlflow_llmbench.workflows.tune import search_with
from tests.virtual import Figures, VirtualExecutor, World

FIXED = {"backend": "fake", "model": "fake:", "prompt_tokens": "8", "output_tokens": "5", "repetitions": "5"}
QUANTS, BATCHES = "bf16,int8,int4", "1,2,4,8,16"
SPEED = {"bf16": 12.0, "int8": 16.0, "int4": 7.0}
"""Milliseconds per token at batch size 1 in most worlds."""


def step(cell: Cell, row: float = 0.02) -> float:
    """A step grows by a share of its time with each further row."""
    return SPEED[cell.quant] * (1 + row * (cell.batch_size - 1))


def monotone(cell: Cell) -> Figures:
    """Larger batches and smaller weights are faster: the best is a corner."""
    return Figures(2 * step(cell), step(cell))


def interior(cell: Cell) -> Figures:
    """Beyond 4 rows the caches overflow: the best lies within the range."""
    beyond = 1 + 1.5 * max(cell.batch_size - 4, 0) / 4
    return Figures(2 * step(cell), step(cell) * beyond)


def crossing(cell: Cell) -> Figures:
    """Few bits are fast in small batches only, since each row unpacks the weights again."""
    time = step(cell, {"bf16": 0.02, "int8": 0.2, "int4": 0.5}[cell.quant])
    return Figures(2 * time, time)


def heavy(cell: Cell) -> Figures:
    """The fast ones need most memory."""
    return Figures(
        2 * step(cell), step(cell), memory={"bf16": 4.0, "int8": 2.0, "int4": 3.0}[cell.quant] + 0.1 * cell.batch_size
    )


def threaded(cell: Cell) -> Figures:
    """Three axes: as `crossing`, and three threads are best."""
    return Figures(20.0, crossing(cell).step * (1 + 0.2 * abs((cell.threads or 0) - 3)))


WORLDS: dict[str, tuple[World, str, dict[str, str], dict[str, str]]] = {
    "monotone": (monotone, "throughput", {}, {}),
    "monotone, latency": (monotone, "latency", {}, {}),
    "interior": (interior, "throughput", {}, {}),
    "crossing": (crossing, "throughput", {}, {}),
    "a limit of TPOT bites": (monotone, "throughput", {"max_tpot": "8.5ms"}, {}),
    "a limit of memory bites": (heavy, "throughput", {"max_memory": "3.5GB"}, {}),
    "both limits bite": (heavy, "throughput", {"max_memory": "3.6GB", "max_tpot": "17ms"}, {}),
    "cost": (interior, "cost", {}, {"price_per_hour": "2"}),
    "three axes": (threaded, "throughput", {}, {"threads": "1,2,3,4"}),
}


def grid(more: Mapping[str, str], quants: str = QUANTS, batches: str = BATCHES) -> dict[str, str]:
    return {**FIXED, "quant": quants, "batch_size": batches, **more}


def tuned(world: World, own: Mapping[str, str] = {}, limits: Mapping[str, str] = {}, **more: str) -> Any:
    """Tune in a world. Returns the result and the executor."""
    parameters = grid(more)
    executor = VirtualExecutor(world)
    done = search_with(executor, parse(parameters), {**own, **limits}, read_limits(**limits), parameters)
    return done, executor


def best(done: TuningResult) -> Cell:
    assert done.found and done.found.winner, format_tuning(done)
    return done.found.winner.result.cell


def best_of_grid(world: World, goal: str, limits: Mapping[str, str], more: Mapping[str, str]) -> Cell:
    """The winner of the whole grid, as `run` and `recommend` find it."""
    executor = VirtualExecutor(world)
    whole = execute(plan(parse(grid({**more, "rerun": "true"})), executor.machine), executor, (None, None))
    assert len(executor.measured) == len(whole.rows)
    winner = recommend(str(whole.folder), goal, read_limits(**limits)).found.winner
    assert winner
    return winner.result.cell


@pytest.mark.parametrize("name", WORLDS)
def test_a_third_of_the_grid_finds_the_winner_of_the_whole(store_uri: str, name: str) -> None:
    world, goal, limits, more = WORLDS[name]
    done, executor = tuned(world, {"goal": goal}, limits, **more)
    assert len(executor.measured) == done.tried == done.plan.open // 3 <= done.plan.cells / 3
    assert best(done) == best_of_grid(world, goal, limits, more)
    assert done.exit_code == 0


def test_the_same_command_measures_the_same_and_then_nothing_more(store_uri: str) -> None:
    first, executor = tuned(crossing)
    again, second = tuned(crossing)
    assert (second.measured, again.reused, again.tried) == ([], 5, 5)
    assert [row.cell for row in again.sweep.rows] == executor.measured
    assert best(first) == best(again)
    more, third = tuned(crossing, {"trials": "7"})
    assert (len(third.measured), more.reused, more.tried) == (2, 5, 7)


def test_a_tuning_that_was_interrupted_goes_on(store_uri: str) -> None:
    whole, executor = tuned(interior)

    def breaking(cell: Cell) -> Figures:
        if (cell.quant, cell.batch_size) == order[2]:
            raise KeyboardInterrupt
        return interior(cell)

    order = [(cell.quant, cell.batch_size) for cell in executor.measured]
    stopped, _ = tuned(breaking, model="fake:vocab=31000")
    assert (stopped.exit_code, stopped.sweep.outcome) == (130, "interrupted")
    told = format_tuning(stopped)
    assert "goes on: what is measured and valid is not measured again" in told
    done, rest = tuned(interior, model="fake:vocab=31000")
    assert [(cell.quant, cell.batch_size) for cell in rest.measured] == order[2:]
    assert (done.reused, best(done).batch_size) == (2, best(whole).batch_size)


def test_a_load_serves_the_trials_that_follow_each_other(store_uri: str) -> None:
    _, executor = tuned(monotone, {"trials": "15"})
    changes = sum(a.quant != b.quant for a, b in zip(executor.measured, executor.measured[1:], strict=False))
    assert executor.loads == changes + 1 < 15
    assert len(set(executor.measured)) == 15


def test_the_trials_are_children_of_one_sweep_whose_run_has_the_search(store_uri: str) -> None:
    done, _ = tuned(monotone)
    client = MlflowClient(store_uri)
    runs = client.search_runs([done.sweep.experiment_id])
    assert len(runs) == 6
    parent = client.get_run(done.sweep.parent_id or "")
    assert parent.data.params["batch_size"] == BATCHES
    assert {"tuning.json", "recommendation.json"} <= {one.path for one in client.list_artifacts(parent.info.run_id)}
    told = json.loads((Path(done.sweep.folder) / "tuning.json").read_text())
    assert (told["configurations"], told["tried"], told["untried"]) == (15, 5, 10)
    tagged = [run for run in runs if run.data.tags.get("llmbench.recommended")]
    assert [run.data.params["quant"] for run in tagged] == ["int4"]


def test_cells_that_are_too_large_by_estimate_are_left_out_and_said(store_uri: str) -> None:
    limits = {"max_memory": "0.6GB"}
    parameters = {
        **FIXED, "backend": "transformers", "model": "opt-125m", "weights": "random", "quant": "fp32,bf16",
        "batch_size": "1,2,4",
    }  # fmt: skip
    executor = VirtualExecutor(lambda cell: Figures(memory=0.5))
    planned = plan(parse(parameters), executor.machine)
    small = [one for one in planned.cells if (one.predicted_bytes or 0) <= 0.6e9]
    if not 0 < len(small) < 6:
        limits = {"max_memory": f"{sorted(one.predicted_bytes or 0 for one in planned.cells)[2] / 1e9:.6f}GB"}
    shown: list[Any] = []
    done = search_with(executor, parse(parameters), limits, read_limits(**limits), parameters, on_plan=shown.append)
    assert 0 < len(shown[0].excluded) < 6
    assert all("by estimate, and the limit is --max-memory" in why for why in shown[0].excluded.values())
    assert {cell.quant for cell in executor.measured} == {"bf16"}
    assert "more configuration" in " ".join(reach(done))
    forced = VirtualExecutor(lambda cell: Figures(memory=0.5))
    search_with(
        forced,
        parse({**parameters, "force": "true", "rerun": "true"}),
        limits,
        read_limits(**limits),
        {},
        on_plan=shown.append,
    )
    assert shown[1].excluded == {}


def test_a_trial_without_memory_is_told_and_what_needs_no_less_is_not_tried(store_uri: str) -> None:
    def small(cell: Cell) -> Figures:
        return Figures(oom=True) if cell.batch_size >= 8 else monotone(cell)

    done, executor = tuned(small, {"trials": "9"})
    assert best(done).batch_size == 4
    failed = [cell for cell in executor.measured if cell.batch_size >= 8]
    largest = {quant: max(c.batch_size for c in failed if c.quant == quant) for quant in {c.quant for c in failed}}
    for position, cell in enumerate(executor.measured):
        before = [one for one in executor.measured[:position] if one in failed and one.quant == cell.quant]
        assert all(cell.batch_size < one.batch_size for one in before), (largest, executor.measured)
    assert set(done.failed.values()) == {"The world has no more memory."}
    assert "could not be measured" in " ".join(reach(done))


def suspect(figures: Figures) -> Figures:
    """The same cell on a busy machine: one of its repetitions takes twice as long, and the others are slower."""
    return Figures(figures.ttft, figures.step, figures.memory, factors=(2.6, 1.3, 1.3, 1.32, 1.28))


def test_suspect_trials_neither_win_nor_mislead(store_uri: str) -> None:
    def busy(cell: Cell) -> Figures:
        return suspect(monotone(cell)) if cell.batch_size == 4 else monotone(cell)

    done, executor = tuned(busy, {"trials": "7"})
    assert (best(done).quant, best(done).batch_size) == ("int4", 16)
    assert done.doubtful or not any(cell.batch_size == 4 for cell in executor.measured)
    everywhere, again = tuned(lambda cell: suspect(monotone(cell)), rerun="true")
    assert everywhere.found and everywhere.found.winner is None
    assert (everywhere.exit_code, len(everywhere.doubtful)) == (1, 5)
    assert ("int4", 16) in {(cell.quant, cell.batch_size) for cell in again.measured}, "they guide it all the same"
    assert any("cannot win" in line for line in reach(everywhere))
    assert not any("winner" in line for line in reach(everywhere))
    accepted, _ = tuned(lambda cell: suspect(monotone(cell)), {"accept_suspect": "a busy machine"}, rerun="true")
    assert (best(accepted).quant, accepted.doubtful) == ("int4", {})


def test_what_was_not_measured_is_said(store_uri: str) -> None:
    done, _ = tuned(interior, {"trials": "2"})
    text = format_tuning(done)
    assert "2 of 15 configurations were measured." in text
    assert re.search(r"13 were not, so it is not certain that the winner is that of the whole grid\. By the", text)
    assert re.search(r"Nothing was measured with quant=(bf16|int8|int4)\.", text)
    assert "--trials 15" in text and "so that the winner is certain" in text
    whole, _ = tuned(interior, {"trials": "15"})
    assert "None was left, so the winner is that of the whole grid." in format_tuning(whole)
    assert whole.untried == 0 and "--trials" not in format_tuning(whole).partition("Next:")[2]


@pytest.mark.parametrize(
    ("own", "more", "message"),
    [
        ({"trials": "none"}, {}, "trials is not a whole number from 1 on: none"),
        ({"trials": "0"}, {}, "trials is not a whole number from 1 on: 0"),
        ({"goal": "speed"}, {}, "Unknown goal: speed"),
        ({"goal": "cost"}, {}, "goal=cost needs a price. Give price_per_hour"),
        ({"goal": "goodput"}, {}, "goal=goodput counts requests within SLOs. Give slo_ttft_ms"),
        ({"min_quality": "kl=0.1"}, {}, "min_quality limits the quality, which is not measured"),
        ({"max_memory": "1"}, {}, "--max-memory is less than 1MB"),
        ({}, {"quant": "int4", "batch_size": "4"}, "There is one configuration, so nothing to search"),
        ({}, {"prompt_tokens": "8,16"}, "prompt_tokens has several values: 8,16. Give one, and tune for each"),
        ({}, {"batching": "none,static", "request_rate": "5"}, "batching=none measures single batches"),
        ({}, {"on": "ray"}, "measures one configuration after another here, and on is given"),
    ],
)
def test_what_cannot_be_found_is_said_before_anything_starts(
    own: dict[str, str], more: dict[str, str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    parameters = grid(more)
    with pytest.raises(UsageError, match=message) as caught:
        tune(**{**parameters, **own})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    options = [part for name, text in {**parameters, **own}.items() for part in (f"--{name.replace('_', '-')}", text)]
    if own.get("trials") != "none":
        assert main(["tune", *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_whole_command_with_the_fake_backend(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Speeds differ by a factor of 3 and more, so that a busy machine changes no order."""
    command = (
        "tune --backend fake --model fake:itl_ms=2,fake:itl_ms=8,fake:itl_ms=30 --batch-size 1,4,16 --prompt-tokens 4 "
        "--output-tokens 6 --repetitions 5 --warmup 1 --accept-suspect busy --json"
    )
    assert main(command.split()) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("Tunes model × batch_size: 9 configurations, for output throughput.\n")
    assert "Measures 3 of these 9, one chosen after another. To measure more or fewer: --trials N." in out
    found = json.loads(out.splitlines()[-1])
    assert found["tuning"]["tried"] == len(found["runs"]) == 3
    winner = found["recommendation"]["winner"]["parameters"]
    assert (winner["model"], winner["batch_size"]) == ("fake:itl_ms=2", 16)
    assert all(line.startswith("llmbench ") for line in found["next"])
    client = MlflowClient(store_uri)
    statuses = [run.info.status for run in client.search_runs([found["experiment_id"]])]
    assert statuses == ["FINISHED"] * 4
