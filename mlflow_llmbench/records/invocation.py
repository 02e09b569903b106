"""The form in which the user called us, so that messages name commands and parameters that work as printed.

    raise UsageError(f"… Run: {command_text('gate', 'models:/bot/2', against='models:/bot/1')}")

gives `llmbench gate models:/bot/2 --against models:/bot/1`, `python -m mlflow_llmbench gate …`, or under `mlflow run`
the same with `-e gate -P candidate=…`. The command line sets the form (`called_as`). Without it we were called from
Python, where a parameter is written `name=value`.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

PROGRAM, MODULE = "llmbench", "python -m mlflow_llmbench"

DEPLOYMENT = "deployments:/"
"""Beginning of a reference to a deployment on this machine by its name."""

LATEST = "latest"
"""Word for the newest measured sweep, where a command or function takes results."""


@dataclass(frozen=True)
class EntryPoint:
    """Entry point of the MLproject that runs a command, with the parameter names of the command's positional values."""

    name: str
    positional: tuple[str, ...] = ()


def option_name(parameter: str) -> str:
    """Return the option that sets a parameter: `--batch-size` for batch_size."""
    return f"--{parameter.replace('_', '-')}"


@dataclass(frozen=True)
class Invocation:
    """The program as the user called it. Under `mlflow run`, `project` is the project's address, else None.

    `entry_points` maps a command to its entry point; the other commands have none and are called as `program`.
    `store_options` maps a command to those of its options that say which store and experiment it uses; `store` has the
    values that the user gave for them, which a command in a message needs as well.
    """

    program: str = PROGRAM
    project: str | None = None
    entry_points: Mapping[str, EntryPoint] = field(default_factory=dict)
    store_options: Mapping[str, Set[str]] = field(default_factory=dict)
    store: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)  # of the sweeps that it has begun

    def command(self, name: str, positional: tuple[str, ...], options: Mapping[str, str]) -> str:
        """Return a command with its options, quoted for a shell."""
        entry = self.entry_points.get(name)
        if self.project is None or entry is None or len(positional) > len(entry.positional):
            here = {key: value for key, value in self.store.items() if key in self.store_options.get(name, ())}
            given = [part for key, value in {**here, **options}.items() for part in (option_name(key), value)]
            return " ".join([self.program, name, *map(shlex.quote, [*positional, *given])])
        parameters = {**dict(zip(entry.positional, positional, strict=False)), **options}
        given = [part for key, value in parameters.items() for part in ("-P", f"{key}={value}")]
        chosen = [] if entry.name == "main" else ["-e", entry.name]
        return " ".join(["mlflow run", *map(shlex.quote, [self.project, *_environment(), *chosen, *given])])

    def parameter(self, name: str, value: str) -> str:
        """Return the text that sets a parameter in this form."""
        if self.project:
            return f"-P {shlex.quote(f'{name}={value}')}"
        option = option_name(name)
        return option if value == "true" else f"{option} {shlex.quote(value)}"


_current: contextvars.ContextVar[Invocation | None] = contextvars.ContextVar("invocation", default=None)


@contextlib.contextmanager
def called_as(invocation: Invocation) -> Iterator[None]:
    """Use the form of `invocation` in all messages until the end of the block."""
    token = _current.set(invocation)
    try:
        yield
    finally:
        _current.reset(token)


def invocation_of(
    program: str, entry_points: Mapping[str, EntryPoint], store_options: Mapping[str, Set[str]] | None = None
) -> Invocation:
    """Return the invocation of this process. MLflow sets MLFLOW_RUN_ID for the command of a project.

    `mlflow run` works in the project's folder, which is therefore the address that runs it again.
    """
    by_project = program == MODULE and "MLFLOW_RUN_ID" in os.environ and os.path.exists("MLproject")
    return Invocation(program, os.getcwd() if by_project else None, entry_points, store_options or {})


def note_store(given: Mapping[str, str]) -> None:
    """Note the options by which the user chose a store and an experiment."""
    if invocation := _current.get():
        invocation.store.update(given)


def already_recorded() -> str:
    """Return what to do about a refused secret under `mlflow run`, which has recorded it; "" elsewhere.

    MLflow logs the parameters of a project before it starts the program.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID") if (_current.get() or Invocation()).project else None
    if not run_id:
        return ""
    return (
        f" MLflow has recorded it with the run {run_id}: change the secret, and remove the run by "
        f"`mlflow runs delete --run-id {run_id}` and `mlflow gc`."
    )


def note_folder(folder: Path) -> None:
    """Note that the command has begun to write results into a folder."""
    if invocation := _current.get():
        invocation.folders.append(str(folder))


def begun_folders() -> list[str]:
    """Return the folders into which the command has written results."""
    return list((_current.get() or Invocation()).folders)


def command_text(name: str, /, *positional: str, **options: str) -> str:
    """Return one of our commands as the user would call it."""
    return (_current.get() or Invocation()).command(name, positional, options)


def parameter_text(name: str, value: str) -> str:
    """Return the text that sets a parameter as the user would give it: `rerun=true` in Python, else an option."""
    invocation = _current.get()
    return f"{name}={value}" if invocation is None else invocation.parameter(name, value)


def _environment() -> list[str]:
    """Return the option of `mlflow run` for the present environment; the ones that MLflow makes are named mlflow-…."""
    return [] if Path(sys.prefix).name.startswith("mlflow-") else ["--env-manager", "local"]
