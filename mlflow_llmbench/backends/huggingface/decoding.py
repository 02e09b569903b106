"""Decode paths of transformers: plain, compiled over a static cache, speculative, or with a quantized KV cache.

Each path is `generate()` with other settings, as a user would deploy it. Compilation happens before the first call of a
cell, for its shape. Compiling again during the measurement is an error.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...records.cell import Cell
from ...records.errors import MeasurementError, MissingError, NotRealised
from ...records.installation import pip_install
from ...records.quantizations import install_command
from ...records.text import plural
from . import quantization
from .inspection import stored_bytes

if TYPE_CHECKING:
    import torch

COMPILE_TOKENS = 4
"""Output tokens of a run that compiles: one of the prefill, and three decode steps.

With CUDA graphs, one step runs, one is recorded and one is replayed.
"""

COMPILE_RUNS = 2

KV_BACKENDS = {
    "fp8": ("fp8", "", 0),
    "int8": ("hqq", "hqq", 8),
    "int4": ("quanto", "optimum-quanto", 4),
    "int2": ("quanto", "optimum-quanto", 2),
}
"""`kv_cache` → transformers' name of the backend, package that it needs, and bits (0: it takes no number)."""


def require(cell: Cell, device: str) -> None:
    """Raise MissingError unless this machine has what the decode path and the KV cache of a cell need."""
    if cell.decode == "compiled" and device.startswith("cuda"):
        _require_triton()
    elif cell.decode == "compiled":
        compiler = os.environ.get("CXX", "g++").split()[0]
        if not shutil.which(compiler):
            raise MissingError(
                "decode=compiled needs a C++ compiler, since torch.compile writes C++ for a CPU, "
                f"and {compiler} is not installed. Install g++, or set CXX."
            )
    package = KV_BACKENDS[cell.kv_cache][1] if cell.kv_cache else ""
    if package and not quantization.installed(package):
        raise MissingError(
            f"kv_cache={cell.kv_cache} needs the package {package}, which is not installed. "
            f"Run: {install_command(package)}; kv_cache=fp8 needs none."
        )


def _require_triton() -> None:
    """Raise MissingError unless torch can compile for a GPU."""
    compilers = [os.environ["CC"].split()[0]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        raise MissingError(
            "decode=compiled needs a C compiler on a GPU, since Triton builds its launchers in C, and "
            f"{' or '.join(compilers)} is not installed. Install gcc, or set CC."
        )
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        raise MissingError(
            f"decode=compiled needs Python's headers on a GPU, since Triton builds its launchers in C, and {header} "
            "does not exist. Install them (python3-dev)."
        )
    if importlib.util.find_spec("triton") is None:
        raise MissingError(
            f"decode=compiled needs the package triton on a GPU, which is not installed. Run: {pip_install('triton')}"
        )


class DecodePath:
    """Settings and arguments of `generate()` for the decode path of a cell, and facts observed while it ran."""

    def __init__(self, cell: Cell, model: Any, assistant: Any = None) -> None:
        self.cell, self.model, self.assistant = cell, model, assistant
        self.static: Any = None  # the cache of the compiled step
        self.graphs = 0  # number of graphs compiled for the shape of the cell
        self.kv_bytes_per_token: int | None = None  # of a quantized cache, as stored at the end of the last call
        if assistant is not None:
            _fix_proposals(assistant, cell.draft_tokens)

    def settings(self) -> dict[str, Any]:
        """Return fields of GenerationConfig."""
        if self.cell.decode == "prompt_lookup":
            return {"prompt_lookup_num_tokens": self.cell.draft_tokens}
        return {"compile_config": self._compile_config()} if self.cell.decode == "compiled" else {}

    def arguments(self) -> dict[str, Any]:
        """Return arguments of `generate()`. Raises MeasurementError if decode=compiled is not compiled yet."""
        if self.cell.decode == "compiled":
            if self.static is None:
                raise MeasurementError("decode=compiled was not compiled for this shape.")
            return {"past_key_values": self.static}
        if self.cell.decode == "assisted":
            return {"assistant_model": self.assistant}
        return {"past_key_values": self._quantized_cache()} if self.cell.kv_cache else {}

    def finish(self, arguments: dict[str, Any], rows: int) -> None:
        """Clean up after a call: empty the static cache, or read the bytes per token of the quantized one.

        Raises NotRealised if the step was compiled again, or if the cache is not quantized.
        """
        if self.cell.decode == "compiled":
            self.empty()
            if self.graphs and self._compiled() != self.graphs:
                raise NotRealised(
                    f"The decode step was compiled again while it was measured ({self._compiled()} graphs, "
                    f"not {self.graphs}), so its latencies are not those of decoding. "
                    "Use decode=generate for this model."
                )
        elif self.cell.kv_cache:
            cache = arguments["past_key_values"]
            quantized = [
                getattr(layer, name, None)
                for layer in cache.layers
                for name in ("_quantized_keys", "_quantized_values")
            ]
            if not all(stored_bytes(part) for part in quantized):
                raise NotRealised(
                    f"kv_cache={self.cell.kv_cache} was asked for, but the cache holds no quantized keys and values. "
                    "Use kv_cache=auto."
                )
            residual = [part for layer in cache.layers for part in (layer.keys, layer.values)]
            self.kv_bytes_per_token = round(
                sum(map(stored_bytes, [*quantized, *residual])) / rows / int(cache.get_seq_length())
            )

    def logits_through_cache(
        self, batch: torch.Tensor, mask: torch.Tensor, last: int, keep: dict[str, int]
    ) -> torch.Tensor:
        """Compute the logits of the last ids (1, tokens) through the quantized KV cache.

        A prefill gives those of the first; a second pass, which reads the prefill from the cache, gives the others.
        """
        import torch

        cache, begin = self.arguments()["past_key_values"], batch.shape[1] - last + 1
        first = self.model(
            input_ids=batch[:, :begin], attention_mask=mask[:, :begin], past_key_values=cache, use_cache=True, **keep
        ).logits[0, -1:]
        others = self.model(
            input_ids=batch[:, begin:], attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits[0]
        return torch.cat([first, others])

    def empty(self) -> None:
        """Empty the static cache in place, because its addresses are compiled into the step."""
        import torch

        with torch.inference_mode():
            self.static.reset()

    def compile(self, tokens: int, eagerly: Callable[[], None], run: Callable[[], None], decodes: bool) -> float:
        """Make a static cache for `tokens` tokens and compile the decode step for it.

        Returns the seconds of the compiling runs. `eagerly` is called first and runs uncompiled. `run` generates a few
        tokens. `decodes` is True if `run` reaches a decode step. Raises NotRealised if nothing was compiled, or on a
        GPU if there are no CUDA graphs of it.
        """
        import torch
        from transformers import StaticCache

        # With a graph of another shape, torch would compile for all shapes, or give up after a few.
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.model.__dict__.pop("_compiled_call", None)
        self.graphs = 0
        self.static = StaticCache(config=self.model.config.get_text_config(decoder=True), max_cache_len=tokens)
        eagerly()
        started = time.perf_counter()
        for _ in range(COMPILE_RUNS):
            run()
        seconds = time.perf_counter() - started
        self.graphs = self._compiled()
        if decodes and not self.graphs:
            raise NotRealised(
                "decode=compiled was asked for, but nothing was compiled: transformers does not compile this model "
                "with this quantization. Use decode=generate."
            )
        if skips := _graphs_skipped():
            raise NotRealised(
                f"decode=compiled was asked for, but torch left {plural(skips, 'graph')} without CUDA graphs, which "
                "this decode path is to measure. The worker's log says why. Use decode=generate."
            )
        return seconds

    def facts(self) -> dict[str, str | int | float]:
        """Return the recorded facts of the decode path."""
        found: dict[str, str | int | float] = {}
        if self.cell.decode == "compiled" and self.static is not None:
            from torch._dynamo.utils import counters

            config = self._compile_config()
            found |= {
                "decode.compile_mode": config.mode,
                "decode.graphs": self.graphs,
                "decode.graph_breaks": sum(counters["graph_break"].values()),
            }
            found["decode.static_cache_tokens"] = int(self.static.get_max_length())
            found["decode.graphs_from_disk"] = int(counters["inductor"]["fxgraph_cache_hit"])
        if self.assistant is not None:
            found["assistant.parameters"] = sum(parameter.numel() for parameter in self.assistant.parameters())
            found["assistant.dtype"] = str(self.assistant.dtype).removeprefix("torch.")
        if self.cell.kv_cache:
            found |= {"kv_cache.type": self.cell.kv_cache, "kv_cache.backend": KV_BACKENDS[self.cell.kv_cache][0]}
        return found

    def _compile_config(self) -> Any:
        from transformers import CompileConfig

        on_gpu = self.model.device.type == "cuda"
        config = CompileConfig(mode="reduce-overhead" if on_gpu else "default", dynamic=False)
        config._compile_all_devices = True  # type: ignore[assignment]
        return config

    @staticmethod
    def _compiled() -> int:
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def _quantized_cache(self) -> Any:
        from transformers import QuantizedCache

        assert self.cell.kv_cache
        backend, _, bits = KV_BACKENDS[self.cell.kv_cache]
        return QuantizedCache(
            backend, self.model.config.get_text_config(decoder=True), **({"nbits": bits} if bits else {})
        )


def _graphs_skipped() -> int:
    """Return how many compiled graphs torch did not record as CUDA graphs; always 0 where none are asked for."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def _fix_proposals(assistant: Any, count: int) -> None:
    """Make the small model propose exactly `count` tokens per step; transformers would adapt it from call to call."""
    from transformers import GenerationConfig

    settings = GenerationConfig()  # neutral, so that no sampling default or end token of its checkpoint has an effect
    settings.num_assistant_tokens = count
    settings.num_assistant_tokens_schedule = "constant"
    settings.assistant_confidence_threshold = 0.0
    assistant.generation_config = settings


class History:
    """The KV cache of a conversation."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @property
    def tokens(self) -> int:
        return int(self.cache.get_seq_length())


def padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (rows, tokens), padded on the left, which is ignored, so that prompts end in one column."""
    import torch

    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], dtype=torch.long)
    return ids, (torch.arange(longest) >= longest - lengths[:, None]).long()


def end_ids(model: Any) -> frozenset[int]:
    """Return the ids by which a model ends an answer, by its generation settings, else its configuration."""
    given = getattr(model.generation_config, "eos_token_id", None)
    given = model.config.get_text_config().eos_token_id if given is None else given
    return frozenset([given] if isinstance(given, int) else given or ())
