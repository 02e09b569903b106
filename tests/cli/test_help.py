"""Help pages: what comes first, panels, units and choices, and examples that parse."""

from __future__ import annotations

import io
import re
import shlex

import pytest

from mlflow_llmbench.analysis import comparability
from mlflow_llmbench.analysis.decisions import dominance
from mlflow_llmbench.analysis.decisions.export import TARGETS
from mlflow_llmbench.analysis.decisions.recommend import GOALS
from mlflow_llmbench.cli import help, output
from mlflow_llmbench.cli.main import COMMANDS, GROUPS, main, parse
from mlflow_llmbench.cli.options import WORDS, as_options
from mlflow_llmbench.config import training
from mlflow_llmbench.config.parsers import PARSERS
from mlflow_llmbench.records.cell import PARAMETERS
from mlflow_llmbench.records.invocation import PROGRAM
from mlflow_llmbench.records.parameter import PANELS
from mlflow_llmbench.records.redaction import Terminal


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for variable in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)


def page(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_program_alone_shows_its_commands_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == page("--help", capsys=capsys) == page("-h", capsys=capsys)
    lines = captured.err.splitlines()
    assert [line for line in lines if line in GROUPS] == ["Measure", "Compare", "Decide", "Inspect"]
    told = [
        line for command in COMMANDS.values() for line in lines if line.split() == [command.name, *command.help.split()]
    ]
    assert len(told) == len(COMMANDS), "each command on one line of 80 columns"


def test_a_short_page_has_what_people_use_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = page("run", "--help", capsys=capsys)
    assert re.findall(r"^  (--\S+)", text, re.MULTILINE) == [
        "--model", "--quant", "--batch-size", "--prompt-tokens", "--output-tokens",
    ]  # fmt: skip
    assert "  --batch-size ROWS,…             rows in one forward pass (default: 1)\n" in text
    count = len(COMMANDS["run"].options) - 5
    assert text.endswith(f"\n{count} more options: `llmbench run --help-all`.\n")
    assert len(text.splitlines()) < 40


@pytest.mark.parametrize("name", COMMANDS)
def test_the_long_page_has_every_option_once_in_panels(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name]
    text = page(name, "--help-all" if command.first else "--help", capsys=capsys)
    shown = re.findall(r"^  (--[a-z0-9-]+)", text, re.MULTILINE)
    assert sorted(shown) == sorted(option.name for option in command.options if not option.positional)
    titles = ["Arguments", "Common options", "Options", *PANELS.values(), "Examples"]
    found = [line for line in text.splitlines() if line in titles]
    assert found == [title for title in titles if title in found]
    assert len(command.first) in (0, 5)
    assert command.first or len(command.options) <= 15, "a long page without what people use first"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_page_fits_the_terminal_and_its_examples_parse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = page(name, "--help", capsys=capsys)
    head, _, examples = text.partition("\nExamples\n")
    assert max(map(len, head.splitlines())) <= 80
    lines = [line for line in examples.splitlines() if line.startswith("  llmbench ")]
    assert len(lines) == 2
    for line in lines:
        assert parse(shlex.split(line)[1:]).command.name in (name, "run")


def test_the_examples_of_the_program_parse() -> None:
    assert [parse(shlex.split(one)).command.name for one in help.EXAMPLES] == ["quickstart", "recommend"]


def test_every_parameter_has_a_panel() -> None:
    assert {f.metadata["panel"] for f in PARAMETERS.values()} == set(PANELS)


def test_units_and_choices_stand_for_the_values(capsys: pytest.CaptureFixture[str]) -> None:
    text = page("run", "--help-all", capsys=capsys)
    for shown in (
        "--weights [hub|random] ", "--slo-ttft-ms MS ", "--load-timeout-s S ", "--memory-limit SIZE|auto ",
        "--threads N|auto,… ", "--batching [none|static|dynamic|continuous],…\n", "--nominal-bandwidth GB/S ",
        "--double-quant [true|false],… ", "--output-dir FOLDER ", "--rerun  ", "--mmap [true|false] ",
    ):  # fmt: skip
        assert f"  {shown}" in text
    assert "--quant int8: compute activations" in text
    assert "--batch-size is the maximum" in " ".join(text.split())
    assert "--batch-size ROWS  " in page("ab", "--help", capsys=capsys), "each side of `ab` is one configuration"


def test_parameters_in_a_help_text_are_options() -> None:
    told = "quant=int4,fp4 with batch_size, and quant_plan.json of a model"
    assert as_options(told) == "--quant int4,fp4 with --batch-size, and quant_plan.json of a model"


@pytest.mark.parametrize("kind", [kind for kind in WORDS if kind in PARSERS])
def test_shown_words_are_accepted(kind: str) -> None:
    declared = next(f for f in PARAMETERS.values() if f.metadata["kind"] == kind)
    for word in WORDS[kind]:
        PARSERS[kind](declared.name, word, declared.metadata)


def test_shown_words_are_those_of_the_table() -> None:
    assert WORDS["loss"] == training.LOSSES
    words = {(name, option.name): option.words for name in COMMANDS for option in COMMANDS[name].options}
    assert words["recommend", "--goal"] == tuple(GOALS)
    assert words["export", "--for"] == tuple(TARGETS)
    assert words["compare", "--allow"] == comparability.ALLOWABLE
    assert words["recommend", "--allow"] == dominance.ALLOWABLE


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "no_color", "colored"), [(Tty(), "", True), (Tty(), "1", False), (io.StringIO(), "", False)]
)
def test_colours_are_for_terminals_that_want_them(
    stream: io.StringIO, no_color: str, colored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    output.show(help.program_page(GROUPS, PROGRAM), Terminal(stream))  # type: ignore[arg-type]
    assert ("\x1b[36m" in stream.getvalue()) == colored
    assert "\\x1b" not in stream.getvalue()
