"""Logits that are NaN or infinite make a run invalid, wherever they appear."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mlflow_llmbench import run
from mlflow_llmbench.analysis.logits_validity import logits
from mlflow_llmbench.backends.base import backend_class
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.measure.batch import measure_cell, zeros_at_end
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.measure.logits import check_logits
from mlflow_llmbench.measure.stream import measure_stream
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.results import CellMeasurements, Quality, RunResult
from mlflow_llmbench.records.results import LogitsCheck as Check
from mlflow_llmbench.workloads.prompts import load_prompts
from tests.loading import loaded
from tests.results import made

FAST: dict[str, Any] = {"prompt_tokens": 8, "output_tokens": 4, "repetitions": 5, "warmup": 1}
SHAPE: dict[str, Any] = {"prompt_tokens": 8, "output_tokens": 4, "repetitions": 2, "warmup": 1, "device": "cpu"}


def overflowing(folder: Path, positions: slice = slice(0, None)) -> Path:
    """Write a small GPT-2 whose hidden values at some positions are 80,000, and float16 ends at 65,504.

    All of its weights are within: words and positions add up.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False))
    with torch.no_grad():
        model.transformer.wte.weight[:, :32] = 40_000
        model.transformer.wpe.weight[positions, :32] = 40_000
    model.save_pretrained(folder)
    return folder


def seen(cell: Cell) -> Check | None:
    """Measure a cell in this process, and look at its logits as a worker does."""
    prompts = load_prompts(cell.workload)
    with loaded(cell) as (backend, info):
        measured = (measure_stream if cell.batching else measure_cell)(
            backend, cell, prompts, info.vocab_size or 32000, lambda _: None
        )
        return check_logits(backend, cell, prompts, info.vocab_size or 32000, measured)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_overflows_in_16_bits_is_seen_there_only(tmp_path: Path) -> None:
    folder = str(overflowing(tmp_path / "hot"))
    assert seen(Cell(model=folder, quant="fp16", batch_size=2, **SHAPE)) == Check(8, 8, 1)
    for quant in ("fp32", "bf16"):
        assert seen(Cell(model=folder, quant=quant, batch_size=2, **SHAPE)) == Check(8, 0)


@pytest.mark.filterwarnings("ignore")
def test_an_overflow_that_only_long_contexts_reach_is_seen_at_their_shape(tmp_path: Path) -> None:
    """The positions from 10 on overflow: after 8 prompt tokens, the fourth output token is chosen at position 10."""
    folder = str(overflowing(tmp_path / "long", slice(10, None)))
    found = seen(Cell(model=folder, quant="fp16", **SHAPE))
    assert found and (found.checked, found.nonfinite, found.first_token) == (4, 1, 4)
    assert seen(Cell(model=folder, quant="fp16", **{**SHAPE, "output_tokens": 3})) == Check(3, 0)


@pytest.mark.filterwarnings("ignore")
def test_other_decode_paths_are_seen_too(tiny_model: Path, tmp_path: Path) -> None:
    hot = str(overflowing(tmp_path / "hot"))
    for cell in (
        Cell(model=str(tiny_model), decode="prompt_lookup", **SHAPE),
        Cell(model=str(tiny_model), kv_cache="fp8", **SHAPE),
    ):
        found = seen(cell)
        assert found and found.checked >= 4 and not found.nonfinite
    found = seen(Cell(model=hot, quant="fp16", decode="prompt_lookup", **SHAPE))
    assert found and found.nonfinite >= 4 and found.first_token == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batching", ["static", "continuous"])
def test_streams_are_seen_too(tiny_model: Path, tmp_path: Path, batching: str) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    spec = {"batching": batching, "request_rate": "50", "requests": "3", "batch_size": "2", "quant": "fp32"}
    shape = {"model": str(tiny_model), "prompt_tokens": "8", "output_tokens": "4", "repetitions": "2", "warmup": "1"}
    cell = next(iter(_cells({**spec, **shape})))
    found = seen(cell)
    assert found and found.checked >= 12 and not found.nonfinite
    shutil.copytree(tiny_model, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    found = seen(replace(cell, model=str(tmp_path / "nan")))
    assert found and found.nonfinite == found.checked > 0
    assert found.weights == ("model.layers.1.mlp.up_proj.weight",)


def _cells(text: dict[str, str]) -> list[Cell]:
    from mlflow_llmbench.config.cells import expand_cells

    return expand_cells(parse(text))


def test_the_repetition_that_looks_like_nan_is_the_one_that_is_done_again() -> None:
    assert zeros_at_end([[0, 5, 0], [1, 0, 0], [2, 3, 4]]) == 2
    assert zeros_at_end([]) == 0
    cell = Cell(backend="fake", model="fake:ttft_ms=0+itl_ms=0", **SHAPE)
    prompts = load_prompts(cell.workload)
    backend = backend_class("fake")(cell, backend_class("fake").resolve(cell))
    backend.load()
    measured = measure_cell(backend, cell, prompts, 32000, lambda _: None)
    assert measured.zeros == (0, 0)
    found = check_logits(backend, cell, prompts, 32000, replace(measured, zeros=(1, 4, 4)))
    assert found == Check(4, 0, None, 1)


def test_a_backend_that_shows_no_logits_is_not_said_to_be_checked() -> None:
    cell = Cell(**SHAPE)

    class Blind:
        capabilities = backend_class("fake").capabilities

    blind: Any = Blind()
    assert check_logits(blind, cell, load_prompts("synthetic"), 100, CellMeasurements(1.0, (), True, (), ())) is None


def test_the_verdict_names_the_first_token_and_the_weights() -> None:
    result: RunResult = made()
    assert not [*logits(result, {})]  # not recorded, as in results of before
    assert not [*logits(replace(result, logits=Check(8, 0)), {})]
    (reason,) = logits(replace(result, logits=Check(8, 6, 2, 0, ("a.weight",))), {})
    assert reason.code == "nonfinite_logits"
    assert "6 of 8 logits of the timed shape were NaN or infinite, from output token 2 on" in reason.sentence
    assert "The weights a.weight are not finite themselves. Use quant=bf16" in reason.sentence
    (reason,) = logits(replace(result, quality=Quality(nonfinite="The model gave NaN.")), {})
    assert "In the evaluation of the quality" in reason.sentence
    assert from_json(
        RunResult, json.loads(json.dumps(to_json(replace(result, logits=Check(8, 6, 2)))))
    ).logits == Check(8, 6, 2)


def test_a_run_with_nan_is_invalid_and_no_best(store_uri: str) -> None:
    done = run(backend="fake", model="fake:ttft_ms=1+itl_ms=0.2+nonfinite_at=3", **FAST)
    assert done.outcome == "ok"
    row = done.rows[0]
    assert row.verdict.word == "invalid" and "nonfinite_logits" in [reason.code for reason in row.verdict.reasons]


@pytest.mark.filterwarnings("ignore")
def test_a_real_run_in_fp16_that_overflows_is_invalid(tmp_path: Path, store_uri: str) -> None:
    done = run(model=str(overflowing(tmp_path / "hot")), quant="fp16", **FAST)
    assert done.outcome == "ok", done.table()
    result = read_result(next(done.folder.glob("*/artifacts")))
    assert result.logits and result.logits.nonfinite == result.logits.checked == 4
    assert done.rows[0].verdict.word == "invalid"
    assert "nonfinite_logits" in [reason.code for reason in done.rows[0].verdict.reasons]
