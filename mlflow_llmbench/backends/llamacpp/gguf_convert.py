"""Run llama.cpp's converter on one checkpoint.

Usage: `python -m mlflow_llmbench.backends.llamacpp.gguf_convert TREE CHECKPOINT TARGET TYPE TRUSTED`

It uses the classes of `convert_hf_to_gguf.py`, with one addition. A checkpoint without a tokenizer (random weights), or
with one that the converter does not know, becomes a file without a vocabulary. That is enough for prompts of token ids.
The last line of standard output is JSON with `model.tokenizer`. This module imports nothing else of this package,
because the source tree has its own gguf.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENIZERS = ("tokenizer.model", "tokenizer.json", "vocab.json", "tiktoken.model", "merges.txt")


def main(tree: str, checkpoint: str, target: str, kind: str, trusted: str) -> None:
    """Write the file. Any error ends the process, with its text as the last line of standard error.

    `trusted`: `true` if code that comes with the checkpoint may run.
    """
    logging.basicConfig(level=logging.WARNING)
    trust_code(trusted == "true")
    sys.path[:0] = [tree, str(Path(tree, "gguf-py"))]
    has_tokenizer = any(Path(checkpoint, name).is_file() for name in TOKENIZERS)
    try:
        tokenizer = _convert(checkpoint, target, kind, has_tokenizer)
    except NotImplementedError as error:
        if not has_tokenizer or "pre-tokenizer" not in str(error):
            raise
        tokenizer = _convert(checkpoint, target, kind, False)
    print(json.dumps({"model.tokenizer": tokenizer}))


def _convert(checkpoint: str, target: str, kind: str, with_tokenizer: bool) -> str:
    """Write the file and return the name of its vocabulary, or `none`."""
    import torch

    conversion: Any = importlib.import_module("conversion")
    gguf: Any = importlib.import_module("gguf")
    types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    }
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(checkpoint) if with_tokenizer else _without_tokenizer(Path(checkpoint), Path(scratch))
        sizes = conversion.ModelBase.load_hparams(folder, False)
        kind_of_model = conversion.get_model_class(conversion.get_model_architecture(sizes, conversion.ModelType.TEXT))
        if not with_tokenizer:
            kind_of_model = _no_vocabulary(kind_of_model)
        model = kind_of_model(folder, types[kind], Path(target))
        model.write()
        stored = model.gguf_writer.kv_data[0].get("tokenizer.ggml.model")
        return str(stored.value) if stored else "none"


def trust_code(trusted: bool) -> None:
    """Decide for this process whether a checkpoint's own code runs; the converter allows it for some architectures."""
    from transformers import AutoConfig, AutoTokenizer

    for loader in (AutoConfig, AutoTokenizer):
        given: Callable[..., Any] = loader.from_pretrained

        def load(*arguments: Any, _given: Callable[..., Any] = given, **settings: Any) -> Any:
            return _given(*arguments, **{**settings, "trust_remote_code": trusted})

        loader.from_pretrained = load  # type: ignore[method-assign]


def _no_vocabulary(kind: Any) -> Any:
    """Return a subclass of the converter's class that writes the vocabulary's size in place of the vocabulary."""

    class WithoutVocabulary(kind):  # type: ignore[misc]
        model_arch = kind.model_arch  # the base class requires it in every subclass

        def set_vocab(self) -> None:
            self._set_vocab_none()

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    return WithoutVocabulary


def _without_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """Link the checkpoint's configuration and weights into a folder, with a made-up vocabulary of the right size.

    The converter's class for Gemma counts the entries of that vocabulary.
    """
    for file in checkpoint.iterdir():
        if (
            file.is_file()
            and file.name not in TOKENIZERS
            and not file.name.startswith(("tokenizer", "special_tokens", "added_tokens"))
        ):
            os.symlink(file.resolve(), folder / file.name)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    words = int((config.get("text_config") or config)["vocab_size"])
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {str(i): i for i in range(words)}}, "added_tokens": []})
    )
    return folder


if __name__ == "__main__":
    main(*sys.argv[1:])
