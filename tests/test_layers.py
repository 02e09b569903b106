"""The architecture: folders and imports follow the tree of docs/architecture.md, and heavy libraries stay at home."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "mlflow_llmbench"

HOMES = {
    "torch": ("backends", "measure/worker", "tracking/serving_model"),
    "transformers": ("backends", "measure/worker", "tracking/serving_model"),
    "bitsandbytes": ("backends",),
    "accelerate": ("backends",),
    "safetensors": ("backends",),
    "huggingface_hub": ("backends", "tracking/serving_model"),
    "gguf": ("backends",),
    "llama_cpp": ("backends", "tracking/serving_model"),
    "vllm": ("backends",),
    "openvino": ("backends",),
    "openvino_genai": ("backends",),
    "optimum": ("backends",),
    "torchao": ("backends",),
    "hqq": ("backends",),
    "lm_eval": ("backends",),
    "uvloop": ("loadgen",),
    "pynvml": ("system",),
    "psutil": ("system",),
    "matplotlib": ("reports/charts",),
    "jinja2": ("reports/html",),
    "mlflow": ("tracking", "sweeps/upload", "workflows/mlflow_deployments"),
    "ray": ("sweeps/ray_executor",),
    "sklearn": ("analysis/decisions/tuning",),
}
"""Heavy library → folders and modules that may import it. The worker is the process that sets up torch."""


def tree_in(document: str) -> list[str]:
    """Entries of the first level of the tree that is drawn in a document, in their order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    drawn = re.search(rf"^```\w*\n{PACKAGE}/\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert drawn, f"{document} has no tree that begins with {PACKAGE}/"
    names = re.findall(r"^[├└]── (\S+)", drawn[1], re.MULTILINE)
    return [name.removesuffix("/").removesuffix(".py") for name in names if name != "__init__.py"]


def name_of(file: Path) -> str:
    """Path of a module in the package without its ending: `stats`, `backends/fake`, `backends` for its __init__."""
    return file.relative_to(ROOT / PACKAGE).with_suffix("").as_posix().removesuffix("/__init__")


FILES = {name_of(file): file for file in sorted((ROOT / PACKAGE).rglob("*.py"))}
ORDER = tree_in("docs/architecture.md")
ENTRIES = {name.partition("/")[0] for name in FILES} - {"__init__", "__main__"}


@cache
def imported_names(module: str) -> tuple[str, ...]:
    """Absolute dotted names of all imports of a module, at any depth; `from a import b` gives `a.b`."""
    return tuple(_imported_names(module))


def _imported_names(module: str) -> Iterator[str]:
    file = FILES[module]
    parents = [PACKAGE, *file.relative_to(ROOT / PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def loaded_by(*arguments: str) -> set[str]:
    """Top-level names of all modules that a fresh interpreter imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_the_drawn_tree_is_the_folders() -> None:
    assert sorted(ORDER) == sorted(ENTRIES)


@pytest.mark.parametrize("module", [name for name in FILES if name.partition("/")[0] in ENTRIES])
def test_imports_follow_the_order_of_the_folders(module: str) -> None:
    """The package's own names (`__version__`, `PACKAGE_DIR`) are free for all."""
    rank = ORDER.index(module.partition("/")[0])
    ours = [name.split(".")[1] for name in imported_names(module) if name.startswith(f"{PACKAGE}.")]
    assert [entry for entry in ours if entry in ENTRIES and ORDER.index(entry) > rank] == []


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_imported_in_its_home_only(library: str) -> None:
    users = {module for module in FILES for name in imported_names(module) if name.partition(".")[0] == library}
    assert {
        module for module in users if not f"{module}/".startswith(tuple(f"{home}/" for home in HOMES[library]))
    } == set()


@pytest.mark.parametrize(
    "arguments",
    [("-c", f"import {PACKAGE}"), ("-m", PACKAGE, "--help"), ("-m", PACKAGE, "run", "--help")],
    ids=" ".join,
)
def test_nothing_heavy_is_loaded_before_it_is_used(arguments: tuple[str, ...]) -> None:
    loaded = loaded_by(*arguments)
    assert PACKAGE in loaded
    assert loaded & {*HOMES, "numpy", "scipy", "pandas"} == set()


def test_public_import_paths_stay() -> None:
    """Names that users import, with the objects behind them."""
    program = (
        "from mlflow_llmbench import run; from mlflow_llmbench.callback import measure;"
        "from mlflow_llmbench.backends.fake import FakeBackend; from mlflow_llmbench.cli import main;"
        "print(run.__module__, measure.__module__, FakeBackend.__module__, main.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == [
        "mlflow_llmbench.workflows.run",
        "mlflow_llmbench.workflows.in_process",
        "mlflow_llmbench.backends.fake",
        "mlflow_llmbench.cli.main",
    ], done.stderr
