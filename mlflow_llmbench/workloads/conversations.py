"""Conversations: messages in turns, of users and of agents that call tools, as files have them.

One line of a file is a conversation, as OpenAI's chat endpoint takes it: `messages` of the roles system, user,
assistant and tool, and `tools` that the model may call. A message may have `delay_ms`, the time to think before it is
sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..records.errors import UsageError
from ..records.redaction import excerpt

Message = Mapping[str, Any]
"""A message as the endpoint takes it: its role, content, and tool calls."""

MOST_DELAY_MS = 86_400_000


@dataclass(frozen=True)
class Turn:
    """What is sent at once: messages after the answer before them, `delay_ms` after it has ended.

    `answer`: the recorded answer, if it calls tools. It is sent back in place of the server's own, because the messages
    after it are the results of exactly these calls.
    """

    messages: tuple[Message, ...]
    delay_ms: float = 0.0
    answer: Message | None = None


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation, and the tools that the model is told of."""

    turns: tuple[Turn, ...]
    tools: tuple[Message, ...] = ()

    @property
    def is_plain(self) -> bool:
        """True if each turn is a text of the user, sent at once."""
        return not self.tools and all(map(_is_plain, self.turns))

    @property
    def asks(self) -> tuple[str, ...]:
        """The user's texts, of a plain conversation."""
        return tuple(turn.messages[0]["content"] for turn in self.turns)

    def identity(self) -> object:
        """JSON data of everything that a server gets and when."""
        if self.is_plain:
            return list(self.asks)
        turns = [[list(turn.messages), turn.delay_ms, turn.answer] for turn in self.turns]
        return {"turns": turns, "tools": list(self.tools)}


def _is_plain(turn: Turn) -> bool:
    only = turn.messages[0]
    return len(turn.messages) == 1 and only["role"] == "user" and isinstance(only["content"], str) and not turn.delay_ms


def parse_conversation(data: Mapping[str, Any], origin: str) -> tuple[Conversation, str]:
    """Return a conversation and all of it as one text. Raises UsageError, which begins with `origin`."""
    messages = _checked(data["messages"], origin)
    tools = data.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(
            f'{origin}: "tools" is not a list of objects: {excerpt(str(tools), 60)}. Write them as the chat endpoint '
            "takes them, or leave them out."
        )
    turns: list[Turn] = []
    said: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] != "assistant":
            said.append(message)
            continue
        turns.append(_turn(said, message if message.get("tool_calls") else None))
        said = []
    return Conversation((*turns, _turn(said)), tuple(tools)), _as_text(messages)


def _turn(messages: Sequence[Mapping[str, Any]], answer: Message | None = None) -> Turn:
    delay_ms = sum(float(message.get("delay_ms", 0)) for message in messages)
    sent = ({name: value for name, value in message.items() if name != "delay_ms"} for message in messages)
    return Turn(tuple(sent), delay_ms, answer)


def _checked(given: object, origin: str) -> list[dict[str, Any]]:
    """Return the messages. Raises UsageError for the first one that is none or cannot come where it is."""
    if not isinstance(given, list) or not given:
        _refuse(origin, "are not a list of messages")
    open_calls: list[str] = []
    before = ""
    for number, message in enumerate(given, 1):
        where = f"{origin}, message {number}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant", "tool"):
            _refuse(origin, f"have no role that is known in message {number}: {excerpt(str(role), 40)}")
        expected = _may_follow(before, bool(open_calls))
        if role not in expected:
            _refuse(origin, f"have {role} at message {number}, where only {' or '.join(expected)} can be")
        _check_delay(message, role, where, first=before in ("", "system"))
        if role == "tool":
            if message.get("tool_call_id") not in open_calls:
                _refuse(
                    origin,
                    f"have a tool at message {number} whose tool_call_id is none of the calls before it: "
                    f"{excerpt(str(message.get('tool_call_id')), 40)}",
                )
            open_calls.remove(message["tool_call_id"])
        if role == "assistant":
            open_calls = _calls(message, origin, number)
        _check_content(message, role, origin, number)
        before = role
    if before == "assistant":
        _refuse(origin, "end with an answer, and a conversation ends with what is asked")
    if open_calls:
        _refuse(origin, f"have no tool that answers the call {excerpt(open_calls[0], 40)}")
    return given


def _may_follow(before: str, calls_open: bool) -> tuple[str, ...]:
    """Return the roles that may follow a role."""
    if calls_open:
        return ("tool",)
    return {
        "": ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "tool": ("assistant", "user"),
        "assistant": ("user",),
    }[before]


def _calls(message: Mapping[str, Any], origin: str, number: int) -> list[str]:
    """Return the ids of the calls that an answer makes."""
    calls = message.get("tool_calls") or []
    ids = [call.get("id") if isinstance(call, dict) else None for call in calls] if isinstance(calls, list) else [None]
    if not all(isinstance(one, str) and one for one in ids) or len(set(ids)) < len(ids):
        _refuse(origin, f"have tool_calls in message {number} that are not a list of calls with an id each")
    return [str(one) for one in ids]


def _check_content(message: Mapping[str, Any], role: str, origin: str, number: int) -> None:
    content = message.get("content")
    if role == "assistant" and message.get("tool_calls") and content in (None, ""):
        return
    if role == "user" and isinstance(content, list) and content and all(map(_is_part, content)):
        return
    if not isinstance(content, str) or not (content.strip() or role == "tool"):
        _refuse(origin, f"have no text in message {number}: {excerpt(str(content), 40)}")


def _is_part(part: object) -> bool:
    """Return True for a part of a user's content: a text, or something else under the name of its type."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        return False
    return isinstance(part.get("text"), str) if kind == "text" else kind in part


def _check_delay(message: Mapping[str, Any], role: str, where: str, first: bool) -> None:
    delay = message.get("delay_ms", 0)
    if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay <= MOST_DELAY_MS:
        raise UsageError(
            f"{where}, has a delay_ms that is no number of milliseconds from 0 to {MOST_DELAY_MS}: "
            f"{excerpt(str(delay), 40)}. Correct it, or leave it out."
        )
    if delay and (role == "assistant" or first):
        which = (
            "an answer, which the server gives" if role == "assistant" else "the first turn, which nothing is before"
        )
        raise UsageError(f"{where}, has a delay_ms and is of {which}. Give it to a message after an answer.")


def _refuse(origin: str, what: str) -> NoReturn:
    raise UsageError(
        f'{origin}: "messages" are not a conversation: they {what}. Write a list of {{"role": "user", "content": "…"}} '
        'and {"role": "assistant", …} in turns that begins and ends with the user; a system message may come first, '
        "and tool messages after their tool_calls."
    )


def _as_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a conversation as one text that ends where the next answer begins."""
    if {message["role"] for message in messages} <= {"user", "assistant"}:
        return plain_dialogue([_text_of(message) for message in messages])
    lines = [f"{message['role'].capitalize()}: {_text_of(message)}" for message in messages]
    return "\n".join([*lines, "Assistant:"])


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = " ".join(part["text"] for part in content if part["type"] == "text")
    calls = message.get("tool_calls") or ()
    return " ".join(filter(None, [str(content), *(json.dumps(call.get("function", {})) for call in calls)]))


def turn_texts(messages: Sequence[str], render: Callable[[list[dict[str, str]]], str] | None) -> list[str]:
    """Return the text that each user message adds to a conversation, including the end of the answer before it.

    `render`: the tokenizer's chat template, from messages with roles to text that ends where the answer begins; None
    gives the plain form of `plain_dialogue`. A stand-in for the answer shows what the template puts between two turns,
    so the text of the history is never rendered again. Raises UsageError for a template that changes answers.
    """
    if render is None:
        return [
            f"{'' if number == 0 else chr(10)}User: {message}\nAssistant:" for number, message in enumerate(messages)
        ]
    found: list[str] = []
    chat: list[dict[str, str]] = []
    for message in messages:
        chat.append({"role": "user", "content": message})
        _, answer, added = render(chat).rpartition(STAND_IN)
        if chat[:-1] and not answer:
            raise UsageError(
                "The chat template of this model leaves earlier answers out, so that no history can be kept. "
                "Use history=none."
            )
        found.append(added)
        chat.append({"role": "assistant", "content": STAND_IN})
    return found


STAND_IN = "an-answer-that-stands-here"
"""Text that no chat template changes."""


def plain_dialogue(messages: Sequence[str]) -> str:
    """Join alternating messages into one text, `User: …` and `Assistant: …`, that ends where the next answer begins."""
    lines = [f"{'Assistant' if number % 2 else 'User'}: {message}" for number, message in enumerate(messages)]
    return "\n".join([*lines, "Assistant:"])
