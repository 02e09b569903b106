"""Quantization-aware training (QAT): its parameters, its training and held-out text, and the memory it needs.

`backends.huggingface.qat` trains, in a worker; `workflows.qat` is the command. A file beside the weights of a trained
checkpoint records how it was made.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any

from ..records import cell, reading
from ..records.cell import Cell, Options
from ..records.errors import UsageError
from ..records.parameter import Parameter
from . import spec
from .choices import BUNDLED_TEXT, WORKLOADS
from .parsers import PARSERS
from .spec import COMMANDS

QUANT = "int4-wo"
"""The quantization that is trained for: the one that `backends.huggingface.qat` emulates."""

LOSSES = ("distill", "lm")
RECIPE = "llmbench_qat.json"
"""File beside the weights of a trained checkpoint that records how it was made."""

ADAM_BYTES = 16
"""Bytes per trained parameter: weight, gradient and Adam's two moments, 4 bytes each."""

BEYOND = 1.4
"""Factor on the sum of known tensors, for activations and allocator overhead (seen with Gemma 3 270M on a CPU)."""


@dataclass(frozen=True)
class Training:
    """Parameters that only a training has; the others are those of a cell, `COMMANDS["qat"]`."""

    data: str = Parameter(
        BUNDLED_TEXT,
        "text to learn from: a text file, a JSON Lines file (text or prompt on each line), bundled, or a bundled "
        "prompt set; separate several by commas",
        "data",
    ).field()
    steps: int = Parameter(100, "steps of the optimizer", "count", high=10_000_000).field()
    learning_rate: float = Parameter(5e-5, "peak learning rate of Adam", "number", low=1e-9, high=1).field()
    batch_size: int = Parameter(
        4, "sequences per step; computed one after another, so memory does not grow", "count", high=65536
    ).field()
    sequence_tokens: int = Parameter(128, "tokens per sequence", "count", low=8, high=1_000_000).field()
    loss: str = Parameter(
        "distill",
        "distill = KL divergence from the unquantized model's next-token distribution; lm = cross-entropy of the next "
        "token",
        "loss",
    ).field()
    held_out: float = Parameter(
        0.2,
        "share of the data, at the end of each part, that is never trained on and measures quality",
        "number",
        low=0.01,
        high=0.9,
    ).field()
    freeze_embeddings: bool = Parameter(
        True, "do not train the embeddings and the output head: int4-wo does not quantize them", "flag"
    ).field()
    output: str | None = Parameter(
        None, "new folder for the trained checkpoint; none = in the results folder", "text", unset="none"
    ).field()


TRAINING: dict[str, Field[Any]] = {f.name: f for f in dataclasses.fields(Training)}
"""Name → declaration. `batch_size` has another meaning and another default here than in a cell."""

NAMES = (*COMMANDS["qat"], *TRAINING)
"""All parameters of the command."""


def declared(name: str) -> Field[Any]:
    """The declaration of a parameter of the command."""
    return TRAINING.get(name) or cell.PARAMETERS[name]


def as_text(name: str, value: object) -> str:
    """A parameter's value as it is written on the command line and logged."""
    return str(declared(name).metadata["unset"]) if value is None else cell.as_text(name, value)


def default_text(name: str) -> str:
    """The default of a parameter of the command as text."""
    return as_text(name, declared(name).default)


def parse_training(values: Mapping[str, object]) -> tuple[Cell, Options, Training]:
    """Validate the command's parameters; return the cell that is trained for, the options and the training.

    Raises UsageError.
    """
    for name in values:
        if name not in NAMES:
            raise UsageError(f"Unknown parameter: {name}. Known: {', '.join(NAMES)}.")
    shared = {name: value for name, value in values.items() if name not in TRAINING}
    for name in shared:
        if declared(name).metadata["sweep"] and len(spec.values_of(name, shared[name])) > 1:
            raise UsageError(f"{name} takes one value here: {shared[name]}. Train one model at a time.")
    asked = spec.parse({**shared, "quant": QUANT})
    own = {name: _parse(name, str(values.get(name, default_text(name))).strip()) for name in TRAINING}
    return asked.first, asked.options, Training(**own)  # type: ignore[arg-type]


def _parse(name: str, text: str) -> object:
    metadata = TRAINING[name].metadata
    if metadata["unset"] and text.lower() == metadata["unset"]:
        return None
    if metadata["kind"] == "loss":
        if text not in LOSSES:
            raise UsageError(f"Unknown loss: {text}. Give {' or '.join(LOSSES)}.")
        return text
    if metadata["kind"] == "data":
        for part in _parts(str(PARSERS["text"](name, text, metadata))):
            # os.path.isfile, since Path.is_file raises for a name that is too long
            if part not in (BUNDLED_TEXT, *_PROMPT_SETS) and not os.path.isfile(part):
                raise UsageError(
                    f"There is no data file {part}. "
                    f"Give a text file, a JSON Lines file, {BUNDLED_TEXT}, or {', '.join(_PROMPT_SETS)}."
                )
        return text
    return PARSERS[metadata["kind"]](name, text, metadata)


_PROMPT_SETS = tuple(name for name in WORKLOADS if name not in ("synthetic", "mixed"))


def _parts(data: str) -> list[str]:
    """Split a `data` parameter into files and sets. A file whose own name has a comma is not split."""
    return [data] if os.path.isfile(data) else cell.split_list(data)


# Memory


def needed_bytes(trained: int, frozen: int, vocabulary: int, training: Training) -> int:
    """Bytes that a training needs beyond the process itself, everything in float32.

    Per trained parameter 16 (`ADAM_BYTES`) + 4 for its quantized value, + 4 for its original value to distill; per
    frozen parameter 4; and arrays of the size of one sequence's logits: 4, to distill 6. All of it times `BEYOND`.
    """
    distills = training.loss == "distill"
    logits = 4 * training.sequence_tokens * vocabulary
    return int(
        BEYOND * (trained * (ADAM_BYTES + 4 + (4 if distills else 0)) + 4 * frozen + logits * (6 if distills else 4))
    )


# Record of a checkpoint's making


def recorded(folder: str) -> dict[str, str | int | float]:
    """Return a trained checkpoint's recipe as dotted params of a run; empty for any other folder."""
    file = Path(folder) / RECIPE
    if not file.is_file():
        return {}
    return {f"qat.{name}": value for name, value in reading.read_facts(file).items()}
