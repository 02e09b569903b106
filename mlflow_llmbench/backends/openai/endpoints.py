"""The endpoints of OpenAI's interface: their paths, and the fields in which requests differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...config.choices import LENGTH_FIELDS

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation."""


@dataclass(frozen=True)
class Endpoint:
    """One endpoint. `refusable`: fields of ours that a server may refuse, and that can be left out or renamed then.

    `length_fields`: names of the field of the output length, the usual one first; empty if nothing is generated.
    `least_output`: fewest output tokens that every server takes.
    """

    path: str
    prompt_field: str
    length_fields: tuple[str, ...] = ()
    refusable: tuple[str, ...] = ()
    least_output: int = 1

    def prompt(self, prompt: Prompt) -> dict[str, Any]:
        """Return the field of a prompt."""
        if self.prompt_field == "messages" and isinstance(prompt, str):
            return {"messages": [{"role": "user", "content": prompt}]}
        return {self.prompt_field: prompt}


_REFUSABLE = ("ignore_eos", "stream_options", "temperature", "max_tokens")

ENDPOINTS: Mapping[str, Endpoint] = {
    "completions": Endpoint("/v1/completions", "prompt", LENGTH_FIELDS, _REFUSABLE),
    "chat": Endpoint("/v1/chat/completions", "messages", LENGTH_FIELDS, _REFUSABLE),
    # Usage is always in its last event. OpenAI's own server takes no fewer than 16 tokens.
    "responses": Endpoint("/v1/responses", "input", ("max_output_tokens",), ("ignore_eos", "temperature"), 16),
    "embeddings": Endpoint("/v1/embeddings", "input"),
}
"""Value of the parameter `endpoint` → the endpoint."""
