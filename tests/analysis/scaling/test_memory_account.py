"""Memory taken apart, leaks found and not found, reductions by hand."""

import dataclasses

import numpy as np
import pytest

from mlflow_llmbench.analysis.scaling import memory_account
from mlflow_llmbench.analysis.scaling.cells import Measured
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import (
    Hashes,
    LoadInfo,
    MemorySample,
    MemoryStages,
    ModelFacts,
    Repetition,
    RequestRecord,
    RunResult,
)
from mlflow_llmbench.stats import trend

MS = 1_000_000
KV, TOKENS, ROWS = 1000, 400, 2


def generated(per_token: float, per_repetition: float, repetitions: int = 10, device: bool = False) -> RunResult:
    """Repetitions of 400 tokens in 4 s, with memory sampled every 40 ms with 2 kB of noise.

    It grows with each token, and some of it stays after each repetition.
    """
    draw, timeline, done = np.random.default_rng(0), [], []
    for index in range(repetitions):
        start = index * 5000 * MS
        stamps = tuple(start + (i + 1) * 10 * MS for i in range(TOKENS))
        done.append(Repetition(index, index, (RequestRecord(start, stamps, ROWS, 100),)))
        for i in range(100):
            held = 10**8 + per_repetition * index + per_token * 4 * i + draw.normal(0, 2000)
            timeline.append(MemorySample(start + i * 40 * MS, int(held), int(held), int(held) if device else None))
    load = LoadInfo(1.0, weight_bytes=10**7, kv_bytes_per_token=KV)
    cell = Cell(batch_size=ROWS, prompt_tokens=100, output_tokens=TOKENS)
    readings = {"baseline": 10**6, "loaded": 12 * 10**6, "peak": 14 * 10**6}
    stages = MemoryStages({}, readings, readings if device else {})
    return RunResult(
        cell,
        "ok",
        0,
        1,
        Hashes(*["0"] * 5),
        ModelFacts("m", "preset", "m", "main"),
        {},
        load,
        repetitions=tuple(done),
        memory=stages,
        timeline=tuple(timeline),
    )


@pytest.mark.parametrize("device", [False, True])
def test_growth_of_the_cache_alone_is_no_leak(device: bool) -> None:
    found = memory_account.growth(generated(ROWS * KV, 0, device=device))
    assert found is not None and found.seen is not None and found.leak is not None
    assert found.where == ("device" if device else "host")
    assert found.expected == ROWS * KV
    assert found.seen.slope == pytest.approx(ROWS * KV, rel=0.02)
    assert found.leak.low < 0 < found.leak.high
    assert not found.grows


@pytest.mark.parametrize("asked", [{"decode": "compiled"}, {"backend": "llama_cpp"}])
def test_a_cache_that_has_its_full_size_from_the_start_hides_no_leak(asked: dict[str, str]) -> None:
    """A cache that does not grow: its memory is half of what a growing cache would take."""
    whole = generated(ROWS * KV / 2, 0)
    found = memory_account.growth(dataclasses.replace(whole, cell=dataclasses.replace(whole.cell, **asked)))
    assert found is not None and found.leak is not None
    assert found.expected == 0
    assert 0 < found.leak.low < ROWS * KV / 2 < found.leak.high


def test_leaks_by_token_and_by_repetition_are_seen() -> None:
    found = memory_account.growth(generated(ROWS * KV + 500, 40_000))
    assert found is not None and found.leak is not None and found.between is not None
    assert found.leak.low < 500 < found.leak.high
    assert found.leak.slope == pytest.approx(500, rel=0.1)
    assert found.leak.low > 0
    assert found.grows
    assert found.between.low < 40_000 < found.between.high


def test_without_samples_or_cache_size_nothing_is_said() -> None:
    whole = generated(ROWS * KV, 0)
    assert memory_account.growth(dataclasses.replace(whole, timeline=())) is None
    assert memory_account.growth(dataclasses.replace(whole, load=LoadInfo(1.0))) is None
    short = memory_account.growth(dataclasses.replace(whole, timeline=whole.timeline[:5]))
    assert short is not None and short.seen is None and short.between is None and short.leak is None and not short.grows


@pytest.mark.parametrize("device", [False, True])
def test_the_parts_add_up_to_the_peak(device: bool) -> None:
    result = generated(ROWS * KV, 0, device=device)
    found = memory_account.account(Measured(result, summarize(result)))
    assert found is not None
    assert found.where == ("device" if device else "host")
    assert found.cache == ROWS * KV * (100 + TOKENS - 1)
    assert found.baseline + found.weights + found.load_rest + found.cache + found.run_rest == found.peak
    assert found.unexplained == 14 * 10**6 - 10**6 - 10**7 - found.cache
    bare = dataclasses.replace(result, memory=MemoryStages())
    assert memory_account.account(Measured(bare, summarize(bare))) is None


def test_a_sliding_window_holds_less() -> None:
    load = LoadInfo(1.0, kv_bytes_per_token=KV, sliding_window=64, sliding_share=0.5)
    assert memory_account.cache_bytes(load, 2, 1000) == 2 * KV * (500 + 32)


def test_reductions_need_a_reference() -> None:
    cells = {quant: dataclasses.replace(generated(0, 0), cell=Cell(quant=quant)) for quant in ("int8", "int4")}
    assert memory_account.reductions([Measured(r, summarize(r)) for r in cells.values()]) == []
    whole = dataclasses.replace(
        generated(0, 0),
        cell=Cell(quant="none"),
        load=LoadInfo(1.0, weight_bytes=4 * 10**7, facts={"model.dtype": "float32"}),
    )
    found = memory_account.reductions([Measured(r, summarize(r)) for r in (*cells.values(), whole)])
    assert [(r.quant, r.reference, r.theory, r.weights) for r in found] == [
        ("int8", "none", 0.75, 0.75),
        ("int4", "none", 0.875, 0.75),
    ]


def test_the_slope_of_a_series_covers_and_shrugs_at_spikes() -> None:
    held = 0
    for seed in range(500):
        noise = np.random.default_rng(seed).normal(0, 1, 80)
        found = trend(list(range(80)), list(0.1 * np.arange(80) + noise))
        assert found is not None
        held += found.low <= 0.1 <= found.high
    assert 0.92 <= held / 500 <= 0.98
    spiked = [0.1 * i for i in range(80)]
    spiked[40] = 1e6
    found = trend(list(range(80)), spiked)
    assert found is not None and found.slope == pytest.approx(0.1, rel=0.02)
    assert trend([1, 2, 3], [1, 2, 3]) is None
    assert trend([5.0] * 20, list(range(20))) is None
