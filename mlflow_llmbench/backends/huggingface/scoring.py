"""Quality of a loaded model: likelihood of a text, and next-token distributions compared with the unquantized model's.

The unquantized model computes the reference in a process of its own, since two models at once may not fit. The
reference is a safetensors file: for each prompt, its ids with the model's own greedy continuation, and the *logits* at
each position of the continuation, in the dtype in which the model gives them. Log-probabilities in fp16 would take as
much room and be rounded. With logits nothing is lost, and a model compared with itself diverges by 0. All sums over
the vocabulary are in double precision.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.choices import MIN_TEXT_TOKENS
from ...records import reading
from ...records.errors import MeasurementError, NotFinite, UsageError
from ...records.results import Divergence, ModelFacts, TextScores, hash16
from ...workloads.prompts import Text, load_prompts
from .. import accelerator
from ..base import Backend

if TYPE_CHECKING:
    import torch


WINDOW, STRIDE = 512, 256
"""Maximum number of tokens that the model sees, and tokens that each window after the first scores."""

MOST_TEXT_TOKENS = 16_384
"""Maximum number of scored tokens of a text. A book on a CPU would take hours; the interval is narrow long before."""

REFERENCE_BYTES = 300_000_000
"""Maximum size in bytes of the logits of one reference; a row of Gemma's vocabulary takes half a megabyte."""

MOST_PROMPTS, MOST_POSITIONS, LEAST_POSITIONS = 64, 32, 8
MOST_PROMPT_TOKENS = 512
PASSAGE_TOKENS = 32  # of a prompt cut from the text, if the workload has no prompts
MOST_OTHER_WORDS = 0.01
BEFORE = 8  # ids before those whose bytes are counted
ROWS = 8  # positions whose distributions are held in double precision at once

Progress = Callable[[int, int], None]
"""Called with the number of the text or prompt that is scored next, from 1, and with their count."""


@dataclass(frozen=True)
class Reference:
    """A reference file. `prompts`: ids with the continuation, and number of positions at their end with logits."""

    path: Path
    name: str
    digest: str
    prompts: tuple[tuple[tuple[int, ...], int], ...]
    nll: tuple[tuple[float, ...], ...]
    text: tuple[tuple[int, ...], tuple[int, ...]]  # ids of the scored text: the tokenizer's prefix, and its own
    words: Mapping[str, str]  # id → decoded word, of every id in the prompts and in the text


def same_words(backend: Backend, known: Reference) -> bool:
    """Return True if the ids of a reference mean the same words to a model.

    Spaces around a word are ignored, since tokenizers write them in different ways. With the same vocabulary, runtimes
    tokenize some texts differently (llama.cpp: runs of spaces and line ends), so all get the ids of the reference.
    They also decode a few special words differently, so one word in a hundred may differ.
    """
    backend.encode("")  # loads the tokenizer
    other = sum(backend.decode([int(number)]).strip() != word.strip() for number, word in known.words.items())
    return other <= MOST_OTHER_WORDS * len(known.words)


# Likelihood of a text


def windows(count: int, window: int, stride: int, begin: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield sliding windows over `count` tokens: (first token seen, first token scored, end).

    Each token from `begin` on is scored once. The first window scores all tokens that it sees. Each later window scores
    `stride` more tokens and sees `window` in all, so nearly every token has at least `window − stride` before it
    ("Perplexity of fixed-length models", Hugging Face transformers documentation).
    """
    end = min(window, count)
    yield 0, begin, end
    while end < count:
        first, end = end, min(end + stride, count)
        yield max(0, end - window), first, end


def score_text(
    backend: Backend, text: Text, context: int | None, progress: Progress, known: Reference | None = None
) -> TextScores:
    """Compute the negative log-likelihood in nats of each token of a text, window by window.

    With a reference, its tokens are scored. Every window begins with the tokenizer's prefix (a beginning-of-sequence
    token): a model trained with it does much worse without it. Raises UsageError if the text is too short,
    MeasurementError if the reference scored other windows.
    """
    prefix, ids = (list(known.text[0]), list(known.text[1])) if known else split_prefix(backend, text.content)
    reference_nll = known.nll if known else ()
    if len(ids) < MIN_TEXT_TOKENS:
        raise UsageError(
            f"The text {text.name} is too short for a perplexity: {len(ids)} tokens. "
            f"Give at least {MIN_TEXT_TOKENS} tokens of text."
        )
    size = min(WINDOW, context or WINDOW)
    stride = min(STRIDE, size // 2)
    plan = list(windows(min(len(ids), MOST_TEXT_TOKENS), size - len(prefix), stride, 0 if prefix else 1))
    nll = []
    for number, (start, first, end) in enumerate(plan, 1):
        progress(number, len(plan))
        seen = [*prefix, *ids[start : end - 1]]
        nll.append(tuple(losses(backend.logits(seen, end - first), ids[first:end])))
    if reference_nll and [*map(len, reference_nll)] != [*map(len, nll)]:
        raise MeasurementError(
            "The reference scored other windows of the text. Delete its file, so that it is computed again."
        )
    own_bytes = token_bytes(backend, text.content, ids, [(first, end) for _, first, end in plan])
    return TextScores(text.name, len(ids), size, stride, tuple(nll), reference_nll, own_bytes)


def token_bytes(
    backend: Backend, text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], ...] | None:
    """Return the UTF-8 bytes of the text that each id stands for, for the ids of each span (first, end).

    They are by how much the decoded text grows with the id, given the `BEFORE` ids before its span: so they add up,
    whatever a tokenizer does with spaces. Of a character in several tokens the parts are not exact, their sum is. None
    if decoding does not give the text back, spaces aside.
    """
    decoded = "".join(backend.decode(ids[: spans[-1][1]]).rstrip("\ufffd").split())
    if not "".join(text.split()).startswith(decoded):
        return None
    found = []
    for first, end in spans:
        start = max(0, first - BEFORE)
        lengths = [len(backend.decode(ids[start:place]).encode()) for place in range(first, end + 1)]
        found.append(tuple(after - before for before, after in itertools.pairwise(lengths)))
    return tuple(found)


def split_prefix(backend: Backend, text: str) -> tuple[list[int], list[int]]:
    """Return the prefix, which is the ids that the tokenizer puts before any text, and the ids of the text itself."""
    prefix, ids = list(backend.encode("")), list(backend.encode(text))
    if ids[: len(prefix)] != prefix:
        prefix = []
    return prefix, ids[len(prefix) :]


def losses(logits: torch.Tensor, targets: Sequence[int]) -> list[float]:
    """Return −log p(target) in nats for each row of logits. Raises MeasurementError if it is not finite."""
    import torch

    found: list[float] = []
    for start in range(0, len(targets), ROWS):
        own = accelerator.doubled(logits[start : start + ROWS])
        wanted = torch.tensor(targets[start : start + ROWS], device=own.device)
        found += torch.nn.functional.cross_entropy(own, wanted, reduction="none").tolist()
    return [round(_finite(value), 6) for value in found]


def _finite(value: float) -> float:
    if not abs(value) < float("inf"):
        raise NotFinite(f"The model gave logits that are not finite ({value}), so its quality is not defined.")
    return value


# Comparison with a reference


def compare(backend: Backend, reference: Reference, progress: Progress, is_reference: bool = False) -> Divergence:
    """Run the model on each prompt of a reference with its continuation, and compare distributions at each position.

    Raises MeasurementError if the vocabularies differ in size, or if a divergence is not finite.
    """
    from safetensors import safe_open

    kl: list[tuple[float, ...]] = []
    agrees: list[tuple[bool, ...]] = []
    with safe_open(reference.path, "pt") as file:
        for number, (ids, positions) in enumerate(reference.prompts):
            progress(number + 1, len(reference.prompts))
            its = file.get_tensor(f"logits.{number}")
            own = backend.logits(ids[:-1], positions)
            if own.shape != its.shape:
                raise MeasurementError(
                    f"The model has {own.shape[1]} words, but the unquantized one has {its.shape[1]}. "
                    "They cannot be compared."
                )
            if not bool(its.isfinite().all()):
                raise MeasurementError(
                    f"The unquantized model {reference.name} gave logits that are not finite, so nothing can be "
                    "compared with it."
                )
            if not bool(own.isfinite().all()):
                raise NotFinite("The model gave logits that are not finite, so it cannot be compared.")
            distances, same = divergence(its.to(own.device), own)
            kl.append(tuple(float(f"{_finite(value):.6g}") for value in distances))
            agrees.append(tuple(same))
    return Divergence(reference.name, reference.digest, tuple(kl), tuple(agrees), is_reference)


def divergence(reference: torch.Tensor, own: torch.Tensor) -> tuple[list[float], list[bool]]:
    """Return KL(reference‖own) in nats and top-1 agreement for each row of logits (positions, vocabulary).

    KL is Σ p·(log p − log q) over the whole vocabulary (Kullback & Leibler 1951), in double precision. The two agree
    if they have a most probable token in common: 16-bit logits often have several equally probable ones, of which any
    may be chosen.
    """
    import torch

    distances: list[float] = []
    agrees: list[bool] = []
    for start in range(0, len(own), ROWS):
        mine, its = (accelerator.doubled(one[start : start + ROWS]) for one in (own, reference))
        log_p, log_q = torch.log_softmax(its, -1), torch.log_softmax(mine, -1)
        terms = torch.where(torch.isneginf(log_p), 0.0, log_p.exp() * (log_p - log_q))
        distances += terms.sum(-1).tolist()
        best = (its == its.max(-1, keepdim=True).values) & (mine == mine.max(-1, keepdim=True).values)
        agrees += best.any(-1).tolist()
    return distances, agrees


# Writing and reading references


def write_references(
    backend: Backend, text: Text, files: Mapping[str, Path], model: ModelFacts, name: str, progress: Progress
) -> None:
    """Write the reference file of each workload in `files`. The loaded model must be the unquantized one."""
    try:
        nll = score_text(backend, text, model.context, progress).nll
    except UsageError:  # reported when the compared models are scored
        nll = ()
    for workload, path in files.items():
        _write_reference(backend, workload, text, model, path, name, nll, progress)


def _write_reference(
    backend: Backend,
    workload: str,
    text: Text,
    model: ModelFacts,
    path: Path,
    name: str,
    nll: Sequence[Sequence[float]],
    progress: Progress,
) -> None:
    from safetensors.torch import save_file

    prompts = _prompts(backend, workload, text)
    row = backend.logits(prompts[0][-1:], 1)
    count, positions = share_room(len(prompts), row.numel() * row.element_size())
    most = max(min(MOST_PROMPT_TOKENS, (model.context or 10**9) - positions), 1)
    prefix, _ = split_prefix(backend, text.content)
    tensors: dict[str, torch.Tensor] = {}
    kept: list[tuple[list[int], int]] = []
    for number, prompt in enumerate(prompts[:count]):
        progress(number + 1, count)
        start = prompt if len(prompt) <= most else [*prefix, *prompt[len(prefix) - most :]]
        continuation = _until_end(_continue(backend, start, positions), _end_ids(model))
        ids = [*start, *continuation]
        tensors[f"logits.{number}"] = backend.logits(ids[:-1], len(continuation)).cpu().contiguous()
        kept.append((ids, len(continuation)))
    scored = split_prefix(backend, text.content)
    seen = {*scored[0], *scored[1][:MOST_TEXT_TOKENS], *(i for ids, _ in kept for i in ids)}
    known = {
        "name": f"{name}, {str(row.dtype).removeprefix('torch.')}",
        "digest": hash16(kept),
        "prompts": kept,
        "nll": nll,
        "text": scored,
        "words": {str(i): backend.decode([i]) for i in sorted(seen)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"reference": json.dumps(known)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _prompts(backend: Backend, workload: str, text: Text) -> list[list[int]]:
    """Return the ids of a workload's texts; if it has none, passages spread evenly over the text for perplexity."""
    texts = load_prompts(workload).texts[:MOST_PROMPTS]
    if texts:
        return [ids for ids in (list(backend.encode(one)) for one in texts) if ids]
    prefix, ids = split_prefix(backend, text.content)
    count = min(MOST_PROMPTS, max(len(ids) // PASSAGE_TOKENS, 1))
    starts = [number * max(len(ids) - PASSAGE_TOKENS, 0) // max(count - 1, 1) for number in range(count)]
    return [[*prefix, *ids[start : start + PASSAGE_TOKENS]] for start in starts]


def share_room(prompts: int, row_bytes: int, room: int = REFERENCE_BYTES) -> tuple[int, int]:
    """Return the number of prompts, and of positions of each, that fit into `room` bytes.

    Prompts come before positions, because the width of an interval depends on the number of prompts.
    """
    count = min(prompts, MOST_PROMPTS)
    positions = min(MOST_POSITIONS, room // (count * row_bytes))
    if positions < LEAST_POSITIONS:
        positions = LEAST_POSITIONS
        count = min(count, max(1, room // (positions * row_bytes)))
    return count, positions


def _continue(backend: Backend, prompt: Sequence[int], count: int) -> list[int]:
    """Generate the model's own greedy continuation of a prompt."""
    steps: list[Any] = []
    backend.generate([prompt], count, steps.append)
    return [int(step[0]) for step in steps]


def _until_end(ids: Sequence[int], ends: set[int]) -> list[int]:
    """Return the ids up to and including the first end-of-sequence token; those after it are not part of the answer."""
    before = list(itertools.takewhile(lambda i: i not in ends, ids))
    return list(ids[: len(before) + 1])


def _end_ids(model: ModelFacts) -> set[int]:
    config = model.config or {}
    found = (config.get("text_config") or {}).get("eos_token_id", config.get("eos_token_id"))
    return set(found) if isinstance(found, list) else set() if found is None else {int(found)}


def read_reference(path: Path) -> Reference:
    """Read a reference file, without its logits. Raises MeasurementError if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            known = reading.parse_json(file.metadata()["reference"], surrogates=True)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MeasurementError(
            f"The reference {path} cannot be read: {error}. Delete it, so that it is computed again."
        ) from None
    prompts = tuple((tuple(ids), int(positions)) for ids, positions in known["prompts"])
    before, own = map(tuple, known["text"])
    return Reference(
        path, known["name"], known["digest"], prompts, tuple(map(tuple, known["nll"])), (before, own), known["words"]
    )
