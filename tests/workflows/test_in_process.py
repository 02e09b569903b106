"""A generate function of the user's own: records, verdicts and runs as of any other measurement, and clear refusals."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.cli.main import main
from mlflow_llmbench.records.errors import TrackingError, UsageError
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.sweeps.upload import upload
from mlflow_llmbench.tracking.load_results import load_results
from mlflow_llmbench.workflows.in_process import measure

ROOT = Path(__file__).resolve().parents[2]
CELL: dict[str, Any] = {"prompt_tokens": 4, "output_tokens": 6, "repetitions": 5, "warmup": 1}
Emit = Callable[[list[int]], None]


def paced(prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
    """Emit the first token after 20 ms, then one every 4 ms."""
    started = time.perf_counter()
    for step in range(output_tokens):
        while time.perf_counter() < started + 0.020 + 0.004 * step:
            time.sleep(0.0005)
        emit([7] * len(prompts))


def measured(generate: Callable[..., object] = paced, **parameters: Any) -> SweepResult:
    with measure("mine", **CELL | parameters) as bench:
        return bench.run(generate)


def results(done: SweepResult) -> list[RunResult]:
    return load_results(str(done.folder))


def test_a_function_is_measured_stamped_and_logged(store_uri: str) -> None:
    seen: list[tuple[int, int, int]] = []

    def generate(prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        seen.append((len(prompts), len(prompts[0]), output_tokens))
        assert all(0 <= token < 50 for prompt in prompts for token in prompt)
        paced(prompts, output_tokens, emit)

    done = measured(generate, batch_size=2, vocab_size=50)
    assert (done.outcome, set(seen), len(seen)) == ("ok", {(2, 4, 6)}, 6)  # one warm-up, five repetitions
    [result] = results(done)
    [row] = done.rows
    assert row.metrics["latency/ttft_ms_p50"] >= 20 and row.metrics["latency/itl_ms_p50"] >= 3
    assert row.metrics["latency/ttft_ms_p50"] > 3 * row.metrics["latency/itl_ms_p50"]
    assert [len(r.requests[0].stamps_ns) for r in result.repetitions] == [6] * 5
    assert not [
        key for key in row.metrics if key.startswith(("memory", "load/load_s", "efficiency"))
    ]  # what was not seen is absent
    client = MlflowClient(store_uri)
    found = client.get_run(done.run_ids[0])
    assert (found.info.status, found.data.params["backend"], found.data.params["model"]) == (
        "FINISHED",
        "callback",
        "mine",
    )
    assert {item.path for item in client.list_artifacts(done.run_ids[0])} >= {
        "result.json",
        "samples.csv.gz",
        "report.md",
    }


def test_lists_make_a_sweep_and_nothing_is_taken_from_an_earlier_one(store_uri: str) -> None:
    done = measured(batch_size=[1, 3])
    assert [row.cell.batch_size for row in done.rows] == [1, 3] and done.parent_id
    calls: list[int] = []

    def counted(prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        calls.append(len(prompts))
        paced(prompts, output_tokens, emit)

    again = measured(counted, batch_size=[1, 3])
    assert json.loads((again.folder / "sweep.json").read_text())["parameters"]["rerun"] == "true"
    assert sorted(calls) == [1] * 6 + [3] * 6


def test_too_few_tokens_are_invalid(store_uri: str) -> None:
    done = measured(lambda prompts, output_tokens, emit: paced(prompts, output_tokens - 1, emit))
    assert done.rows[0].verdict and "wrong_token_count" in [reason.code for reason in done.rows[0].verdict.reasons]


def test_a_function_that_fails_fails_its_cell_only(store_uri: str) -> None:
    def fragile(prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        if len(prompts) == 2:
            raise ZeroDivisionError("in my engine")
        paced(prompts, output_tokens, emit)

    done = measured(fragile, batch_size=[1, 2, 3])
    assert [row.outcome for row in done.rows] == ["ok", "error", "ok"]
    assert done.rows[1].message == "The function that generates raised ZeroDivisionError: in my engine."
    [log] = done.folder.glob("*/worker.log")
    assert "in fragile" in log.read_text()
    assert (
        measured(lambda prompts, output_tokens, emit: None)
        .rows[0]
        .message.startswith("The backend generated no token.")
    )


def test_tokens_that_are_handed_over_at_the_end_are_no_stream(store_uri: str) -> None:
    def at_once(prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        paced(prompts, 1, lambda ids: None)
        for _ in range(output_tokens):
            emit([7] * len(prompts))

    [row] = measured(at_once).rows
    assert row.verdict and row.verdict.word != "valid"
    [reason] = [reason for reason in row.verdict.reasons if reason.code == "chunked_stream"]
    assert reason.sentence.startswith("The tokens of a request came together, ") and reason.sentence.endswith(
        "Emit each token as it is made."
    )
    assert "chunked_stream" not in [
        reason.code for row in measured().rows if row.verdict for reason in row.verdict.reasons
    ]


@pytest.mark.parametrize("step", ["ab", None, ["x"], [[1], None]])
def test_a_step_that_is_no_list_of_ids_fails_its_cell(step: Any, store_uri: str) -> None:
    [row] = measured(
        lambda prompts, output_tokens, emit: emit(step), batch_size=2 if step in ("ab", [[1], None]) else 1
    ).rows
    assert row.outcome == "error"
    assert row.message == f"Step 1 is not a list of ids: {step!r}. Emit one integer for each row."


def test_texts_are_encoded_by_the_users_own_tokenizer(store_uri: str) -> None:
    prompts_seen: list[Sequence[int]] = []

    def generate(prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        prompts_seen.extend(prompts)
        paced(prompts, output_tokens, emit)

    measured(generate, workload="qa", prompt_tokens=40, encode=lambda text: [ord(letter) for letter in text])
    assert {len(prompt) for prompt in prompts_seen} == {40}
    assert len({tuple(prompt) for prompt in prompts_seen}) > 1


def test_prompts_of_another_vocabulary_are_another_workload(store_uri: str) -> None:
    hashes = [results(measured(vocab_size=size))[0].hashes.workload for size in (50, 60)]
    assert hashes[0] != hashes[1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"batching": "static"}, "batching has no meaning for a function of your own. Known: model, "),
        ({"workload": "qa"}, "workload=qa has texts, but the function takes ids. Give encode="),
        ({"batch_size": 0}, "batch_size is too small: 0."),
        ({"model": "a,b"}, "has a comma"),
    ],
)
def test_wrong_parameters_are_told_before_a_model_is_loaded(
    parameters: dict[str, Any], message: str, store_uri: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message), measure(**{"model": "mine"} | parameters):
        pytest.fail("the body was entered")
    assert not (tmp_path / "llmbench-results").exists()


def test_a_store_that_is_wrong_and_a_body_that_measures_nothing(store_uri: str) -> None:
    with pytest.raises(TrackingError), measure("mine", tracking_uri="http://127.0.0.1:9"):
        pytest.fail("the body was entered")
    with pytest.raises(UsageError, match="Nothing was measured"), measure("mine", tracking_uri=store_uri):
        pass
    with measure("mine", **CELL) as bench:
        bench.run(paced)
        with pytest.raises(UsageError, match="already done"):
            bench.run(paced)


def test_its_folder_is_uploaded_and_its_run_not_reproduced(
    store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = measured()
    assert upload(str(done.folder), store_uri).there == 1
    assert main(["reproduce", done.run_ids[0]]) == 2
    assert (
        "mine was measured with backend=callback, a function in a program of yours. Run that program again"
        in capsys.readouterr().err
    )


def test_the_example_runs_and_has_five_lines(store_uri: str, tmp_path: Path) -> None:
    file = ROOT / "examples" / "own_generate.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": store_uri}
    done = subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()[1:3]] == ["1", "4"]
    body = next(node for node in ast.parse(file.read_text()).body if isinstance(node, ast.If))
    assert sum(len(node.body) + 1 if isinstance(node, ast.With) else 1 for node in body.body) <= 4  # and the import
