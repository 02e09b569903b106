"""Text tables: alignment, wide characters, missing values, wrapping to a width, and nothing that acts in a terminal."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from mlflow_llmbench.reports.tables import MISSING, aligned, display_width, text_table

PACKAGE = Path(__file__).resolve().parents[2] / "mlflow_llmbench"


def test_words_stand_left_and_numbers_right() -> None:
    assert text_table(["quant", "tokens/s", ""], [["int4", "5", "valid"], ["bf16", 1200, ""]], [1]) == (
        "quant  tokens/s\nint4          5  valid\nbf16       1200"
    )


def test_an_absent_value_is_a_dash_and_zero_is_not() -> None:
    assert text_table(["a", "b"], [[None, 0]], [1]) == f"a  b\n{MISSING}  0"


@pytest.mark.parametrize(
    ("text", "width"),
    [("int4", 4), ("模型", 4), ("ﾓﾃﾞﾙ", 4), ("e\u0301", 1), ("a\u200db", 2), ("🚀", 2), ("", 0)],
)
def test_the_width_is_that_in_a_terminal(text: str, width: int) -> None:
    assert display_width(text) == width


def test_columns_stay_aligned_beside_wide_characters() -> None:
    lines = text_table(["model", "n"], [["模型", "1"], ["ab", "22"]], [1]).splitlines()
    assert {display_width(line) for line in lines} == {9}


@pytest.mark.parametrize("limit", [30, 40, 60])
def test_words_are_wrapped_and_numbers_are_not(limit: int) -> None:
    said = "a sentence of several words, with-one-word-that-is-longer-than-a-column"
    first, second = aligned([["name", "tokens/s", "note"], ["int4", "12345.67", said]], [1], limit)
    assert all(display_width(line) <= limit for line in [*first, *second])
    assert "12345.67" in second[0]
    assert "".join(line.removeprefix("int4").replace("12345.67", "") for line in second).replace(" ", "") == (
        said.replace(" ", "")
    )


def test_without_a_terminal_nothing_is_wrapped() -> None:
    assert "x" * 500 in text_table(["a"], [["x" * 500]])


def test_a_terminal_wraps_by_its_own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    master, terminal = os.openpty()
    with os.fdopen(master), os.fdopen(terminal, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        monkeypatch.setenv("COLUMNS", "40")
        text = text_table(["a", "b"], [["word " * 30, "1"]], [1])
    assert max(map(display_width, text.splitlines())) <= 40


def test_a_terminal_too_narrow_for_any_table_still_gets_one() -> None:
    assert len(aligned([["word " * 9, "word " * 9]], (), 1)[0]) > 1


def test_control_characters_are_shown_and_do_nothing() -> None:
    text = text_table(["a\tb"], [["\x1b[31mred\n\u202e"]])
    assert text == "a b\n\\x1b[31mred \\u202e"


def test_a_table_of_nothing_is_its_heading() -> None:
    assert text_table(["a", "b"], []) == "a  b"
    assert aligned([]) == []


def test_no_other_module_pads_columns() -> None:
    """A module of the package that calls ljust or rjust makes a table of its own."""
    padding = {
        file.name
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in ("ljust", "rjust")
    }
    assert padding == set()
