"""Passages to calibrate with: pieces of the bundled texts, or seeded random ids for a model without a tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

BUNDLED = ("qa", "summarization", "creative", "code", "chat", "domain")
"""Bundled workloads from whose texts passages are cut. The text for perplexity is none of them."""


def cut(sets: Sequence[Sequence[str]], tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """Return `count` passages of `tokens` ids, cut at even distances from the joined texts of each set.

    Each begins with the ids that the tokenizer puts before every text. Sets that are too short give none.
    """
    prefix = list(tokenizer("")["input_ids"])
    length = tokens - len(prefix)
    found: list[list[int]] = []
    for number, texts in enumerate(sets):
        ids = list(tokenizer("\n\n".join(texts))["input_ids"])[len(prefix) :]
        share = (number + 1) * count // len(sets) - number * count // len(sets)
        starts = [place * max(len(ids) - length, 0) // max(share - 1, 1) for place in range(share)]
        found += [[*prefix, *ids[start : start + length]] for start in starts]
    return [passage for passage in found if len(passage) == tokens]


def draw(seed: str, vocab_size: int, count: int, tokens: int) -> list[list[int]]:
    """Return `count` passages of `tokens` random ids, drawn evenly without the first ones, which are often special."""
    generator = random.Random(seed)
    low = min(100, vocab_size // 2)
    return [[generator.randrange(low, vocab_size) for _ in range(tokens)] for _ in range(count)]
