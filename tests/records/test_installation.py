"""Commands that install packages, for an environment that is activated or not, and for one that has no pip."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_llmbench.records import installation
from mlflow_llmbench.records.installation import of_extra, pip_install


def executable(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_the_pip_of_an_active_environment_has_its_plain_name() -> None:
    assert pip_install("torch>=2.6", "hqq") == "pip install 'torch>=2.6' hqq"


def test_another_environments_pip_is_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(executable(tmp_path / "pip").parent))
    assert pip_install("hqq") == f"{sys.executable} -m pip install hqq"


def test_uv_installs_where_there_is_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(executable(tmp_path / "uv").parent))
    found = importlib.metadata.version

    def version(name: str) -> str:
        if name == "pip":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert pip_install("hqq") == f"uv pip install --python {sys.executable} hqq"


def test_setuptools_can_be_imported_after_pip_was_looked_for(tmp_path: Path) -> None:
    """Its hook gives way to pip, once the module pip is looked for, and setuptools then refuses to start."""
    code = "from mlflow_llmbench.records.installation import pip_install; pip_install('x'); import setuptools"
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(Path(installation.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_extra_is_the_packages_that_it_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mlflow_llmbench-9.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mlflow-llmbench\nVersion: 9\nRequires-Dist: torch\n"
        'Requires-Dist: ray[client]>=2.40; extra == "ray"\n'
        "Requires-Dist: uvloop>=0.19; (platform_system != 'Windows') and extra == 'online'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert of_extra("ray", "ray") == ("ray[client]>=2.40",)
    assert of_extra("online", "uvloop") == ("uvloop>=0.19",)
    assert of_extra("none", "own") == ("own",)


def test_without_an_installation_the_packages_have_no_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "DISTRIBUTION", "no-such-distribution-of-ours")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.requires(installation.DISTRIBUTION)
    assert of_extra("gptq", "optimum", "gptqmodel") == ("optimum", "gptqmodel")
