"""Run models in this process with transformers, on the CPU or one CUDA GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import model_shape, training
from ...config.choices import ATTENTIONS, DECODES
from ...records.cell import Cell
from ...records.errors import MeasurementError, MissingError, NotRealised, foreign_errors
from ...records.installation import pip_install
from ...records.mixed_plan import QuantPlan
from ...records.quantizations import FLOAT_DTYPES, MIXED, SCHEMES, UNPACKED, schemes_of
from ...records.results import LoadInfo, ModelFacts
from ...system import gpu, machine
from ...system.placement import AUTO, Working
from ...workloads.conversations import turn_texts
from .. import accelerator
from ..base import CHECKPOINT, Capabilities, DeviceMemory, Emit, Token
from ..checkpoints import files, sources
from ..parallel import RankMemory
from ..peak_rates import measure_peaks
from . import decoding, logits, mixed, placing, pruning, quantization, recipe, sharding
from .continuous import ContinuousEngine
from .decoding import DecodePath, History
from .inspection import Inspection, inspect_model, touch, verify, verify_plan
from .ranks import Ranks
from .streamer import Streamer, late_check

if TYPE_CHECKING:
    import torch


class TransformersBackend:
    """Runs `AutoModelForCausalLM` and `generate()` with a streamer that only passes each step on."""

    capabilities = Capabilities(
        library="transformers",
        tokenizer=True,
        logits=True,
        harness=True,
        conversations=True,
        padding=True,
        continuous=True,
        random_weights=True,
        heavy=("torch", "transformers"),
        quantizations=schemes_of("transformers"),
        delegates=("llama_cpp",),
        attentions=ATTENTIONS,
        decodes=DECODES,
        devices=("cpu", "cuda", "xpu", "mps"),
        kv_caches=tuple(decoding.KV_BACKENDS),
        parameters=("tensor_parallel", "prune", "placement"),
        serving=CHECKPOINT,
    )

    def __init__(self, cell: Cell, model: ModelFacts, rank: int = 0) -> None:
        self.cell = cell
        self.facts = model
        self.rank = rank
        self.device = sharding.device_of(machine.require_device(cell.device), cell, rank)
        self.devices = placing.devices_of(cell, self.device)
        self.meter = gpu.meter_of(*self.devices)
        self.room: dict[str, Any] = {}  # arguments of `placing.keywords`
        self.model: Any = None
        self.tokenizer: Any = None
        self.path: DecodePath | None = None
        self._checked_late = False
        self.weights_format = ""
        self.load_s = 0.0
        self.plan: QuantPlan | None = None
        self._watch: logits.Watch | None = None
        self.ranks: Ranks | None = None  # the others, if this is the first of several
        self.rank_pids: tuple[int, ...] = ()
        self.store = ""
        self.parts: list[sharding.Part] = []
        self.pruned: dict[str, str | int | float] = {}

    @classmethod
    def resolve(cls, cell: Cell) -> ModelFacts:
        """Find files, commit and configuration of a preset, folder, GGUF file or Hub id.

        Raises ModelError or MissingError.
        """
        for package in ("torch", "transformers"):
            if importlib.util.find_spec(package) is None:
                raise MissingError(
                    f"backend=transformers needs the package {package}, which is not installed. "
                    f"Run: {pip_install(package)}"
                )
        quantization.require(cell)
        decoding.require(cell, machine.require_device(cell.device))
        sharding.require(cell)
        model = sources.find_model(cell)
        quantization.require_for(model)
        model = (
            dataclasses.replace(model, quant_plan=mixed.read_plan(cell.quant_plan, model)) if cell.quant_plan else model
        )
        return sources.with_assistant(cell, model)

    @classmethod
    def refusal(cls, cell: Cell, model: ModelFacts) -> str | None:
        """Say why a cell cannot be measured with this model, and what to do; None if it can."""
        return placing.refusal(cell, model) or sharding.refusal(cell, model)

    @classmethod
    def prepare(cls, cell: Cell, model: ModelFacts) -> None:
        """Write the random checkpoint, or download the files from the Hub."""
        sources.fetch(cell, model)
        if model.assistant:
            sources.fetch(sources.assistant_of(cell), model.assistant)

    @classmethod
    def is_prepared(cls, cell: Cell, model: ModelFacts) -> bool:
        """Return True if the files are on this disk, with all that is made for the quantization before the load."""
        small = model.assistant is None or sources.is_local(sources.assistant_of(cell), model.assistant)
        maker = quantization.maker_of(cell)
        return small and (maker is None or maker.is_made(cell, model)) and sources.is_local(cell, model)

    # Loading

    def load(self) -> LoadInfo:
        """Load, verify and touch the model. The time covers loading from local files and touching, not verification.

        With several ranks each loads its part, and the time is that of the last one.
        """
        if self.ranks:
            self.ranks.ask("load")
        info = self._load()
        if self.ranks:
            self.parts = sharding.parts_of(self.parts[0], self.ranks.answers())
            self.ranks.forget_store()
        return sharding.whole(info, self.parts) if self.ranks else info

    def _load(self) -> LoadInfo:
        import torch
        from transformers import GenerationConfig

        folder, gguf_file = sources.local_files(self.cell, self.facts)
        if not gguf_file:
            files.require_whole(self.facts.name, Path(folder))
        self.weights_format = "gguf" if gguf_file else files.weights_format(folder)
        with foreign_errors("starting the device"):
            accelerator.take(self.device)
        if self.store:
            sharding.join(self.cell, self.device, self.rank, self.store)
        self.plan = mixed.plan_of(self.cell, self.facts) if self.cell.quant == MIXED else None
        dtype, keywords = self._dtype(), self._load_keywords(gguf_file)
        how, place = (self._recipe(gguf_file, dtype), self.device) if self.plan is None else ({}, "cpu")
        started = time.perf_counter()
        with foreign_errors("loading"), torch.inference_mode():
            with quantization.complete(self.facts.name, self.facts):
                self.model, _ = recipe.load(folder, how, device=place, dtype=dtype, **keywords)
            if self.plan:  # layer by layer on the way to the device, which never holds all of it unquantized
                mixed.realise(self.model, self.plan.modules, self.device)
                self.model.to(self.device)
            touch(self.model)  # part of the load: only now is a mapped checkpoint read from the disk
            assistant = self._load_assistant(dtype)
        accelerator.synchronise(self.devices)
        self.load_s = time.perf_counter() - started
        # Neutral settings: no end-of-sequence token or sampling default of the checkpoint changes length or cost.
        self.ends = decoding.end_ids(self.model)
        self.model.generation_config = GenerationConfig()
        self.path = DecodePath(self.cell, self.model, assistant)
        gc.collect()
        found = inspect_model(self.model)
        verify(self.cell.quant, self.device, found)
        sharding.verify(self.cell, self.model)
        placing.verify(self.cell, self.device, self.model)
        self.pruned = pruning.facts(self.cell, self.facts) | pruning.verify(self.cell, self.facts, self.model)
        if self.plan:
            verify_plan(self.plan.modules, self.model)
        if gguf_file and self.cell.quant == "none" and not any("gguf" in name.lower() for name in found.linear_classes):
            raise NotRealised(
                f"transformers cannot run {gguf_file} packed: it was unpacked to {', '.join(found.dtypes)}. "
                "Say so with quant=bf16, fp16 or fp32, or run it as it is with backend=llama_cpp."
            )
        info = self._load_info(self.load_s, found)
        self.parts = [sharding.Part.of(info, found)]
        return info

    def _load_assistant(self, dtype: str) -> Any:
        """Load the small model that proposes tokens, in the dtype of the computation; None if the cell has none."""
        if self.facts.assistant is None:
            return None
        cell = sources.assistant_of(self.cell)
        folder, _ = sources.local_files(cell, self.facts.assistant)
        keywords: dict[str, Any] = {"local_files_only": True, "trust_remote_code": cell.trust_remote_code}
        if not files.may_be_pickled(cell, self.facts.assistant.source):
            keywords["use_safetensors"] = True
        with quantization.complete(self.facts.assistant.name, self.facts.assistant):
            assistant, _ = recipe.load(folder, {}, device=self.device, dtype=dtype, **keywords)
        touch(assistant)
        return assistant

    def describe(self) -> LoadInfo:
        info = self._load_info(self.load_s, inspect_model(self.model))
        return sharding.whole(info, self.parts) if self.ranks else info

    def _dtype(self) -> str:
        """The dtype to load with: torch's name of it, or `auto`."""
        if self.plan:
            return FLOAT_DTYPES[self.plan.sensitivity.kept]
        scheme = SCHEMES[self.cell.quant]
        if scheme.made_while_loading:
            return "bfloat16" if accelerator.has_bfloat16(self.device) else "float16"
        return scheme.dtype or "auto"

    def _recipe(self, gguf_file: str | None, dtype: str) -> dict[str, Any]:
        """The recipe to load with, plain data."""
        if SCHEMES[self.cell.quant].made_while_loading:
            return quantization.recipe_of(self.cell, dtype)
        return dict(UNPACKED) if gguf_file and self.cell.quant in FLOAT_DTYPES else {}

    def _load_keywords(self, gguf_file: str | None) -> dict[str, Any]:
        keywords: dict[str, Any] = {
            "local_files_only": True,
            "trust_remote_code": self.cell.trust_remote_code,
            **sharding.load_keywords(self.cell),
            **(placing.keywords(self.cell, **self.room) if self.room else {}),
        }
        if self.cell.attention != "auto":
            keywords["attn_implementation"] = self.cell.attention
        if gguf_file:
            keywords["gguf_file"] = gguf_file
        elif not files.may_be_pickled(self.cell, self.facts.source):
            keywords["use_safetensors"] = True
        return keywords

    def _load_info(self, load_s: float, found: Inspection) -> LoadInfo:
        config = self.model.config.get_text_config()
        compute = self.model.get_input_embeddings().weight.dtype
        shape = model_shape.Shape.from_config(config.to_dict())
        maker = quantization.checkpoint_maker_of(self.cell)
        placed = placing.parts(self.model) if self.cell.placement == AUTO else ()
        facts: dict[str, str | int | float] = {
            "model.parameters": found.parameters,
            "model.dtype": str(compute).removeprefix("torch."),
            "model.class": type(self.model).__name__,
            "model.revision": self.facts.revision,
            "model.weights_format": self.weights_format,
            "model.remote_code": "true"
            if any(name.startswith("transformers_modules.") for name in sys.modules)
            else "false",
            "model.attention": str(getattr(config, "_attn_implementation", "unknown")),
            "model.device": found.device,
            **({"model.device_name": named} if (named := self._device_name()) else {}),
            **placing.facts(placed),
            **({"memory.device_source": self.meter.source} if self.meter else {}),
            **({} if found.linear_bits is None else {"quant.bits_per_weight": round(found.linear_bits, 3)}),
            "quant.kernel": recipe.kernel(found.linear_classes),
            **quantization.facts(self.cell, self.model),
            **(self.path.facts() if self.path else {}),
            **({"assistant.revision": self.facts.assistant.revision} if self.facts.assistant else {}),
            **(maker.recorded(sources.local_files(self.cell, self.facts)[0]) if maker else {}),
            **(mixed.facts(self.plan) if self.plan else {}),
            **self.pruned,
            **training.recorded(sources.base_files(self.cell, self.facts)[0]),
        }
        costs = shape.cost_fields(compute.itemsize) if shape else {}
        if self.path and self.path.kv_bytes_per_token is not None:
            costs["kv_bytes_per_token"] = self.path.kv_bytes_per_token
        return LoadInfo(
            load_s=load_s,
            weight_bytes=found.weight_bytes,
            step_bytes=model_shape.read_by_step(config.to_dict(), found.step_bytes),
            **costs,
            cache_bytes=accelerator.cache_bytes(self.device),
            facts=facts,
            vocab_size=int(config.vocab_size),
            mapped_weight_bytes=found.mapped_bytes,
            quant_plan=self.plan,
            made=sources.local_files(self.cell, self.facts)[0] if maker or self.facts.pruned else None,
            placement=placed or None,
        )

    def _device_name(self) -> str | None:
        """Name of a device that the fingerprint of the machine does not name: all but NVIDIA's."""
        return None if self.meter else accelerator.name(self.device)

    # Generating

    def generate(
        self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit, history: History | None = None
    ) -> None:
        assert self.path
        # generate() skips the part of the prompt that the cache holds.
        arguments = {"past_key_values": history.cache} if history else self.path.arguments()
        with self._together("generate", prompts, output_tokens):
            self._generate(prompts, output_tokens, emit, self.path.settings(), arguments)
        if history is None:
            self.path.finish(arguments, len(prompts))

    def generate_plainly(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Emit) -> None:
        self._generate(prompts, output_tokens, emit, {}, {})

    def compile(self, prompts: Sequence[Sequence[int]], longest: int, output_tokens: int) -> float | None:
        if self.cell.decode != "compiled":
            return None
        assert self.path
        path, few = self.path, min(output_tokens, decoding.COMPILE_TOKENS)

        def run(**settings: Any) -> None:
            arguments = path.arguments()
            self._generate(prompts, few, lambda _: None, path.settings() | settings, arguments)
            path.empty()

        with foreign_errors("compiling the decode step"):
            return path.compile(longest + output_tokens, lambda: run(disable_compile=True), run, decodes=few > 1)

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        output_tokens: int,
        emit: Emit,
        fields: dict[str, Any],
        arguments: dict[str, Any],
    ) -> None:
        import torch
        from transformers import GenerationConfig

        ids, mask = decoding.padded(prompts)
        settings = GenerationConfig(
            max_new_tokens=output_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
            **fields,
        )
        streamer: Any = Streamer(emit)
        if self._watch:
            arguments = {**arguments, **self._watch.arguments()}
        with foreign_errors("generating"), torch.inference_mode(), contextlib.ExitStack() as stack:
            stack.enter_context(accelerator.stopping_at_once(self.device))
            if not self._checked_late:
                streamer = stack.enter_context(late_check(self.model, streamer))
                self._checked_late = True
            ids, mask = ids.to(self.device), mask.to(self.device)
            self.model.generate(ids, attention_mask=mask, generation_config=settings, streamer=streamer, **arguments)
            accelerator.synchronise(self.devices)

    @contextlib.contextmanager
    def watch_logits(self) -> Iterator[logits.Watch]:
        self._watch = logits.Watch(self.model)
        try:
            yield self._watch
        finally:
            self._watch = None

    def new_history(self) -> History:
        from transformers import DynamicCache

        return History(DynamicCache(config=self.model.config))

    def open_engine(self, rows: int, longest: int, on_step: Callable[[Sequence[Token]], None]) -> ContinuousEngine:
        try:
            with foreign_errors("preparing continuous batching"):
                return ContinuousEngine(self.model, rows, longest, on_step, self._watch)
        except MeasurementError as error:
            raise MeasurementError(
                f"transformers cannot batch this model continuously. {error} "
                "Use batching=static,dynamic, or another attention."
            ) from error

    def encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self._tokenizer()(text)["input_ids"]
        return ids

    def encode_turns(self, messages: Sequence[str]) -> Sequence[Sequence[int]]:
        tokenizer = self._tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            first, *rest = turn_texts(messages, None)
            return [self.encode(first), *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in rest)]

        def render(chat: list[dict[str, str]]) -> str:
            return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))

        with foreign_errors("applying the chat template"):  # the template writes the special tokens itself
            return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in turn_texts(messages, render)]

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:  # only text workloads need it, and building it from a GGUF file takes a minute
            self.tokenizer = sources.load_tokenizer(self.cell, self.facts)
        return self.tokenizer

    def decode(self, ids: Sequence[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def language_model(self) -> tuple[Any, Any]:
        return self.model, self._tokenizer()

    def forward(self, prompts: Sequence[Sequence[int]]) -> None:
        import torch

        ids, mask = decoding.padded(prompts)
        with foreign_errors("computing a forward pass"), torch.inference_mode():
            ids, mask = ids.to(self.device), mask.to(self.device)
            self.model(input_ids=ids, attention_mask=mask, use_cache=True, **self._keeping(1))
            accelerator.synchronise(self.devices)

    def _keeping(self, last: int) -> dict[str, int]:
        """Return the argument by which most models skip the output head for all but the last ids."""
        return {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}

    def logits(self, ids: Sequence[int], last: int) -> torch.Tensor:
        import torch

        batch = torch.tensor([list(ids)], dtype=torch.long)
        through_cache = self.cell.kv_cache is not None and last > 1
        # The output head at 262,144 words would take most of the memory.
        keep = self._keeping(1 if through_cache else last)
        with self._together("logits", list(ids), last), foreign_errors("scoring"), torch.inference_mode():
            batch = batch.to(self.device)
            mask = torch.ones_like(batch)
            if through_cache:
                assert self.path
                return self.path.logits_through_cache(batch, mask, last, keep)
            found: torch.Tensor = self.model(input_ids=batch, attention_mask=mask, use_cache=False, **keep).logits
            return found[0, -last:]

    # Several devices

    def make_room(self, host_bytes: int | None, needs: Working | None, folder: Path) -> None:
        self.room = {"limit": host_bytes, "needs": needs, "folder": folder}

    def start_ranks(self) -> None:
        self.ranks = Ranks(self.cell, self.facts)
        self.store = str(self.ranks.store)
        self.rank_pids = self.ranks.start()

    def ready(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> None:
        assert self.ranks
        self.ranks.begin("generate", prompts, output_tokens)

    def _together(self, name: str, *arguments: Any) -> contextlib.AbstractContextManager[None]:
        return self.ranks.together(name, *arguments) if self.ranks else contextlib.nullcontext()

    def rank_memory(self) -> tuple[RankMemory, ...]:
        assert self.ranks
        return self.ranks.memory(self.device_memory(), self.parts if self.model else [])

    def collective_share(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> float | None:
        self.ready(prompts, output_tokens)
        return sharding.collective_share(lambda: self.generate(prompts, output_tokens, lambda _: None))

    def end_ranks(self) -> None:
        if self.ranks:
            self.ranks.close()

    # Device

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        if self.ranks and reset and self.device != "cpu":
            self.ranks.device_memory(reset)
        return accelerator.device_memory(self.devices, self.meter, reset)

    def peaks(self) -> dict[str, float]:
        with foreign_errors("measuring the device's best rates"):
            found = measure_peaks(self.device, accelerator.cache_bytes(self.device) or 0)
        self.trim()
        return found

    def close(self) -> None:
        if self.ranks:
            self.ranks.ask("close")
        self.model = self.tokenizer = self.path = None
        if self.cell.decode == "compiled":  # its graphs hold memory
            import torch

            torch._dynamo.reset()
        self.trim()

    def trim(self) -> None:
        if self.ranks:
            self.ranks.ask("trim")
        gc.collect()
        accelerator.empty_caches(self.device)
