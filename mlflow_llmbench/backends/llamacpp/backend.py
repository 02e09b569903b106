"""Run GGUF models in this process with llama.cpp, the fastest option on a CPU that most people have.

A `.gguf` file runs as it is. Any other checkpoint is converted first if llama.cpp knows its architecture (`gguf_made`).
One context of the cell's size serves all repetitions of a cell. Its KV cache is emptied at the beginning of each call,
inside the timed region, as llama.cpp's own benchmark does. Each step is one `llama_decode` for all rows and takes the
most probable token of each row.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...config import model_shape, models
from ...config.backend_checks import check_declared
from ...records.cell import Cell
from ...records.errors import MeasurementError, NotRealised, UsageError
from ...records.installation import pip_install
from ...records.quantizations import FLOAT_DTYPES, GGUF_CACHES, SCHEMES, schemes_of
from ...records.results import LoadInfo, ModelFacts
from ...system import gpu, machine, memory
from ...workloads.conversations import turn_texts
from .. import peak_rates
from ..base import GGUF_FILE, Capabilities, DeviceMemory, Distribution, Emit
from ..checkpoints import gguf_file, random_weights, sources
from ..huggingface import pruning
from . import gguf_quantize
from .session import Model, Session, Timings, library, log_lines

if TYPE_CHECKING:
    import torch


FLASH = {"auto": -1, "eager": 0}
"""Value of `attention` → llama.cpp's flash attention setting: −1 where possible, 0 never."""

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30}
MIB = 1024 * 1024
BUFFER = re.compile(r"(\S+) model buffer size =\s*([\d.]+) MiB")


class LlamaCppBackend:
    """Call `llama_decode` on all rows at once and take the most probable token of each."""

    capabilities = Capabilities(
        library="llama.cpp",
        tokenizer=True,
        logits=True,
        conversations=True,
        padding=True,
        random_weights=True,
        heavy=("llama_cpp",),
        distributions=(Distribution("llama_cpp", "llama-cpp-python"),),
        quantizations=("none", *FLOAT_DTYPES, *schemes_of("llama_cpp")),
        attentions=tuple(FLASH),
        kv_caches=GGUF_CACHES,
        default_kv_cache="f16",
        preallocates=("generate",),
        parameters=("gpu_layers", "mmap", "prune"),
        kept_quantized=("gguf",),
        reference="transformers",
        serving=GGUF_FILE,
    )

    def __init__(self, cell: Cell, model: ModelFacts) -> None:
        self.cell = cell
        self.facts = model
        self.threads = cell.threads or machine.physical_cores()
        self.device = machine.require_device(cell.device)
        self.meter = gpu.meter_of(self.device)
        self.file = _path_of(cell, model)
        self.header: gguf_file.Header | None = None
        self.model: Model | None = None
        self.session: Session | None = None
        self._scorer: Session | None = None
        self._longest_text, self._has_generated = 0, False
        self.load_s = 0.0
        self._buffers: dict[str, int] = {}
        self._mapped = 0

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        """Find the files, commit and configuration of a GGUF file, or of a checkpoint to convert.

        Raises ModelError, MissingError or UsageError.
        """
        gguf_quantize.require()
        check_declared(cell)
        device = machine.require_device(cell.device)
        if device == "cpu" and cell.gpu_layers:
            raise UsageError(
                f"gpu_layers={cell.gpu_layers} needs a GPU, but the device is cpu. Leave it out, or give device=cuda."
            )
        model = sources.find_model(cell)
        if model.source in sources.GGUF_SOURCES:
            return _with_header(cell, model)
        if not gguf_quantize.file_of(cell, model).exists():
            gguf_quantize.source_tree()  # raises now, with advice, if the converter is missing
            for architecture in ((model.config or {}).get("architectures") or ())[:1]:
                gguf_quantize.check_architecture(cell, str(architecture))
        return model

    @classmethod
    def prepare(cls, cell: Cell, model: ModelFacts) -> None:
        """Fetch or write the checkpoint, and convert it to a GGUF file."""
        preset = models.find_preset(cell.model)
        if cell.weights == "random" and preset is not None:  # check before gigabytes are written
            gguf_quantize.check_architecture(cell, random_weights.architecture(preset))
        sources.fetch(cell, model)
        if model.source not in sources.GGUF_SOURCES:
            gguf_quantize.make(cell, model, sources.base_files(cell, model)[0])

    @classmethod
    def is_prepared(cls, cell: Cell, model: ModelFacts) -> bool:
        """Return True if the file that llama.cpp reads is on this disk."""
        return (
            sources.is_local(cell, model)
            if model.source in sources.GGUF_SOURCES
            else gguf_quantize.file_of(cell, model).exists()
        )

    # Loading

    def load(self) -> LoadInfo:
        """Load and verify the model and touch its pages.

        `load_s` is the time of llama.cpp's load plus that of reading the mapped file. Raises MeasurementError or
        NotRealised.
        """
        if self.file is None or not self.file.is_file():
            raise MeasurementError(f"{self.cell.model} has no GGUF file {self.file}. Run the command again to make it.")
        number = int(self.device.partition(":")[2] or 0) if self.device.startswith("cuda") else None
        if number is not None and not library().llama_supports_gpu_offload():
            raise NotRealised(
                "This build of llama-cpp-python has no GPU support, so device=cuda cannot be used. Use device=cpu, "
                "or build it again: "
                f"CMAKE_ARGS=-DGGML_CUDA=on {pip_install('--force-reinstall', '--no-cache-dir', 'llama-cpp-python')}"
            )
        layers = -1 if self.cell.gpu_layers is None else self.cell.gpu_layers
        started = time.perf_counter()
        self.model = Model(str(self.file), self.cell.mmap, number, layers)
        if self.cell.mmap:
            memory.touch_mapped(part.resolve() for part in gguf_file.parts_of(self.file))
        self.load_s = time.perf_counter() - started
        self.header = gguf_file.read_header(self.file)
        self._buffers = buffers_in(log_lines())
        self._mapped = mapped_weights(self._buffers, self.header.weight_bytes)
        self._verify(self.model)
        return self.describe()

    def _verify(self, model: Model) -> None:
        """Raise NotRealised unless the file has the requested quantization."""
        wanted = self.cell.quant
        if wanted not in schemes_of("llama_cpp"):
            return
        number = getattr(model.lib, f"LLAMA_FTYPE_MOSTLY_{SCHEMES[wanted].recipe['file_type']}")
        if int(model.lib.llama_model_ftype(model.handle)) != number:
            raise NotRealised(
                f"quant={wanted} was requested, but {self.file} is {model.file_type()}. Delete the file, then run the "
                "command again to make it anew."
            )

    def describe(self) -> LoadInfo:
        model, header = self._loaded()
        kind = self.cell.kv_cache or self.capabilities.default_kv_cache
        _, block, size = gguf_file.TYPES[KV_TYPES[kind]]
        shape = model_shape.Shape.from_config(self.facts.config or header.as_config())
        costs = shape.cost_fields(size / block) if shape else {}
        values = header.kv_values_per_token()
        if values is not None:
            costs["kv_bytes_per_token"] = round(values * size / block)
        return LoadInfo(
            load_s=self.load_s,
            weight_bytes=header.weight_bytes,
            step_bytes=model_shape.read_by_step(self.facts.config or header.as_config(), header.step_bytes),
            **costs,
            cache_bytes=None if model.on_gpu else machine.last_level_cache_bytes(),
            facts=self._model_facts(model, header)
            | self._run_facts(model, kind)
            | gguf_quantize.recorded(self.file or Path())
            | pruning.facts(self.cell, self.facts),
            vocab_size=model.words,
            mapped_weight_bytes=self._mapped,
            made=str(self.file),
        )

    def _model_facts(self, model: Model, header: gguf_file.Header) -> dict[str, str | int | float]:
        return {
            "model.parameters": model.parameters(),
            "model.dtype": gguf_file.FLOATS.get(header.embedding_type, header.embedding_type),
            "model.class": model.describe(),
            "model.revision": self.facts.revision,
            "model.weights_format": "gguf",
            "model.tokenizer": str(header.metadata.get("tokenizer.ggml.model", "none")),
            "model.remote_code": "false",
            "quant.method": "gguf" if header.linear_bits < 16 else "none",
            "quant.type": model.file_type(),
            "quant.bits_per_weight": round(header.linear_bits, 3),
            "quant.kernel": header.linear_types,
        }

    def _run_facts(self, model: Model, kind: str) -> dict[str, str | int | float]:
        """Return facts on how llama.cpp runs the model, read from its log."""
        lines = log_lines()
        told = [
            found[1]
            for line in lines
            if (found := re.search(r"(?:Flash Attention|flash_attn +=) (enabled|disabled|not supported)", line))
        ]
        attention = {"enabled": "flash", "disabled": "eager", "not supported": "eager"}.get(
            told[-1] if told else "", "flash where it can"
        )
        return {
            "model.attention": attention,
            "model.device": self.device,
            **(offloaded_in(lines) if model.on_gpu else {}),
            **({"memory.device_source": self.meter.source} if self.meter else {}),
            "model.memory": ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in self._buffers.items()),
            "kv_cache.type": kind,
            **({"kv_cache.tokens": self.session.rows * self.session.max_tokens} if self.session else {}),
            "llama_cpp.version": model.lib.llama_version().decode(errors="replace"),
            "llama_cpp.package": gguf_quantize.version(),
            "llama_cpp.system_info": model.lib.llama_print_system_info().decode(errors="replace").strip(" |\n"),
            "llama_cpp.threads": self.threads,
        }

    def _loaded(self) -> tuple[Model, gguf_file.Header]:
        if self.model is None or self.header is None:
            raise MeasurementError("The model is not loaded.")
        return self.model, self.header

    # Generating

    def generate(
        self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit, history: _History | None = None
    ) -> None:
        longest = max(len(prompt) for prompt in prompts)
        if self.cell.prompt_tokens is None:
            longest = max(longest, self._longest_text)  # one context for all texts of a workload, in any order
        self._has_generated = True
        session = self._context(len(prompts), longest + output_tokens)
        if history and history.tokens and history.session is not session:
            raise MeasurementError("The conversation outgrew its context, so its history is lost. Please report this.")
        ids = session.prefill(prompts, history.tokens if history else 0)
        emit(ids)
        for _ in range(output_tokens - 1):
            ids = session.step(ids)
            emit(ids)
        if history:
            history.session, history.tokens = session, max(len(prompt) for prompt in prompts) + output_tokens - 1

    def _context(self, rows: int, max_tokens: int) -> Session:
        """Return a context for this many rows and tokens: the present one if it has room, else a new one."""
        found = self.session
        if found is not None and found.rows >= rows and found.max_tokens >= max_tokens:
            return found
        rows, max_tokens = (
            (rows, max_tokens) if found is None else (max(rows, found.rows), max(max_tokens, found.max_tokens))
        )
        self._close_session()
        self.session = self._new_session(rows, max_tokens)
        return self.session

    def _new_session(self, rows: int, max_tokens: int, all_logits: bool = False) -> Session:
        kind = KV_TYPES[self.cell.kv_cache or self.capabilities.default_kv_cache]
        return Session(self._loaded()[0], rows, max_tokens, self.threads, kind, FLASH[self.cell.attention], all_logits)

    def timings(self, reset: bool = False) -> Timings | None:
        """Return llama.cpp's own timings of the context; None before the first call."""
        if self.session is None:
            return None
        found = self.session.timings()
        if reset:
            self.session.reset_timings()
        return found

    def new_history(self) -> _History:
        return _History()

    def encode_turns(self, messages: Sequence[str]) -> Sequence[Sequence[int]]:
        model = self._with_tokenizer()
        render = model.chat_renderer()
        first, *rest = turn_texts(messages, render)
        turns = [model.encode(first, special=render is None), *(model.encode(text, special=False) for text in rest)]
        self._note_length(sum(map(len, turns)) + (len(turns) - 1) * self.cell.output_tokens)
        return turns

    def _with_tokenizer(self) -> Model:
        model = self._loaded()[0]
        if not model.has_tokenizer:
            raise MeasurementError(
                f"The GGUF file of {self.cell.model} has no tokenizer: its checkpoint has none, or one that "
                "llama.cpp's converter does not know. Use workload=synthetic."
            )
        return model

    def encode(self, text: str) -> Sequence[int]:
        ids = self._with_tokenizer().encode(text)
        self._note_length(len(ids))
        return ids

    def _note_length(self, tokens: int) -> None:
        """Remember the longest text since the last generation.

        All texts of a cell are tokenized before its first generation.
        """
        self._longest_text = max(0 if self._has_generated else self._longest_text, tokens)
        self._has_generated = False

    def decode(self, ids: Sequence[int]) -> str:
        model = self._loaded()[0]
        return model.decode(ids) if ids and model.has_tokenizer else ""

    def logits(self, ids: Sequence[int], last: int) -> torch.Tensor:
        import torch

        self._close_session()
        if self._scorer is None or self._scorer.max_tokens < len(ids):
            if self._scorer is not None:
                self._scorer.close()
            self._scorer = self._new_session(1, len(ids), all_logits=True)
        return torch.from_numpy(self._scorer.logits(ids, last))

    # Device

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        """Return the driver's reading in every field, since llama.cpp does not count its memory.

        The peak is then the highest of the readings.
        """
        seen = self.meter.read() if self.meter else None
        return None if seen is None else DeviceMemory(seen, seen, seen, seen)

    def peaks(self) -> dict[str, float]:
        """Measure the same rates as for transformers, in a separate process.

        torch would otherwise be most of this process's memory.
        """
        if self.device.startswith("cuda"):
            return {}
        return peak_rates.measure_peaks_apart()

    def trim(self) -> None:
        """Free the context. The next cell makes its own in its first warm-up."""
        self._close_session()

    def close(self) -> None:
        self.trim()
        if self._scorer is not None:
            self._scorer.close()
            self._scorer = None
        if self.model is not None:
            self.model.close()
            self.model = None

    def _close_session(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None


class _History:
    """Number of tokens of a conversation that each row of the context holds."""

    def __init__(self) -> None:
        self.tokens = 0
        self.session: Session | None = None


def offloaded_in(lines: Sequence[str]) -> dict[str, str]:
    """Return how many layers are on the GPU, from llama.cpp's log: `33/33`. Empty if it does not say."""
    found = [match[1] for line in lines if (match := re.search(r"offloaded (\d+/\d+) layers", line))]
    return {"model.gpu_layers": found[0]} if found else {}


def buffers_in(lines: Sequence[str]) -> dict[str, int]:
    """Return the bytes of weights by kind of buffer, from llama.cpp's log, which rounds to 0.01 MiB."""
    found: dict[str, int] = {}
    for line in lines:
        if match := BUFFER.search(line):
            found[match[1]] = found.get(match[1], 0) + round(float(match[2]) * MIB)
    return found


def mapped_weights(buffers: dict[str, int], weight_bytes: int) -> int:
    """Return the bytes of weights that are read from the mapped file: all that no other kind of buffer holds.

    A buffer `…_Mapped` spans the file from its first to its last tensor, so it may be larger than the needed part.
    """
    spans = sum(size for name, size in buffers.items() if name.endswith("_Mapped"))
    others = sum(size for name, size in buffers.items() if not name.endswith("_Mapped"))
    return min(spans, max(weight_bytes - others, 0)) if spans else 0


def _path_of(cell: Cell, model: ModelFacts) -> Path | None:
    return sources.gguf_path(model) if model.source in sources.GGUF_SOURCES else gguf_quantize.file_of(cell, model)


def _with_header(cell: Cell, model: ModelFacts) -> ModelFacts:
    """Return the facts, completed from the file's header if the file is on this disk."""
    if cell.quant != "none":
        raise UsageError(
            f"quant={cell.quant} cannot be made from a GGUF file. Use quant=none to run {cell.model} as it is."
        )
    path = sources.gguf_path(model)
    if path is None:
        return model
    header = gguf_file.read_header(path)
    dtype = gguf_file.FLOATS.get(header.embedding_type)
    return ModelFacts(
        model.name,
        model.source,
        model.location,
        model.revision,
        header.as_config(),
        dtype,
        header.context,
        model.files_bytes,
    )
