"""Decode paths and KV caches of transformers on a tiny real model: tokens, tokens per step, bytes and refusals."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from mlflow_llmbench import run
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.backends.huggingface import decoding
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.backends.huggingface.scoring import divergence
from mlflow_llmbench.measure.batch import checked_ids, time_request
from mlflow_llmbench.measure.journal import read_result
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MissingError, NotRealised, UsageError
from tests.loading import loaded

PROMPTS = [[5, 6, 7, 8, 9] * 4]
DENSE = 2 * 2 * 2 * 32  # values of keys and values per token: layers, KV heads, dimensions of a head


def tokens_of(generate: Any, count: int, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    steps: list[Any] = []
    generate(prompts, count, steps.append)
    return [list(row) for row in zip(*checked_ids(steps, len(prompts)), strict=True)]


def needs(package: str) -> Any:
    try:
        importlib.metadata.version(package)
        there = True
    except importlib.metadata.PackageNotFoundError:
        there = False
    return pytest.mark.skipif(not there, reason=f"needs the package {package}")


def test_an_assistant_that_is_always_right_brings_its_tokens_and_one_more_in_each_step(tiny_model: Path) -> None:
    cell = Cell(model=str(tiny_model), quant="fp32", decode="assisted", assistant=str(tiny_model), draft_tokens=4)
    with loaded(cell) as (backend, _):
        record, steps = time_request(backend, PROMPTS, 30)
        assert record.chunk_tokens == (5,) * 6
        assert (record.tokens, record.output_tokens, record.single_tokens) == (30, 30, False)
        assert [[step[0] for step in checked_ids(steps, 1)]] == tokens_of(backend.generate_plainly, 30)
        facts = backend.describe().facts
    assert facts["assistant.parameters"] == 426_624
    assert facts["assistant.revision"] == TransformersBackend.resolve(Cell(model=str(tiny_model))).revision
    assert facts["assistant.dtype"] == "float32"


def test_looked_up_tokens_are_checked_and_the_answer_is_the_same(tiny_model: Path) -> None:
    """The tiny model soon repeats itself, so proposals looked up are often right; the prompt alone holds no answer."""
    with loaded(Cell(model=str(tiny_model), quant="fp32", decode="prompt_lookup", draft_tokens=3)) as (backend, _):
        record, _ = time_request(backend, PROMPTS, 40)
        assert record.output_tokens == 40
        assert record.chunk_tokens and 1 in record.chunk_tokens and max(record.chunk_tokens) == 4
        assert tokens_of(backend.generate, 40) == tokens_of(backend.generate_plainly, 40)


def test_an_assistant_of_another_vocabulary_is_refused(cache_folder: Path) -> None:
    cell = Cell(model="opt-125m", weights="random", decode="assisted", assistant="pythia-70m")
    with pytest.raises(
        UsageError, match=r"assistant=pythia-70m has a vocabulary of 50304 tokens, but opt-125m has 50272"
    ):
        TransformersBackend.resolve(cell)
    same = TransformersBackend.resolve(
        Cell(model="opt-350m", weights="random", decode="assisted", assistant="opt-125m")
    )
    assert same.assistant and same.assistant.location == "facebook/opt-125m"
    assert not TransformersBackend.is_prepared(cell, same)


def test_a_cache_of_8_bit_floats_takes_a_quarter_of_one_of_32(tiny_model: Path) -> None:
    with loaded(Cell(model=str(tiny_model), quant="fp32", kv_cache="fp8")) as (backend, _):
        assert tokens_of(backend.generate, 12) == tokens_of(backend.generate_plainly, 12)
        info = backend.describe()
    assert info.kv_bytes_per_token == pytest.approx(DENSE, abs=1)  # plus two scales per layer
    assert info.facts["kv_cache.type"] == "fp8"


@pytest.mark.parametrize(
    ("cache", "bits"),
    [
        pytest.param("int8", 8.5, marks=needs("hqq")),
        *(pytest.param(f"int{b}", b + 0.5, marks=needs("optimum-quanto")) for b in (4, 2)),
    ],
)
def test_a_cache_of_fewer_bits_takes_less(tiny_model: Path, cache: str, bits: float) -> None:
    """A prompt of 192 tokens is quantized at once, in groups of 64 with two numbers of 16 or 32 bits.

    The three new tokens are not quantized.
    """
    prompt = [[5 + i % 100 for i in range(192)]]
    with loaded(Cell(model=str(tiny_model), quant="bf16", kv_cache=cache)) as (backend, _):
        tokens_of(backend.generate, 4, prompt)
        info = backend.describe()
    least, most = DENSE * (bits - 0.5) / 8, DENSE * (bits + 1) / 8 + 3 * 2 * DENSE / 195
    assert least < (info.kv_bytes_per_token or 0) < most
    assert info.facts["kv_cache.backend"] == ("hqq" if cache == "int8" else "quanto")


def test_quality_sees_the_prompt_as_the_quantized_cache_holds_it(tiny_model: Path) -> None:
    """In a single pass no key would come from the cache, and a cache of 2 bits would seem to cost nothing."""
    ids = [5 + i * 7 % 100 for i in range(64)]
    found = []
    for cache in (None, "fp8"):
        with loaded(Cell(model=str(tiny_model), quant="fp32", kv_cache=cache)) as (backend, _):
            found.append(backend.logits(ids, 8))
            assert backend.logits(ids, 1).shape == (1, 512)
            assert backend.logits(ids, 64).shape == (64, 512)
    exact, near = found
    assert exact.shape == near.shape == (8, 512)
    assert torch.allclose(exact[0], near[0], atol=1e-5)  # a prefill uses its own keys at full precision
    distances, _ = divergence(exact[1:], near[1:])
    assert all(1e-9 < distance < 0.1 for distance in distances)


@pytest.mark.slow
def test_a_whole_run_with_looked_up_tokens(tiny_model: Path, store_uri: str) -> None:
    """Tokens per step are recorded on texts that the model repeats, and no inter-token latency."""
    done = run(
        model=str(tiny_model),
        quant="fp32",
        decode="generate,prompt_lookup",
        prompt_tokens=16,
        output_tokens=32,
        repetitions=5,
        warmup=1,
    )
    assert done.outcome == "ok", done.table()
    results = {r.cell.decode: r for r in (read_result(folder) for folder in done.folder.glob("*/artifacts"))}
    plain, looked = (summarize(results[decode]) for decode in ("generate", "prompt_lookup"))
    assert looked["lengths/tokens_per_step_mean"] > 1.2
    assert "latency/itl_ms_mean" in plain and "latency/itl_ms_mean" not in looked and "latency/icl_ms_mean" in looked
    assert looked["trust/same_tokens_ratio"] == 1
    assert results["generate"].hashes.workload == results["prompt_lookup"].hashes.workload


# Compiled


def test_what_is_not_compiled_is_not_measured_under_that_name(tiny_model: Path) -> None:
    with (
        torch._dynamo.config.patch(disable=True),
        loaded(Cell(model=str(tiny_model), quant="fp32", decode="compiled")) as (backend, _),
        pytest.raises(NotRealised, match="nothing was compiled"),
    ):
        backend.compile(PROMPTS, 20, 8)


def test_compiled_without_cuda_graphs_is_not_measured_under_that_name(tiny_model: Path) -> None:
    """Torch counts a graph that it cannot record, for example because an input is on the CPU, and goes on."""

    def skipped() -> None:
        torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1
        torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] += 1

    with (
        loaded(Cell(model=str(tiny_model), quant="fp32", decode="compiled")) as (backend, _),
        pytest.raises(NotRealised, match="but torch left 2 graphs without CUDA graphs"),
    ):
        backend.path.compile(20, lambda: None, skipped, True)


def test_the_static_cache_gives_the_same_tokens_again_and_again(tiny_model: Path) -> None:
    """The cache of the compiled step is emptied after each call; uncompiled here, to be quick."""
    with loaded(Cell(model=str(tiny_model), quant="fp32", decode="compiled")) as (backend, _):
        assert backend.path
        backend.path.compile(28, lambda: None, lambda: None, decodes=False)
        prompts = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
        with torch.compiler.set_stance("force_eager"):
            first, second = (tokens_of(backend.generate, 20, prompts) for _ in range(2))
        assert first == second == tokens_of(backend.generate_plainly, 20, prompts)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_step_is_compiled_once_for_each_shape(tiny_model: Path, store_uri: str) -> None:
    settings = {"prompt_tokens": 12, "repetitions": 5, "warmup": 1}
    done = run(model=str(tiny_model), quant="fp32", decode="compiled", batch_size="1,2", output_tokens=8, **settings)
    assert done.outcome == "ok", done.table()
    results = [read_result(folder) for folder in done.folder.glob("*/artifacts")]
    assert sorted(result.cell.batch_size for result in results) == [1, 2]
    for result in results:
        metrics = summarize(result)
        assert metrics["trust/same_tokens_ratio"] == 1
        assert metrics["load/compile_s"] * 1000 > 10 * metrics["latency/e2e_ms_mean"]
        if result.cell.batch_size == 2:  # the larger one comes first, and only the first call after a load is cold
            assert metrics["load/first_call_ms"] < metrics["load/compile_s"] * 1000 / 5
        assert result.load and result.load.facts["decode.graphs"] == 1
        assert result.load.facts["decode.graph_breaks"] == 0
        assert result.load.facts["decode.static_cache_tokens"] == 20


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.filterwarnings("ignore")  # warnings of torch's compiler, which otherwise runs in a process of its own
def test_a_step_that_is_compiled_again_while_it_is_measured_is_refused(tiny_model: Path) -> None:
    with loaded(Cell(model=str(tiny_model), quant="fp32", decode="compiled")) as (backend, _):
        backend.compile(PROMPTS, 20, 8)
        assert tokens_of(backend.generate, 8) == tokens_of(backend.generate_plainly, 8)
        torch._dynamo.reset()  # as if a guard failed
        with pytest.raises(NotRealised, match="compiled again while it was measured"):
            tokens_of(backend.generate, 8)


# Missing requirements


def test_what_compiling_for_a_gpu_needs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(MissingError, match=r"needs a C compiler on a GPU, .* and no-such-compiler is not installed"):
        decoding.require(Cell(decode="compiled"), "cuda:0")
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(
        MissingError, match=r"needs Python's headers on a GPU, .*Python\.h does not exist\. Install them"
    ):
        decoding.require(Cell(decode="compiled"), "cuda:0")
    (tmp_path / "Python.h").touch()
    if importlib.util.find_spec("triton") is None:
        with pytest.raises(MissingError, match="needs the package triton on a GPU"):
            decoding.require(Cell(decode="compiled"), "cuda:0")
    else:
        decoding.require(Cell(decode="compiled"), "cuda:0")


def test_what_a_decode_path_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        MissingError,
        match=r"decode=compiled needs a C\+\+ compiler, .* no-such-compiler is not installed\. "
        r"Install g\+\+, or set CXX\.",
    ):
        decoding.require(Cell(decode="compiled"), "cpu")
    known = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("hqq", "optimum-quanto"):
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        MissingError,
        match=r"kv_cache=int4 needs the package optimum-quanto, .* "
        r"Run: pip install 'optimum-quanto>=0.2.7'; kv_cache=fp8",
    ):
        decoding.require(Cell(kv_cache="int4"), "cpu")
    with pytest.raises(MissingError, match=r"kv_cache=int8 needs the package hqq"):
        decoding.require(Cell(kv_cache="int8"), "cpu")
    decoding.require(Cell(kv_cache="fp8"), "cpu")
