"""Reference pages are what the declarations generate, and name everything that is declared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mlflow_llmbench.cli.main import COMMANDS
from mlflow_llmbench.cli.reference import commands_markdown, errors_markdown, parameter_types, parameters_markdown
from mlflow_llmbench.config import parameter_types as types
from mlflow_llmbench.config.training import TRAINING
from mlflow_llmbench.records import errors
from mlflow_llmbench.records.cell import PARAMETERS

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGES = {"parameters": parameters_markdown, "commands": commands_markdown, "errors": errors_markdown}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_declarations_generate(name: str) -> None:
    written = (REFERENCE / f"{name}.md").read_text(encoding="utf-8")
    assert written == PAGES[name](), f"docs/reference/{name}.md differs from the declarations: make reference"


def test_the_types_of_parameters_are_what_the_declarations_generate() -> None:
    assert Path(types.__file__).read_text(encoding="utf-8") == parameter_types(), "they differ: make reference"


@pytest.mark.parametrize("page", PAGES.values())
def test_every_row_has_the_columns_of_its_heading(page: Callable[[], str]) -> None:
    columns = 0
    for line in page().splitlines():
        if line.startswith("|"):
            now = line.replace(r"\|", "").count("|")
            assert columns in (0, now), line
            columns = now
        else:
            columns = 0


def test_the_page_of_parameters_has_all_with_their_bounds() -> None:
    page = parameters_markdown()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert sorted(row[0].split("`")[1] for row in rows) == sorted([*PARAMETERS, *TRAINING])
    assert "| `batch_size` † | `ROWS` from 1 to 4,096 | `1` | rows in one forward pass | `run` |" in page
    assert "`quant=mixed`: most memory for weights" in page
    assert "| `load_timeout_s` | `S` from 0.1, `none` | `3600` |" in page


def test_the_page_of_commands_has_each_option_that_is_no_parameter() -> None:
    sections = dict(part.split("\n", 1) for part in commands_markdown().split("\n### llmbench ")[1:])
    assert list(sections) == list(COMMANDS)
    assert "all for `run` but `--processes`." in sections["ab"]
    assert "| `--pairs` | `N` | fresh processes per side (default: 6) |" in sections["ab"]
    assert "| `--output` |" in sections["study"], "not the parameter of that name of a training"


def test_the_page_of_errors_has_each_error_and_its_exit_code() -> None:
    page = errors_markdown()
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.LlmbenchError)]
    assert all(f"| `{kind.__name__}` | `" in page for kind in kinds if kind is not errors.LlmbenchError)
    assert "| `NotComparable` | `LlmbenchError` |" in page
    assert page.count("| 2 | ") == sum(one.exit_code == 2 for one in kinds)
