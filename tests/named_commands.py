"""Collect the commands that pages, help texts and messages name, as they stand there."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from mlflow_llmbench import PACKAGE_DIR
from mlflow_llmbench.cli import help
from mlflow_llmbench.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
DIARY = ROOT / "docs" / "log.md"
"""The page that tells of the past: its commands were those of their day."""

PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page != DIARY
]
PROGRAMS = ("curl", "llmbench", "make", "mlflow", "pip", "python", "ray", "hf")
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
PATTERN = re.compile(r"…|\[OPTIONS\]|\bCOMMAND\b|-e NAME\b")
"""What makes a text a pattern of commands and no command."""


@dataclass(frozen=True)
class Named:
    """A command with the place that names it. `alone`: the name of a command within a sentence, such as `run`."""

    text: str
    place: str
    alone: bool = False

    @property
    def words(self) -> list[str]:
        """Its words without what a shell does with its output; `RUN` stands for what another command finds."""
        words = shlex.split(re.sub(r"\$\([^)]*\)", "RUN", self.text))
        ends = [number for number, word in enumerate(words) if word in ("||", "&&", "|", ">")]
        return words[: ends[0]] if ends else words


def collected() -> list[Named]:
    """Return all commands, each text once."""
    found: dict[str, Named] = {}
    for named in (*_of_pages(), *_of_help(), *_of_examples(), *_of_messages()):
        known = found.get(named.text)
        if known is None or (known.alone and not named.alone):
            found[named.text] = named
    return list(found.values())


def _of_pages() -> Iterator[Named]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        place = page.relative_to(ROOT).as_posix()
        for block in FENCE.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                yield from _command(re.sub(r"\s+#( .*)?$", "", line), place)
        for code in CODE.findall(FENCE.sub("", text)):
            yield from _command(code, place, in_sentence=True)


def _of_help() -> Iterator[Named]:
    for example in help.EXAMPLES:
        yield Named(f"llmbench {example}", "llmbench --help")
    for command in COMMANDS.values():
        for example in command.examples:
            yield Named(f"llmbench {example}", f"llmbench {command.name} --help")


def _of_examples() -> Iterator[Named]:
    """Yield what the docstrings of the examples show, and the steps of workflows."""
    for file in sorted((ROOT / "examples").glob("*.*")):
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".yml":
            jobs = yaml.safe_load(text)["jobs"].values()
            lines = [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]
        else:
            lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
        for line in lines:
            yield from _command(line, f"examples/{file.name}")


def _of_messages() -> Iterator[Named]:
    """Yield what stands between backticks in a text of the code that is no docstring; `X` is a value filled in."""
    for file in sorted(PACKAGE_DIR.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) in statements or id(node) in inner:
                    continue
                text = node.value
            else:
                continue
            for code in CODE.findall(text):
                yield from _command(code, file.relative_to(PACKAGE_DIR.parent).as_posix(), in_sentence=True)


def _command(line: str, place: str, in_sentence: bool = False) -> Iterator[Named]:
    text = " ".join(line.split())
    if text.partition(" ")[0] in PROGRAMS and " " in text and not PATTERN.search(text):
        yield Named(text, place, in_sentence and len(text.split()) == 2)


@dataclass(frozen=True)
class Composed:
    """A call of `command_text` in the code: the command, its positional values (`X` if filled in), its options."""

    name: str
    positional: tuple[str, ...]
    options: tuple[str, ...]
    place: str


def composed() -> list[Composed]:
    """Return every command that a message composes."""
    found = []
    for file in sorted(PACKAGE_DIR.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and (
                getattr(node.func, "id", "") == "command_text" or getattr(node.func, "attr", "") == "command_text"
            )
            if called and isinstance(node, ast.Call):
                first, *others = node.args
                assert isinstance(first, ast.Constant), f"{file}: {ast.unparse(node)}"
                place = f"{file.relative_to(PACKAGE_DIR.parent).as_posix()}:{node.lineno}"
                given = tuple(str(one.value) if isinstance(one, ast.Constant) else "X" for one in others)
                options = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
                found.append(Composed(str(first.value), given, options, place))
    return found
