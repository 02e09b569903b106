"""Shared fixtures: a prepared SQLite store that is copied per test, and a tiny real model with real files."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.update(
    HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", TOKENIZERS_PARALLELISM="false", LLMBENCH_CHARTS="0",
    OMP_NUM_THREADS="1",  # two tests run at a time; workers have the number of their cells
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean_environment(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """Run each test in its own folder, without an outside MLflow run or store, and restore the environment variables.

    Commands draw charts only in tests marked `charts` or `slow`: drawing takes most of the time of a fake sweep.
    GPTQModel moves the Hub's cache by variables that it sets when it is imported.
    """
    if len(gc.get_objects(generation=2)) > 200_000:  # of loaded modules, which make each collection take 0.3 s
        gc.collect()
        gc.freeze()
    before = set(os.environ)
    # The pip of this environment comes first, as in one that is activated: messages then name `pip` alone.
    monkeypatch.setenv("PATH", os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    for name in list(os.environ):
        if name.startswith("MLFLOW_") and name != "MLFLOW_DISABLE_TELEMETRY":
            monkeypatch.delenv(name)
    if any(request.node.get_closest_marker(name) for name in ("charts", "slow")):
        monkeypatch.delenv("LLMBENCH_CHARTS", raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the `libnvidia-ml.so.1` that is made of fake_nvml.c."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler (cc) to build the library that answers as NVIDIA's driver")
    folder = tmp_path_factory.mktemp("nvml")
    source, library = ROOT / "tests" / "fake_nvml.c", folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
    return folder


@pytest.fixture
def nvml(nvml_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that describes GPUs, as at the head of fake_nvml.c, to NVIDIA's Python module in all processes.

    It can be called again while a test runs: each reading starts NVML, which then reads the new description.
    """
    import pynvml

    described = tmp_path / "gpus.txt"
    monkeypatch.setenv("FAKE_NVML", str(described))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(nvml_library), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(nvml_library / "libnvidia-ml.so.1")))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})

    def describe(text: str) -> None:
        described.write_text(text)

    return describe


@pytest.fixture(scope="session")
def store_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite store with its schema. Creating one takes seconds, copying it milliseconds."""
    folder = tmp_path_factory.mktemp("store")
    code = f"from mlflow import MlflowClient; MlflowClient('sqlite:///{folder}/mlflow.db').search_experiments()"
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    return folder / "mlflow.db"


@pytest.fixture
def store_uri(store_template: Path, tmp_path: Path) -> Iterator[str]:
    """The address of an empty store in the test's folder, the place of the default store."""
    import mlflow

    shutil.copy(store_template, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(None)
    yield uri
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with seeded weights and a byte-level tokenizer, as an ordinary model folder (fp32, 1 MB)."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for random checkpoints and peaks, shared by the session, so that the user's own cache is not touched."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("LLMBENCH_CACHE")
    os.environ["LLMBENCH_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["LLMBENCH_CACHE"]
    else:
        os.environ["LLMBENCH_CACHE"] = before
