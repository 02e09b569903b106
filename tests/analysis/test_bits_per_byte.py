"""Bits per byte: worked examples, the same value however a text is cut into tokens, and bytes of a real tokenizer."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlflow_llmbench.analysis import quality
from mlflow_llmbench.backends.huggingface import scoring
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import Quality, TextScores
from mlflow_llmbench.workloads.prompts import Text
from tests.loading import loaded

LN2 = math.log(2)
TEXT = "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich. \n\n" * 12


def scored(bits: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], digest: str = "text") -> Quality:
    """A quality with these bits of each token, and these bytes, by window."""
    nll = tuple(tuple(value * LN2 for value in window) for window in bits)
    return Quality(digest, TextScores("text", 9, 8, 4, nll, (), tuple(map(tuple, sizes))))


def test_bits_per_byte_by_hand() -> None:
    """12 bits over 10 bytes. Windows: 9 bits in 6 bytes and 3 in 4, residuals 9 − 7.2 and 3 − 4.8, t(1) = 12.7062."""
    found = quality.bits_per_byte(scored([[4, 5], [3]], [[2, 4], [4]]))
    assert found and found.value == pytest.approx(1.2)
    half = 12.7062 * math.sqrt(2 / 1 * (1.8**2 + 1.8**2) / 10**2)
    assert (found.low, found.high) == pytest.approx((1.2 - half, 1.2 + half), abs=1e-4)
    figures = quality.figures(scored([[4, 5], [3]], [[2, 4], [4]]))
    assert figures["quality/bits_per_byte"] == pytest.approx(1.2)


def test_results_without_bytes_have_none() -> None:
    old = dataclasses.replace(scored([[4]], [[2]]), scores=TextScores("text", 9, 8, 4, ((1.0,),)))
    assert quality.bits_per_byte(old) is None
    assert quality.bits_per_byte_difference(old, scored([[4]], [[2]])) is None
    assert quality.bits_per_byte_difference(scored([[4]], [[2]]), scored([[4]], [[2]], "another text")) is None


def cut(bits: Sequence[float], most: int, seed: int) -> Quality:
    """A text of single bytes with these bits each, cut into tokens of 1 to `most` bytes in windows of 50 tokens."""
    draw, tokens, place = random.Random(seed), [], 0
    while place < len(bits):
        size = draw.randint(1, most)
        tokens.append((sum(bits[place : place + size]), len(bits[place : place + size])))
        place += size
    windows = [tokens[start : start + 50] for start in range(0, len(tokens), 50)]
    return scored([[t[0] for t in w] for w in windows], [[t[1] for t in w] for w in windows])


def test_two_ways_to_cut_one_text_have_the_same_bits_per_byte() -> None:
    """One model of bytes, with hard and easy passages, seen through two tokenizers: nothing differs."""
    draw = random.Random(1)
    bits = [draw.expovariate(1) * (5 if place // 300 % 2 else 1) for place in range(6000)]
    one, other = cut(bits, 3, 2), cut(bits, 9, 3)
    first, second = quality.bits_per_byte(one), quality.bits_per_byte(other)
    assert first and second and first.value == pytest.approx(second.value)
    found = quality.bits_per_byte_difference(one, other)
    assert found and found.low is not None and found.high is not None
    assert found.value == pytest.approx(0, abs=1e-9) and found.low < 0 < found.high


def test_a_constant_difference_is_found_however_hard_the_text_is() -> None:
    """Paired by place: 0.05 bits a byte, far less than passages differ, has an interval that is narrower than it."""
    draw = random.Random(4)
    bits = [draw.uniform(0.9, 1.1) * (5 if place // 300 % 2 else 1) for place in range(6000)]
    found = quality.bits_per_byte_difference(cut([b + 0.05 for b in bits], 3, 5), cut(bits, 9, 6))
    assert found and found.low is not None and found.high is not None
    assert found.value == pytest.approx(0.05, abs=1e-6)
    assert 0 < found.low < 0.05 < found.high
    alone = quality.bits_per_byte(cut(bits, 9, 6))
    assert alone and alone.low and alone.high and alone.high - alone.low > 10 * (found.high - found.low)


def test_bytes_of_tokens_add_up_to_those_of_the_text(tiny_model: Path) -> None:
    """A byte-level tokenizer: characters of two bytes are two tokens, and the windows' sums are the text's bytes."""
    with loaded(Cell(model=str(tiny_model), quant="fp32")) as (backend, _):
        scores = scoring.score_text(backend, Text("own", TEXT), 128, lambda number, limit: None)
        assert scores.token_bytes and [*map(len, scores.token_bytes)] == [*map(len, scores.nll)]
        assert sum(itertools.chain(*scores.token_bytes)) == len(TEXT.encode()) - (
            scores.tokens - sum(map(len, scores.nll))
        )
        whole = quality.bits_per_byte(Quality("own", scores))
        assert whole and whole.value == pytest.approx(sum(map(sum, scores.nll)) / LN2 / len(TEXT.encode()), rel=0.01)
        ids = backend.encode(TEXT)
        assert scoring.token_bytes(backend, "Another text " * 80, ids, [(0, 20)]) is None
