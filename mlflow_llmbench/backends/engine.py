"""Common parts of engines with a scheduler of their own (vLLM, OpenVINO GenAI).

These are: a batch whose rows are requests, the size of the engine, the checkpoint's tokenizer, and the errors of
features that they lack.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from ..records.cell import Cell
from ..records.errors import MeasurementError, first_line, foreign_errors
from ..records.results import ModelFacts
from .base import Capabilities, Emit
from .checkpoints import sources

MIN_ROWS, MAX_STEP_TOKENS = 256, 16_384
"""Least number of rows that an engine has room for, and most prompt tokens that it computes in one step."""

AUTO_TOKENS = 2048
"""Assumed prompt tokens per row if the workload gives the lengths."""


class EngineBase:
    """The part of a backend that is the same for all engines."""

    capabilities: Capabilities

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        self.cell = cell
        self.facts = model
        self.tokenizer: Any = None

    def _require_room(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> None:
        """Raise MeasurementError if rows would have to wait for others' part of the KV cache."""
        raise NotImplementedError

    def _run(self, prompts: Sequence[Sequence[int]], output_tokens: int, steps: StepAligner) -> None:
        """Submit the prompts and step the engine until all are answered."""
        raise NotImplementedError

    def _error_text(self, error: Exception) -> str:
        """Return the line that says what is wrong in an error of the engine."""
        return first_line(error)

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit, history: Any = None) -> None:
        self._require_room(prompts, output_tokens)
        steps = StepAligner(len(prompts), output_tokens, emit)
        with foreign_errors("generating", self.capabilities.library, self._error_text):
            self._run(prompts, output_tokens, steps)
        steps.require_whole()

    def _total_tokens(self) -> int:
        """Return the prompt and output tokens of all rows of the largest cell together: the first of a group."""
        return self.cell.batch_size * ((self.cell.prompt_tokens or AUTO_TOKENS) + self.cell.output_tokens)

    def _scheduler_limits(self) -> dict[str, Any]:
        """Return the settings of the scheduler that all engines share, sized for the largest cell."""
        return {
            "max_num_seqs": max(MIN_ROWS, self.cell.batch_size),
            "max_num_batched_tokens": max(2048, min(self._total_tokens(), MAX_STEP_TOKENS)),
            "enable_prefix_caching": False,
        }

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

    def trim(self) -> None:
        """Free nothing: the engine's KV cache serves all cells of a load."""


class StepAligner:
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
