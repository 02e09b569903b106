"""A tiny Llama in one and in two ranks into MLflow, and what is left of ranks when one of them, or all, is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench import load_results, run
from mlflow_llmbench.system import memory
from tests.end_to_end.test_survival import alive, runs, start, states, until, without_model

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]

CELL: dict[str, Any] = {"quant": "bf16", "prompt_tokens": 16, "output_tokens": 8, "repetitions": 5, "warmup": 1}


def test_one_and_two_ranks_into_mlflow(store_uri: str, tiny_model: Path) -> None:
    result = run(model=str(tiny_model), tensor_parallel="1,2", batch_size="1,4", threads=2, quality="auto", **CELL)
    assert [row.outcome for row in result.rows] == ["ok"] * 4, [row.message for row in result.rows]
    found = {without_model(one): one.data for one in runs(store_uri).values()}
    assert {*found} == {"b1 tp1", "b4 tp1", "b1 tp2", "b4 tp2", "batch_size × tensor_parallel"}
    for rows in (1, 4):
        one, two = found[f"b{rows} tp1"], found[f"b{rows} tp2"]
        assert (one.params["tensor_parallel"], two.params["tensor_parallel"]) == ("1", "2")
        assert two.metrics["settings/tensor_parallel"] == 2 and two.params["model.ranks"] == "2"
        half = one.metrics["memory/weight_gb"] / 2
        assert two.metrics["memory/rank_weight_gb"] == pytest.approx(half, rel=0.02)
        assert two.metrics["memory/weight_gb"] == pytest.approx(2 * half, rel=0.02)
        # Two interpreters with torch: nearly all of the memory of such a small model.
        assert two.metrics["memory/host_needed_gb_loaded"] > 1.5 * one.metrics["memory/host_needed_gb_loaded"]
        assert two.metrics["memory/rank_host_needed_gb_peak"] < 0.7 * two.metrics["memory/host_needed_gb_peak"]
        assert "memory/rank_weight_gb" not in one.metrics and "parallel/communication_ratio" not in one.metrics
        assert 0 < two.metrics["parallel/communication_ratio"] < 1
        if "invalid" not in (one.tags["llmbench.verdict"], two.tags["llmbench.verdict"]):
            assert two.metrics["parallel/efficiency_ratio"] > 0
        assert two.metrics["quality/kl_vs_reference"] == pytest.approx(one.metrics["quality/kl_vs_reference"], abs=1e-3)
    [two_ranks] = [
        one for one in load_results(result.folder) if one.cell.tensor_parallel == 2 and one.cell.batch_size == 4
    ]
    assert all(request.rows == 4 for repetition in two_ranks.repetitions for request in repetition.requests)
    assert two_ranks.logits and two_ranks.logits.checked and not two_ranks.logits.nonfinite


@contextmanager
def measuring(tmp_path: Path, uri: str, model: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A command that measures in two ranks without end, its worker and its other rank."""
    given = ["--backend", "transformers", "--model", str(model), "--tensor-parallel", "2", "--repetitions", "100000"]
    process = start(tmp_path, uri, *given, "--quant", "fp32", start_new_session=True)
    try:
        until(
            lambda: any(
                '"event":"repetition"' in f.read_text() for f in tmp_path.glob("llmbench-results/*/*/worker.jsonl")
            )
        )
        [events] = tmp_path.glob("llmbench-results/*/*/worker.jsonl")
        told = re.search(r'"event":"ranks","t_ns":\d+,"pids":\[(\d+)\]', events.read_text().replace(" ", ""))
        assert told
        rank = int(told[1])
        worker = int((Path("/proc") / told[1] / "stat").read_text().rpartition(")")[2].split()[1])
        assert worker in memory.descendants(process.pid)
        yield process, worker, rank
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_rank_that_is_killed_ends_the_cell_as_crashed(store_uri: str, tmp_path: Path, tiny_model: Path) -> None:
    with measuring(tmp_path, store_uri, tiny_model) as (process, worker, rank):
        os.kill(rank, signal.SIGKILL)
        output, errors = process.communicate(timeout=200)
    assert "Rank 1 of 2 ended with signal SIGKILL" in output + errors
    assert {*states(store_uri).values()} == {("FAILED", "crashed")}
    assert not alive(worker) and not alive(rank)


@pytest.mark.parametrize(("how", "whom"), [("SIGKILL", "worker"), ("SIGINT", "group"), ("SIGKILL", "command")])
def test_no_rank_outlives_its_worker(
    store_uri: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, how: str, whom: str
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    with measuring(tmp_path, store_uri, tiny_model) as (process, worker, rank):
        if whom == "group":
            os.killpg(process.pid, getattr(signal, how))
        else:
            os.kill(worker if whom == "worker" else process.pid, getattr(signal, how))
        process.communicate(timeout=200)
        until(lambda: not alive(rank) and not alive(worker), 30)
    if whom != "command":
        assert {*states(store_uri).values()} == {("FAILED", "oom") if whom == "worker" else ("KILLED", "interrupted")}
    assert not [*scratch.glob("llmbench-ranks-*")]
