"""Decode paths: compiled, speculative and with a quantized cache, on the scripted backend and on a tiny real model."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench import run
from mlflow_llmbench.analysis.summary import series, statistics, summarize
from mlflow_llmbench.analysis.verdict import judge, unsupported_percentiles
from mlflow_llmbench.config import models
from mlflow_llmbench.config.cells import config_hash, expand_cells, group_cells
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import ModelFacts, RunResult
from mlflow_llmbench.system import estimate

FAST = {"prompt_tokens": 8, "output_tokens": 10, "repetitions": 5, "warmup": 1}
MODEL = ModelFacts("m", "folder", "m", "r", {}, "float16", 2048)


def fake(script: str, **parameters: Any) -> tuple[RunResult, Path]:
    done = run(backend="fake", model=f"fake:{script}", **{**FAST, **parameters})
    assert done.outcome == "ok", done.table()
    folder = next(done.folder.glob("*/artifacts"))
    return read_result(folder), folder


def test_a_step_of_several_tokens_is_no_inter_token_latency(store_uri: str) -> None:
    """Ten tokens in steps of 4, 4 and 2: two gaps of 20 ms for the six tokens after the first step's."""
    result, folder = fake("step_tokens=4+itl_ms=20", decode="prompt_lookup")
    metrics = summarize(result)
    assert metrics["lengths/tokens_per_step_mean"] == pytest.approx(10 / 3)
    assert metrics["latency/tpot_ms_mean"] == pytest.approx(2 * 20 / 6, rel=0.3)
    assert metrics["latency/icl_ms_p50"] == pytest.approx(20, rel=0.3)
    assert [key for key in metrics if "itl_ms" in key] == []
    assert [point.key for point in series(result) if "itl_ms" in point.key] == []
    assert [s.key for s in statistics(result) if "itl_ms" in s.key] == []
    assert [text for text in unsupported_percentiles(result) if text.startswith("ITL")] == []
    assert "wrong_token_count" not in [reason.code for reason in judge(result, metrics).reasons]
    assert metrics["trust/same_tokens_ratio"] == 1
    with gzip.open(folder / "samples.csv.gz", "rt") as file:
        rows = [row for row in csv.DictReader(io.StringIO(file.read())) if row["repetition"] == "0"]
    assert [int(row["token"]) for row in rows] == list(range(11))
    assert [len({row["t_ns"] for row in rows[a:b]}) for a, b in ((1, 5), (5, 9), (9, 11))] == [1, 1, 1]
    assert (
        "10 tokens under decode=prompt_lookup as under decode=generate and kv_cache=auto: 1 of 1."
        in (folder / "report.md").read_text()
    )


def test_steps_of_one_token_are_tokens(store_uri: str) -> None:
    metrics = summarize(fake("step_tokens=1+itl_ms=10", decode="assisted", assistant="fake:")[0])
    assert metrics["lengths/tokens_per_step_mean"] == 1
    assert metrics["latency/itl_ms_p50"] == pytest.approx(10, rel=0.3)
    assert "latency/icl_ms_p50" not in metrics


def test_one_lucky_repetition_among_others_has_no_inter_token_latency_either(store_uri: str) -> None:
    """A repetition in which every proposal was wrong has gaps of single tokens, which are the slow ones."""
    result, _ = fake("step_tokens=2", decode="prompt_lookup")
    single, _ = fake("step_tokens=1+itl_ms=5", decode="prompt_lookup")
    mixed = dataclasses.replace(result, repetitions=(*result.repetitions[1:], single.repetitions[0]))
    assert [key for key in summarize(mixed) if "itl_ms" in key] == []
    assert [point.key for point in series(mixed) if "itl_ms" in point.key] == []


def test_compiling_is_part_of_the_load_and_of_no_latency(store_uri: str) -> None:
    result, _ = fake("compile_ms=400+ttft_ms=2", decode="compiled", batch_size=2)
    metrics = summarize(result)
    assert metrics["load/compile_s"] >= 0.4
    assert metrics["load/first_call_ms"] < 400
    assert metrics["load/load_s"] < 0.4
    assert metrics["latency/ttft_ms_mean"] < 100
    assert "load/compile_s" not in summarize(fake("ttft_ms=2")[0])


def test_other_tokens_than_those_of_plain_decoding_are_told(store_uri: str) -> None:
    result, folder = fake("differs_at=7", decode="compiled", batch_size=2)
    assert result.same_tokens == (6, 6)
    assert summarize(result)["trust/same_tokens_ratio"] == pytest.approx(0.6)
    text = (folder / "report.md").read_text()
    assert "as under decode=generate and kv_cache=auto: 0 of 2. The first difference is at token 7." in text
    assert "trust/same_tokens_ratio" not in summarize(fake("differs_at=7")[0])


def test_settings_without_a_meaning_make_no_cells_of_their_own() -> None:
    spec = parse({"quant": "int8,int4,bf16", "int8_threshold": "0,6", "double_quant": "true,false"})
    found = [(cell.quant, cell.int8_threshold, cell.double_quant) for cell in expand_cells(spec)]
    assert found == [("int8", 0, False), ("int8", 6, False), ("int4", 6, True), ("int4", 6, False), ("bf16", 6, False)]
    spec = parse({"decode": "generate,prompt_lookup", "draft_tokens": "3,5"})
    assert [(cell.decode, cell.draft_tokens) for cell in expand_cells(spec)] == [
        ("generate", 10),
        ("prompt_lookup", 3),
        ("prompt_lookup", 5),
    ]


def test_decode_path_and_cache_decide_the_load_and_the_configuration() -> None:
    cells = [
        Cell(),
        Cell(decode="compiled"),
        Cell(decode="prompt_lookup"),
        Cell(decode="prompt_lookup", draft_tokens=3),
        Cell(kv_cache="fp8"),
        Cell(quant="int8", int8_threshold=0),
        Cell(quant="int8"),
        Cell(quant="int4", double_quant=True),
        Cell(quant="int4"),
    ]
    assert len(group_cells(cells)) == len({config_hash(cell, MODEL) for cell in cells}) == len(cells)
    assisted = Cell(decode="assisted", assistant="small")
    first, second = (
        dataclasses.replace(MODEL, assistant=dataclasses.replace(MODEL, name="small", revision=revision))
        for revision in "ab"
    )
    assert config_hash(assisted, first) != config_hash(assisted, second)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"decode": "assisted"}, r"decode=assisted needs a small model that proposes tokens\. Give assistant=MODEL"),
        ({"assistant": "opt-125m"},
         r"assistant is a setting of decode=assisted\. Add decode=assisted, or leave it out\."),
        ({"draft_tokens": "4"}, r"draft_tokens is a setting of decode=prompt_lookup,assisted"),
        ({"int8_threshold": "0", "quant": "int4"}, r"int8_threshold is a setting of quant=int8"),
        ({"double_quant": "true", "quant": "int8"}, r"double_quant is a setting of quant=int4,fp4"),
        ({"decode": "compile"}, r"Unknown decode: compile\. Did you mean compiled\?"),
        ({"kv_cache": "int3"}, r"Unknown kv_cache: int3\."),
        ({"decode": "compiled", "history": "recomputed", "workload": "chat", "prompt_tokens": "auto"},
         r"history=recomputed cannot be measured with decode=compiled"),
        ({"kv_cache": "fp8", "history": "kept", "workload": "chat", "prompt_tokens": "auto"},
         r"history=kept cannot be measured with kv_cache=fp8"),
        ({"decode": "prompt_lookup", "batching": "static", "request_rate": "5"},
         r"decode=prompt_lookup works for single batches only"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_before_anything_starts(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(parameters)


def test_cells_that_contradict_themselves_are_refused_one_by_one(store_uri: str) -> None:
    done = run(backend="fake", model="fake:", decode="generate,prompt_lookup", batch_size="1,2", **FAST)
    assert [row.outcome for row in done.rows] == ["ok", "ok", "ok", "refused"]
    assert (
        "decode=prompt_lookup proposes tokens for one row, and batch_size is 2. Use batch_size=1"
        in done.rows[3].message
    )
    with pytest.raises(UsageError, match="proposes tokens for one row"):
        run(backend="fake", model="fake:", decode="prompt_lookup", batch_size=2, **FAST)
    with pytest.raises(UsageError, match=r"backend=fake has no kv_cache=int4\. Use kv_cache=auto\."):
        run(backend="fake", model="fake:", kv_cache="int4", **FAST)
    refusal = estimate.contradiction(Cell(kv_cache="int4", decode="compiled"))
    assert refusal and refusal.kind == "settings" and "is not quantized" in refusal.sentence


def test_the_estimate_knows_the_decode_path() -> None:
    preset = models.find_preset("opt-1.3b")
    assert preset
    facts = dataclasses.replace(MODEL, config=dict(preset.config))
    cell = Cell(quant="fp16", batch_size=16, prompt_tokens=1024, output_tokens=512)

    def bytes_of(**changes: Any) -> int:
        return estimate.predicted_bytes(dataclasses.replace(cell, **changes), facts, preset.shape) or 0

    cache = 16 * preset.shape.kv_bytes(1536, 2)
    assert bytes_of() - bytes_of(kv_cache="fp8") == cache // 2
    assert bytes_of() - bytes_of(kv_cache="int4") == pytest.approx(cache * (1 - 0.5625 / 2), rel=1e-6)
    assert bytes_of(decode="compiled") > bytes_of()
    small = models.find_preset("opt-125m")
    assert small
    alone = bytes_of(batch_size=1)
    facts = dataclasses.replace(facts, assistant=dataclasses.replace(MODEL, config=dict(small.config), dtype="float16"))
    assert bytes_of(decode="assisted", batch_size=1) - alone > small.parameters * 2
    rates = {"read_bytes_per_s": 1e10, "flops_per_s": 1e12}
    one = dataclasses.replace(cell, batch_size=1, output_tokens=111, repetitions=5)
    plain, drafted = (
        estimate.least_seconds(c, facts, preset.shape, rates) or 0
        for c in (one, dataclasses.replace(one, decode="prompt_lookup", draft_tokens=10))
    )
    assert drafted < 0.25 * plain
