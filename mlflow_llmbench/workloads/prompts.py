"""Prompts sent to a model: of an exact length in tokens, identical for every configuration, generated from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..config.choices import BUNDLED_TEXT, WORKLOADS
from ..records import reading
from ..records.cell import DRAWN, Cell
from ..records.errors import UsageError
from ..records.reading import Unreadable
from ..records.redaction import redact
from ..records.results import hash16
from .conversations import Conversation, parse_conversation
from .sharing import parts_of, shares_prefixes
from .traces import read_trace

Encode = Callable[[str], Sequence[int]]

WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "he",
    "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one", "you", "were", "her",
    "all", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "more", "no", "if",
    "out", "so", "said", "what", "up", "its", "about", "into", "than", "them", "can", "only", "other", "new", "some",
    "could", "time",
)  # fmt: skip
"""Words that are one token each, with the space before them, in common vocabularies. A probe of the server detects
others."""

SPREAD = math.log(2)
"""Standard deviation of the log of a `mixed` length: two thirds lie between half and twice the median."""

CLIP = (1 / 8, 4)
"""Bounds of a `mixed` length, as multiples of the median: 3 standard deviations below, 2 above (cutting 2.3 %)."""

MIXED = (
    "Requests of varying length: log-normal with these lengths as medians, two thirds between half and twice the "
    "median, clipped at ⅛ and 4 times."
)
"""Description of the distribution of `mixed`."""


def lengths_vary(cell: Cell) -> bool:
    """Return True if each request of a cell has its own lengths."""
    return cell.workload == "mixed" or cell.trace is not None


def lengths_of(cell: Cell, number: int) -> tuple[int, int]:
    """Prompt and output tokens of request `number`: those of the cell or its trace, or drawn around them for `mixed`.

    A drawn length is exp(N(ln median, `SPREAD`²)) with the cell's length as median, rounded, within `CLIP` and at
    least 1; prompt and output are independent. Real requests are skewed to the right like that: many short, few long.
    The draw depends on the seed and the number, not on the repetition, so repetitions differ by what was measured and
    not by the draw, as with the rate of the arrivals.
    """
    medians = (cell.prompt_tokens or 0, cell.output_tokens)
    if cell.trace:
        recorded = read_trace(cell.trace).requests
        one = recorded[number % len(recorded)]
        return one.prompt_tokens, one.output_tokens
    if cell.workload != "mixed":
        return medians
    draw = random.Random(f"{cell.seed}/lengths/{number}")
    drawn = [median * min(max(draw.lognormvariate(0.0, SPREAD), CLIP[0]), CLIP[1]) for median in medians]
    return max(1, round(drawn[0])), max(1, round(drawn[1]))


def longest_of(cell: Cell) -> tuple[int, int]:
    """Largest numbers of prompt and output tokens that a request of a cell may have."""
    if cell.trace:
        return read_trace(cell.trace).longest
    most = CLIP[1] if cell.workload == "mixed" else 1
    return most * (cell.prompt_tokens or 0), most * cell.output_tokens


@dataclass(frozen=True)
class PromptSet:
    """Texts of a workload in file order; none for `synthetic` and `mixed`, which draw prompts from the vocabulary."""

    name: str
    texts: tuple[str, ...] = ()
    conversations: tuple[Conversation, ...] = ()  # of each line, if every line is one

    def batch(self, cell: Cell, repetition: int, vocab_size: int, encode: Encode | None) -> list[list[int]]:
        """Prompts of one repetition: `batch_size` rows of token ids, all of one length, so that nothing is padded.

        With a numeric `prompt_tokens` each row has exactly that many tokens, and rows differ. With `auto` all rows of
        repetition r are text r (modulo the number of texts), at its own length. Raises UsageError if
        texts need a tokenizer and there is none.
        """
        if not self.texts:
            return [
                self._random_row(cell, repetition, row, vocab_size, cell.prompt_tokens or 0)
                for row in range(cell.batch_size)
            ]
        if encode is None:
            raise UsageError(
                f"workload={cell.workload} needs a tokenizer, and the model has none. Use workload=synthetic."
            )
        if cell.prompt_tokens is None:
            ids = list(encode(self.texts[repetition % len(self.texts)]))
            return [ids] * cell.batch_size
        return [
            self._text_row(cell.prompt_tokens, repetition * cell.batch_size + row, encode)
            for row in range(cell.batch_size)
        ]

    def request(
        self, cell: Cell, repetition: int, number: int, vocab_size: int, encode: Encode | None
    ) -> tuple[list[int], int]:
        """Prompt ids and output tokens of one request of a stream.

        Texts are taken in turn, at their own length if `prompt_tokens` is `auto`. Raises UsageError if they need a
        tokenizer and there is none.
        """
        prompt_tokens, output_tokens = lengths_of(cell, number)
        if not self.texts:
            return self._random_row(cell, repetition, number, vocab_size, prompt_tokens), output_tokens
        if encode is None:
            raise UsageError(
                f"workload={cell.workload} needs a tokenizer, and the model has none. Use workload=synthetic."
            )
        if cell.prompt_tokens is None:
            return list(encode(self.texts[number % len(self.texts)])), output_tokens
        return self._text_row(prompt_tokens, number, encode), output_tokens

    def words(
        self, cell: Cell, repetition: int, number: int, count: int, unique: str = "", tokens_per_word: float = 1.0
    ) -> str:
        """Prompt of one request to a server: `count` words drawn from the seed, or the text of a workload.

        It begins with the words that it shares with other requests. `unique` seeds these, or without them the first
        words, so that no cache of an earlier run can hold the beginning of the prompt.
        """
        first = shared_words(cell, repetition, number, unique, tokens_per_word)
        if unique and not first:
            first = unique_words(repetition, number, unique)
        if self.texts and cell.prompt_tokens is None:
            return " ".join([*first, self.texts[number % len(self.texts)]])
        first = first[:count]
        if not self.texts:
            draw = random.Random(f"{cell.seed}/{repetition}/{number}")
            return " ".join([*first, *draw.choices(WORDS, k=count - len(first))])
        found, position = first, number
        while len(found) < count:
            found = [*found, *self.texts[position % len(self.texts)].split()]
            position += 1
        return " ".join(found[:count])

    def _random_row(self, cell: Cell, repetition: int, row: int, vocab_size: int, length: int) -> list[int]:
        # The lowest ids are special tokens in every vocabulary we know; an EOS in the prompt would be odd text.
        draw = random.Random(f"{cell.seed}/{repetition}/{row}")
        return [draw.randrange(min(100, vocab_size // 2), vocab_size) for _ in range(length)]

    def _text_row(self, length: int, start: int, encode: Encode) -> list[int]:
        ids: list[int] = []
        position = start
        while len(ids) < length:
            more = list(encode(self.texts[position % len(self.texts)]))
            if not more:
                raise UsageError(
                    f"Prompt {position % len(self.texts) + 1} of workload {self.name} has no tokens. "
                    "Give prompts with text."
                )
            ids += more
            position += 1
        return ids[:length]

    def digest(self, cell: Cell, vocab_size: int | None) -> str:
        """Return `workload_hash`: identity of prompts and lengths, without the batch size and the model's settings."""
        texts = [one.identity() for one in self.conversations] if cell.history != "none" else list(self.texts)
        prompts: object = texts or {"generator": "uniform-ids-1", "seed": cell.seed, "vocab_size": vocab_size}
        if cell.scenario == "online" and not self.texts:
            prompts = {"generator": "common-words-1", "seed": cell.seed}
        if cell.workload == "mixed":
            prompts = {"prompts": prompts, "lengths": "log-normal-1", "spread": SPREAD, "clip": CLIP, "seed": cell.seed}
        if cell.trace:
            return hash16({"prompts": prompts, "trace": read_trace(cell.trace).digest})
        if shares_prefixes(cell):
            prompts = {"prompts": prompts, "prefix": [cell.prefix_tokens, cell.prefix_count], "seed": cell.seed}
        return hash16({"prompts": prompts, "prompt_tokens": cell.prompt_tokens, "output_tokens": cell.output_tokens})


def unique_words(repetition: int, number: int, unique: str) -> list[str]:
    """Return words to begin a prompt with that no other prompt begins with."""
    return random.Random(f"{unique}/{repetition}/{number}").choices(WORDS, k=8)


def shared_words(cell: Cell, repetition: int, number: int, unique: str, tokens_per_word: float) -> list[str]:
    """Return the words of the beginning that a request shares with others of its repetition.

    The words of a part are drawn from its key, so equal parts have equal words. They end at the word whose tokens are
    the nearest to the part's end in the prompt.
    """
    found: list[str] = []
    end = 0
    for part in parts_of(cell, number, lengths_of(cell, number)[0] or None):
        end += part.tokens
        draw = random.Random(f"{unique}/{cell.seed}/{repetition}/{part.key}")
        found += draw.choices(WORDS, k=max(0, round(end / tokens_per_word) - len(found)))
    return found


def load_prompts(workload: str) -> PromptSet:
    """Load the prompt set of a `workload` parameter.

    That is `synthetic` or `mixed`, a bundled name, or a JSON Lines file with a `prompt` per line. Raises UsageError,
    naming the line, for a file that cannot be read as such.
    """
    if workload in DRAWN:
        return PromptSet(workload)
    if workload in WORKLOADS:
        text = (resources.files(__package__) / f"{workload}.jsonl").read_text(encoding="utf-8")
        return PromptSet(workload, *_parse_lines(reading.json_lines(text), workload))
    try:
        lines = reading.read_json_lines(workload)
    except Unreadable as error:
        raise UsageError(f"Cannot read workload file {workload}: {error}. Give a UTF-8 JSON Lines file.") from None
    return PromptSet(Path(workload).stem, *_parse_lines(lines, workload))


def require_conversations(cell: Cell, prompts: PromptSet) -> None:
    """Raise UsageError if a cell is measured turn by turn and its workload has no conversations."""
    if cell.history != "none" and not prompts.conversations:
        raise UsageError(
            f"history={cell.history} needs conversations, and workload={cell.workload} has none. "
            'Use workload=chat, or a file whose lines have "messages" instead of a "prompt".'
        )
    if cell.history in ("recomputed", "kept") and not all(one.is_plain for one in prompts.conversations):
        raise UsageError(
            f"history={cell.history} takes conversations of texts, and workload={cell.workload} has tools, system "
            "messages, images or delays. Measure it behind a server, with history=sent."
        )


def prompts_of(cells: Iterable[Cell]) -> dict[str, PromptSet]:
    """Load the prompt sets of all workloads of the cells.

    Raises UsageError for an unreadable file, and for a history with prompts that have no turns.
    """
    cells = list(cells)
    found = {workload: load_prompts(workload) for workload in dict.fromkeys(cell.workload for cell in cells)}
    for cell in cells:
        require_conversations(cell, found[cell.workload])
    return found


@dataclass(frozen=True)
class Text:
    """A text for perplexity: name as given, and content."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """16 hex digits for the content."""
        return hash16(self.content)


def load_text(name: str) -> Text:
    """Load the text of a `quality_text` parameter: the bundled one, or a UTF-8 file.

    Raises UsageError for a file that cannot be read as such.
    """
    if name == BUNDLED_TEXT:
        return Text(name, (resources.files(__package__) / "perplexity.txt").read_text(encoding="utf-8"))
    try:
        return Text(name, reading.read_text(name))
    except Unreadable as error:
        raise UsageError(f"Cannot read the text file {name}: {error}. Give a plain text file in UTF-8.") from None


def _parse_lines(
    lines: Iterable[tuple[int, str, Any]], origin: str
) -> tuple[tuple[str, ...], tuple[Conversation, ...]]:
    """Return the prompts, one per line, and if every line is a conversation also the conversations."""
    prompts, conversations = [], []
    for number, line, data in lines:
        try:
            if "messages" in data:
                conversation, prompt = parse_conversation(data, f"{origin}, line {number}")
                conversations.append(conversation)
                prompts.append(prompt)
                continue
            prompt = data["prompt"]
        except (KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(
                f'{origin}, line {number}, is not a JSON object with a "prompt" text: {redact(line)[:60]}. '
                'Write {"prompt": "…"} on each line.'
            )
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{origin} has no prompts. Write one JSON object with a prompt per line.")
    return tuple(prompts), tuple(conversations) if len(conversations) == len(prompts) else ()
