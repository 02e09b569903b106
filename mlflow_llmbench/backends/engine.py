"""Common parts of engines with a scheduler of their own (vLLM, OpenVINO GenAI).

These are: emission of steps, the checkpoint's tokenizer, and the errors of features that they lack.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from ..records.cell import Cell
from ..records.errors import MeasurementError
from ..records.results import ModelFacts
from .base import Emit
from .checkpoints import sources


class Engine:
    """The part of a backend that is the same for all engines."""

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        self.cell = cell
        self.facts = model
        self.tokenizer: Any = None

    def new_history(self) -> Any:
        raise MeasurementError(f"backend={self.cell.backend} keeps no history. Use history=none.")

    def encode_turns(self, messages: Sequence[str]) -> Sequence[Sequence[int]]:
        raise MeasurementError(f"backend={self.cell.backend} cannot be measured turn by turn. Use history=none.")

    def encode(self, text: str) -> Sequence[int]:
        if self.tokenizer is None:
            self.tokenizer = sources.load_tokenizer(self.cell, self.facts)
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def language_model(self) -> tuple[Any, Any]:
        raise MeasurementError(f"backend={self.cell.backend} gives lm-eval no model. Leave quality_tasks out.")


class Rows:
    """Emits a step as soon as every row has its token.

    An engine advances rows of one length together, so each of its steps is emitted at once. If one row is ahead
    (because another row's prompt was computed in parts), its token waits for the slowest row: the stamp is the time at
    which the whole batch had that many tokens.
    """

    def __init__(self, count: int, output_tokens: int, emit: Emit) -> None:
        self.waiting: list[deque[int]] = [deque() for _ in range(count)]
        self.left = [output_tokens] * count
        self.emit = emit

    def add(self, tokens: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Add the result of one step of the engine: row numbers, each with its new ids."""
        for row, ids in tokens:
            self.waiting[row].extend(ids)
            self.left[row] -= len(ids)
        while all(self.waiting):
            self.emit([row.popleft() for row in self.waiting])

    def require_whole(self) -> None:
        """Raise MeasurementError unless every row got exactly its number of tokens."""
        if any(self.left):
            raise MeasurementError(f"The engine ended its rows with {self.left} tokens left. Please report this.")
