"""Read one event of OpenAI's Responses endpoint.

Events are typed: `response.output_text.delta` and other deltas bring text, and `response.completed`, `.incomplete` or
`.failed` end the stream, with the usage (platform.openai.com/docs/api-reference/responses-streaming; the types of the
package openai). There is no `[DONE]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...records.results import CONTENT, REASONING, REFUSAL, TOOLS

_CHANNELS: Mapping[str, str] = {
    "output_text": CONTENT,
    "refusal": REFUSAL,
    "reasoning": REASONING,
    "reasoning_text": REASONING,
    "reasoning_summary": REASONING,
    "reasoning_summary_text": REASONING,
    "function_call_arguments": TOOLS,
    "custom_tool_call_input": TOOLS,
    "mcp_call_arguments": TOOLS,
    "code_interpreter_call_code": TOOLS,
    "shell_call_command": TOOLS,
}
_NO_TEXT = frozenset(["audio"])
"""Deltas whose strings are no text: sound."""

_FINISHES: Mapping[str, str] = {"max_output_tokens": "length"}


@dataclass(frozen=True)
class ResponseEvent:
    """What an event brings: text of a channel, or the end of the stream with its reason, usage and error."""

    channel: str = ""
    text: str = ""
    finish: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    error: Any = None


def read_event(body: Mapping[str, Any]) -> ResponseEvent | None:
    """Return what an event brings; None if it is none of this endpoint. Fields of usage get the names of the others."""
    kind = body.get("type")
    if not isinstance(kind, str) or not kind.startswith("response."):
        return None
    name = kind.removeprefix("response.")
    if name in ("completed", "incomplete", "failed"):
        response = body.get("response")
        return _end(name, response if isinstance(response, dict) else {})
    delta = body.get("delta")
    if not name.endswith(".delta") or not isinstance(delta, str) or not delta:
        return ResponseEvent()
    what = name.removesuffix(".delta")
    return ResponseEvent() if what in _NO_TEXT else ResponseEvent(_CHANNELS.get(what, what), delta)


def _end(name: str, response: Mapping[str, Any]) -> ResponseEvent:
    usage, details = response.get("usage"), response.get("incomplete_details")
    reason = str(details.get("reason") or name) if isinstance(details, dict) else name
    finish = "stop" if name == "completed" else _FINISHES.get(reason, reason)
    told = usage if isinstance(usage, dict) else {}
    return ResponseEvent(
        finish=finish,
        usage={
            "prompt_tokens": told.get("input_tokens"),
            "completion_tokens": told.get("output_tokens"),
            "prompt_tokens_details": told.get("input_tokens_details"),
        },
        error=(response.get("error") or "The response failed.") if name == "failed" else None,
    )
