"""Versions of the GPU libraries that torch uses: CUDA or ROCm runtime, cuDNN and NCCL, read without importing torch.

The driver's CUDA version (`gpu.gpus`) is only the highest that it supports; kernels come from the runtime here.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

LIBRARIES = {"cudnn": "libcudnn", "nccl": "libnccl"}
"""Fact → stem of the shared library's file, in distributions for Linux."""

Installed = Callable[[str], str | None]
"""Returns the version of a distribution, None if it is not installed."""


def versions(
    torch: Path | None = None, installed: Installed | None = None, folders: Sequence[Path] | None = None
) -> dict[str, str | None]:
    """Return the version of each fact of `GPU_RUNTIME`; None for one that is not there.

    All are None for a build of torch for CPUs.
    CUDA and ROCm are those that torch was built for (`torch.version`). cuDNN and NCCL are those of NVIDIA's
    distributions for that CUDA, else of the library's file (`libcudnn.so.9.10.2`) beside torch or in the system.
    `torch`: folder of the package · `folders`: where libraries lie.
    """
    torch = torch or _torch_folder()
    built = _built_for(torch / "version.py") if torch else {}
    cuda, rocm = built.get("cuda"), built.get("hip")
    found: dict[str, str | None] = {"cuda_runtime": cuda, "rocm": rocm, "cudnn": None, "nccl": None}
    if torch and cuda:
        places = [torch / "lib", *(library_folders() if folders is None else folders)]
        for fact, stem in LIBRARIES.items():
            found[fact] = _distribution(fact, cuda, installed or _version) or _file_version(stem, places)
    return found


def has_xpu() -> bool:
    """Return True if the installed torch is a build for Intel's GPUs (`torch.version.xpu`)."""
    torch = _torch_folder()
    return bool(torch and _built_for(torch / "version.py").get("xpu"))


def library_folders() -> list[Path]:
    """Return the folders in which the loader finds libraries: those of the environment, of conda, of the system."""
    named = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    return [Path(name) for name in (*named, f"{sys.prefix}/lib", *SYSTEM_FOLDERS)]


SYSTEM_FOLDERS = ("/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64")


def _torch_folder() -> Path | None:
    try:
        found = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return None
    origin = getattr(found, "origin", None)
    return Path(origin).parent if origin else None


def _built_for(file: Path) -> dict[str, str]:
    """Return the texts that torch's version.py assigns: `cuda`, `hip`, … Empty if it cannot be read."""
    try:
        lines = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, str] = {}
    for line in lines:
        targets = (
            line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        )
        value = getattr(line, "value", None)
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found |= {target.id: value.value for target in targets if isinstance(target, ast.Name)}
    return found


def _distribution(fact: str, cuda: str, installed: Installed) -> str | None:
    """Return the version of NVIDIA's distribution of a library for a CUDA version: `nvidia-cudnn-cu13`."""
    return installed(f"nvidia-{fact}-cu{cuda.partition('.')[0]}") or installed(f"nvidia-{fact}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _file_version(stem: str, folders: Iterable[Path]) -> str | None:
    """Return the most exact version in the names of a library's files, in the first folder that has any."""
    for folder in folders:
        names = [file.resolve().name for file in sorted(folder.glob(f"{stem}.so*"))]
        found = [name.partition(".so.")[2] for name in names if ".so." in name]
        if found:
            return max(found, key=lambda version: (version.count("."), version))
    return None
