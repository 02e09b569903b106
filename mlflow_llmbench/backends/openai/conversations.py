"""Send conversations turn by turn, each with the answers that came before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...loadgen.client import NextRequest
from ...loadgen.http1 import Exchange
from ...records.cell import Cell
from ...workloads.conversations import Conversation, Message
from ...workloads.prompts import PromptSet, shared_words, unique_words
from .answers import answer_of

if TYPE_CHECKING:
    from .backend import OpenAIBackend


class Conversations:
    """The conversations of one repetition, turn by turn. Each turn sends all earlier turns and the server's answers.

    A recorded answer that calls tools is sent back in place of the server's own, because the results that follow are
    those of its calls. An answer is parsed when it has ended, in the client's single thread, because the next turn
    needs its text. The time of that is part of the lag of the client's event loop. A failed turn ends its conversation.
    Each conversation begins with the prefix of its group, if there are any, and then with unique words, so that no
    prefix cache holds it from an earlier repetition. Its later turns may hit the cache, as they would in use.
    """

    def __init__(self, backend: OpenAIBackend, prompts: PromptSet, cell: Cell, repetition: int) -> None:
        self.backend, self.prompts, self.cell, self.repetition = backend, prompts, cell, repetition
        self.said: dict[int, list[Message]] = {}

    def begin(self, number: int) -> bytes:
        """Build the request of the first turn of a conversation."""
        first, *others = self._conversation(number).turns[0].messages
        self.said[number] = [{**first, "content": _after(self._beginning(number), first["content"])}, *others]
        return self._turn(number, 1)

    def follow_up(self, exchange: Exchange) -> NextRequest | None:
        """Build the request of the turn after an answer; None after the last turn or a failure."""
        number, turn = exchange.conversation or 0, exchange.turn or 1
        turns = self._conversation(number).turns
        answer = answer_of(exchange) if turn < len(turns) else None
        if answer is None or answer.fault:
            del self.said[number]
            return None
        own = {"role": "assistant", "content": "".join(answer.text)}
        self.said[number] += [turns[turn - 1].answer or own, *turns[turn].messages]
        return NextRequest(self._turn(number, turn + 1), round(turns[turn].delay_ms * 1e6))

    def _conversation(self, number: int) -> Conversation:
        return self.prompts.conversations[number % len(self.prompts.conversations)]

    def _beginning(self, number: int) -> str:
        """Return the words before a conversation: those of its group, then unique ones."""
        unique = self.backend.conversation_prefix
        shared = shared_words(self.cell, self.repetition, number, unique, self.backend.tokens_per_word)
        return " ".join([*shared, *unique_words(self.repetition, number, unique)])

    def _turn(self, number: int, turn: int) -> bytes:
        tools = self._conversation(number).tools
        more: dict[str, Any] = {"tools": list(tools)} if tools else {}
        return self.backend.body(self.said[number], self.cell.output_tokens, f"{number}-{turn}", more)


def _after(beginning: str, content: Any) -> Any:
    """Return the content of a message after some words: a text, or a list of parts."""
    if isinstance(content, str):
        return f"{beginning} {content}"
    return [{"type": "text", "text": beginning}, *content]
