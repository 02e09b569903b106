"""Pass the tokens of `generate()` on as they come, and check that they come in time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ...records.errors import NotRealised
from ..base import Emit


class Streamer:
    """Passes the ids of each step on.

    generate() calls `put` first with the prompt, then once per step with ids that are on the host.
    """

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.put: Emit = self._skip_prompt

    def _skip_prompt(self, value: Any) -> None:
        self.put = self.emit

    def end(self) -> None:
        """Do nothing: nothing is buffered."""


@contextlib.contextmanager
def late_check(model: Any, streamer: Streamer) -> Iterator[Any]:
    """Raise NotRealised unless the first token is emitted after exactly one forward pass.

    With a deferred stop check, which transformers uses where reading the device is slow, each token would be emitted
    one step late, and every TTFT would be one step too long. Done once per load, in the very first call, which is a
    warm-up.
    """
    forwards: list[int] = []
    seen_at_first: list[int] = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    emit = streamer.emit

    def counting(step: Any) -> None:
        if not seen_at_first:
            seen_at_first.append(len(forwards))
        emit(step)

    try:
        yield Streamer(counting)
    finally:
        hook.remove()
    if seen_at_first and seen_at_first[0] != 1:
        raise NotRealised(
            f"The first token was emitted after {seen_at_first[0]} forward passes, not 1, so all stamps would be late. "
            "Use a transformers version without a deferred stop check on this device."
        )
