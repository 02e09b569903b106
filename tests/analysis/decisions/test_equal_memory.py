"""Models against each other at equal memory: who are rivals, by what they are judged, and how it is told."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from mlflow_llmbench.analysis.decisions.candidates import candidates
from mlflow_llmbench.analysis.decisions.equal_memory import Rivals, rivals
from mlflow_llmbench.analysis.decisions.recommend import recommend
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import LoadInfo, Quality, RunResult, TaskScore
from mlflow_llmbench.reports.equal_memory import equal_memory_sentences, equal_memory_table
from mlflow_llmbench.reports.recommendation import format_recommendation, recommendation_json
from tests.analysis.test_bits_per_byte import cut
from tests.results import made

DRAW = random.Random(0)
NOISE = [DRAW.uniform(0.5, 1.5) for _ in range(4000)]


def one(model: str, quant: str, size: float, memory: float, quality: Quality | None, **settings: Any) -> RunResult:
    """A result of a model of `size` billions, with its peak memory in GB."""
    found = made(quant, memory=memory)
    cell: Cell = dataclasses.replace(found.cell, model=model, **settings)
    load = LoadInfo(1.0, facts={"model.parameters": int(size * 1e9)})
    hashes = dataclasses.replace(found.hashes, config=f"{model}{quant}{settings}")
    return dataclasses.replace(found, cell=cell, load=load, quality=quality, hashes=hashes)


def bits(level: float, seed: int) -> Quality:
    """Scores of one text with tokens of its own: `level` bits a byte on average, harder in some places."""
    return cut([level * value for value in NOISE], 2 + seed % 7, seed)


def judged(*results: RunResult) -> tuple[Rivals, ...]:
    return rivals(candidates(results))


def test_a_larger_model_in_fewer_bits_against_a_smaller_one() -> None:
    small, large = one("small", "bf16", 1, 2.0, bits(1.2, 1)), one("large", "int4", 4, 2.2, bits(1.0, 2))
    [pair] = judged(one("large", "bf16", 4, 8.0, bits(0.95, 3)), large, small)
    assert (pair.smaller.result, pair.larger.result) == (small, large)
    assert pair.better is pair.larger and pair.lower
    assert pair.difference.low is not None and 0 < pair.difference.low < 0.2 < (pair.difference.high or 0)
    [line] = equal_memory_sentences([pair])
    assert line.startswith("At about 2.10 GB, small bf16 or large int4? large int4: bits per byte 1.")
    assert "and of small bf16 1.2" in line and "the difference is +0.2" in line
    table = equal_memory_table([pair])
    assert table and table.body[0][-1] == "large int4"


def test_what_chance_could_explain_cannot_be_told() -> None:
    again = random.Random(9)
    other = cut([value * again.uniform(0.6, 1.4) for value in NOISE], 4, 4)
    [pair] = judged(one("small", "bf16", 1, 2.0, bits(1.0, 1)), one("large", "int4", 4, 2.0, other))
    assert pair.better is None
    assert "It cannot be told: bits per byte" in equal_memory_sentences([pair])[0]
    table = equal_memory_table([pair])
    assert table and table.body[0][-1] == "cannot be told"


def test_rivals_are_the_nearest_in_memory_and_within_the_factor() -> None:
    results = [
        one("small", "bf16", 1, 2.0, bits(1.2, 1)),
        one("small", "int8", 1, 1.0, bits(1.3, 2)),
        one("large", "int8", 4, 4.0, bits(1.0, 3)),
        one("large", "int4", 4, 2.1, bits(1.1, 4)),
        one("large", "fp4", 4, 2.2, bits(1.1, 5)),
    ]
    assert [(p.smaller.name, p.larger.name) for p in judged(*results)] == [("small bf16", "large int4")]


def test_a_pruned_model_is_a_rival_of_its_quantization() -> None:
    pruned = one("m", "bf16", 3, 2.0, bits(1.5, 1), prune="layers-25%")
    [pair] = judged(pruned, one("m", "int4", 4, 2.0, bits(1.1, 2)))
    assert pair.better is pair.larger and pair.smaller.result is pruned


def test_tasks_judge_where_bytes_are_not_known() -> None:
    def tasks(share: float, digest: str = "t") -> Quality:
        return Quality(tasks=(TaskScore("arc", "acc,none", share, 0.02, 500),), tasks_digest=digest)

    [pair] = judged(one("small", "bf16", 1, 2.0, tasks(0.6)), one("large", "int4", 4, 2.0, tasks(0.5)))
    assert pair.better is pair.smaller and pair.measure == "acc of arc" and not pair.lower
    assert pair.difference.low is not None and abs(pair.difference.low - (0.1 - 1.96 * 0.02 * 2**0.5)) < 1e-9
    assert judged(one("small", "bf16", 1, 2.0, tasks(0.6)), one("large", "int4", 4, 2.0, tasks(0.5, "other"))) == ()
    [near] = judged(one("small", "bf16", 1, 2.0, tasks(0.55)), one("large", "int4", 4, 2.0, tasks(0.5)))
    assert near.better is None


def test_without_a_quality_or_another_model_there_is_nothing_to_judge() -> None:
    assert judged(one("small", "bf16", 1, 2.0, None), one("large", "int4", 4, 2.0, None)) == ()
    assert judged(one("m", "bf16", 1, 2.0, bits(1, 1)), one("m", "int8", 1, 2.0, bits(1, 2))) == ()


def test_recommend_answers_the_question() -> None:
    results = [one("small", "bf16", 1, 2.0, bits(1.2, 1)), one("large", "int4", 4, 2.2, bits(1.0, 2))]
    found = recommend(results)
    assert "At equal memory:\n  At about 2.10 GB, small bf16 or large int4? large int4:" in format_recommendation(found)
    [told] = recommendation_json(found)["equal_memory"]
    assert told["better"] == "large int4" and told["smaller"]["config_hash"] == results[0].hashes.config
