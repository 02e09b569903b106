"""One recipe, two loads: the model of a registered version computes the same as the measured one, bit for bit."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlflow_llmbench.analysis.decisions.deployment import Deployment, Evidence, deployment_of
from mlflow_llmbench.analysis.decisions.export import TARGETS, export
from mlflow_llmbench.backends.huggingface import quantization, recipe
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import LlmbenchError, UsageError
from mlflow_llmbench.records.quantizations import LIBRARY_PACKAGES, SCHEMES, schemes_of
from mlflow_llmbench.records.results import Verdict
from tests.loading import loaded
from tests.results import made

GROUP = 64
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "int8": [{}, {"int8_threshold": 0.0}],
    "int4": [{}, {"double_quant": True}],
    "mixed": [{"quant_budget": "8.5"}],
}
"""Settings to try, for schemes that have some."""

IDS = torch.randint(100, 500, (1, 64), generator=torch.Generator().manual_seed(0))


def lacking(quant: str) -> str:
    """Why a scheme cannot run here; empty if it can."""
    try:
        quantization.require(Cell(quant=quant, group_size=GROUP))
    except LlmbenchError as error:
        return str(error)
    return ""


def cases() -> Iterator[Any]:
    for quant in schemes_of("transformers"):
        for settings in SETTINGS.get(quant, [{}]):
            grouped = {"group_size": GROUP} if "group_size" in SCHEMES[quant].settings else {}
            words = "-".join([quant, *(f"{name}={value}" for name, value in settings.items())])
            why = lacking(quant)
            yield pytest.param(quant, settings | grouped, id=words, marks=pytest.mark.skipif(bool(why), reason=why))


@contextmanager
def measured(folder: Path, quant: str, **settings: Any) -> Iterator[tuple[torch.Tensor, Deployment]]:
    """Logits of the measured model, and its deployment."""
    cell = Cell(model=str(folder), quant=quant, device="cpu", **settings)
    with loaded(cell) as (backend, info), torch.inference_mode():
        result = made(
            cell=cell,
            model=backend.facts,
            load=info,
            environment={"packages": dict.fromkeys(LIBRARY_PACKAGES, "1.0")},
        )
        yield backend.model(IDS).logits, deployment_of(result, {}, Evidence("r", "s", Verdict("valid")))


@pytest.mark.filterwarnings("ignore")  # warnings of the libraries and MLflow's
@pytest.mark.parametrize(("quant", "settings"), [*cases()])
def test_a_registered_version_computes_what_was_measured(
    tiny_model: Path, tmp_path: Path, quant: str, settings: Mapping[str, Any]
) -> None:
    """The version is saved and loaded by MLflow, with its own copy of the code."""
    import mlflow

    from mlflow_llmbench.tracking.registry import save

    with measured(tiny_model, quant, **settings) as (logits, deployment):
        save(deployment, tmp_path / "version")
        version = mlflow.pyfunc.load_model(str(tmp_path / "version")).unwrap_python_model()
        assert torch.equal(version._engine().model(IDS).logits, logits)
    assert deployment.requirements == tuple(f"{package}==1.0" for package in SCHEMES[quant].packages)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quant", ["int8-wo", "int8-dq", "int4-wo", "hqq4", "quanto8"])
def test_another_quantization_than_the_measured_one_is_refused(tiny_model: Path, quant: str) -> None:
    if why := lacking(quant):
        pytest.skip(why)
    from mlflow.exceptions import MlflowException

    from mlflow_llmbench.tracking.serving_model import Checkpoint

    grouped = {"group_size": GROUP} if "group_size" in SCHEMES[quant].settings else {}
    with measured(tiny_model, quant, **grouped) as (_, deployment):
        config = json.loads(json.dumps(deployment.config))
    with pytest.raises(MlflowException, match="The model was measured with the layers other, and has been loaded with"):
        Checkpoint(config | {"kernel": "other"})
    with pytest.raises(
        UsageError,
        match=f"vllm cannot be told to make quant={quant} as it was measured. Serve it with: mlflow models serve",
    ):
        export(config, uri="models:/bot/1", target="vllm")


BEFORE: dict[str, dict[str, Any]] = {
    "int8-wo": {"class": "TorchAoConfig", "scheme": "int8-wo", "group_size": None},
    "int8-dq": {"class": "TorchAoConfig", "scheme": "int8-dq", "group_size": None},
    "int4-wo": {"class": "TorchAoConfig", "scheme": "int4-wo", "group_size": GROUP},
    "hqq4": {"class": "hqq", "bits": 4, "group_size": GROUP},
}
"""`quantization` in the configuration of versions that were registered before recipes were stored."""


FRAGMENTS = """
import ctypes, time
from mlflow_llmbench.backends.huggingface import recipe
from mlflow_llmbench.system import memory
libc = ctypes.CDLL(None)
if not hasattr(libc, "malloc_trim"):
    raise SystemExit("no malloc_trim")
libc.malloc.restype, size = ctypes.c_void_p, 64 * 1024  # below the size that malloc maps by itself
before = memory.read().anonymous
blocks = [libc.malloc(size) for _ in range(3200)]
for block in blocks:
    ctypes.memset(block, 1, size)
with recipe.releasing_memory():
    for block in blocks[::2]:  # every second one stays, as weights do
        libc.free(ctypes.c_void_p(block))
    until = time.monotonic() + 60
    while memory.read().anonymous - before > 0.75 * 3200 * size and time.monotonic() < until:
        time.sleep(0.01)
    during = memory.read().anonymous - before
print(round(during / size / 3200, 1), round((memory.read().anonymous - before) / size / 3200, 1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_is_freed_between_weights_is_returned_while_loading() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run([sys.executable, "-c", FRAGMENTS], capture_output=True, text=True, env=environment)
    if "no malloc_trim" in done.stderr:
        pytest.skip("this C library has no malloc_trim")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.5 0.5\n", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quant", BEFORE)
def test_a_version_of_an_earlier_release_loads_and_is_exported_as_before(tiny_model: Path, quant: str) -> None:
    if why := lacking(quant):
        pytest.skip(why)
    from mlflow_llmbench.tracking.serving_model import Checkpoint

    grouped = {"group_size": GROUP} if "group_size" in SCHEMES[quant].settings else {}
    with measured(tiny_model, quant, **grouped) as (logits, deployment):
        config = dict(deployment.config) | {"quantization": BEFORE[quant]}
        assert torch.equal(Checkpoint(config).model(IDS).logits, logits)
    for target in ("vllm", "tgi", "sglang", "transformers"):
        with pytest.raises(UsageError, match=f"{target} cannot be told to make quant={quant} as it was measured"):
            export(config, uri="models:/bot/1", target=target)
    assert f"quant={quant}" in export(config, uri="models:/bot/1", target="docker-compose")
    assert set(TARGETS) > {"vllm", "docker-compose"}


def test_a_part_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded with another device than the measured one, a version takes the layout of that device's kernel."""
    layouts = SimpleNamespace(Tiles=lambda **given: ("tiles", given), Rows=lambda **given: ("rows", given))
    monkeypatch.setitem(sys.modules, "layouts", layouts)
    choice = {
        "by_device": {
            "cuda": {"class": "layouts.Tiles", "group_size": 64},
            "cpu": {"class": "layouts.Rows", "group_size": 64},
        }
    }
    assert recipe.made(choice, "cuda:1") == ("tiles", {"group_size": 64})
    assert recipe.made(choice, "cpu") == recipe.made(choice, "mps") == ("rows", {"group_size": 64})


def test_the_code_of_a_version_imports_nothing_of_this_package() -> None:
    from mlflow_llmbench.tracking.registry import serving_code

    tree = ast.parse(serving_code())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in imports for alias in node.names]
    names += [str(node.module) for node in imports if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name.startswith("mlflow_llmbench")]
    assert not [node for node in imports if isinstance(node, ast.ImportFrom) and node.level]
    assert {"load", "kernel"} <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
