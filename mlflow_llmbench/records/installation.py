"""Commands that install packages into the environment of this interpreter, wherever this package came from.

An extra is written as the packages that it stands for, since `mlflow-llmbench[extra]` needs an index that has us: it
does not work from a checkout or a wheel.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import sys

DISTRIBUTION = "mlflow-llmbench"
_OF_EXTRA = re.compile(r"""\s*;.*\bextra\s*==\s*['"](?P<extra>[\w-]+)['"]""")


def pip_install(*requirements: str) -> str:
    """Return the command that installs requirements, quoted for a shell."""
    return " ".join([_install(), *map(shlex.quote, requirements)])


def of_extra(extra: str, *packages: str) -> tuple[str, ...]:
    """Return the requirements of one of our extras; `packages`, without versions, if we are not installed here."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return packages
    found = [one[: match.start()] for one in declared if (match := _OF_EXTRA.search(one)) and match["extra"] == extra]
    return tuple(found) or packages


def _has_pip() -> bool:
    """Return True if the environment has pip, from its metadata.

    Looking for the module makes setuptools leave the standard library's distutils in place before Python 3.12, and then
    nothing in this process can import setuptools any more.
    """
    try:
        return bool(importlib.metadata.version("pip"))
    except importlib.metadata.PackageNotFoundError:
        return False


def _install() -> str:
    """Return the beginning of the command: that of this environment's pip, or of uv if the environment has none."""
    found, python = shutil.which("pip"), shlex.quote(sys.executable)
    if found and os.path.dirname(found) == os.path.dirname(sys.executable):
        return "pip install"
    if not _has_pip() and shutil.which("uv"):
        return f"uv pip install --python {python}"
    return f"{python} -m pip install"
