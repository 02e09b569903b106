"""No Python process of ours imports from the folder in which a command is called, which may be a downloaded model."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlflow_llmbench
from mlflow_llmbench.system import python_command
from mlflow_llmbench.system.python_command import SAFE_PATH, code_command, module_command, safe, variables, without_ours

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(mlflow_llmbench.__file__).parent
ENDS = {"PYTHONPATH": f"{os.pathsep}{ROOT}{os.pathsep}"}
"""A PYTHONPATH with empty parts, each of which means the working directory."""

MODULES = (
    "measure.worker",
    "loadgen.server_process",
    "backends.openai.client_worker",
    "backends.llamacpp.gguf_convert",
)
OTHERS = ("torch", "transformers", "numpy", "mlflow", "yaml", "psutil", "pynvml", "huggingface_hub", "matplotlib")
"""Names of packages that we and our libraries import."""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "ran.txt"


def plant(folder: Path, names: frozenset[str] | tuple[str, ...], trace: Path) -> None:
    """Write a module of each name that notes that it ran."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'a').write({name!r} + '\\n')\nraise ImportError\n")


@pytest.fixture
def model(tmp_path: Path, trace: Path) -> Path:
    """A folder with a module for every name of the standard library and of the packages that we use."""
    plant(tmp_path / "model", (*sys.stdlib_module_names, *OTHERS), trace)
    return tmp_path / "model"


@pytest.mark.parametrize("module", MODULES)
def test_a_process_of_ours_imports_nothing_from_the_working_directory(module: str, model: Path, trace: Path) -> None:
    done = subprocess.run(
        module_command(sys.executable, f"mlflow_llmbench.{module}"),
        cwd=model,
        env=variables({**os.environ, **ENDS}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert not trace.exists(), done.stderr
    assert "No module named" not in done.stderr  # ours was found


def test_each_of_both_means_keeps_it_out_where_it_has_to(model: Path, trace: Path) -> None:
    """Without PYTHONSAFEPATH, as on Python 3.10, and without the first statement, as for a process of a process."""
    older = {name: value for name, value in os.environ.items() if name != SAFE_PATH} | {"PYTHONPATH": str(ROOT)}
    code = "import sys, torch; print(torch.__file__)"
    first = "import importlib.util; print(importlib.util.find_spec('torch'), importlib.util.find_spec('yaml'))"
    done = subprocess.run(code_command(sys.executable, first), cwd=model, env=older, capture_output=True, text=True)
    assert str(model) not in done.stdout and done.returncode == 0, done.stderr
    child = [sys.executable, "-c", first]
    done = subprocess.run(child, cwd=model, env=safe({**os.environ, **ENDS}), capture_output=True, text=True)
    assert str(model) not in done.stdout and done.returncode == 0, done.stderr
    assert not trace.exists()
    unguarded = subprocess.run([sys.executable, "-c", code], cwd=model, env=older, capture_output=True)
    assert unguarded.returncode and trace.exists()  # what is planted does run where it can


def test_a_server_gets_the_variables_as_the_user_has_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SAFE_PATH, raising=False)
    for path in ("", "/one", f"/one{os.pathsep}two"):
        monkeypatch.setenv("PYTHONPATH", path)
        given = {"A": "1"} | ({"PYTHONPATH": path} if path else {})
        ours = variables(given)
        assert ours[SAFE_PATH] and ours["PYTHONPATH"].split(os.pathsep)[0] == str(PACKAGE.parent)
        assert without_ours(ours) == given
    assert without_ours(variables({SAFE_PATH: "1"}))[SAFE_PATH] == "1"


def test_the_command_forgets_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    others = [str(tmp_path), str(PACKAGE.parent)]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), *others, ""])
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    python_command.forget_working_directory()
    assert sys.path == others
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), *others])
    monkeypatch.setenv("PYTHONPATH", ".")  # somebody wants it
    python_command.forget_working_directory()
    assert sys.path == [str(tmp_path / "here"), *others]


def test_a_command_called_in_the_folder_of_a_model(tmp_path: Path, trace: Path, store_uri: str) -> None:
    plant(tmp_path / "model", OTHERS, trace)
    command = [sys.executable, "-m", "mlflow_llmbench", "run", "--backend", "fake", "--model", "fake:ttft_ms=1"]
    options = ["--repetitions", "2", "--warmup", "1", "--prompt-tokens", "2", "--output-tokens", "2"]
    done = subprocess.run(
        [*command, *options, "--output-dir", str(tmp_path / "out"), "--tracking-uri", store_uri],
        cwd=tmp_path / "model",
        env={**os.environ, **ENDS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not trace.exists(), trace.read_text()


def test_every_python_that_we_start_is_started_this_way() -> None:
    """Only `python_command` writes `-m` or `-c` after an interpreter; `export` writes it for a container."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.List | ast.Tuple) and len(node.elts) > 1:
                first, second = map(ast.unparse, node.elts[:2])
                starts = second in ("'-m'", "'-c'") and ("python" in first or "executable" in first)
                assert not starts or file.name in ("python_command.py", "export.py"), f"{file}, line {node.lineno}"
