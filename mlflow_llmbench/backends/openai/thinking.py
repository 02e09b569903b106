"""Fields that switch a model's thinking off, by server, and signs that it thinks all the same.

No field is common to all servers, and most ignore the fields that they do not know, so that only an answer tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...records.results import REASONING, RequestRecord

FIELDS: tuple[dict[str, Any], ...] = (
    {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},  # vLLM, SGLang, llama.cpp
    {"reasoning_effort": "none"},  # OpenAI, Ollama
    {"thinking": {"type": "disabled"}},  # DeepSeek, GLM, Kimi, Anthropic by proxies
    {"reasoning": {"enabled": False}},  # OpenRouter
    {"enable_thinking": False},  # DashScope, SiliconFlow
)

PROBE_TOKENS = 16
"""Output tokens of the answer that is looked at: thinking comes first."""

MARKS = ("<think", "<|channel|>analysis", "<reasoning", "[THINK]")
"""Beginnings of thoughts in the text of an answer, where the server does not take them out."""


def shows_thinking(record: RequestRecord, text: Sequence[str]) -> bool:
    """Return True if an answer has a reasoning channel, or if its visible text begins with thoughts."""
    return REASONING in (record.channels or {}) or "".join(text).lstrip().startswith(MARKS)
