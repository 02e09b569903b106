"""Untrusted models may do nothing that was not allowed.

Uses real pickles and real code that would leave a file behind if they ran.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from mlflow_llmbench.backends.checkpoints import files, sources
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import LlmbenchError, MeasurementError, ModelError, UsageError

ROOT = Path(__file__).resolve().parents[2]
FAST = ("--prompt-tokens", "4", "--output-tokens", "3", "--repetitions", "5", "--warmup", "1")


class Evil:
    """An object that creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pickled(model: Path) -> Path:
    """The tiny model with its weights as torch.save wrote them before safetensors."""
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model


def load(model: Path, **parameters: Any) -> dict[str, Any]:
    """Facts of the loaded model."""
    cell = Cell(model=str(model), device="cpu", **parameters)
    backend = TransformersBackend(cell, TransformersBackend.resolve(cell))
    try:
        return dict(backend.load().facts)
    finally:
        backend.close()


def change(file: Path, **more: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def test_the_pickle_of_these_tests_is_a_real_one(trace: Path) -> None:
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()


def test_pickled_weights_are_read_only_where_asked_for_and_that_is_recorded(pickled: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(pickled)
    assert str(caught.value) == (
        f"The weights of {pickled} are a pickle (pytorch_model.bin), which can carry code, and are not read unless "
        "you say so. "
        "Prefer a model with *.safetensors; or trust its origin and give allow_pickle=true."
    )
    assert load(pickled, allow_pickle=True)["model.weights_format"] == "pickle"


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize(
    "file",
    ["pytorch_model.bin", "model.safetensors", "model-00001-of-00001.safetensors", "pytorch_model-00001-of-00001.bin"],
)
def test_code_in_a_pickle_never_runs(model: Path, trace: Path, file: str, allowed: bool) -> None:
    (model / "model.safetensors").unlink()
    (model / file).write_bytes(pickle.dumps(Evil(trace)))
    if "00001" in file:
        index = "model.safetensors.index.json" if "safetensors" in file else "pytorch_model.bin.index.json"
        (model / index).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": file}}))
    with pytest.raises((ModelError, MeasurementError)):
        load(model, allow_pickle=allowed)
    assert not trace.exists()


def test_a_pickle_beside_safetensors_is_not_touched(model: Path, trace: Path) -> None:
    for name in (
        "pytorch_model.bin",
        "adapter_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "model.pt",
        "consolidated.00.pth",
        "tokenizer.pickle",
    ):
        (model / name).write_bytes(pickle.dumps(Evil(trace)))
    facts = load(model)
    assert (facts["model.weights_format"], facts["model.remote_code"]) == ("safetensors", "false")
    assert load(model, allow_pickle=True)["model.weights_format"] == "safetensors"
    assert not trace.exists()


def test_safetensors_that_name_a_pickle_in_their_index_are_not_loaded(model: Path, trace: Path) -> None:
    shutil.move(model / "model.safetensors", model / "other.safetensors")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(trace)))
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}})
    )
    with pytest.raises(LlmbenchError):
        load(model)
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(LlmbenchError):
        load(model)
    assert not trace.exists()


def code(trace: Path) -> str:
    return (
        f"import os\nos.makedirs({str(trace)!r}, exist_ok=True)\nfrom transformers import LlamaConfig as Config, "
        "LlamaForCausalLM as Model\n"
    )


def test_code_that_comes_with_a_model_is_refused(model: Path, trace: Path) -> None:
    (model / "own.py").write_text(code(trace))
    change(
        model / "config.json",
        model_type="of-its-own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    with pytest.raises(ModelError, match=r"brings code of its own \(auto_map\), which is not run unless you say so."):
        load(model)
    change(model / "config.json", model_type="llama")  # transformers has this one itself, and takes its own
    assert load(model)["model.remote_code"] == "false"
    assert not trace.exists()


@pytest.mark.parametrize(
    "key", ["_attn_implementation_internal", "attn_implementation", "_experts_implementation_internal"]
)
@pytest.mark.parametrize(
    "value", ["stranger/kernel", "stranger/kernel@main:function", {"text_config": "stranger/kernel"}]
)
def test_kernels_that_a_configuration_names_are_refused(model: Path, key: str, value: object) -> None:
    change(model / "config.json", **{key: value})
    with pytest.raises(ModelError, match=r"brings code of its own \(\w+: .*stranger/kernel"):
        load(model)
    original = json.loads((model / "config.json").read_text())
    del original[key]
    (model / "config.json").write_text(json.dumps({**original, "text_config": {key: value}}))
    with pytest.raises(ModelError, match="stranger/kernel"):
        TransformersBackend.resolve(Cell(model=str(model)))


def test_an_ordinary_implementation_is_not_refused(model: Path) -> None:
    change(model / "config.json", attn_implementation="eager", _attn_implementation_autoset=True)
    assert load(model)["model.attention"] == "eager"


def test_code_that_comes_with_a_tokenizer_is_refused(model: Path, trace: Path) -> None:
    (model / "own.py").write_text(code(trace) + "from transformers import PreTrainedTokenizerFast as Tokenizer\n")
    change(
        model / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]},
    )
    cell = Cell(model=str(model))
    with pytest.raises(
        ModelError, match=r"The tokenizer of .* brings code of its own, which is not run unless you say so."
    ):
        sources.load_tokenizer(cell, TransformersBackend.resolve(cell))
    assert not trace.exists()


def test_a_template_and_a_function_for_generating_that_come_with_a_model_are_not_run(model: Path, trace: Path) -> None:
    escape = "{{ cycler.__init__.__globals__.os.mkdir('" + str(trace) + "') }}"
    (model / "chat_template.jinja").write_text(escape)
    change(model / "tokenizer_config.json", chat_template=escape)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(
        f"import os\nos.mkdir({str(trace)!r})\ndef generate(model, **_): ...\n"
    )
    cell = Cell(model=str(model), device="cpu")
    facts = TransformersBackend.resolve(cell)
    backend = TransformersBackend(cell, facts)
    backend.load()
    steps: list[Any] = []
    backend.generate([list(backend.encode("say something"))], 3, steps.append)
    assert len(steps) == 3
    backend.close()
    assert not trace.exists()


@pytest.mark.parametrize("revision", ["../../x", "refs/../../x", "a b", "-x\x00", "/etc/passwd", ""])
def test_a_revision_is_a_name(revision: str) -> None:
    with pytest.raises(UsageError, match="revision"):
        sources.find_model(Cell(model="opt-125m", revision=revision))


@pytest.mark.parametrize(
    ("parameters", "source", "may"),
    [
        ({}, "folder", False), ({}, "hub", False), ({}, "preset", True), ({"revision": "refs/pr/7"}, "preset", False),
        ({"revision": "0123456789abcdef0123456789abcdef01234567"}, "preset", False),
        ({"allow_pickle": True}, "hub", True),
    ],
)  # fmt: skip
def test_whose_pickles_may_be_read(parameters: dict[str, Any], source: str, may: bool) -> None:
    assert files.may_be_pickled(Cell(**parameters), source) is may


@pytest.mark.slow
def test_what_was_allowed_is_in_the_run(pickled: Path, trace: Path, store_uri: str, tmp_path: Path) -> None:
    (pickled / "own.py").write_text(code(trace))
    change(
        pickled / "config.json",
        model_type="of-its-own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf"),
        "MLFLOW_TRACKING_URI": store_uri,
    }
    command = [sys.executable, "-m", "mlflow_llmbench", "run", "--model", str(pickled), *FAST, "--allow-pickle"]
    refused = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (1, 1)
    assert not trace.exists()
    done = subprocess.run(
        [*command, "--trust-remote-code"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert trace.exists()
    [run] = MlflowClient(store_uri).search_runs(["1"])
    names = ("allow_pickle", "trust_remote_code", "model.weights_format", "model.remote_code")
    assert [run.data.params[name] for name in names] == ["true", "true", "pickle", "true"]
