"""Numbers in words, and the word that was meant."""

from __future__ import annotations

import pytest

from mlflow_llmbench.records.text import known_words, large_number_text, nearest


@pytest.mark.parametrize(
    ("text", "near"), [("int44", "int4"), ("INT4", "int4"), ("througput", "throughput"), ("speed", ""), ("", "")]
)
def test_the_nearest_word(text: str, near: str) -> None:
    assert nearest(text, ["int4", "int8", "e2e", "throughput"]) == near


def test_an_unknown_word_is_told_with_the_known_ones() -> None:
    assert known_words("zhs", ("bash", "zsh")) == "Did you mean zsh? Known: bash, zsh."
    assert known_words("cmd", ("bash", "zsh")) == "Known: bash, zsh."


def test_large_counts_are_words() -> None:
    shown = [large_number_text(value) for value in (12.0, 950_000, 1_204_000, 3_450_000_000)]
    assert shown == ["12.0", "950 thousand", "1.20 million", "3.45 billion"]
