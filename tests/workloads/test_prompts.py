"""Prompts: exact lengths in tokens, identical for every configuration, from a seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.workloads.prompts import load_prompts


def encode(text: str) -> list[int]:
    return list(text.encode())


def test_synthetic_rows_are_exact_distinct_and_seeded() -> None:
    prompts = load_prompts("synthetic")
    cell = Cell(batch_size=3, prompt_tokens=17)
    first = prompts.batch(cell, 0, 1000, None)
    assert [len(row) for row in first] == [17, 17, 17]
    assert len({tuple(row) for row in first}) == 3
    assert first == prompts.batch(cell, 0, 1000, None)
    assert first != prompts.batch(cell, 1, 1000, None)
    assert first != prompts.batch(Cell(batch_size=3, prompt_tokens=17, seed=1), 0, 1000, None)
    assert all(100 <= i < 1000 for row in first for i in row)


def test_texts_are_cut_and_joined_to_the_exact_length() -> None:
    prompts = load_prompts("qa")
    rows = prompts.batch(Cell(workload="qa", batch_size=2, prompt_tokens=200), 0, 256, encode)
    assert [len(row) for row in rows] == [200, 200]
    assert bytes(rows[0]).decode().startswith(prompts.texts[0])
    assert bytes(rows[1]).decode().startswith(prompts.texts[1])


def test_auto_uses_each_text_at_its_own_length() -> None:
    prompts = load_prompts("qa")
    cell = Cell(workload="qa", batch_size=2, prompt_tokens=None)
    for repetition in (0, 7, 57):
        rows = prompts.batch(cell, repetition, 256, encode)
        assert [bytes(row).decode() for row in rows] == [prompts.texts[repetition % 50]] * 2


def test_workload_hash_is_of_prompts_and_lengths_not_of_the_configuration() -> None:
    prompts = load_prompts("qa")
    cell = Cell(workload="qa")
    assert prompts.digest(cell, 512) == prompts.digest(Cell(workload="qa", quant="int4", batch_size=8), 512)
    assert prompts.digest(cell, 512) != prompts.digest(Cell(workload="qa", output_tokens=64), 512)
    synthetic = load_prompts("synthetic")
    assert synthetic.digest(Cell(), 512) != synthetic.digest(Cell(seed=1), 512)
    assert synthetic.digest(Cell(), 512) != synthetic.digest(Cell(), 1024)


def test_own_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "one"}\n\n{"prompt": "two", "answer": "2"}\n')
    assert load_prompts(str(file)).texts == ("one", "two")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompts"),
        ("{}", "line 1, is not a JSON object"),
        ('{"prompt": "a"}\nnot json', "line 2"),
        ('{"prompt": 3}', "line 1"),
        ('{"prompt": "  "}', "line 1"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_prompts(str(file))


def test_texts_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(UsageError, match="needs a tokenizer"):
        load_prompts("qa").batch(Cell(workload="qa"), 0, 512, None)
