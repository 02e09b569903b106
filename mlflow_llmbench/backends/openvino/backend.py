"""Run OpenVINO on the CPU by stepping OpenVINO GenAI's continuous batching pipeline. Its requests are a batch's rows.

optimum-intel first converts the checkpoint (`openvino_made`). The pipeline is the one that OpenVINO applications use:
paged attention, a KV cache in OpenVINO's default type, and quantized activations with packed weights. Prefix caching is
off.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...config import model_shape
from ...config.backend_checks import check_declared
from ...records.cell import Cell
from ...records.errors import MeasurementError, MissingError, UsageError, first_line, foreign_errors
from ...records.redaction import excerpt
from ...records.results import LoadInfo, ModelFacts
from ...system import machine
from .. import peak_rates
from ..base import Capabilities, DeviceMemory
from ..checkpoints import sources
from ..engine import MIN_ROWS, EngineBase, StepAligner
from . import convert

if TYPE_CHECKING:
    import torch


OWN_ENVIRONMENT = (
    "python -m venv ENVIRONMENT && ENVIRONMENT/bin/pip install openvino-genai optimum-intel 'transformers<5.1'"
)
KV_TYPES = {"f32": "f32", "f16": "f16", "bf16": "bf16", "int8": "u8"}
"""Value of `kv_cache` → OpenVINO's name of it."""

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""Dtype of a checkpoint → the requested precision. For float16 OpenVINO chooses what this CPU computes in."""

PAGE = 32
"""Tokens per page of the KV cache on the CPU."""


class OpenVinoBackend(EngineBase):
    """Call `ContinuousBatchingPipeline.step()` until every row has its tokens."""

    capabilities = Capabilities(
        library="OpenVINO",
        tokenizer=True,
        logits=True,
        padding=True,
        random_weights=True,
        quantizations=("none", *convert.BITS),
        reference="transformers",
        own_environment=OWN_ENVIRONMENT,
        heavy=("openvino", "openvino_genai"),
        kv_caches=tuple(KV_TYPES),
        variables=(("OPENVINO_TELEMETRY_OPT_OUT", "1"),),
    )

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        super().__init__(cell, model)
        self.device = machine.require_device(cell.device)
        self.threads = cell.threads or machine.physical_cores()
        self.folder = convert.folder_of(cell, model)
        self.pipeline: Any = None
        self.load_s = 0.0
        self.stored: convert.Stored | None = None
        self.realised: dict[str, str] = {}
        self._scorer: Any = None
        self._calls = itertools.count()

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        """Find a checkpoint to convert to an OpenVINO model. Raises ModelError, MissingError or UsageError."""
        if importlib.util.find_spec("openvino_genai") is None:
            raise MissingError(
                "backend=openvino needs OpenVINO GenAI, and optimum-intel, which conflicts with our versions of other "
                f"packages. Make an environment for them, {OWN_ENVIRONMENT}, "
                "and give worker_python=ENVIRONMENT/bin/python."
            )
        check_declared(cell)
        if machine.require_device(cell.device) != "cpu":
            raise UsageError(f"backend=openvino runs on the CPU only, but device is {cell.device}. Give device=cpu.")
        model = sources.find_model(cell)
        method = ((model.config or {}).get("quantization_config") or {}).get("quant_method")
        if model.source in sources.GGUF_SOURCES or method:
            raise UsageError(
                f"backend=openvino cannot run an already quantized model: {cell.model} ({method or 'a GGUF file'}). "
                "Give an unquantized checkpoint."
            )
        convert.require(cell, model)
        return model

    @classmethod
    def prepare(cls, cell: Cell, model: ModelFacts) -> None:
        """Fetch or write the checkpoint, and convert it to an OpenVINO model."""
        sources.fetch(cell, model)
        convert.make(cell, model, sources.base_files(cell, model)[0])

    @classmethod
    def is_prepared(cls, cell: Cell, model: ModelFacts) -> bool:
        """Return True if the OpenVINO model is on this disk."""
        return convert.is_made(cell, model)

    # Loading

    def load(self) -> LoadInfo:
        """Read and compile the model. `load_s` is the time to create the pipeline, with room for its KV cache."""
        if not convert.is_made(self.cell, self.facts):
            raise MeasurementError(
                f"{self.cell.model} has no OpenVINO model {self.folder}. Run the command again to make it."
            )
        with foreign_errors("loading", "OpenVINO", self._error_text):
            genai = importlib.import_module("openvino_genai")
            self.realised = realised_properties(self._properties())
            scheduler = genai.SchedulerConfig()
            for name, value in self._settings().items():
                setattr(scheduler, name, value)
            started = time.perf_counter()
            self.pipeline = genai.ContinuousBatchingPipeline(str(self.folder), scheduler, "CPU", self._properties())
            self.load_s = time.perf_counter() - started
            self.stored = convert.stored(self.folder, _ITEM_SIZES[self.realised["INFERENCE_PRECISION_HINT"]])
        return self.describe()

    def _properties(self) -> dict[str, Any]:
        """Return the properties for OpenVINO's compiler.

        The file is read, not mapped, so that all memory that the model needs is anonymous.
        """
        found: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads, "ENABLE_MMAP": False}
        if self.facts.dtype in PRECISIONS:
            found["INFERENCE_PRECISION_HINT"] = PRECISIONS[self.facts.dtype]
        if self.cell.kv_cache is not None:
            found["KV_CACHE_PRECISION"] = KV_TYPES[self.cell.kv_cache]
        return found

    def _settings(self) -> dict[str, Any]:
        """Return the scheduler's settings, sized for the first cell of a group, which has the most tokens.

        `_require_room` checks that the other cells fit.
        """
        return {
            "num_kv_blocks": -(-2 * self._total_tokens() // PAGE) + 2 * MIN_ROWS,
            "cache_size": 0,
            "dynamic_split_fuse": False,
            **self._scheduler_limits(),
        }

    def describe(self) -> LoadInfo:
        if self.pipeline is None or self.stored is None:
            raise MeasurementError("The model is not loaded.")
        shape = model_shape.Shape.from_config(self.facts.config or {})
        held, token_bytes = self.stored, self._token_bytes()
        costs = shape.cost_fields(2) if shape else {}
        costs |= {"kv_bytes_per_token": token_bytes}
        computed = self.realised["INFERENCE_PRECISION_HINT"]
        facts: dict[str, str | int | float] = {
            "model.parameters": held.parameters,
            "model.dtype": computed,
            "model.class": "ContinuousBatchingPipeline",
            "model.revision": self.facts.revision,
            "model.weights_format": "openvino",
            "model.device": self.device,
            "model.remote_code": str(self.cell.trust_remote_code).lower(),
            "quant.method": "nncf" if self.cell.quant in convert.BITS else "none",
            "quant.compute_dtype": computed,
            "quant.bits_per_weight": round(held.bits, 3),
            "quant.kernel": held.kinds,
            "openvino.version": importlib.metadata.version("openvino"),
            "openvino.genai": importlib.metadata.version("openvino-genai"),
            "openvino.threads": self.threads,
            "openvino.requirements": self.realised.get("RUNTIME_REQUIREMENTS", ""),
            **(
                {"kv_cache.bytes_per_value": round(token_bytes / shape.kv_bytes_per_token(1), 3)}
                if shape and token_bytes
                else {}
            ),
            "kv_cache.tokens": self._settings()["num_kv_blocks"] * PAGE,
            **convert.recorded(self.folder),
        }
        if self.cell.quant in convert.BITS:
            facts["openvino.dynamic_quantization_group_size"] = self.realised.get(
                "DYNAMIC_QUANTIZATION_GROUP_SIZE", "0"
            )
        return LoadInfo(
            load_s=self.load_s,
            weight_bytes=held.weight_bytes,
            step_bytes=model_shape.read_by_step(self.facts.config or {}, held.step_bytes),
            **costs,
            cache_bytes=machine.last_level_cache_bytes(),
            facts=facts,
            vocab_size=shape.vocab_size if shape else None,
        )

    def _token_bytes(self) -> int | None:
        """Return the KV cache's bytes per token, from the pipeline's allocation; None before it is allocated."""
        whole = int(self.pipeline.get_metrics().kv_cache_size_in_bytes)
        return whole // (self._settings()["num_kv_blocks"] * PAGE) or None

    # Generating

    def _run(self, prompts: Sequence[Sequence[int]], output_tokens: int, steps: StepAligner) -> None:
        import numpy

        genai, openvino = importlib.import_module("openvino_genai"), importlib.import_module("openvino")
        settings = genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos, settings.do_sample = output_tokens, True, False
        pipeline, numbers = self.pipeline, self._calls
        handles = [
            (
                row,
                pipeline.add_request(
                    next(numbers), openvino.Tensor(numpy.array([list(prompt)], dtype=numpy.int64)), settings
                ),
            )
            for row, prompt in enumerate(prompts)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            steps.add(
                [
                    (row, ids)
                    for row, handle in handles
                    if handle.can_read()
                    for ids in (one.generated_ids for one in handle.read().values())
                ]
            )

    def _require_room(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> None:
        settings = self._settings()
        needed = sum(-(-(len(prompt) + output_tokens) // PAGE) for prompt in prompts)
        if needed > settings["num_kv_blocks"] or len(prompts) > settings["max_num_seqs"]:
            raise MeasurementError(
                f"OpenVINO made room for {settings['num_kv_blocks'] * PAGE} tokens of {settings['max_num_seqs']} rows, "
                f"by the largest cell of this load, but {len(prompts)} rows with {needed * PAGE} tokens need more. "
                "Measure this cell in a separate command."
            )

    def logits(self, ids: Sequence[int], last: int) -> torch.Tensor:
        """Compute logits from the same file with the same settings, but with ordinary attention.

        The pipeline does not expose its logits.
        """
        import numpy
        import torch

        with foreign_errors("scoring", "OpenVINO", self._error_text):
            if self._scorer is None:
                core = importlib.import_module("openvino").Core()
                self._scorer = core.compile_model(
                    self.folder / convert.MODEL, "CPU", self._properties()
                ).create_infer_request()
            self._scorer.reset_state()
            count = len(ids)
            given = {
                "input_ids": numpy.array([list(ids)], dtype=numpy.int64),
                "attention_mask": numpy.ones((1, count), dtype=numpy.int64),
                "position_ids": numpy.arange(count, dtype=numpy.int64)[None],
                "beam_idx": numpy.zeros(1, dtype=numpy.int32),
            }
            asked = {name for one in self._scorer.model_inputs for name in one.get_names()}
            self._scorer.infer({name: value for name, value in given.items() if name in asked})
            return torch.from_numpy(self._scorer.get_tensor("logits").data[0, -last:].copy())

    def _error_text(self, error: Exception) -> str:
        """Leave out the source locations that OpenVINO puts before its message."""
        texts = [line for line in str(error).splitlines() if line.strip()]
        lines = [line for line in texts if not line.startswith(("Exception from", "Check '"))]
        return excerpt(lines[0], 200) if lines else first_line(error)

    # Device

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        return None

    def peaks(self) -> dict[str, float]:
        return peak_rates.measure_peaks_apart()

    def close(self) -> None:
        self.pipeline = self._scorer = self.tokenizer = None


_ITEM_SIZES = {"f32": 4, "bf16": 2, "f16": 2}


def realised_properties(asked: dict[str, Any]) -> dict[str, str]:
    """Return the properties that OpenVINO realises on this CPU, read from a compiled model with one matrix.

    The pipeline does not report its own.
    """
    import numpy

    openvino, ops = importlib.import_module("openvino"), importlib.import_module("openvino.opset13")
    given = ops.parameter([1, 64], numpy.float32)
    tiny = openvino.Model(
        [ops.matmul(given, ops.constant(numpy.ones((64, 64), numpy.float32)), False, False)], [given], "tiny"
    )
    own = {name: value for name, value in asked.items() if name != "ENABLE_MMAP"}
    compiled = openvino.Core().compile_model(tiny, "CPU", own)
    found = {}
    for name in ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "RUNTIME_REQUIREMENTS"):
        with contextlib.suppress(RuntimeError):  # this version does not know the property
            value = compiled.get_property(name)
            found[name] = value.to_string() if hasattr(value, "to_string") else str(value)
    return found
