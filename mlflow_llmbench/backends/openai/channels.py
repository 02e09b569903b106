"""Tell the channel of a chunk of text: the answer itself, reasoning, tool calls, a refusal, or a field of another name.

Servers put reasoning in fields of many names: `reasoning_content` (vLLM, SGLang, DeepSeek), `reasoning` (vLLM, Ollama,
Groq), `reasoning_details` (OpenRouter), `thinking_blocks` (LiteLLM), parts of `content` (Mistral).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...records.results import CONTENT, REASONING, REFUSAL, TOOLS

_VISIBLE = ("content", "text")
_FIELDS: Mapping[str, str] = {
    "reasoning_content": REASONING,
    "reasoning": REASONING,
    "reasoning_text": REASONING,
    "reasoning_details": REASONING,
    "thinking": REASONING,
    "thinking_blocks": REASONING,
    "thought": REASONING,
    "tool_calls": TOOLS,
    "function_call": TOOLS,
    "refusal": REFUSAL,
}
_NO_TEXT = frozenset(
    ["role", "name", "id", "type", "index", "object", "format", "signature", "data", "logprobs", "annotations",
     "encrypted_content", "expires_at", "token_ids", "finish_reason", "stop_reason"]
)  # fmt: skip
"""Fields whose strings are no text that a model wrote: names, keys, encrypted reasoning, sound."""


def channel_of(fields: Mapping[str, Any], is_delta: bool) -> tuple[str, str]:
    """Return the channel of a chunk, "" if it has no text, and its visible text.

    `fields` are those of the delta, or of a choice without one, where only known fields are read. A chunk with visible
    text is one of the answer, whatever else it has.
    """
    for name in _VISIBLE:
        value = fields.get(name)
        if text := "".join(_visible(value)):
            return CONTENT, text
        if isinstance(value, list) and _has_text(value):
            return REASONING, ""  # parts of other types: a server's way to tell reasoning
    for name, channel in _FIELDS.items():
        value = fields.get(name)
        if (bool(value) and channel == TOOLS) or _has_text(value):
            return channel, ""
    if is_delta:
        for name, value in fields.items():
            if name not in _NO_TEXT and name not in _VISIBLE and _has_text(value):
                return name, ""
    return "", ""


def _visible(value: object) -> Iterator[str]:
    """Yield the visible texts of a content field: a string, or a list of parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            if isinstance(part, dict) and part.get("type") in ("text", "output_text", None):
                yield from _visible(part.get("text"))
            elif isinstance(part, str):
                yield part


def _has_text(value: object) -> bool:
    """Return True if a string that a model wrote is anywhere in a value."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str) and one:
            return True
        if isinstance(one, dict):
            left += [inner for name, inner in one.items() if name not in _NO_TEXT]
        elif isinstance(one, list):
            left += one
    return False
