"""Command line: parse, call the function of the command, and turn errors into one line and an exit code.

Slow imports happen inside the commands.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TextIO, cast

from .. import __version__
from ..records.errors import LlmbenchError
from ..records.invocation import PROGRAM, begun_folders, called_as, invocation_of
from ..records.redaction import Terminal
from ..system.python_command import forget_working_directory
from ..tracking.store import told_at_once
from . import decisions, environment, measure, results
from .interruption import interruptible
from .options import Parser, entry_points

COMMANDS = {
    command.name: command
    for command in (*measure.COMMANDS, *results.COMMANDS, *environment.COMMANDS, *decisions.COMMANDS)
}
"""All commands by name, in the order of the help."""


def build_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Build the parser of all commands. `program` is how the user called us."""
    parser = Parser(prog=program, description="Honest benchmarks of quantized language models, each one an MLflow run.")
    parser.add_argument("--version", action="version", version=f"llmbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS.values():
        command.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run one command. Returns the exit code: 0, 1 for a failure, 2 for a wrong parameter, 130 if interrupted.

    `gate` and `reproduce` have further exit codes. `program` is how the user called us.
    """
    forget_working_directory()
    with (
        interruptible(),
        contextlib.redirect_stdout(cast(TextIO, Terminal(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, Terminal(sys.stderr))),
        called_as(invocation_of(program, entry_points(COMMANDS.values()))),
    ):
        return _main(arguments, program)


def _main(arguments: Sequence[str] | None, program: str) -> int:
    failure_code = 1
    try:
        given = build_parser(program).parse_args(arguments)
        command = COMMANDS[given.command]
        failure_code = command.failure_code
        goes_on = _warn if command in measure.COMMANDS else None
        with told_at_once(getattr(given, "tracking_uri", None), goes_on):
            return command.run(given)
    except LlmbenchError as error:
        print(f"llmbench: {error}", file=sys.stderr)
        return failure_code if error.exit_code == 1 else error.exit_code
    except KeyboardInterrupt:
        print(f"llmbench: interrupted{_so_far(arguments)}.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        traceback.print_exc()  # inside `main`, whose streams redact secrets
        return 1


def _so_far(arguments: Sequence[str] | None) -> str:
    """Say what an interrupted command leaves behind."""
    if folders := begun_folders():
        return f". What was measured is in {', '.join(folders)}"
    measures = {command.name for command in measure.COMMANDS if command.name != "plan"}
    given = sys.argv[1:] if arguments is None else arguments
    return " before anything was measured" if measures.intersection(given[:1]) else ""


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
