"""Read and cut texts for quantization-aware training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.choices import MIN_TEXT_TOKENS
from ..config.training import _PROMPT_SETS, Training, _parts
from ..records import reading
from ..records.errors import UsageError
from ..records.reading import Unreadable
from ..records.results import hash16
from .prompts import load_prompts, load_text

LEAST_PARTS = 10
"""A text is split into paragraphs, lines or words: the first of these that gives at least this many parts."""


@dataclass(frozen=True)
class Texts:
    """The data: training text and held-out text. `name` is the `data` parameter without folders."""

    name: str
    training: str
    held_out: str

    @property
    def digest(self) -> str:
        """16 hex digits for both parts."""
        return hash16([self.training, self.held_out])


# Data


def read_texts(training: Training) -> Texts:
    """Read the data and split it. The end of each file or set is held out, at whole paragraphs, lines or prompts.

    Raises UsageError for data that cannot be read, and for data too short for enough tokens under any tokenizer.
    """
    learned, held = [], []
    for part in _parts(training.data):
        pieces, joint = _pieces(part)
        cut = _cut([len(piece) for piece in pieces], training.held_out)
        learned.append(joint.join(pieces[:cut]))
        held.append(joint.join(pieces[cut:]))
    name = "+".join(Path(part).name for part in _parts(training.data))
    texts = Texts(name, "\n\n".join(learned).strip(), "\n\n".join(held).strip())
    require_enough(training, len(texts.training.encode()), len(texts.held_out.encode()), "bytes")
    return texts


def require_enough(training: Training, learned: int, held: int, unit: str = "tokens") -> None:
    """Raise UsageError unless both parts have enough tokens.

    Before the tokens are known, lengths are given in bytes, which are never fewer.
    """
    least = training.batch_size * training.sequence_tokens
    if learned < least:
        raise UsageError(
            f"The data are too short to train on: {learned:,} {unit} beside what is held out, and one step takes "
            f"batch_size={training.batch_size} × sequence_tokens={training.sequence_tokens} tokens. "
            "Give more text, or smaller steps."
        )
    if held < MIN_TEXT_TOKENS:
        raise UsageError(
            f"What is held out is too short to measure quality on: {held:,} {unit}, and {MIN_TEXT_TOKENS} tokens "
            f"are needed. Give more text, or a larger held_out than {training.held_out:g}."
        )


def _pieces(name: str) -> tuple[Sequence[str], str]:
    """Pieces of a file or set, and the separator between them. Raises UsageError if there are too few."""
    if name in _PROMPT_SETS:
        return load_prompts(name).texts, "\n\n"
    if name.endswith((".jsonl", ".json")):
        return _documents(name), "\n\n"
    text = load_text(name).content
    for joint in ("\n\n", "\n", " "):
        pieces = [piece for piece in text.split(joint) if piece.strip()]
        if len(pieces) >= LEAST_PARTS:
            return pieces, joint
    raise UsageError(f"The data are too short to train on: {name} has {len(text)} characters. Give more text.")


def _documents(file: str) -> Sequence[str]:
    """Texts of a JSON Lines file: the `text` of each line, or else its `prompt` or `messages` as in a workload.

    Raises UsageError.
    """
    try:
        lines = [line for _, _, line in reading.read_json_lines(file)]
    except Unreadable as error:
        raise UsageError(f'Cannot read {file}: {error}. Write {{"text": "…"}} on each line, in UTF-8.') from None
    texts = [line.get("text") if isinstance(line, dict) else None for line in lines]
    if lines and all(isinstance(text, str) and text.strip() for text in texts):
        return [str(text) for text in texts]
    return load_prompts(file).texts


def _cut(lengths: Sequence[int], share: float) -> int:
    """Number of pieces to train on: at least one, leaving at least one held out if there are two."""
    total, seen = sum(lengths), 0
    for number, length in enumerate(lengths):
        if number and seen + length > (1 - share) * total:
            return number
        seen += length
    return max(len(lengths) - 1, 1)
