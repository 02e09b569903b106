"""Command line: parse, call the function of the command, and turn errors into one line and an exit code.

Slow imports happen inside the commands.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO, cast

import click
from click.shell_completion import shell_complete

from ..records.errors import LlmbenchError
from ..records.invocation import PROGRAM, begun_folders, called_as, invocation_of, note_store
from ..records.redaction import Terminal
from ..system.python_command import forget_working_directory
from . import comparison, decisions, inspection, measure, parser
from .completion import VARIABLE
from .interruption import interruptible
from .options import EXPERIMENT, TRACKING_URI, entry_points, store_options
from .parser import Call, Program

GROUPS = {
    "Measure": measure.COMMANDS,
    "Compare": comparison.COMMANDS,
    "Decide": decisions.COMMANDS,
    "Inspect": inspection.COMMANDS,
}
"""All commands in groups, in the order of the help."""

COMMANDS = {command.name: command for commands in GROUPS.values() for command in commands}
"""All commands by name."""


def parse(arguments: Sequence[str], program: str = PROGRAM) -> Call:
    """Parse the arguments of the program. See `parser.parse`."""
    return parser.parse(GROUPS, arguments, program)


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run one command. Returns the exit code: 0, 1 for a failure, 2 for a wrong parameter, 130 if interrupted.

    `gate` and `reproduce` have further exit codes. `program` is how the user called us.
    """
    forget_working_directory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # replace what a terminal lacks, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    with (
        interruptible(),
        contextlib.redirect_stdout(cast(TextIO, Terminal(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, Terminal(sys.stderr))),
        called_as(invocation_of(program, entry_points(COMMANDS.values()), store_options(COMMANDS.values()))),
    ):
        return _main(arguments, program)


def _main(arguments: Sequence[str] | None, program: str) -> int:
    failure_code = 1
    try:
        if instruction := os.environ.get(VARIABLE):
            return shell_complete(Program(GROUPS), {}, PROGRAM, VARIABLE, instruction)
        call = parse(sys.argv[1:] if arguments is None else arguments, program)
        failure_code = call.command.failure_code
        given = {option.argument: call.values.get(option.argument) for option in (TRACKING_URI, EXPERIMENT)}
        note_store({name: str(value) for name, value in given.items() if value})
        with _told_at_once(call):
            return call.run()
    except click.exceptions.Exit as done:
        return done.exit_code
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


def _told_at_once(call: Call) -> contextlib.AbstractContextManager[Any]:
    """Tell before the command runs that the store it was given does not answer. A command that measures goes on."""
    uri = call.command.store_address(call.values)
    if not uri:
        return contextlib.nullcontext()
    from ..tracking.reach import told_at_once

    return told_at_once(uri, _warn if call.command.store == "later" else None)


def _so_far(arguments: Sequence[str] | None) -> str:
    """Say what an interrupted command leaves behind."""
    if folders := begun_folders():
        return f". What was measured is in {', '.join(folders)}"
    measures = {command.name for command in measure.COMMANDS}
    given = sys.argv[1:] if arguments is None else arguments
    return " before anything was measured" if measures.intersection(given[:1]) else ""


def _warn(line: str) -> None:
    print(line, file=sys.stderr)
