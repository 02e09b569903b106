"""The word that was meant."""

from __future__ import annotations

import pytest

from mlflow_llmbench.records.text import known_words, nearest


@pytest.mark.parametrize(
    ("text", "near"), [("int44", "int4"), ("INT4", "int4"), ("througput", "throughput"), ("speed", ""), ("", "")]
)
def test_the_nearest_word(text: str, near: str) -> None:
    assert nearest(text, ["int4", "int8", "e2e", "throughput"]) == near


def test_an_unknown_word_is_told_with_the_known_ones() -> None:
    assert known_words("zhs", ("bash", "zsh")) == "Did you mean zsh? Known: bash, zsh."
    assert known_words("cmd", ("bash", "zsh")) == "Known: bash, zsh."
