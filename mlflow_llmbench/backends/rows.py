"""Rows that an engine of its own generates together: its tokens, row by row as they come, become steps of all rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..errors import MeasurementError
from .base import Emit


class Rows:
    """Emits a step as soon as every row has its token.

    An engine takes rows of one length in step, and each of its steps is emitted at once. Where it does not (a prompt that it computed in
    parts, so that another row was ahead), a row's token waits for the slowest row: the stamp is when the whole batch had so many tokens.
    """

    def __init__(self, count: int, output_tokens: int, emit: Emit) -> None:
        self.waiting: list[deque[int]] = [deque() for _ in range(count)]
        self.left = [output_tokens] * count
        self.emit = emit

    def add(self, tokens: Sequence[tuple[int, Sequence[int]]]) -> None:
        """What one step of the engine brought: numbers of rows, each with its new ids."""
        for row, ids in tokens:
            self.waiting[row].extend(ids)
            self.left[row] -= len(ids)
        while all(self.waiting):
            self.emit([row.popleft() for row in self.waiting])

    def require_whole(self) -> None:
        """Raise MeasurementError unless every row has had all of its tokens, and no more."""
        if any(self.left):
            raise MeasurementError(f"The engine ended its rows with {self.left} tokens left. Please report this.")
