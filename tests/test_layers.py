"""The architecture as a table: which module may import which, where each heavy library lives, and the tree in the README."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "mlflow_llmbench"
LAYERS = {
    "nouns": ("redaction", "errors", "metrics", "quantizations", "quant_plan", "cell", "records"),
    "intent": (
        "parameters",
        "launch",
        "combinations",
        "spec",
        "models",
        "plan",
        "traces",
        "workload",
        "arrivals",
        "batching",
        "training",
    ),
    "world": (
        "memory",
        "gpu",
        "machine",
        "sse",
        "http1",
        "prometheus",
        "client",
        "server_process",
        "interpreter",
        "estimate",
        "backends",
    ),
    "act": (
        "measure",
        "measure_server",
        "measure_stream",
        "journal",
        "supervise",
        "stages",
        "worker",
        "reference",
        "node",
    ),
    "think": (
        "stats",
        "quality",
        "latency",
        "repetitions",
        "efficiency",
        "online_summary",
        "summary",
        "twin",
        "online_validity",
        "validity",
        "goodput",
        "compare",
        "recommend",
        "deployment",
        "gate",
        "reproduction",
        "foreign",
        "frontier",
        "markup",
        "fits",
        "scaling",
        "tradeoffs",
        "footprint",
        "scaling_study",
        "claims",
        "findings",
    ),
    "show": (
        "report",
        "model_table",
        "charts",
        "comparison_charts",
        "load_charts",
        "overview",
        "page",
        "scaling_report",
        "scaling_charts",
        "study_charts",
        "tradeoff_charts",
        "study_report",
        "artifacts",
        "decision",
        "pareto",
        "gate_report",
        "export",
        "sensitivity",
        "training_report",
    ),
    "keep": ("context", "tracking", "view", "registry", "serving_model"),
    "drive": (
        "packages",
        "doctor",
        "progress",
        "relations",
        "watcher",
        "jobs",
        "upload",
        "resume",
        "ledger",
        "place",
        "cluster",
        "sweep",
        "callback",
        "preview",
        "ab",
        "evidence",
        "study",
        "qat",
        "reproduce",
        "rematch",
        "importing",
        "decide",
        "cli",
        "__main__",
        "__init__",
    ),
}
"""From top to bottom: a module imports from its own layer and those above it. `backends` stands for the whole folder."""

THINK_SEES = ("nouns", "think")
"""Pure functions over records: not even the layers above them, but for the nouns."""

EXCEPTIONS = {("measure", "stats"), ("measure_server", "stats"), ("measure_stream", "stats")}
"""Measurement stops when the interval is narrow: it must be the very interval that is reported."""

HOMES = {
    "torch": ("backends", "worker", "serving_model"),
    "transformers": ("backends", "worker", "serving_model"),
    "bitsandbytes": ("backends", "serving_model"),
    "accelerate": ("backends",),
    "safetensors": ("backends",),
    "huggingface_hub": ("backends", "serving_model"),
    "gguf": ("backends",),
    "llama_cpp": ("backends", "serving_model"),
    "vllm": ("backends",),
    "openvino": ("backends",),
    "openvino_genai": ("backends",),
    "optimum": ("backends",),
    "torchao": ("backends", "serving_model"),
    "hqq": ("backends", "serving_model"),
    "lm_eval": ("backends",),
    "uvloop": ("client",),
    "pynvml": ("gpu",),
    "psutil": ("machine", "memory"),
    "matplotlib": (
        "charts",
        "comparison_charts",
        "load_charts",
        "pareto",
        "scaling_charts",
        "sensitivity",
        "study_charts",
        "tradeoff_charts",
    ),
    "mlflow": ("tracking", "view", "upload", "registry", "serving_model"),
    "ray": ("cluster",),
}
"""Heavy library → the only modules that import it. The worker is the process that sets torch and transformers up."""

RANK = {layer: rank for rank, layer in enumerate(LAYERS)}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}


def name_of(file: Path) -> str:
    """Name of a module inside the package: `stats`, `backends.fake`, `backends` for its __init__, `__init__` for ours."""
    name = ".".join(file.relative_to(ROOT / PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = {name_of(file): file for file in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imported_names(module: str) -> Iterator[str]:
    """Absolute dotted names of everything that a module imports, wherever in its text; `from a import b` gives `a.b`."""
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


def own_imports(module: str) -> Iterator[str]:
    """Names of our modules that a module imports. The version is a constant that any module may read."""
    for name in imported_names(module):
        inner = name.removeprefix(f"{PACKAGE}.")
        if name == PACKAGE or (inner != name and inner != "__version__"):
            yield next((known for known in (inner, inner.rpartition(".")[0]) if known in FILES), "__init__")


def family(module: str) -> str:
    return module.partition(".")[0]


def is_allowed(importer: str, imported: str) -> bool:
    if (importer, imported) in EXCEPTIONS:
        return True
    mine, its = LAYER_OF[family(importer)], LAYER_OF[family(imported)]
    return its in THINK_SEES if mine == "think" else RANK[its] <= RANK[mine]


def loaded_by(*arguments: str) -> set[str]:
    """Top-level names of all modules that a fresh interpreter imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def tree_in(readme: str) -> set[str]:
    """Files and folders in the drawn tree. A folder's own files are on lines below it, or on its line between dots."""
    block = re.search(rf"^```\w*\n({PACKAGE}/\n.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, f"no tree that begins with {PACKAGE}/"
    found: set[str] = set()
    folder = ""
    for line in block[1].splitlines():
        entry = re.match(r"([│ ]*)[├└]── (\S+)(.*)", line)
        if entry is None:
            continue
        indent, name, text = entry.groups()
        folder = folder if indent else ""
        found.add(folder + name)
        if name.endswith("/"):
            folder = name
            found |= {name + inside for inside in re.findall(r"\w+\.py\b", text)}
    return found


def test_every_module_has_a_place_in_the_table() -> None:
    assert {family(module) for module in FILES} == set(LAYER_OF)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module: str) -> None:
    assert [name for name in own_imports(module) if not is_allowed(module, name)] == []


@pytest.mark.parametrize("exception", sorted(EXCEPTIONS), ids="-".join)
def test_an_exception_is_needed(exception: tuple[str, str]) -> None:
    importer, imported = exception
    assert imported in set(own_imports(importer))


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_is_imported_in_its_home_only(library: str) -> None:
    users = {module for module in FILES for name in imported_names(module) if family(name) == library}
    assert {module for module in users if family(module) not in HOMES[library]} == set()


@pytest.mark.parametrize(
    "arguments",
    [("-c", f"import {PACKAGE}"), ("-m", PACKAGE, "--help"), ("-m", PACKAGE, "run", "--help")],
    ids=" ".join,
)
def test_nothing_heavy_is_loaded_before_it_is_used(arguments: tuple[str, ...]) -> None:
    loaded = loaded_by(*arguments)
    assert PACKAGE in loaded
    assert loaded & {*HOMES, "numpy", "scipy", "pandas"} == set()


def test_the_tree_in_the_readme_is_the_tree() -> None:
    """A folder's line stands for its `__init__.py`."""
    files = {str(file.relative_to(ROOT / PACKAGE)) for file in FILES.values()} - {"backends/__init__.py"}
    assert tree_in((ROOT / "README.md").read_text(encoding="utf-8")) - {"backends/__init__.py"} == files | {
        "backends/",
        "workloads/",
    }
