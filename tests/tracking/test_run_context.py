"""The run-context provider, found by MLflow through its entry point in a fresh interpreter, as in any program."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_llmbench import __version__
from mlflow_llmbench.system import machine
from mlflow_llmbench.tracking.run_context import TAG_RUNS

ROOT = Path(__file__).resolve().parents[2]
LOADED = "import json, sys\nimport mlflow\nprint(json.dumps(sorted(sys.modules)))"
TAGGED = (
    "import json, mlflow\nmlflow.set_tracking_uri({uri!r})\nwith mlflow.start_run() as run:\n    pass\n"
    "print(json.dumps(mlflow.get_run(run.info.run_id).data.tags))"
)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that makes this checkout's entry point look installed."""
    folder = tmp_path / "site" / "llmbench_context-0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: llmbench-context\nVersion: 0\n")
    (folder / "entry_points.txt").write_text(
        "[mlflow.run_context_provider]\nllmbench-here = mlflow_llmbench.tracking.run_context:RunContext\n"
    )
    return folder.parent


def told(code: str, *paths: Path, **variables: str) -> object:
    """The JSON that a fresh interpreter prints last."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr and "Unexpected" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("variables", [{}, {TAG_RUNS: "1"}], ids=["off", "on"])
def test_importing_mlflow_loads_nothing_that_measures(installed: Path, variables: dict[str, str]) -> None:
    loaded = told(LOADED, ROOT, installed, **variables)
    assert isinstance(loaded, list)
    assert "mlflow_llmbench.tracking.run_context" in loaded  # the entry point was found
    own = {name for name in loaded if name.startswith("mlflow_llmbench")}
    parts = ("", ".tracking", ".tracking.run_context", ".records", ".records.errors", ".records.redaction")
    assert own == {f"mlflow_llmbench{part}" for part in parts}
    assert not {"torch", "transformers", "pynvml", "ray", "bitsandbytes"} & set(loaded)


def test_importing_mlflow_takes_no_longer(installed: Path) -> None:
    """Use the import times of a single interpreter, so that other load on the machine affects all of them equally."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, installed)))}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import mlflow"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [
        line.removeprefix("import time:").split("|")
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    ][1:]
    own_us = {name.strip(): int(own) for own, _, name in lines}
    ours = {name: took for name, took in own_us.items() if name.startswith("mlflow_llmbench")}
    assert ours and sum(ours.values()) < 0.05 * sum(own_us.values())


def test_the_provider_needs_the_standard_library_only() -> None:
    tree = ast.parse((ROOT / "mlflow_llmbench" / "tracking" / "run_context.py").read_text(encoding="utf-8"))
    names = {
        node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level and node.module
    }
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.partition(".")[0] for name in names} <= set(sys.stdlib_module_names)
    assert all(
        not isinstance(node, ast.ImportFrom) or not node.level for node in tree.body
    )  # none of our modules before a run begins


def test_runs_of_others_are_tagged_where_it_is_asked_for(installed: Path, store_uri: str) -> None:
    code = TAGGED.format(uri=store_uri)
    assert isinstance(off := told(code, ROOT, installed), dict) and not [
        name for name in off if name.startswith("llmbench.")
    ]
    assert isinstance(zero := told(code, ROOT, installed, **{TAG_RUNS: "0"}), dict) and zero.keys() == off.keys()
    on = told(code, ROOT, installed, **{TAG_RUNS: "1"})
    assert isinstance(on, dict)
    here = machine.environment()
    assert on["llmbench.hardware_hash"] == here["hashes"]["hardware"]
    assert on["llmbench.env_hash"] == here["hashes"]["env"]
    assert on["llmbench.cpu"] == here["cpu"]["name"]
    assert on["llmbench.version"] == __version__
    assert (
        not {"llmbench.outcome", "llmbench.sweep", "llmbench.config_hash", "llmbench.verdict"} & on.keys()
    )  # it is not one of our results
