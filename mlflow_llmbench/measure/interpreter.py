"""Workers in another Python interpreter: check it, run in it, and ask it about a model.

Runtimes need other versions of packages than we do, and than each other. A worker needs only the files of this package,
which it imports from a folder that holds nothing else: packages installed with us stay invisible, and those installed
there are used. Every question that depends on installed packages (does a backend exist, where do a model's files come
from) is asked in that interpreter.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import PACKAGE_DIR
from ..backends.base import COMMAND_PYTHON, backend_class
from ..records import errors
from ..records.backends import capabilities_of, known_backends, recorded_capabilities
from ..records.cell import Cell
from ..records.errors import LlmbenchError, MeasurementError, MissingError, UsageError
from ..records.redaction import redact, worker_environment
from ..records.results import ModelFacts, hash16
from ..system import gpu, machine
from ..system.python_command import code_command, module_command, safe
from ..system.python_command import variables as variables_of_ours
from .events import JobFailed, ModelResolved, decode
from .task import WorkerJob

MIN_PYTHON = (3, 10)
"""The oldest Python that runs a worker, as in pyproject.toml."""

WORKER = "mlflow_llmbench.measure.worker"

ASK_S, RESOLVE_S = 60.0, 120.0

OWN_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")
"""Variables that lead an interpreter to its packages; ours would lead another one to those of the wrong Python."""

DISTRIBUTIONS = {"pynvml": "nvidia-ml-py"}
"""Module of any worker → distribution that installs it, where the names differ. Backends declare their own."""

ASK = """
import json, sys
found = {"version": list(sys.version_info[:3])}
if sys.version_info >= (3, 10):
    import importlib.util
    found["lacking"] = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
    if not found["lacking"]:
        from mlflow_llmbench.measure import worker
        from mlflow_llmbench.system import machine
        found["environment"] = machine.fingerprint()
print(json.dumps(found))
"""
"""Probe that runs in any interpreter, so it must be valid in every Python since 2.6."""


def worker_command(python: str | None) -> list[str]:
    """Return the command that starts a worker in the requested interpreter, or in ours."""
    return module_command(python or sys.executable, WORKER)


def variables(python: str | None, kept: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process of that interpreter, in which this package can be imported.

    `kept`: our variables that it may have.
    """
    if python is None:
        return variables_of_ours(kept)
    others = {name: value for name, value in kept.items() if name not in OWN_VARIABLES}
    return safe({**others, "PYTHONPATH": str(package_folder()), COMMAND_PYTHON: sys.executable})


def package_folder() -> Path:
    """Return a folder that holds only a link to this package. Raises MissingError if it cannot be made."""
    package = PACKAGE_DIR
    folder = machine.cache_folder() / "package" / hash16(str(package))
    link = folder / package.name
    if link.exists():
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f".{os.getpid()}"
        scratch.symlink_to(package)
        scratch.replace(link)
    except OSError as error:
        raise MissingError(
            f"The folder {folder} cannot be written: {error.strerror}. Set LLMBENCH_CACHE to a folder that you own."
        ) from None
    return folder


def environment_of(cell: Cell, ours: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fingerprint of the environment that measures a cell: its worker's interpreter, or `ours`.

    Raises UsageError or MissingError.
    """
    if cell.worker_python is None:
        return ours
    return {**examine(cell.worker_python, needed_modules(cell)), "git": ours.get("git")}


def needed_modules(cell: Cell) -> tuple[str, ...]:
    """Modules that the worker of a cell needs: those of its backend, and readers of this machine without /proc."""
    own = () if Path("/proc/self/status").exists() else ("psutil",)
    heavy = (module.partition(".")[0] for module in capabilities_of(cell.backend).heavy)
    return tuple(dict.fromkeys((*own, *(("pynvml",) if gpu.gpus() else ()), *heavy)))


def lacking_here(modules: Sequence[str]) -> list[str]:
    """Return the distributions to install in our own interpreter to have these modules; imports nothing."""
    tops = dict.fromkeys(module.partition(".")[0] for module in modules)
    return [distribution_of(top) for top in tops if importlib.util.find_spec(top) is None]


ASK_DOCTOR = """
import json
from mlflow_llmbench.measure import runtime
from mlflow_llmbench.records.codec import to_json
print(json.dumps(to_json(runtime.runtime_items())))
"""


def ask_doctor(python: str) -> list[dict[str, Any]]:
    """Return the items of `doctor.runtime_items` in another interpreter, with its own pip in their advice.

    Raises UsageError or MeasurementError.
    """
    examine(python)
    answer, problem = _ask(code_command(python, ASK_DOCTOR), "", RESOLVE_S, downloads=False)
    if not answer:
        raise MeasurementError(f"worker_python={python} cannot be examined: {problem}.")
    items: list[dict[str, Any]] = json.loads(answer)
    return [item | {"advice": item["advice"] and _with_its_pip(python, item["advice"])} for item in items]


def try_import(python: str, backend: str) -> str:
    """Return why a backend's modules cannot be imported in another interpreter; empty if they can.

    Takes as long as the import, at most a minute.
    """
    own = capabilities_of(backend)
    text = f"import os; os.environ.update({dict(own.variables)!r}); import {', '.join(own.heavy)}; print('imported')"
    return _ask(code_command(python, text), "", ASK_S, downloads=False)[1] if own.heavy else ""


@functools.cache
def examine(python: str, modules: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """Return the fingerprint that `machine` takes in another interpreter, which has these modules and can run a worker.

    Raises UsageError if it is not a Python that can run a worker, and MissingError if packages are missing there; each
    message is one line.
    """
    answer, problem = _ask(code_command(python, ASK, *modules), "", ASK_S, downloads=False)
    try:
        found: dict[str, Any] = json.loads(answer)
        version = tuple(found["version"])
    except (ValueError, TypeError, KeyError):
        raise UsageError(
            f"worker_python={python} does not run as a Python interpreter: {problem or 'it printed something else'}. "
            f"Give the path of a Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or later, such as ENVIRONMENT/bin/python."
        ) from None
    if version < MIN_PYTHON:
        raise UsageError(
            f"worker_python={python} is Python {'.'.join(map(str, version))}, and a worker needs "
            f"{MIN_PYTHON[0]}.{MIN_PYTHON[1]} or later. Give another interpreter, or leave it out."
        )
    if found["lacking"]:
        raise MissingError(_lacking(python, found["lacking"]))
    environment: Mapping[str, Any] = found["environment"]
    return environment


def _lacking(python: str, modules: Sequence[str]) -> str:
    names = [distribution_of(module) for module in modules]
    noun = "package" if len(names) == 1 else "packages"
    return (
        f"worker_python={python} lacks the {noun} {', '.join(names)}, which its worker needs. "
        f"Run: {pip(python)} {' '.join(names)}"
    )


def distribution_of(module: str) -> str:
    """Return the distribution that installs a module."""
    declared = (one for name in known_backends() for one in recorded_capabilities(name).distributions)
    found = next((one for one in declared if one.module == module), None)
    if found is None:
        return DISTRIBUTIONS.get(module, module.replace("_", "-"))
    return found.cpu if found.cpu and not gpu.gpus() else found.name


def pip(python: str) -> str:
    """Return the command that installs into the environment of an interpreter."""
    return f"{shlex.quote(python)} -m pip install"


def _with_its_pip(python: str, text: str) -> str:
    """Return a text with the pip of an interpreter in its commands, unless they name one already."""
    return re.sub(r"(?<!/)(?<!-m )(?<!uv )pip install", lambda _: pip(python), text)


def resolve(cell: Cell) -> ModelFacts:
    """Resolve the cell's model by its backend, in the interpreter that will run it.

    Raises what the backend's `resolve` raises; pip commands in messages are those of that interpreter.
    """
    if cell.worker_python is None:
        return backend_class(cell.backend).resolve(cell)
    python = cell.worker_python
    examine(python, needed_modules(cell))
    job = WorkerJob("resolve", (cell,))
    answer, problem = _ask(worker_command(python), job.to_line(), RESOLVE_S, downloads=True)
    for line in answer.splitlines():
        match decode(line) if line.startswith("{") else None:
            case ModelResolved(model=model):
                return model
            case JobFailed(kind=kind, message=message):
                raise _error(python, kind, message)
    raise MeasurementError(
        f"worker_python={python} did not say what the model {cell.model} is: {problem or 'its worker ended'}."
    )


def _error(python: str, kind: str, message: str) -> LlmbenchError:
    known = getattr(errors, kind, MeasurementError)
    if known is MissingError:
        return MissingError(f"worker_python={python}: {_with_its_pip(python, message)}")
    return known(message) if isinstance(known, type) and issubclass(known, LlmbenchError) else MeasurementError(message)


def _ask(arguments: Sequence[str], text: str, seconds: float, downloads: bool) -> tuple[str, str]:
    """Run a process; return its output, and if it failed the last line of its errors, or how it ended."""
    environment = variables(arguments[0], worker_environment(os.environ, downloads))
    try:
        done = subprocess.run(
            arguments,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {seconds:g} s"
    except OSError as error:
        return "", str(error.strerror)
    printed = done.stderr.strip().splitlines()
    failed = done.returncode != 0
    problem = (redact(printed[-1])[:200] if printed else f"it ended with code {done.returncode}") if failed else ""
    return (
        "" if failed else done.stdout.strip().splitlines()[-1] if not text and done.stdout.strip() else done.stdout
    ), problem
