"""Options of the command line, generated from the declared parameters."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import Field
from typing import Any

from ..records.cell import PARAMETERS, default_text
from ..records.errors import UsageError


class Parser(argparse.ArgumentParser):
    """ArgumentParser with errors in our form: one line, what is wrong and what to do, exit code 2."""

    def error(self, message: str) -> Any:
        """Raise UsageError instead of printing the usage and exiting."""
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See `{self.prog} --help`.")


def _add_parameters(command: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add one option per declared parameter."""
    for name in names:
        _add_parameter(
            command, name, PARAMETERS[name], default_text(name), " †" if PARAMETERS[name].metadata["sweep"] else ""
        )


def _add_parameter(command: argparse.ArgumentParser, name: str, declared: Field[Any], default: str, mark: str) -> None:
    flag: dict[str, Any] = {"nargs": "?", "const": "true"} if declared.metadata["kind"] == "flag" else {}
    text = f"{declared.metadata['help']}{mark} (default: {default})".replace("%", "%%")
    command.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=text, **flag)
