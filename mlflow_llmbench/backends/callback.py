"""A user's own function as a backend, measured by `workflows.in_process`, never started from a command line."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

from ..records.cell import Cell
from ..records.errors import LlmbenchError, MeasurementError, UsageError, first_line
from ..records.quantizations import schemes_of
from ..records.results import LoadInfo, ModelFacts
from .base import Capabilities, DeviceMemory, Emit, History, NothingToFetch

Generate = Callable[[Sequence[Sequence[int]], int, Emit], object]
"""`generate(prompts, output_tokens, emit)` generates so many tokens for each prompt (ids).

It calls `emit(ids)` with one id per prompt as soon as they are there.
"""


class CallbackBackend(NothingToFetch):
    """Calls the function that it is given; there is nothing to load."""

    capabilities = Capabilities(  # `quant` is a label of what the function runs
        quantizations=schemes_of("transformers")
    )
    device = "cpu"

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        raise UsageError(
            f"{cell.model} was measured with backend=callback, a function in a program of yours. "
            "Run that program again: see mlflow_llmbench.workflows.in_process."
        )

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        self.cell = cell
        self.function: Generate | None = None
        self.encoder: Callable[[str], Sequence[int]] | None = None
        self.vocab_size = 0
        self.raised = ""  # traceback of the error that the function raised

    def load(self) -> LoadInfo:
        return self.describe()

    def describe(self) -> LoadInfo:
        return LoadInfo(None, facts={"model.device": self.device}, vocab_size=self.vocab_size)

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit, history: Any = None) -> None:
        assert self.function
        try:
            self.function(prompts, output_tokens, emit)
        except (LlmbenchError, MemoryError):
            raise
        except Exception as error:
            self.raised = traceback.format_exc()
            raise MeasurementError(
                f"The function that generates raised {type(error).__name__}: {first_line(error)}."
            ) from error

    def encode(self, text: str) -> Sequence[int]:
        assert self.encoder
        return self.encoder(text)

    def encode_turns(self, messages: Sequence[str]) -> Sequence[Sequence[int]]:
        raise MeasurementError("A function of your own cannot be measured turn by turn. Use history=none.")

    def new_history(self) -> History:
        raise MeasurementError("A function of your own keeps no history. Use history=none.")

    def decode(self, ids: Sequence[int]) -> str:
        raise MeasurementError("A function of your own has no tokenizer here.")

    def logits(self, ids: Sequence[int], last: int) -> Any:
        raise MeasurementError("A function of your own has no logits here.")

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        return None

    def peaks(self) -> dict[str, float]:
        return {}

    def trim(self) -> None: ...

    def close(self) -> None: ...
