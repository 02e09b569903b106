"""Packages that this one needs or can use: versions, features, install commands. Imports none, reads metadata only."""

from __future__ import annotations

import importlib.metadata
import re

from ..records.installation import pip_install
from ..records.quantizations import LIBRARIES, QUANTIZATIONS, SCHEMES, Library

NEEDED = {
    "torch": (">=2.6", ""),
    "transformers": (">=5.3", "<6"),
    "accelerate": (">=1.0", ""),
    "safetensors": ("", ""),
    "mlflow": (">=3.15", "<4"),
}
"""Packages required to measure and log, with their supported versions, as in pyproject.toml."""

FLOORS = {
    "torch": ("2.6", "the oldest that runs no code out of pickled weights (CVE-2025-32434)"),
    "transformers": ("5.3", "the oldest that runs no code of a model without trust_remote_code (CVE-2026-4372)"),
    "mlflow": ("3.10", "the oldest whose server lets no stranger read its files (CVE-2026-2614)"),
}
"""Package → the oldest version that is safe with foreign models and addresses, and why. Older ones cause a warning."""

ALSO_SHOWN = (
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "matplotlib",
    "psutil",
    "nvidia-ml-py",
    "triton",
    "kernels",
    "flash-attn",
)


def _gives(library: Library) -> str:
    """Return what a library adds: its schemes, then its other features."""
    schemes = ", ".join(name for name in QUANTIZATIONS if SCHEMES[name].library is library)
    return "; ".join(filter(None, [schemes, library.gives]))


OPTIONAL = (
    *((one.packages, _gives(one)) for one in LIBRARIES if _gives(one)),
    (("gguf",), "models in .gguf files"),
)
"""Packages, and features that they add."""


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_written_for(name: str, installed: str) -> bool:
    """Return True if an installed version of a needed package is supported."""
    low, below = NEEDED[name]
    numbers = _numbers(installed)
    return not (low and numbers < _numbers(low)) and not (below and numbers >= _numbers(below))


def below_floor(name: str, installed: str) -> str | None:
    """Return why an installed version is too old (`2.5.1 is older than 2.6, the oldest that …`), or None."""
    floor, why = FLOORS.get(name, ("", ""))
    return f"{installed} is older than {floor}, {why}" if floor and _numbers(installed) < _numbers(floor) else None


def warnings_of_versions() -> list[str]:
    """Return one line for each installed package that is below its floor."""
    olds = {name: old for name in FLOORS if (old := below_floor(name, version(name) or FLOORS[name][0]))}
    return [
        f"{name} {old}. Run: {pip_install(name + ','.join(filter(None, NEEDED[name])))}" for name, old in olds.items()
    ]


def _numbers(text: str) -> tuple[int, int]:
    """Return major and minor version, or (0, 0) if there are none."""
    found = re.search(r"(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)
