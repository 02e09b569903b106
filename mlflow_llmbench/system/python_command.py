"""Command lines and variables of the Python processes that we start. None of them imports from the working directory.

Python puts the working directory first on the import path of `python -m` and `python -c`, so a `torch.py` in a
downloaded model's folder would run. Two means keep it out, since neither does alone:

- `PYTHONSAFEPATH` (Python 3.11 and later), which the process hands on to the processes that it starts;
- the first statement of the command, for Python 3.10, and for an older one that only has to tell its version.

An empty part of PYTHONPATH also means the working directory, usually without intent (`PYTHONPATH=$PYTHONPATH:/x`). It
is left out. A part that names a folder stays.
"""

from __future__ import annotations

import contextlib
import os
import site
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import PACKAGE_DIR

FORGET = "import sys; sys.path[:1] = [part for part in sys.path[:1] if part]"
"""First statement of a command. With `-c`, the first part of the import path is empty and means the working directory.

Valid in every Python since 2.6.
"""

SAFE_PATH = "PYTHONSAFEPATH"
OURS = "llmbench"
"""Value of `PYTHONSAFEPATH` that we set. Every text has the same effect; a server that we start does not get ours."""


def module_command(python: str, module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of ours like `python -m MODULE`, without the working directory."""
    code = f"{FORGET}; import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    return [python, "-c", code, *arguments]


def code_command(python: str, code: str, *arguments: str) -> list[str]:
    """Return the command that runs a text like `python -c CODE`, without the working directory."""
    return [python, "-c", f"{FORGET}\n{code}", *arguments]


def variables(kept: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process of our own interpreter, in which this package can be imported.

    `kept`: our variables that it may have.
    """
    return safe({**kept, "PYTHONPATH": os.pathsep.join([str(PACKAGE_DIR.parent), *python_path()])})


def safe(kept: Mapping[str, str]) -> dict[str, str]:
    """Return these variables such that Python imports nothing from the working directory."""
    return _with_path({SAFE_PATH: OURS, **kept}, python_path(kept))


def without_ours(kept: Mapping[str, str]) -> dict[str, str]:
    """Return these variables for a program of the user's: without what `variables` has added."""
    parts = python_path(kept)
    given = {name: value for name, value in kept.items() if (name, value) != (SAFE_PATH, OURS)}
    return _with_path(given, parts[1:] if parts[:1] == [str(PACKAGE_DIR.parent)] else parts)


def _with_path(kept: Mapping[str, str], parts: Sequence[str]) -> dict[str, str]:
    others = {name: value for name, value in kept.items() if name != "PYTHONPATH"}
    return others | ({"PYTHONPATH": os.pathsep.join(parts)} if parts else {})


def python_path(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the folders that PYTHONPATH names; its empty parts are left out."""
    return [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]


def forget_working_directory() -> None:
    """Remove the working directory from the import path of this process, unless PYTHONPATH names it or we are in it.

    Python has put it there for `python -m`, or because of an empty part of PYTHONPATH.
    """
    with contextlib.suppress(OSError):  # it was deleted
        here = Path.cwd()
        named: list[str | Path] = [
            PACKAGE_DIR.parent,
            *python_path(),
            os.path.dirname(os.__file__),
            *site.getsitepackages(),
        ]
        if here not in {Path(part).resolve() for part in named}:
            sys.path[:] = [part for part in sys.path if part and Path(part).absolute() != here]
