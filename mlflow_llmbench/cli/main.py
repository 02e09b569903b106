"""Command line: parse, call one function of the library, print. Slow imports happen inside the commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO, cast

from .. import __version__
from ..records.errors import LlmbenchError
from ..records.redaction import Terminal
from . import decisions
from .environment import _doctor, _models
from .measure import _ab, _measuring, _plan, _qat, _run, _study
from .options import Parser
from .results import _compare, _reading, _scaling, _upload


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; the options of `run` come from the declared parameters."""
    parser = Parser(
        prog="llmbench", description="Honest benchmarks of quantized language models, each one an MLflow run."
    )
    parser.add_argument("--version", action="version", version=f"llmbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    found = {**_measuring(commands), **_reading(commands)}
    for name in ("run", "plan", "online", "study"):
        found[name].add_argument(
            "--config",
            metavar="FILE",
            help="YAML file of parameters, such as a run's config.yaml; command-line options override it",
        )
    for name in ("compare", "ab"):
        found[name].add_argument(
            "--noise",
            metavar="RATIO",
            type=float,
            default=0.01,
            help="relative differences below this count as noise (default: 0.01)",
        )
    for name in ("run", "plan", "online", "compare", "ab", "scaling", "study", "qat"):
        found[name].add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    for name in ("run", "online", "upload", "compare", "ab", "scaling", "study", "qat"):
        found[name].add_argument(
            "--tracking-uri", metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI, or a SQLite file here)"
        )
        found[name].add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: llmbench)")
    for name, help in (
        ("models", "list the model presets and which of them fit on this machine"),
        ("doctor", "report what this machine and environment can do, and what is missing"),
    ):
        found[name] = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        found[name].add_argument("--json", action="store_true", help="print one JSON object instead of text")
    found["doctor"].add_argument(
        "--worker-python",
        metavar="PATH",
        help="examine this Python interpreter for workers, instead of the current one",
    )
    decisions.add_parsers(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 for a failure, 2 for a wrong parameter, 130 if interrupted.

    `gate` and `reproduce` have further exit codes.
    """
    for name in SIGNALS:
        signal.signal(name, _interrupt)
    with (
        contextlib.redirect_stdout(cast(TextIO, Terminal(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, Terminal(sys.stderr))),
    ):
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    try:
        given = build_parser().parse_args(arguments)
        return COMMANDS[given.command](given)
    except LlmbenchError as error:
        print(f"llmbench: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("llmbench: interrupted before anything was measured.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        traceback.print_exc()  # inside `main`, whose streams redact secrets
        return 1


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that end a command in order: from Ctrl-C, a scheduler, or a closed terminal."""


def _interrupt(*_: object) -> None:
    """Handle the first signal only. Later ones are ignored until every run has ended and its results are saved."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "plan": _plan,
    "online": _run,
    "ab": _ab,
    "upload": _upload,
    "compare": _compare,
    "scaling": _scaling,
    "study": _study,
    "qat": _qat,
    "models": _models,
    "doctor": _doctor,
} | decisions.COMMANDS
