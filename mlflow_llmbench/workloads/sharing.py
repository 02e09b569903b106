"""Beginnings of prompts that requests share, and what a prefix cache without limits would find of them.

A prompt begins with parts: the prefix of its group (`prefix_tokens`), or the blocks of a recorded request. Parts with
equal keys have equal tokens. Each repetition and each wave of the warm-up has texts of its own, so that nothing of one
is in a cache of the server when the next begins, and every repetition has the same share to find.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..records.cell import Cell
from .traces import BLOCK_TOKENS, read_trace


@dataclass(frozen=True)
class Part:
    """A part of a prompt: `tokens` of it, the first ones of the text that `key` stands for."""

    key: str
    tokens: int


def shares_prefixes(cell: Cell) -> bool:
    """Return True if a cell says which beginnings its prompts share."""
    if cell.trace:
        return read_trace(cell.trace).has_blocks
    return cell.prefix_tokens is not None


def parts_of(cell: Cell, number: int, prompt_tokens: int | None) -> tuple[Part, ...]:
    """Return the parts that the prompt of request `number` begins with; the rest of it is its own.

    `prompt_tokens`: length of the prompt, None for a text that comes after the prefix at its own length. A shorter
    prompt than the prefix has its beginning, and at least one token of its own.
    """
    if cell.trace:
        recorded = read_trace(cell.trace).requests
        one = recorded[number % len(recorded)]
        return tuple(
            Part(f"block {block}", min(BLOCK_TOKENS, one.prompt_tokens - BLOCK_TOKENS * position))
            for position, block in enumerate(one.blocks)
        )
    if cell.prefix_tokens is None:
        return ()
    tokens = cell.prefix_tokens if prompt_tokens is None else min(cell.prefix_tokens, prompt_tokens - 1)
    return (Part(f"prefix {group_of(cell, number)}", tokens),) if tokens > 0 else ()


def group_of(cell: Cell, number: int) -> int:
    """Return the group, from 0, whose prefix request `number` has.

    Of every `prefix_count` successive requests each group has one, in an order drawn from the seed: all groups are
    equally frequent, and none comes at equal distances, which a cache that is too small for all would never find again.
    """
    turn, place = divmod(number, cell.prefix_count)
    return _order(cell.seed, cell.prefix_count, turn)[place]


@functools.lru_cache(maxsize=64)
def _order(seed: int, groups: int, turn: int) -> Sequence[int]:
    return random.Random(f"{seed}/groups/{turn}").sample(range(groups), groups)


@dataclass
class PrefixTree:
    """A prefix cache without limits: a tree of the parts with which prompts began, in the order of their sending."""

    tokens: int = 0  # most tokens of this part that a prompt has had
    after: dict[str, PrefixTree] = field(default_factory=dict)

    def take(self, parts: Iterable[Part]) -> int:
        """Return the number of tokens at the beginning of a prompt that earlier prompts had too, and keep its parts."""
        node, found, known = self, 0, True
        for part in parts:
            node = node.after.setdefault(part.key, PrefixTree())
            if known:
                found += min(node.tokens, part.tokens)
                known = node.tokens >= part.tokens
            node.tokens = max(node.tokens, part.tokens)
        return found
