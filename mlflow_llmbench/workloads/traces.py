"""Traces: files with recorded arrival times and lengths of the requests of an open loop.

JSON Lines as in Mooncake's traces (github.com/kvcache-ai/Mooncake): each line is an object with `timestamp`, in
milliseconds that never decrease, `input_length` and `output_length`, in tokens, and where prompts share beginnings
`hash_ids`, a number for each block of 512 tokens of the prompt. Blocks with the same number, after the same blocks,
have the same tokens; the last block may have fewer. Other keys are ignored.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

from ..records import reading
from ..records.errors import UsageError
from ..records.reading import Unreadable
from ..records.redaction import redact
from ..records.results import hash16

MOST_TOKENS = 10_000_000

BLOCK_TOKENS = 512
"""Tokens of a block of Mooncake's traces."""

FORM = '{"timestamp": MILLISECONDS, "input_length": TOKENS, "output_length": TOKENS}'


@dataclass(frozen=True)
class Recorded:
    """One recorded request: arrival in ns after the first one, prompt tokens and output tokens.

    `blocks`: the number of each block of its prompt; empty if they are not recorded.
    """

    at_ns: int
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recording:
    """Requests of a trace file, in order."""

    requests: tuple[Recorded, ...]

    @functools.cached_property
    def longest(self) -> tuple[int, int]:
        """Largest numbers of prompt and output tokens of a request."""
        return max(r.prompt_tokens for r in self.requests), max(r.output_tokens for r in self.requests)

    @functools.cached_property
    def has_blocks(self) -> bool:
        """True if blocks of prompts are recorded, so that it is known which prompts share a beginning."""
        return any(r.blocks for r in self.requests)

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify times, lengths, and blocks as far as they are recorded."""
        return hash16([(r.at_ns, r.prompt_tokens, r.output_tokens, *filter(None, [r.blocks])) for r in self.requests])


def read_trace(path: str) -> Recording:
    """Read the requests of a trace file; cached until the file changes.

    Raises UsageError, naming the line, for a file that is not a trace.
    """
    try:
        seen = os.stat(path)
    except OSError as error:
        raise UsageError(f"Cannot read trace file {path}: {error.strerror}. Give a JSON Lines file.") from None
    return _read(path, seen.st_mtime_ns, seen.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: str, changed_ns: int, size: int) -> Recording:
    try:
        lines = reading.read_json_lines(path)
    except Unreadable as error:
        raise UsageError(f"Cannot read trace file {path}: {error}. Give a UTF-8 JSON Lines file.") from None
    found: list[Recorded] = []
    first = last = 0.0
    for number, line, data in lines:
        where = f"{path}, line {number},"
        at_ms, prompt, output = _parse(line, data, where)
        first = first if found else at_ms
        if found and at_ms < last:
            raise UsageError(
                f"{path}, line {number}, goes back in time: {at_ms:g} ms after {last:g} ms. "
                "Sort the lines by timestamp."
            )
        last = at_ms
        blocks = _blocks(data.get("hash_ids"), prompt, where)
        found.append(Recorded(round((at_ms - first) * 1e6), prompt, output, blocks))
    if not found:
        raise UsageError(f"{path} has no requests. Write {FORM} on each line.")
    return Recording(tuple(found))


def _parse(line: str, data: Any, where: str) -> tuple[float, int, int]:
    """Return time in ms, prompt tokens and output tokens of a line and its value."""
    try:
        at, prompt, output = (data[name] for name in ("timestamp", "input_length", "output_length"))
    except (KeyError, TypeError):
        raise UsageError(
            f"{where} is not a request of a trace: {redact(line)[:60]}. Write {FORM} on each line."
        ) from None
    timed = isinstance(at, int | float) and not isinstance(at, bool) and 0 <= at < 1e15
    if not timed or not all(
        isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MOST_TOKENS for n in (prompt, output)
    ):
        raise UsageError(
            f"{where} has a time that is no number of milliseconds from 0, or a length that is no number of tokens "
            f"from 1: {redact(line)[:60]}. Write {FORM} on each line."
        )
    return float(at), prompt, output


def _blocks(given: object, prompt_tokens: int, where: str) -> tuple[int, ...]:
    """Return the numbers of a prompt's blocks; empty if they are not given."""
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in given):
        raise UsageError(
            f'{where} has hash_ids that are not a list of whole numbers: {redact(str(given))[:60]}. Write "hash_ids": '
            "[1, 2, …], one for each block of the prompt, or leave them out."
        )
    needed = -(-prompt_tokens // BLOCK_TOKENS)
    if len(given) != needed:
        raise UsageError(
            f"{where} has {len(given)} hash_ids, and its input_length of {prompt_tokens} tokens is {needed} blocks of "
            f"{BLOCK_TOKENS}. Correct one of them, or leave hash_ids out."
        )
    return tuple(given)
