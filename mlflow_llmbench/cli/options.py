"""Declarations of commands and their options, and the parser that is built from them.

A command is declared once, where its function is: name, help, options, function. The options that are measurement
parameters are generated from the declared parameters (`records.cell`, `config.training`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass
from typing import Any

from ..config.spec import COMMANDS as PARAMETERS_OF
from ..config.training import NAMES, TRAINING
from ..config.training import default_text as training_default
from ..records.cell import PARAMETERS, default_text
from ..records.errors import UsageError
from ..records.invocation import EntryPoint

NOT_GIVEN = ("", "none")
"""Texts that stand for an option that is not given: a parameter of the MLproject needs a default, which is `none`."""


@dataclass(frozen=True)
class Option:
    """An option (`--name`), or a positional value of a command (a name without dashes).

    `flag`: takes no value. `switch`: takes true or false, and no value means true. `many`: one or more positional
    values, or an option that can be repeated. `optional`: `none` means that it is not given. `key`: name of the
    argument of the command's function. `entry_name`: name of a positional value as parameter of the MLproject.
    """

    name: str
    help: str
    metavar: str | None = None
    default: object = None
    type: Callable[[str], object] = str
    required: bool = False
    flag: bool = False
    switch: bool = False
    many: bool = False
    optional: bool = False
    key: str = ""
    entry_name: str = ""

    @property
    def argument(self) -> str:
        """Name of the argument of the command's function, and of the parsed value."""
        return self.key or self.name.lstrip("-").replace("-", "_")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add this option to a parser."""
        help = self.help.replace("%", "%%")
        if self.flag:
            parser.add_argument(self.name, dest=self.argument, action="store_true", help=help)
            return
        settings: dict[str, Any] = {"metavar": self.metavar, "type": self.type, "help": help}
        if not self.name.startswith("-"):
            settings |= {"nargs": "+"} if self.many else {}
            parser.add_argument(self.argument, **settings)
            return
        if self.many:
            settings |= {"action": "append", "default": []}
        elif self.switch:
            settings |= {"nargs": "?", "const": "true"}
        else:
            settings |= {"default": self.default, "required": self.required}
        parser.add_argument(self.name, dest=self.argument, **settings)

    def value(self, given: argparse.Namespace) -> object:
        """Return the parsed value, None if it is not given."""
        value: object = getattr(given, self.argument)
        if not self.optional:
            return value
        text = str(value or "").strip()
        return None if text in NOT_GIVEN else text


@dataclass(frozen=True)
class Command:
    """A command: its name, one line of help, options, and function, which returns the exit code.

    `failure_code` is the exit code of a failure, for a command whose exit code 1 is an answer. `entry_point` is the
    name of the MLproject's entry point that runs it, "" if there is none.
    """

    name: str
    help: str
    options: tuple[Option, ...]
    function: Callable[..., int]
    description: str | None = None
    failure_code: int = 1
    entry_point: str = ""

    def add_to(self, commands: Any) -> None:
        """Add the parser of this command to `commands`, the subparsers of the command line."""
        parser = commands.add_parser(self.name, help=self.help, description=self.description)
        for option in self.options:
            option.add_to(parser)

    def run(self, given: argparse.Namespace) -> int:
        """Call the function with the parsed values. Returns the exit code."""
        return self.function(**{option.argument: option.value(given) for option in self.options})


def command(
    name: str,
    help: str,
    *options: Option,
    description: str | None = None,
    failure_code: int = 1,
    entry_point: str = "",
) -> Callable[[Callable[..., int]], Command]:
    """Declare a command by its function. See `Command`."""
    return lambda function: Command(name, help, options, function, description, failure_code, entry_point)


def entry_points(commands: Iterable[Command]) -> Mapping[str, EntryPoint]:
    """Return the entry point of each command that has one."""
    return {
        command.name: EntryPoint(
            command.entry_point, tuple(option.entry_name for option in command.options if option.entry_name)
        )
        for command in commands
        if command.entry_point
    }


class Parser(argparse.ArgumentParser):
    """ArgumentParser with errors in our form: one line, what is wrong and what to do, exit code 2."""

    def error(self, message: str) -> Any:
        """Raise UsageError instead of printing the usage and exiting."""
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See `{self.prog} --help`.")


def parameter_options(names: Iterable[str]) -> tuple[Option, ...]:
    """Return one option per declared measurement parameter."""
    return tuple(
        _parameter_option(
            name, PARAMETERS[name], default_text(name), " †" if PARAMETERS[name].metadata["sweep"] else ""
        )
        for name in names
    )


def training_options() -> tuple[Option, ...]:
    """Return one option per parameter of a training."""
    return tuple(
        _parameter_option(name, TRAINING.get(name) or PARAMETERS[name], training_default(name), "") for name in NAMES
    )


def _parameter_option(name: str, declared: Field[Any], default: str, mark: str) -> Option:
    return Option(
        f"--{name.replace('_', '-')}",
        f"{declared.metadata['help']}{mark} (default: {default})",
        "VALUE",
        switch=declared.metadata["kind"] == "flag",
        key=name,
    )


def comma_list(text: str | None) -> frozenset[str]:
    """Return the words of a comma list; no words if it is not given."""
    return frozenset(filter(None, (text or "").split(",")))


RUN_OPTIONS, ONLINE_OPTIONS = (parameter_options(PARAMETERS_OF[name]) for name in ("run", "online"))
CONFIG = Option(
    "--config", "YAML file of parameters, such as a run's config.yaml; command-line options override it", "FILE"
)
NOISE = Option(
    "--noise", "relative differences below this count as noise (default: 0.01)", "RATIO", default=0.01, type=float
)
SHARE = Option(
    "--share",
    "share of the best throughput per instance that a batch size must keep (default: 0.5)",
    "RATIO",
    default=0.5,
    type=float,
)
JSON = Option("--json", "print one JSON object as the last line of stdout", flag=True)
ONLY_JSON = Option("--json", "print one JSON object instead of text", flag=True)
TRACKING_URI = Option("--tracking-uri", "MLflow store (default: MLFLOW_TRACKING_URI, or a SQLite file here)", "URI")
EXPERIMENT = Option("--experiment", "MLflow experiment (default: llmbench)", "NAME")
ACCEPT_SUSPECT = Option(
    "--accept-suspect",
    "accept suspect results for this reason, which is recorded; none = do not accept them",
    "REASON",
    optional=True,
)
PERMISSIONS = (
    Option("--trust-remote-code", "run code that comes with the model, if the run did", flag=True),
    Option("--allow-pickle", "read weights stored as a pickle, if the run did", flag=True),
)


def output_dir(help: str) -> Option:
    """Return the option for the folder of measured results."""
    default = default_text("output_dir")
    return Option("--output-dir", f"{help} (default: {default})", "FOLDER", default=default)
