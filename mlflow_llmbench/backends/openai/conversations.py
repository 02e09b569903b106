"""Send conversations turn by turn, each with the answers that came before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...loadgen.http1 import Exchange
from ...records.cell import Cell
from ...workloads.prompts import PromptSet
from .answers import answer_of

if TYPE_CHECKING:
    from .backend import OpenAIBackend


class Conversations:
    """The conversations of one repetition, turn by turn. Each turn sends all earlier turns and the server's answers.

    An answer is parsed when it has ended, in the client's single thread, because the next turn needs its text. The time
    of that is part of the lag of the client's event loop. A failed turn ends its conversation. Each conversation begins
    with unique words, so that no prefix cache holds it from an earlier repetition. Its later turns may hit the cache,
    as they would in use.
    """

    def __init__(self, backend: OpenAIBackend, prompts: PromptSet, cell: Cell, repetition: int) -> None:
        self.backend, self.prompts, self.cell, self.repetition = backend, prompts, cell, repetition
        self.said: dict[int, list[dict[str, str]]] = {}

    def begin(self, number: int) -> bytes:
        """Build the request of the first turn of a conversation."""
        first = PromptSet("synthetic").words(self.cell, self.repetition, number, 8, self.backend.conversation_prefix)
        self.said[number] = [{"role": "user", "content": f"{first} {self._asks(number)[0]}"}]
        return self._turn(number, 1)

    def follow_up(self, exchange: Exchange) -> bytes | None:
        """Build the request of the turn after an answer; None after the last turn or a failure."""
        number, turn = exchange.conversation or 0, exchange.turn or 1
        asks = self._asks(number)
        answer = answer_of(exchange) if turn < len(asks) else None
        if answer is None or answer.fault:
            del self.said[number]
            return None
        self.said[number] += [
            {"role": "assistant", "content": "".join(answer.text)},
            {"role": "user", "content": asks[turn]},
        ]
        return self._turn(number, turn + 1)

    def _asks(self, number: int) -> tuple[str, ...]:
        return self.prompts.conversations[number % len(self.prompts.conversations)]

    def _turn(self, number: int, turn: int) -> bytes:
        return self.backend.body(self.said[number], self.cell.output_tokens, f"{number}-{turn}")
