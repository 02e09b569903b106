"""Backends by name: the table of ours, those of installed packages, and what each one declares.

A backend is a class, and its `capabilities` say what it can do. Every check reads them; no code compares names. Adding
a backend takes its own module, one line in this table and the same line in pyproject.toml.
"""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from .errors import UsageError
from .quantizations import LIBRARIES

RUNTIMES = {
    "transformers": "mlflow_llmbench.backends.huggingface.backend:TransformersBackend",
    "llama_cpp": "mlflow_llmbench.backends.llamacpp.backend:LlamaCppBackend",
    "vllm": "mlflow_llmbench.backends.vllm:VllmBackend",
    "openvino": "mlflow_llmbench.backends.openvino.backend:OpenVinoBackend",
    "fake": "mlflow_llmbench.backends.fake:FakeBackend",
}
"""Backends that run a model in the worker's process: name → `module:class`."""

BACKENDS = {
    **RUNTIMES,
    "openai": "mlflow_llmbench.backends.openai.backend:OpenAIBackend",
    "callback": "mlflow_llmbench.backends.callback:CallbackBackend",
}
"""All of ours. The same table is declared as entry points; this one works in an uninstalled checkout."""

ENTRY_POINTS = "mlflow_llmbench.backends"

DEFAULT_BACKEND = "transformers"
SERVER_BACKEND = "openai"
"""Backend of `llmbench online`, if no other one is given."""

CALLBACK_BACKEND = "callback"
"""Backend of `measure`, for a function in a program of the user's own."""


@dataclass(frozen=True)
class Serving:
    """How a registered version of a measured model is served.

    `engine`: key of `serving_model.ENGINES`; "" if nothing answers. `packages`: distributions that the engine imports;
    the versions in the measured environment are pinned.
    """

    engine: str
    packages: tuple[str, ...]


CHECKPOINT = Serving("checkpoint", ("torch", "transformers", "tokenizers", "accelerate", "safetensors", "numpy"))
"""Serving of a checkpoint by transformers."""

GGUF_FILE = Serving("gguf", ("llama-cpp-python", "numpy"))
"""Serving of a GGUF file by llama.cpp."""


@dataclass(frozen=True)
class Distribution:
    """Distribution on the package index that installs a module, where the names differ; `cpu`: without a GPU."""

    module: str
    name: str
    cpu: str = ""


@dataclass(frozen=True)
class Capabilities:
    """Declared features of a backend. What is not declared is refused, in one line, before anything is loaded."""

    library: str = ""  # that runs the model, as people write it; empty = the backend's name
    tokenizer: bool = False  # `encode` and `decode` work
    logits: bool = False  # `logits` works, so quality can be measured
    heavy: tuple[str, ...] = ()  # modules to import before the *baseline* stage
    variables: tuple[tuple[str, str], ...] = ()  # environment variables of the worker, set before these imports
    distributions: tuple[Distribution, ...] = ()  # that install the heavy modules, where the names differ
    own_environment: str = ""  # commands that install it into an environment of its own, if it conflicts with ours
    harness: bool = False  # lm-eval tasks can be run, see `base.HarnessBackend`
    conversations: bool = False  # `encode_turns` and `new_history` work, and `generate` takes a history
    online: bool = False  # a server that takes loads of requests, see `base.ServerBackend`
    offline_baseline: str = ""  # of a server: backend that `twin` runs the same model with, in process
    padding: bool = False  # `generate` takes prompts of unequal lengths
    continuous: bool = False  # batches requests as they arrive, see `base.EngineBackend`
    scripted: bool = False  # plays a script: no weights, and texts need no model
    random_weights: bool = False  # `weights=random` works
    quantizations: tuple[str, ...] = ("none",)  # values of `quant`
    delegates: tuple[str, ...] = ()  # backends that run, in the same sweep, quantizations that this one lacks
    attentions: tuple[str, ...] = ("auto",)  # values of `attention`
    decodes: tuple[str, ...] = ("generate",)  # values of `decode`; a backend with more is a `base.DecodingBackend`
    devices: tuple[str, ...] = ("cpu", "cuda")  # kinds of devices; a server's are its own
    kv_caches: tuple[str, ...] = ()  # values of `kv_cache` besides auto
    default_kv_cache: str = ""  # value that `kv_cache=auto` means; empty = the dtype of the computation
    preallocates: tuple[str, ...] = ("compiled",)  # values of `decode` with the whole KV cache from the first token on
    parameters: tuple[str, ...] = ()  # backend-specific parameters that it takes, see `cell.BACKEND_SPECIFIC`
    kept_quantized: tuple[str, ...] = tuple(library.method for library in LIBRARIES if library.packed)
    # quantization methods of checkpoints (and gguf) whose weights take as much memory as their files; others unpack
    reference: str = ""  # backend that runs the unquantized model, the reference of quality; empty = itself
    serving: Serving | None = None  # how a registered version is served; None = it cannot be registered


def known_backends() -> dict[str, str]:
    """Return all backends with their `module:class`: ours, and those that installed packages declare."""
    return BACKENDS | _installed(tuple(sys.path)) | BACKENDS  # ours come first and cannot be replaced


@functools.lru_cache(maxsize=4)
def _installed(search_path: tuple[str, ...]) -> dict[str, str]:
    """Return the backends of installed packages. Reading their metadata takes tens of milliseconds."""
    return {entry.name: entry.value for entry in metadata.entry_points(group=ENTRY_POINTS)}


def load_class(name: str) -> Any:
    """Return the class of a backend by its name.

    Raises UsageError if it is unknown, cannot be imported, or declares no capabilities.
    """
    place = BACKENDS.get(name) or known_backends().get(name)
    if place is None:
        raise UsageError(f"Unknown backend: {name}. Known: {', '.join(sorted(known_backends()))}.")
    module, _, attribute = place.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"Backend {name} cannot be imported from {place}: {error}. Check the package that declares it."
        ) from None
    if not isinstance(getattr(found, "capabilities", None), Capabilities):
        raise UsageError(
            f"Backend {name} declares no capabilities: {place} has no attribute `capabilities` of the class "
            "Capabilities. Check the package that declares it."
        )
    return found


def capabilities_of(name: str) -> Capabilities:
    """Return what a backend declares. Raises UsageError as `load_class` does."""
    declared: Capabilities = load_class(name).capabilities
    return declared


def recorded_capabilities(name: str) -> Capabilities:
    """Return what the backend of a stored result declares; the defaults if it is not installed here."""
    try:
        return capabilities_of(name)
    except UsageError:
        return Capabilities()


def library_of(name: str) -> str:
    """Return the library behind a backend, as people write it."""
    return recorded_capabilities(name).library or name


def served_libraries() -> list[str]:
    """Return the libraries that run registered models, as people write them."""
    return [library_of(name) for name in RUNTIMES if (serving := capabilities_of(name).serving) and serving.engine]


def backend_of(backend: str, quant: str) -> str:
    """Return the backend that runs a quantization: `backend`, or a delegate of it that has what it lacks."""
    own = capabilities_of(backend)
    if quant in own.quantizations:
        return backend
    return next((other for other in own.delegates if quant in capabilities_of(other).quantizations), backend)
