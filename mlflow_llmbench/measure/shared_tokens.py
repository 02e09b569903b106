"""Count the tokens that prompts of a repetition share with earlier ones: what an ideal prefix cache would hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..records.cell import Cell
from ..records.results import RequestRecord
from ..workloads.conversations import Conversation
from ..workloads.prompts import lengths_of
from ..workloads.sharing import PrefixTree, parts_of, shares_prefixes


def shared_requests(records: Sequence[RequestRecord], cell: Cell, numbers: Sequence[int]) -> list[RequestRecord]:
    """Return the records of single requests with their `shared_tokens`, if the load says what they share."""
    if not shares_prefixes(cell):
        return list(records)
    tree = PrefixTree()
    parts = [parts_of(cell, number, lengths_of(cell, number)[0] or None) for number in numbers]
    return [
        dataclasses.replace(record, shared_tokens=tree.take(own)) for record, own in zip(records, parts, strict=True)
    ]


def shared_turns(
    records: Sequence[RequestRecord], cell: Cell, conversations: Sequence[Conversation]
) -> list[RequestRecord]:
    """Return the records of conversations with their `shared_tokens`, as far as the server counts prompts.

    A first turn has the prefix of its group. A later one has the prompt of the turn before it, and that turn's answer
    without its last token, which no step has computed, if the answer itself is sent back.
    """
    tree = PrefixTree()
    turns = {(record.conversation, record.turn): record for record in records}
    found = []
    for record in records:
        number, turn = record.conversation or 0, record.turn or 1
        before = turns.get((number, turn - 1))
        if before is None:
            shared: int | None = tree.take(parts_of(cell, number, None))
        else:
            replaced = conversations[number % len(conversations)].turns[turn - 2].answer
            shared = _held_after(before, sent_back=replaced is None)
        found.append(dataclasses.replace(record, shared_tokens=shared))
    return found


def _held_after(before: RequestRecord, sent_back: bool) -> int | None:
    """Return the tokens of a turn that the next one begins with; None if the server does not count prompts."""
    if before.prompt_tokens is None:
        return None
    return before.prompt_tokens + (before.output_tokens - 1 if sent_back and before.channels is None else 0)
