"""Messages name commands and parameters in the form in which the user called us."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
import yaml

from mlflow_llmbench.cli.main import COMMANDS, parse
from mlflow_llmbench.cli.options import entry_points, store_options
from mlflow_llmbench.config.spec import parse as parse_parameters
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.invocation import (
    MODULE,
    PROGRAM,
    EntryPoint,
    Invocation,
    called_as,
    command_text,
    invocation_of,
    note_store,
    parameter_text,
)

ENTRY_POINTS = entry_points(COMMANDS.values())
DECLARED = yaml.safe_load((Path(__file__).parents[2] / "MLproject").read_text(encoding="utf-8"))["entry_points"]


def test_the_same_command_for_each_way_of_calling() -> None:
    assert command_text("gate", "models:/bot/2", against="models:/bot/1") == (
        "llmbench gate models:/bot/2 --against models:/bot/1"
    )
    assert parameter_text("rerun", "true") == "rerun=true"
    with called_as(Invocation(PROGRAM, None, ENTRY_POINTS)):
        assert command_text("promote", "models:/bot@previous") == "llmbench promote models:/bot@previous"
        assert parameter_text("rerun", "true") == "--rerun"
        assert parameter_text("batch_size", "1,4") == "--batch-size 1,4"
    with called_as(Invocation(MODULE, None, ENTRY_POINTS)):
        assert command_text("upload", "my results") == "python -m mlflow_llmbench upload 'my results'"
    with called_as(Invocation(MODULE, "/a project", ENTRY_POINTS)):
        words = shlex.split(command_text("gate", "models:/bot/2", against="models:/bot/1"))
        assert [word for word in words if word not in ("--env-manager", "local")] == [
            *("mlflow", "run", "/a project", "-e", "gate"),
            *("-P", "candidate=models:/bot/2", "-P", "against=models:/bot/1"),
        ]
        assert "-e" not in command_text("run", model="opt-125m").split()  # the entry point main needs no name
        assert command_text("promote", "models:/bot/2") == "python -m mlflow_llmbench promote models:/bot/2"
        assert parameter_text("rerun", "true") == "-P rerun=true"
    assert parameter_text("rerun", "true") == "rerun=true"


def test_a_command_in_a_message_uses_the_store_that_the_user_named() -> None:
    invocation = Invocation(PROGRAM, None, ENTRY_POINTS, store_options(COMMANDS.values()))
    with called_as(invocation):
        note_store({"tracking_uri": "sqlite:///my runs.db", "experiment": "pilot"})
        assert command_text("upload", "folder") == (
            "llmbench upload folder --tracking-uri 'sqlite:///my runs.db' --experiment pilot"
        )
        assert command_text("promote", "models:/bot/2") == (  # it has no experiment
            "llmbench promote models:/bot/2 --tracking-uri 'sqlite:///my runs.db'"
        )
        assert command_text("upload", "folder", tracking_uri="http://other", experiment="pilot") == (
            "llmbench upload folder --tracking-uri http://other --experiment pilot"
        )
        assert command_text("models") == "llmbench models"
    assert command_text("upload", "folder") == "llmbench upload folder"


def test_mlflow_run_is_recognised_by_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("MLproject").touch()
    assert invocation_of(MODULE, ENTRY_POINTS).project is None
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert invocation_of(MODULE, ENTRY_POINTS).project == os.getcwd()
    assert invocation_of(PROGRAM, ENTRY_POINTS).project is None
    Path("MLproject").unlink()
    assert invocation_of(MODULE, ENTRY_POINTS).project is None  # a run that the user gave to a command


@pytest.mark.parametrize(
    "given", [{"headers": {"X-Key": "hunter2"}, "url": "http://h"}, {"launch": "serve --api-key hunter2 --port {port}"}]
)
def test_a_secret_that_mlflow_has_recorded_is_told_with_its_run(
    given: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "a" * 32)
    with called_as(Invocation(MODULE, "/a project", ENTRY_POINTS)), pytest.raises(UsageError) as told:
        parse_parameters({"model": "m", "backend": "openai", **given})
    assert str(told.value).endswith(
        f" MLflow has recorded it with the run {'a' * 32}: change the secret, and remove the run by "
        f"`mlflow runs delete --run-id {'a' * 32}` and `mlflow gc`."
    )
    with called_as(Invocation(PROGRAM, None, ENTRY_POINTS)), pytest.raises(UsageError) as told:
        parse_parameters({"model": "m", "backend": "openai", **given})
    assert "MLflow" not in str(told.value) and "hunter2" not in str(told.value)


def test_the_entry_points_are_those_of_the_project() -> None:
    assert {entry.name for entry in ENTRY_POINTS.values()} == set(DECLARED)
    for command, entry in ENTRY_POINTS.items():
        assert isinstance(entry, EntryPoint)
        assert f"python -m mlflow_llmbench {command} " in DECLARED[entry.name]["command"]
        assert all(f" {{{name}}}" in DECLARED[entry.name]["command"] for name in entry.positional)
        declared = DECLARED[entry.name]["parameters"].items()
        # A result is given by its place, and may be the latest one.
        first = [name for name, one in declared if one.get("default", "latest") == "latest"][:1]
        assert list(entry.positional) == first


@pytest.mark.parametrize(
    "text",
    [
        command_text("gate", "models:/bot/2", against="models:/bot/1"),
        command_text("register", "RUN", name="bot"),
        command_text("upload", "a folder"),
        command_text("run", model="a folder", quant="int4-wo", group_size="64"),
    ],
)
def test_a_named_command_is_one_that_the_parser_takes(text: str) -> None:
    assert parse(shlex.split(text)[1:])
