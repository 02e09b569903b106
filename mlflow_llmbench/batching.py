"""Which requests are batched together and when, and what a batch computes for nothing. Pure: times in, times out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def next_batch(due_ns: Sequence[int], free_ns: int, rows: int, wait_ns: int | None) -> tuple[int, int]:
    """When a batch begins, and how many of the requests that are not served yet are in it.

    `due_ns`: when each of them comes, in order; a batch takes them in that order, at most `rows`. `free_ns`: when the last
    batch has ended. A static batch (`wait_ns` None) begins when it is full, or when the last request of the stream has come; a
    dynamic one also `wait_ns` after its first request has come, with those that are there then, however few they are.
    """
    full_ns = due_ns[rows - 1] if len(due_ns) >= rows else None
    if wait_ns is None:
        ready_ns = due_ns[-1] if full_ns is None else full_ns
    else:
        over_ns = due_ns[0] + wait_ns
        ready_ns = over_ns if full_ns is None else min(full_ns, over_ns)
    begin_ns = max(free_ns, ready_ns)
    return begin_ns, min(bisect_right(due_ns, begin_ns), rows)


def batch_positions(lengths: Sequence[tuple[int, int]]) -> int:
    """Token positions that one batch computes, for the prompt and output tokens of each row: rows · (longest prompt + most output − 1).

    Shorter prompts are padded to the longest, and rows that have all their tokens are computed until the last one has its own.
    The last token of a row is never fed back, hence the 1.
    """
    return len(lengths) * (max(prompt for prompt, _ in lengths) + max(output for _, output in lengths) - 1)


def needed_positions(lengths: Sequence[tuple[int, int]]) -> int:
    """Token positions that the same requests need, each by itself: Σ (prompt + output − 1)."""
    return sum(prompt + output - 1 for prompt, output in lengths)
