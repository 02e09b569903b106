"""A stream of requests of varying length, batched in process: batches, wasted computation, the whole way to MLflow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, cast

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.analysis.online_metrics import padding_waste
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.backends.base import Backend
from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config.cells import config_hash
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure.stream import Order, Served, _server, measure_stream
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.errors import MeasurementError, UsageError
from mlflow_llmbench.records.results import (
    EngineReadings,
    Hashes,
    ModelFacts,
    Repetition,
    RequestRecord,
    RunResult,
)
from mlflow_llmbench.system.estimate import beyond_context
from mlflow_llmbench.workloads.batching import batch_positions, needed_positions, next_batch
from mlflow_llmbench.workloads.prompts import PromptSet, lengths_of, load_prompts, longest_of

from ..backends.huggingface.test_backend import loaded
from ..null_server import null_server

MS = 1_000_000
MIXED = Cell(
    model="fake:ttft_ms=20+itl_ms=5",
    backend="fake",
    workload="mixed",
    prompt_tokens=32,
    output_tokens=16,
    batch_size=3,
    batching="static",
    request_rate=100.0,
)


# Composition of batches


def grouped(
    arrivals: Sequence[float], durations: Sequence[float], rows: int, wait: float | None
) -> list[tuple[float, int]]:
    """Begin in ms and rows of each batch of a stream, when batch i takes `durations[i]` ms."""
    due, free, found = [int(at * MS) for at in arrivals], 0, []
    for duration in durations:
        begin, count = next_batch(due, free, rows, None if wait is None else int(wait * MS))
        found.append((begin / MS, count))
        due, free = due[count:], begin + int(duration * MS)
    assert not due
    return found


@pytest.mark.parametrize(
    ("rows", "wait", "durations", "batches"),
    [
        (
            3,
            None,
            (10, 10, 10),
            [(5, 3), (30, 3), (60, 1)],
        ),  # a static batch waits until it is full; the last one for the stream's end
        (3, None, (40, 40, 10), [(5, 3), (45, 3), (85, 1)]),  # or until the model is free
        (
            3,
            4,
            (10, 10, 10, 10, 10),
            [(4, 2), (14, 1), (29, 2), (39, 1), (64, 1)],
        ),  # a dynamic one for the wait after its first request at most
        (3, 10, (10, 10, 10), [(5, 3), (30, 3), (70, 1)]),  # full before the wait is over
        (
            3,
            0,
            (3, 3, 3, 10, 3, 3),
            [(0, 1), (3, 1), (6, 1), (25, 1), (35, 2), (60, 1)],
        ),  # no wait: requests already there
        (8, 1, (50, 10, 10), [(1, 1), (51, 5), (61, 1)]),  # requests that came while busy go together
    ],
)
def test_batches_of_a_scripted_stream(
    rows: int, wait: float | None, durations: Sequence[float], batches: list[tuple[float, int]]
) -> None:
    assert grouped((0, 2, 5, 25, 26, 30, 60), durations, rows, wait) == batches


def test_what_a_batch_computes_and_what_its_answers_need() -> None:
    lengths = [(5, 3), (2, 9), (4, 1)]
    assert batch_positions(lengths) == 3 * (5 + 9 - 1)
    assert needed_positions(lengths) == 7 + 10 + 4
    assert padding_waste([EngineReadings(39, 21)]) == pytest.approx(1 - 21 / 39)
    assert padding_waste([EngineReadings(39, 21), EngineReadings(None, 21)]) is None
    assert batch_positions([(5, 3)]) == needed_positions([(5, 3)])


# The workload of varying lengths


def test_lengths_are_log_normal_about_the_asked_medians_and_clipped() -> None:
    cell = dataclasses.replace(MIXED, prompt_tokens=1000, output_tokens=400)
    drawn = [lengths_of(cell, number) for number in range(4000)]
    for lengths, middle in zip(zip(*drawn, strict=True), (1000, 400), strict=True):
        assert median(lengths) == pytest.approx(middle, rel=0.05)
        assert fmean(middle / 2 <= length <= 2 * middle for length in lengths) == pytest.approx(0.683, abs=0.03)
        assert fmean(length == 4 * middle for length in lengths) == pytest.approx(0.0228, abs=0.008)
        assert min(lengths) >= middle / 8
    logs = [(math.log(p), math.log(o)) for p, o in drawn]
    (mean_p, mean_o) = (fmean(pair[i] for pair in logs) for i in (0, 1))
    assert abs(fmean((p - mean_p) * (o - mean_o) for p, o in logs)) < 0.03 * 0.48  # independent


def test_a_stream_has_the_same_lengths_in_each_repetition_and_other_tokens() -> None:
    prompts = load_prompts("mixed")
    first, second = (
        [prompts.request(MIXED, repetition, number, 1000, None) for number in range(9)] for repetition in (0, 1)
    )
    assert (
        [(len(ids), output) for ids, output in first]
        == [(len(ids), output) for ids, output in second]
        == [lengths_of(MIXED, n) for n in range(9)]
    )
    assert len({len(ids) for ids, _ in first}) > 4
    assert all(a != b for (a, _), (b, _) in zip(first, second, strict=True))
    assert first == [prompts.request(MIXED, 0, number, 1000, None) for number in range(9)]
    assert lengths_of(dataclasses.replace(MIXED, workload="synthetic"), 3) == (32, 16)


def test_the_lengths_are_in_the_identity_of_the_workload() -> None:
    digest = load_prompts("mixed").digest(MIXED, 1000)
    assert digest != PromptSet("synthetic").digest(dataclasses.replace(MIXED, workload="synthetic"), 1000)
    assert digest != load_prompts("mixed").digest(dataclasses.replace(MIXED, output_tokens=17), 1000)
    assert digest == load_prompts("mixed").digest(dataclasses.replace(MIXED, batching="continuous", batch_size=9), 1000)


def test_the_longest_request_has_to_fit_into_the_context() -> None:
    assert longest_of(MIXED) == (128, 64)
    facts = ModelFacts("m", "none", "m", "r", context=191)
    assert "whose longest request has 192" in str(beyond_context(MIXED, facts))
    assert beyond_context(MIXED, dataclasses.replace(facts, context=192)) is None
    assert beyond_context(dataclasses.replace(MIXED, workload="synthetic"), facts) is None


# Parameters

STREAM = {"backend": "fake", "model": "fake:itl_ms=1", "batching": "static", "request_rate": "5"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"workload": "mixed"},
            "one batch has one exact length. Add batching=static,dynamic,continuous and request_rate",
        ),
        (
            {"workload": "mixed", "batching": "static", "request_rate": "2", "prompt_tokens": "auto"},
            "prompt_tokens=auto has no meaning for workload=mixed",
        ),
        ({"batching": "static"}, "batching needs a stream of requests. Give request_rate"),
        ({"batching": "static,none", "request_rate": "2"}, "Leave none out of the list"),
        ({"request_rate": "2"}, "request_rate is for a stream of requests. Add batching="),
        ({"slo_ttft_ms": "200"}, "slo_ttft_ms is for a stream of requests."),
        ({"batching": "dynmic", "request_rate": "2"}, "Did you mean dynamic?"),
        ({"batching": "static", "request_rate": "2", "batch_wait_ms": "5"}, "Add batching=dynamic, or leave it out."),
        (
            {"batching": "static", "request_rate": "2", "concurrency": "5"},
            "concurrency has a meaning only if a server is measured.",
        ),
        (
            {"workload": "chat", "history": "kept", "prompt_tokens": "auto", "batching": "static", "request_rate": "2"},
            "and history is for conversations",
        ),
        (
            {"url": "http://h", "backend": "openai", "batching": "static", "request_rate": "2"},
            "the server batches as it was started",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(given)
    assert message in str(caught.value)


def test_a_stream_changes_no_other_cell_s_identity() -> None:
    facts = ModelFacts("m", "none", "h", "x")
    assert (
        config_hash(Cell(), facts) == config_hash(Cell(request_rate=7.0, batch_wait_ms=5), facts) == "04d64520e6395112"
    )
    assert config_hash(MIXED, facts) != config_hash(dataclasses.replace(MIXED, request_rate=7.0), facts)
    assert config_hash(MIXED, facts) != config_hash(dataclasses.replace(MIXED, batching="dynamic"), facts)
    assert parse(STREAM | {"batching": "static,continuous"}).scenario == "batching"
    assert parse({}).scenario == "offline"


# Measured with scripted delays


def backend_of(cell: Cell) -> FakeBackend:
    backend = FakeBackend(cell, FakeBackend.resolve(cell))
    backend.load()
    return backend


def serve(cell: Cell, stream: Sequence[Order], due_ms: Sequence[float]) -> Served:
    with _server(backend_of(cell), cell, 1000) as answer:
        return answer(stream, [int(at * MS) for at in due_ms])


def after(served: Served, index: int = 0) -> list[float]:
    """Arrival of one token of each request, in ms after the intended arrival of the first request."""
    first = served.requests[0].start_ns
    return [(request.stamps_ns[index] - first) / MS for request in served.requests]


FOUR: list[Order] = [([7] * 5, 4), ([8] * 2, 9), ([9] * 4, 1), ([5] * 3, 2)]


def test_a_static_batch_waits_until_it_is_full_and_runs_until_its_last_row_has_ended() -> None:
    served = serve(MIXED, FOUR, (0, 1, 60, 61))
    assert served.readings.batches == (3, 1)
    assert served.readings.positions == 3 * (5 + 9 - 1) + (3 + 2 - 1)
    assert served.readings.needed == needed_positions([(len(ids), output) for ids, output in FOUR])
    assert [r.output_tokens for r in served.requests] == [4, 9, 1, 2]
    begun = 60
    assert after(served)[:3] == [after(served)[0]] * 3
    assert after(served)[0] >= begun + 20
    assert after(served)[3] >= begun + 20 + 8 * 5 + 20  # the whole first batch, and its own first token
    assert [r.end_ns for r in served.requests] == [r.stamps_ns[-1] for r in served.requests]  # not the batch's end


def test_a_dynamic_batch_waits_no_longer_than_it_may() -> None:
    cell = dataclasses.replace(MIXED, batching="dynamic", batch_wait_ms=30)
    served = serve(cell, FOUR, (0, 1, 300, 301))
    assert served.readings.batches == (2, 2)
    assert after(served)[0] >= 30 + 20
    assert after(served)[2] >= 300 + 30 + 20


def test_a_request_joins_a_continuous_batch_while_another_one_runs() -> None:
    cell = dataclasses.replace(MIXED, batching="continuous")
    served = serve(cell, [([7] * 5, 60), ([8] * 2, 3)], (0, 50))
    assert after(served)[1] < after(served, -1)[0]
    assert after(served, -1)[1] < after(served, -1)[0]
    assert [r.output_tokens for r in served.requests] == [60, 3]
    assert served.readings.positions == served.readings.needed == 5 + 59 + 2 + 2
    assert len(served.readings.lags_ns) >= 60
    assert min(served.readings.lags_ns) >= 0


@pytest.mark.parametrize("batching", ["static", "dynamic", "continuous"])
def test_the_batching_changes_no_token(batching: str) -> None:
    cell = dataclasses.replace(MIXED, batching=batching, batch_wait_ms=1)
    assert serve(cell, FOUR, (0, 1, 2, 3)).outputs == tuple(
        [97 + (sum(ids) + i) % 26 for i in range(output)] for ids, output in FOUR
    )


def test_a_backend_that_cannot_batch_so_is_named() -> None:
    class Single(FakeBackend):
        capabilities = dataclasses.replace(FakeBackend.capabilities, padding=False, continuous=False)

    for batching in ("static", "continuous"):
        cell = dataclasses.replace(MIXED, batching=batching)
        with pytest.raises(MeasurementError, match=f"backend=fake has no {batching} batching"):
            measure_stream(
                Single(cell, FakeBackend.resolve(cell)), cell, load_prompts("mixed"), 1000, lambda *_, **__: None
            )


# Figures and verdict


def result(*requests: RequestRecord, positions: int | None = 100, cell: Cell = MIXED) -> RunResult:
    engine = EngineReadings(positions, 60, (2, 1), (2 * MS, 4 * MS))
    repetitions = tuple(Repetition(i, 1000 * i, requests, engine=engine) for i in range(5))
    return RunResult(
        cell,
        "ok",
        0,
        9000,
        Hashes("c", "w", "h", "s", "e"),
        ModelFacts("m", "none", "m", "x"),
        {},
        steady=True,
        warmup_s=(1, 1, 1),
        repetitions=repetitions,
    )


def request(intended: float, *stamps: float, asked: int) -> RequestRecord:
    at = int(intended * MS)
    times = tuple(int(stamp * MS) for stamp in stamps)
    return RequestRecord(at, times, prompt_tokens=10, intended_ns=at, end_ns=times[-1], asked=(10, asked))


THREE = (request(0, 30, 40, 50, asked=3), request(20, 30, 40, asked=2), request(45, 70, 80, 90, asked=3))


def test_figures_of_a_stream_by_hand() -> None:
    metrics = summarize(result(*THREE))
    assert metrics["efficiency/padding_waste_ratio"] == pytest.approx(0.4)
    assert metrics["throughput/output_tokens_per_s"] == pytest.approx(8 / 0.09)
    assert metrics["throughput/requests_per_s"] == pytest.approx(3 / 0.09)
    assert metrics["latency/ttft_ms_mean"] == pytest.approx((30 + 10 + 25) / 3)
    assert metrics["latency/e2e_ms_mean"] == pytest.approx((50 + 20 + 45) / 3)
    assert metrics["latency/tpot_ms_mean"] == pytest.approx(10)
    assert metrics["client/stamp_lag_ms_mean"] == pytest.approx(3)
    assert (
        metrics["settings/batch_size"],
        metrics["settings/request_rate"],
        metrics["lengths/output_tokens_mean"],
    ) == (
        3,
        100,
        pytest.approx(8 / 3),
    )
    assert not {
        "settings/concurrency",
        "efficiency/mbu_ratio",
        "efficiency/mfu_ratio",
        "throughput/prefill_tokens_per_s",
    } & set(metrics)
    assert "efficiency/padding_waste_ratio" not in summarize(result(*THREE, positions=None))


def test_a_result_survives_its_json() -> None:
    one = result(*THREE)
    assert from_json(RunResult, to_json(one)) == one


def test_an_answer_of_another_length_than_asked_is_invalid() -> None:
    def codes(one: RunResult) -> set[str]:
        return {reason.code for reason in judge(one, summarize(one)).reasons}

    assert "wrong_token_count" not in codes(result(*THREE))
    assert "wrong_token_count" in codes(result(*THREE[:2], request(45, 70, 80, asked=3)))


# The whole way


@pytest.mark.charts
def test_a_sweep_over_ways_of_batching_is_runs_in_mlflow(store_uri: str, tmp_path: Path) -> None:
    arguments = "run --backend fake --model fake:ttft_ms=6+itl_ms=2 --workload mixed".split()
    arguments += "--prompt-tokens 16 --output-tokens 8".split()
    arguments += (
        "--batching static,dynamic,continuous --batch-wait-ms 2 --batch-size 4 --request-rate 100 --requests 12".split()
    )
    assert (
        main(
            [
                *arguments,
                *"--repetitions 5 --warmup 1 --tracking-uri".split(),
                store_uri,
                "--output-dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    client = MlflowClient(store_uri)
    runs = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    cells = {run.data.params["batching"]: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert set(cells) == {"static", "dynamic", "continuous"}
    assert len({run.data.tags["llmbench.workload_hash"] for run in cells.values()}) == 1
    for run in cells.values():
        assert run.data.tags["llmbench.scenario"] == "batching"
        assert run.data.tags["llmbench.outcome"] == "ok"
        assert (run.data.params["request_rate"], run.data.params["batch_wait_ms"]) == ("100", "2")
        assert "wrong_token_count" not in run.data.tags["llmbench.verdict_reasons"]
        assert "log-normal" in run.data.tags["mlflow.note.content"]
    waste = {name: run.data.metrics["efficiency/padding_waste_ratio"] for name, run in cells.items()}
    assert waste["continuous"] == 0
    assert waste["static"] > 0.2
    assert list(tmp_path.rglob("comparison/charts/padding.svg"))


def test_an_ordinary_run_has_no_parameter_of_a_stream(store_uri: str) -> None:
    assert main("run --backend fake --model fake:itl_ms=1 --output-tokens 4 --repetitions 5 --warmup 1".split()) == 0
    client = MlflowClient(store_uri)
    [run] = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    assert not {"batching", "batch_wait_ms", "request_rate", "arrival", "requests", "slo_ttft_ms"} & set(
        run.data.params
    )


def test_a_server_gets_requests_of_those_lengths(store_uri: str) -> None:
    from mlflow_llmbench.sweeps.sweep import run

    settings: dict[str, Any] = {
        "workload": "mixed",
        "prompt_tokens": 24,
        "output_tokens": 8,
        "requests": 12,
        "repetitions": 5,
        "warmup": 1,
    }
    with null_server("null:ttft_ms=1+itl_ms=0") as url:
        done = run(tracking_uri=store_uri, backend="openai", url=url, model="null:ttft_ms=1+itl_ms=0", **settings)
    [row] = done.rows
    wanted = [lengths_of(row.cell, number) for number in range(12)]
    assert row.metrics["lengths/output_tokens_mean"] == pytest.approx(fmean(output for _, output in wanted))
    assert row.metrics["lengths/prompt_tokens_mean"] == pytest.approx(fmean(prompt for prompt, _ in wanted), abs=1)
    assert row.verdict is not None
    assert "length_drift" not in {reason.code for reason in row.verdict.reasons}


# A real model


def tiny(kind: str, folder: Path) -> Path:
    """Two-layer models of other architectures: OPT has learned positions, Gemma 3 a sliding window in one of its
    layers."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, OPTConfig

    torch.manual_seed(1)
    size: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    gemma = {
        "intermediate_size": 128,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = (
        OPTConfig(ffn_dim=128, word_embed_proj_dim=64, **size) if kind == "opt" else Gemma3TextConfig(**size, **gemma)
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("batching", "kind", "attention"),
    [
        ("static", "llama", "sdpa"), ("dynamic", "llama", "sdpa"), ("continuous", "llama", "sdpa"),
        ("continuous", "llama", "eager"),
        ("static", "opt", "sdpa"), ("continuous", "opt", "sdpa"), ("static", "gemma", "sdpa"),
        ("continuous", "gemma", "sdpa"),
    ],
)  # fmt: skip
def test_every_way_of_batching_brings_the_tokens_of_plain_greedy_decoding(
    tiny_model: Path, tmp_path: Path, batching: str, kind: str, attention: str
) -> None:
    """Compare with each prompt alone; the reported token positions are those that went through the model."""
    folder = tiny_model if kind == "llama" else tiny(kind, tmp_path / kind)
    stream: list[Order] = [([5 + i, *range(20, 20 + 7 * i)], output) for i, output in enumerate((6, 1, 11, 3, 8))]
    settings: dict[str, Any] = {
        "batching": batching,
        "batch_size": 2,
        "batch_wait_ms": 1,
        "request_rate": 100.0,
        "workload": "mixed",
    }
    cell = Cell(model=str(folder), quant="fp32", attention=attention, **settings)
    with loaded(cell) as (backend, _):
        alone: list[list[int]] = []
        for ids, output in stream:
            steps: list[Any] = []
            backend.generate([ids], output, steps.append)
            alone.append([int(step[0]) for step in steps])
        with _server(cast(Backend, backend), cell, 60) as answer:
            seen: list[int] = []
            hook = backend.model.register_forward_pre_hook(
                lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
            )
            for _ in range(2):  # an engine serves several streams
                seen.clear()
                served = answer(stream, [0, 0, 0, 2 * MS, 3 * MS])
                assert list(served.outputs) == alone
                assert served.readings.positions == sum(seen)
            hook.remove()
        assert [r.output_tokens for r in served.requests] == [6, 1, 11, 3, 8]
        assert (served.readings.positions == served.readings.needed) == (batching == "continuous")
        assert backend.model.config._attn_implementation == attention  # as before


def test_an_attention_that_cannot_be_batched_continuously_is_one_clear_error(tiny_model: Path) -> None:
    cell = Cell(
        model=str(tiny_model), attention="flex_attention", batching="continuous", batch_size=2, request_rate=1.0
    )
    with (
        loaded(cell) as (backend, _),
        pytest.raises(MeasurementError) as caught,
        _server(cast(Backend, backend), cell, 60),
    ):
        pass
    assert str(caught.value).startswith("transformers cannot batch this model continuously.")
    assert "flex_attention is not supported" in str(caught.value)
    assert str(caught.value).endswith("Use batching=static,dynamic, or another attention.")
