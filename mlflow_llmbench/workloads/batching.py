"""Batching of a request stream: when a batch begins, which requests it holds, its padding. Pure functions of time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def next_batch(due_ns: Sequence[int], free_ns: int, rows: int, wait_ns: int | None) -> tuple[int, int]:
    """Return the time at which the next batch begins, in ns, and its number of requests.

    `due_ns`: arrival times of unserved requests, in order; a batch takes them in that order, at most `rows` ·
    `free_ns`: end of the last batch. A static batch (`wait_ns` None) begins when it is full, or when the last request
    of the stream has arrived. A dynamic one begins also `wait_ns` after its first request, with those that are there.
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
    """Token positions that one batch computes: rows · (longest prompt + longest output − 1).

    `lengths`: prompt and output tokens of each row. Shorter prompts are padded to the longest, and finished rows are
    computed until the last one has finished. The last token of a row is never fed back, hence the 1.
    """
    return len(lengths) * (max(prompt for prompt, _ in lengths) + max(output for _, output in lengths) - 1)


def needed_positions(lengths: Sequence[tuple[int, int]]) -> int:
    """Token positions that the same requests need individually: Σ (prompt + output − 1)."""
    return sum(prompt + output - 1 for prompt, output in lengths)
