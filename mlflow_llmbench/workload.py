"""What is sent to the model: prompts of an exact length in tokens, the same ones for every configuration, from a seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from .cell import DRAWN, Cell
from .errors import UsageError
from .records import hash16
from .redaction import redact
from .spec import BUNDLED_TEXT, WORKLOADS
from .traces import read_trace

Encode = Callable[[str], Sequence[int]]

WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "her",
    "all",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "more",
    "no",
    "if",
    "out",
    "so",
    "said",
    "what",
    "up",
    "its",
    "about",
    "into",
    "than",
    "them",
    "can",
    "only",
    "other",
    "new",
    "some",
    "could",
    "time",
)
"""Words that are one token each, with the space before them, in the usual vocabularies. A probe of the server tells where they are not."""

SPREAD = math.log(2)
"""Standard deviation of the logarithm of a length of `mixed`: two thirds of all lie between half and twice the median."""

CLIP = (1 / 8, 4)
"""Least and most length of `mixed`, as multiples of the median: 3 standard deviations below and 2 above, where 2.3 % are cut."""

MIXED = "Requests of varying length: log-normal with these lengths as medians, two thirds between half and twice the median, clipped at ⅛ and 4 times."
"""The distribution of `mixed` in a sentence."""


def lengths_vary(cell: Cell) -> bool:
    """Whether each request of a cell is asked for at lengths of its own."""
    return cell.workload == "mixed" or cell.trace is not None


def lengths_of(cell: Cell, number: int) -> tuple[int, int]:
    """Prompt and output tokens of request `number`: those of the cell, those of the trace, or for `mixed` drawn with those of the cell as medians.

    Each is exp(N(ln median, `SPREAD`²)), rounded, within `CLIP` and at least 1; the two are independent. Real
    requests are skewed to the right like that: many short ones, few long ones. They depend on the seed and on the number, not on the
    repetition: repetitions then differ by what was measured and not by the draw, as with the rate of the arrivals.
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
    """The most prompt and output tokens that a request of a cell may have."""
    if cell.trace:
        return read_trace(cell.trace).longest
    most = CLIP[1] if cell.workload == "mixed" else 1
    return most * (cell.prompt_tokens or 0), most * cell.output_tokens


@dataclass(frozen=True)
class PromptSet:
    """Texts of a workload in file order; empty for `synthetic` and `mixed`, whose prompts are drawn from the vocabulary."""

    name: str
    texts: tuple[str, ...] = ()
    conversations: tuple[
        tuple[str, ...], ...
    ] = ()  # what the user says, turn by turn, where every line is a conversation

    def batch(self, cell: Cell, repetition: int, vocab_size: int, encode: Encode | None) -> list[list[int]]:
        """Prompts of one repetition: `batch_size` rows of token ids, all of one length, so that nothing is padded.

        With a numeric `prompt_tokens` each row has exactly that many tokens, and rows differ. With `auto` repetition r
        uses text r (modulo their number) for all rows, at its own length.
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
        """Prompt ids and output tokens of one request of a stream; texts are taken in turn, at their own length where `prompt_tokens` is `auto`."""
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

    def words(self, cell: Cell, repetition: int, number: int, count: int, unique: str = "") -> str:
        """The prompt of one request to a server: `count` words from the seed, or the text of a workload.

        With `unique` the first words are drawn from it, so that no cache of an earlier run can hold the beginning of the prompt.
        """
        draw = random.Random(f"{cell.seed}/{repetition}/{number}")
        first = random.Random(f"{unique}/{repetition}/{number}").choices(WORDS, k=min(8, count)) if unique else []
        if not self.texts:
            return " ".join([*first, *draw.choices(WORDS, k=count - len(first))])
        if cell.prompt_tokens is None:
            return " ".join([*first, self.texts[number % len(self.texts)]])
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
                    f"Prompt {position % len(self.texts) + 1} of workload {self.name} has no tokens. Give prompts with text."
                )
            ids += more
            position += 1
        return ids[:length]

    def digest(self, cell: Cell, vocab_size: int | None) -> str:
        """`workload_hash`: what is sent and how much is asked for; the batch size and the model's settings are not part of it."""
        texts = [list(turns) for turns in self.conversations] if cell.history != "none" else list(self.texts)
        prompts: object = texts or {"generator": "uniform-ids-1", "seed": cell.seed, "vocab_size": vocab_size}
        if cell.scenario == "online" and not self.texts:
            prompts = {"generator": "common-words-1", "seed": cell.seed}
        if cell.workload == "mixed":
            prompts = {"prompts": prompts, "lengths": "log-normal-1", "spread": SPREAD, "clip": CLIP, "seed": cell.seed}
        if cell.trace:
            return hash16({"prompts": prompts, "trace": read_trace(cell.trace).digest})
        return hash16({"prompts": prompts, "prompt_tokens": cell.prompt_tokens, "output_tokens": cell.output_tokens})


def load_prompts(workload: str) -> PromptSet:
    """The prompt set of a `workload` parameter: `synthetic` or `mixed`, a bundled name, or a JSON Lines file with a `prompt` per line.

    Raises UsageError, naming the line, for a file that cannot be read as such.
    """
    if workload in DRAWN:
        return PromptSet(workload)
    if workload in WORKLOADS:
        text = (resources.files(__package__) / "workloads" / f"{workload}.jsonl").read_text(encoding="utf-8")
        return PromptSet(workload, *_parse_lines(text, workload))
    try:
        text = Path(workload).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read workload file {workload}: {error}. Give a UTF-8 JSON Lines file.") from None
    return PromptSet(Path(workload).stem, *_parse_lines(text, workload))


def require_conversations(cell: Cell, prompts: PromptSet) -> None:
    """Raise UsageError if a cell is to be measured turn by turn and its workload has no turns."""
    if cell.history != "none" and not prompts.conversations:
        raise UsageError(
            f"history={cell.history} needs conversations, and workload={cell.workload} has none. "
            'Use workload=chat, or a file whose lines have "messages" instead of a "prompt".'
        )


def prompts_of(cells: Iterable[Cell]) -> dict[str, PromptSet]:
    """The prompt sets of all workloads of cells. Raises UsageError for a file that cannot be read as one, and for a history of prompts without turns."""
    cells = list(cells)
    found = {workload: load_prompts(workload) for workload in dict.fromkeys(cell.workload for cell in cells)}
    for cell in cells:
        require_conversations(cell, found[cell.workload])
    return found


def turn_texts(messages: Sequence[str], render: Callable[[list[dict[str, str]]], str] | None) -> list[str]:
    """What each message of the user adds to the text of a conversation, the end of the answer before it included.

    `render` is the tokenizer's chat template: messages with roles → text that ends where the answer begins. What it puts
    between two turns is found by a stand-in for the answer, so that the text of the history is never made anew; None is the plain
    form of `plain_dialogue`. Raises UsageError for a template that does not keep answers as they are.
    """
    if render is None:
        return [
            f"{'' if number == 0 else chr(10)}User: {message}\nAssistant:" for number, message in enumerate(messages)
        ]
    found: list[str] = []
    chat: list[dict[str, str]] = []
    for message in messages:
        chat.append({"role": "user", "content": message})
        _, answer, added = render(chat).rpartition(STAND_IN)
        if chat[:-1] and not answer:
            raise UsageError(
                "The chat template of this model leaves earlier answers out, so that no history can be kept. Use history=none."
            )
        found.append(added)
        chat.append({"role": "assistant", "content": STAND_IN})
    return found


STAND_IN = "an-answer-that-stands-here"
"""Words that no chat template changes."""


def plain_dialogue(messages: Sequence[str]) -> str:
    """Messages of user and assistant in turns as one text, `User: …` and `Assistant: …`, which ends where the next answer begins."""
    lines = [f"{'Assistant' if number % 2 else 'User'}: {message}" for number, message in enumerate(messages)]
    return "\n".join([*lines, "Assistant:"])


@dataclass(frozen=True)
class Text:
    """A text for perplexity: its name as given, and its digest."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """16 hex digits for the content."""
        return hash16(self.content)


def load_text(name: str) -> Text:
    """The text of a `quality_text` parameter: the bundled one, or a UTF-8 file. Raises UsageError for a file that cannot be read as such."""
    if name == BUNDLED_TEXT:
        return Text(name, (resources.files(__package__) / "workloads" / "perplexity.txt").read_text(encoding="utf-8"))
    try:
        return Text(name, Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the text file {name}: {error}. Give a plain text file in UTF-8.") from None


def _parse_lines(text: str, origin: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The prompts, one per line, and where every line is a conversation what its user says."""
    prompts, conversations = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            if "messages" in data:
                messages = _messages(data["messages"], f"{origin}, line {number}")
                conversations.append(tuple(messages[::2]))
                prompts.append(plain_dialogue(messages))
                continue
            prompt = data["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(
                f'{origin}, line {number}, is not a JSON object with a "prompt" text: {redact(line)[:60]}. Write {{"prompt": "…"}} on each line.'
            )
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f"{origin} has no prompts. Write one JSON object with a prompt per line.")
    return tuple(prompts), tuple(conversations) if len(conversations) == len(prompts) else ()


def _messages(given: object, origin: str) -> list[str]:
    """The texts of a conversation. Raises UsageError unless user and assistant take turns and the user has the last word."""
    roles = ("user", "assistant")
    found = (
        [
            m.get("content") if isinstance(m, dict) and m.get("role") == roles[i % 2] else None
            for i, m in enumerate(given)
        ]
        if isinstance(given, list)
        else []
    )
    if len(found) % 2 == 0 or not all(isinstance(text, str) and text.strip() for text in found):
        raise UsageError(
            f'{origin}: "messages" are not a conversation. Write a list of {{"role": "user", "content": "…"}} and {{"role": "assistant", …}} in turns '
            "that begins and ends with the user."
        )
    return [str(text) for text in found]
