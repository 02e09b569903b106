"""Workers in another environment: real interpreters in virtual environments without MLflow, and unusable programs."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

import mlflow_llmbench
from mlflow_llmbench import run
from mlflow_llmbench.backends.base import Capabilities
from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config import spec
from mlflow_llmbench.config.cells import config_hash, group_cells
from mlflow_llmbench.measure import interpreter, journal
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import LlmbenchError, MissingError, UsageError
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.sweeps.sweep import SweepResult
from mlflow_llmbench.system import machine
from mlflow_llmbench.workflows import ab, doctor

FAST: dict[str, Any] = {
    "backend": "fake",
    "output_tokens": 6,
    "prompt_tokens": 4,
    "repetitions": 5,
    "warmup": 1,
    "model": "fake:ttft_ms=2+itl_ms=1",
}
VERSIONS = {"torch": "9.9.9+other", "transformers": "7.0.1"}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment without MLflow and numpy, with only the metadata of another torch version."""
    return environment(tmp_path_factory.mktemp("other"), VERSIONS)


def environment(folder: Path, versions: dict[str, str]) -> str:
    """The interpreter of a new environment in which packages of these versions appear to be installed."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    [packages] = (folder / "lib").glob("python3*/site-packages")
    for name, version in versions.items():
        known = packages / f"{name}-{version}.dist-info"
        known.mkdir()
        (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(python)


def program(folder: Path, text: str, name: str = "python") -> str:
    file = folder / name
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def fake(**parameters: Any) -> SweepResult:
    return run(**(FAST | parameters))


def result_of(result: SweepResult, number: int = 0) -> Any:
    return journal.read_result(sorted(result.folder.glob("*/artifacts"))[number])


def quieten(result: SweepResult) -> None:
    """Make the result on disk look like one from a quiet machine, because only valid results are reused."""
    [file] = result.folder.glob("*/artifacts/result.json")
    known = json.loads(file.read_text())
    first = known["repetitions"][0] | {"noise": None}
    for request in first["requests"]:  # as the script says, whatever the machine made of it
        request["stamps_ns"] = [request["t0_ns"] + (2 + i) * 1_000_000 for i in range(len(request["stamps_ns"]))]
    known |= {"repetitions": [first | {"index": number} for number in range(len(known["repetitions"]))], "steady": True}
    file.write_text(json.dumps(known))


# Workers in another environment


def test_the_environment_of_these_tests_has_no_mlflow(other: str) -> None:
    code = (
        "import importlib.util as u; print([n for n in ('mlflow', 'numpy', 'yaml', 'psutil', 'torch', "
        "'mlflow_llmbench') if u.find_spec(n)])"
    )
    done = subprocess.run([other, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "[]"


def test_a_worker_runs_in_an_environment_that_has_no_package_at_all(store_uri: str, other: str) -> None:
    from mlflow import MlflowClient

    done = fake(worker_python=other, batch_size="1,2", batching=None)
    assert done.outcome == "ok", done.rows
    result = result_of(done)
    assert result.environment["packages"] == VERSIONS
    assert result.environment["git"] == machine.git_commit(str(Path(mlflow_llmbench.__file__).parent))
    assert result.cell.worker_python == other
    here = machine.fingerprint()["hashes"]
    assert result.hashes.hardware == here["hardware"]
    assert result.hashes.software != here["software"]
    found = MlflowClient(store_uri).get_run(done.run_ids[0]).data
    assert found.params["worker_python"] == other
    assert found.tags["llmbench.torch"] == "9.9.9+other"
    assert found.tags["llmbench.software_hash"] == result.hashes.software


def test_what_is_installed_beside_us_stays_unseen_there(
    other: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))  # no Python starts with this
    code = (
        "import importlib.util as u, sys, mlflow_llmbench; print(mlflow_llmbench.__version__, u.find_spec('torch'), "
        "u.find_spec('tests'))"
    )
    done = subprocess.run(
        [other, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env=interpreter.variables(other, os.environ),
    )
    assert done.stdout.split() == [mlflow_llmbench.__version__, "None", "None"]
    assert [path.name for path in interpreter.package_folder().iterdir()] == ["mlflow_llmbench"]


def test_the_files_of_a_model_are_prepared_there_too(store_uri: str, other: str) -> None:
    done = fake(worker_python=other)
    [log] = done.folder.glob("*/prepare.jsonl")
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "end"


def test_a_crash_there_is_a_row_of_that_environment(store_uri: str, other: str) -> None:
    done = fake(worker_python=other, model="fake:fail=crash")
    result = result_of(done)
    assert (result.outcome, result.environment["packages"]) == ("crashed", VERSIONS)


def test_what_a_killed_command_left_is_of_that_environment(other: str, tmp_path: Path) -> None:
    from mlflow_llmbench.sweeps import job as job_sweeps
    from mlflow_llmbench.sweeps import planning

    [planned] = planning.plan(spec.parse(FAST | {"worker_python": other})).cells
    job = job_sweeps.Job(planned, tmp_path / planned.folder)
    job.folder.mkdir(parents=True)
    job_sweeps.write_job(job)
    assert job_sweeps.read_job(job.folder).planned.environment == planned.environment
    assert planned.environment
    assert planned.environment["packages"] == VERSIONS
    assert planned.hashes.software == planned.environment["hashes"]["software"]


# Identity of results


def test_where_an_interpreter_lies_does_not_decide_and_what_is_installed_does(
    store_uri: str, other: str, tmp_path: Path
) -> None:
    first = fake(worker_python=other)
    assert not result_of(first).linked
    quieten(first)
    twin = environment(tmp_path / "twin", VERSIONS)
    assert result_of(fake(worker_python=twin)).linked  # the same packages under another path: measured before
    newer = environment(tmp_path / "newer", VERSIONS | {"torch": "9.9.10"})
    again = result_of(fake(worker_python=newer))
    assert not again.linked
    assert not result_of(fake()).linked  # our own environment is different
    assert again.hashes.config == result_of(first).hashes.config


def test_the_identity_of_a_configuration_is_older_than_the_parameter() -> None:
    model = ModelFacts("m", "none", "fake", "r")
    assert config_hash(Cell(model="m", worker_python="/a/python"), model) == config_hash(Cell(model="m"), model)
    assert len(group_cells([Cell(worker_python="/a/python"), Cell()])) == 2


def test_two_environments_can_be_compared_in_turns(store_uri: str, other: str) -> None:
    done = ab.run_ab({}, {"worker_python": other}, FAST, pairs=2)
    assert {difference.kind for difference in done.comparison.labels} == {"software"}
    assert "torch" in {difference.name for difference in done.comparison.labels}
    first, second = ab.sides(done.sweep)
    assert (first.environment["packages"] == VERSIONS, second.environment["packages"]) == (False, VERSIONS)


# Unusable interpreters


def test_there_is_no_such_interpreter(tmp_path: Path) -> None:
    for path, wrong in [
        (tmp_path / "none", "There is no interpreter"),
        (tmp_path, "is a folder"),
        (tmp_path / "plain", "cannot be executed"),
    ]:
        (tmp_path / "plain").write_text("")
        with pytest.raises(UsageError, match=wrong) as caught:
            spec.parse({"worker_python": str(path)})
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        ("#!/bin/sh\necho hello\n", "does not run as a Python interpreter: it printed something else"),
        ("#!/bin/sh\necho out of order >&2\nexit 3\n", "does not run as a Python interpreter: out of order"),
        ("not a program", "does not run as a Python interpreter: Exec format error"),
        ("#!/bin/sh\necho '{\"version\": [3, 9, 2]}'\n", "is Python 3.9.2, and a worker needs 3.10 or later"),
    ],
)
def test_what_cannot_run_a_worker_is_refused_in_one_line_before_anything_starts(
    script: str, wrong: str, tmp_path: Path, store_uri: str
) -> None:
    python = program(tmp_path, script)
    with pytest.raises(UsageError, match=wrong) as caught:
        fake(worker_python=python)
    assert f"worker_python={python}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "llmbench-results").exists()


def test_a_python_that_cannot_import_the_worker_says_so(tmp_path: Path) -> None:
    python = program(tmp_path, f'#!/bin/sh\nunset PYTHONPATH\nexec "{sys.executable}" -S "$@"\n')
    with pytest.raises(UsageError, match=r"No module named 'mlflow_llmbench'"):
        interpreter.examine(python)


def test_missing_packages_are_named_with_the_command_that_installs_them(other: str) -> None:
    with pytest.raises(MissingError) as caught:
        interpreter.examine(other, ("json", "llama_cpp", "torch"))
    assert str(caught.value) == (
        f"worker_python={other} lacks the packages llama-cpp-python, torch, which its worker needs. Run: {other} -m "
        "pip install llama-cpp-python torch"
    )


def test_a_backend_whose_packages_are_missing_there_is_refused_before_anything_starts(
    other: str, tmp_path: Path
) -> None:
    with pytest.raises(MissingError, match=r"lacks the packages torch, transformers, which its worker needs"):
        run(model="opt-125m", weights="random", worker_python=other)
    assert not (tmp_path / "llmbench-results").exists()


def test_what_the_backend_says_there_of_a_model_is_said_here(other: str) -> None:
    assert interpreter.resolve(Cell(**FAST_CELL, worker_python=other)) == FakeBackend.resolve(Cell(**FAST_CELL))
    with pytest.raises(UsageError, match="does not know the setting sense=1"):
        interpreter.resolve(Cell(model="fake:sense=1", backend="fake", worker_python=other))


FAST_CELL: dict[str, Any] = {"model": "fake:ttft_ms=2", "backend": "fake"}


def test_an_error_of_that_environment_names_its_own_pip() -> None:
    error = interpreter._error("/env/bin/python", "MissingError", "quant=hqq4 needs hqq. Run: pip install hqq")
    assert str(error) == "worker_python=/env/bin/python: quant=hqq4 needs hqq. Run: /env/bin/python -m pip install hqq"
    assert isinstance(interpreter._error("/p", "Nonsense", "x"), LlmbenchError)


def test_a_gpu_is_not_measured_by_a_worker_that_cannot_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "capabilities", Capabilities(heavy=("vllm.engine", "vllm.other")))
    monkeypatch.setattr("mlflow_llmbench.system.gpu.gpus", lambda: [{"name": "one"}])
    assert interpreter.needed_modules(Cell(backend="fake")) == ("pynvml", "vllm")


@pytest.mark.parametrize(
    ("parameters", "wrong"),
    [
        ({"backend": "openai", "url": "http://127.0.0.1:9"}, "and a server has its own"),
        ({"on": "ray"}, "an interpreter of this machine"),
    ],
)
def test_an_interpreter_is_of_a_worker_of_this_machine(parameters: dict[str, str], wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        spec.parse({"worker_python": sys.executable, **parameters})


def test_without_one_nothing_is_asked_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "_ask", lambda *_: pytest.fail("a process was started"))
    ours = {"hashes": {}}
    assert interpreter.environment_of(Cell(backend="fake"), ours) is ours
    assert interpreter.resolve(Cell(**FAST_CELL)).source == "none"


# The report of `doctor`


def test_the_doctor_examines_another_environment(other: str) -> None:
    report = doctor.examine_worker(other)
    items = {(item.section, item.name): item for item in report.items}
    assert items["Interpreter", "packages"].found == "torch 9.9.9+other, transformers 7.0.1"
    assert items["Backends", "fake"].status == "ok"
    assert items["Backends", "openvino"].status == "missing"
    assert (
        items["Backends", "transformers"].found == "needs torch, transformers"
    )  # a recorded version does not make a module importable
    assert items["Quantizations", "int8"].advice == f"Run: {other} -m pip install bitsandbytes"
    assert "ENVIRONMENT/bin/pip install openvino-genai" in str(items["Backends", "openvino"].advice)
    assert report.ready


def test_the_doctor_imports_a_runtime_that_is_there(tmp_path: Path) -> None:
    python = environment(tmp_path / "broken", {})
    [packages] = (tmp_path / "broken" / "lib").glob("python3*/site-packages")
    for name in ("openvino", "openvino_genai"):
        (packages / f"{name}.py").write_text(
            "raise RuntimeError('built for another machine')" if name == "openvino_genai" else ""
        )
    [item] = [item for item in doctor.examine_worker(python).items if item.name == "openvino"]
    assert (item.status, item.found) == ("limited", "cannot be imported: RuntimeError: built for another machine")
    (packages / "openvino_genai.py").write_text("")
    [item] = [item for item in doctor.examine_worker(python).items if item.name == "openvino"]
    assert item.status == "ok"


def test_the_command_of_the_doctor_takes_an_interpreter(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--worker-python", other]) == 0
    assert capsys.readouterr().out.startswith("Interpreter\n  ok       Python")
    assert main(["doctor", "--worker-python", "/none/python"]) == 2
    assert "There is no interpreter /none/python" in capsys.readouterr().err
