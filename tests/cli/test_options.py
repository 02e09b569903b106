"""Declared options and commands."""

from __future__ import annotations

import pytest

from mlflow_llmbench.cli import parser
from mlflow_llmbench.cli.main import COMMANDS, parse
from mlflow_llmbench.cli.options import Option, comma_list, command
from mlflow_llmbench.records.cell import PARAMETERS


@pytest.mark.parametrize("text", ["none", "", " none "])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("recommend", ["r", "--max-memory={}", "--max-ttft={}", "--allow={}", "--accept-suspect={}"]),
        ("gate", ["c", "--against", "v", "--limit={}", "--pairs={}", "--accept-suspect={}"]),
        ("reproduce", ["r", "--url={}"]),
        ("compare", ["a", "b", "--allow={}"]),
        ("study", ["--price={}", "--accept-suspect={}"]),
    ],
)
def test_none_is_the_same_as_not_given(name: str, arguments: list[str], text: str) -> None:
    """An MLproject passes every parameter, and `none` is the default of those that are not given."""
    given = parse([name, *(argument.format(text) for argument in arguments)])
    alone = parse([name, *(argument for argument in arguments if "{}" not in argument)])
    options = COMMANDS[name].options
    assert [o.value(given.values[o.argument]) for o in options] == [o.value(alone.values[o.argument]) for o in options]


def test_a_command_gets_its_options_as_arguments() -> None:
    seen: dict[str, object] = {}

    @command("echo", "repeat", Option("words", "words", "WORD", many=True), Option("--loud", "100 % loud", flag=True))
    def echo(words: tuple[str, ...], loud: bool) -> int:
        seen.update(words=words, loud=loud)
        return 7

    assert parser.parse({"Own": [echo]}, ["echo", "a", "--loud", "b"]).run() == 7
    assert seen == {"words": ("a", "b"), "loud": True}


def test_every_measuring_command_has_the_declared_parameters() -> None:
    for name in ("run", "plan", "study"):
        arguments = {option.argument for option in COMMANDS[name].options}
        assert {"model", "quant", "batch_size", "rerun"} <= arguments & set(PARAMETERS)
    assert "processes" not in {option.argument for option in COMMANDS["ab"].options}


def test_words_of_a_comma_list() -> None:
    assert comma_list("hardware,software") == {"hardware", "software"}
    assert comma_list(None) == comma_list("") == frozenset()
