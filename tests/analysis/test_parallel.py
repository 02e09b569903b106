"""Several ranks against one, by hand: 5 tokens in 60 ms with one rank, and in 42 ms with two."""

from __future__ import annotations

import dataclasses

import pytest

from mlflow_llmbench.analysis import parallel
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.records.cell import Options
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.sweeps.cross_cell import cross_findings
from tests.results import made


def ranks(count: int, step: float, ttft: float, **fields: object) -> RunResult:
    result = made(step=step, ttft=ttft, **fields)  # type: ignore[arg-type]
    return dataclasses.replace(result, cell=dataclasses.replace(result.cell, tensor_parallel=count))


ONE, TWO = ranks(1, 10, 20), ranks(2, 8, 10, collective_share=0.4)


def test_efficiency_and_speedups_by_hand() -> None:
    found = parallel.gained(ONE, TWO)
    assert found["parallel/efficiency_ratio"] == pytest.approx(60 / 42 / 2)
    assert found["parallel/ttft_speedup"] == pytest.approx(2)
    assert found["parallel/tpot_speedup"] == pytest.approx(10 / 8)
    for name in ("efficiency_ratio", "ttft_speedup", "tpot_speedup"):
        low, value, high = (found[f"parallel/{name}{end}"] for end in ("_ci_low", "", "_ci_high"))
        assert 0 < low < value < high


def test_four_ranks_that_are_slower_than_one() -> None:
    found = parallel.gained(ONE, ranks(4, 20, 40))
    assert found["parallel/efficiency_ratio"] == pytest.approx(0.5 / 4)
    assert found["parallel/ttft_speedup"] == pytest.approx(0.5)


def test_results_that_cannot_be_compared_have_no_efficiency() -> None:
    elsewhere = dataclasses.replace(TWO, hashes=dataclasses.replace(TWO.hashes, hardware="other"))
    assert parallel.gained(ONE, elsewhere) == {}
    assert parallel.sentence("m tp2", ONE, elsewhere, {}) == "m tp2: cannot be compared with one rank."


def test_figures_of_suspect_results_are_told_as_such() -> None:
    loose = ranks(2, 8, 10, factors=(1.0, 1.4, 0.7, 1.2, 0.9))
    assert judge(loose).word == "suspect" and judge(ONE).word == "valid"
    told = parallel.sentence("m tp2", ONE, loose, parallel.gained(ONE, loose))
    assert told.endswith("; not to be trusted, since the results of 2 ranks are suspect.")


def test_a_sweep_tells_what_further_ranks_gain() -> None:
    wider = ranks(2, 8, 10, batch=4)  # has no cell of one rank beside it
    found = cross_findings([ONE, TWO, wider], ["m tp1", "m tp2", "m tp2 b4"], Options())
    assert [*map(bool, found.added)] == [False, True, False]
    [sentence] = found.sentences
    assert sentence.startswith("m tp2: parallel efficiency 0.71 (") and sentence.endswith(
        "), 1.43 times the throughput of one rank, the first token 2.00 times as soon; 40% of the time was spent in "
        "collectives."
    )
    alone = cross_findings([TWO], ["m tp2"], Options())
    assert (alone.added, alone.sentences) == (({},), ())
