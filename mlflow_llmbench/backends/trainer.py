"""Quantization-aware training: a checkpoint whose weights are learned as `quant=int4-wo` will round them. Runs in a worker of its own.

torchao's fake quantization (`torchao.quantization.qat`) stands in every linear layer but the output head: the forward pass sees the
weights as the quantized cell computes with them, the gradient passes through the rounding as if it were not there (the straight-through
estimator of Bengio et al., arXiv:1308.3432). By default the loss is the KL divergence from the unquantized model, which teaches it what it knew
(Liu et al., LLM-QAT, arXiv:2305.17888), not the text.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import machine, models
from ..cell import Cell
from ..errors import MeasurementError, UsageError
from ..records import ModelFacts, from_json
from ..training import RECIPE, Training, needed_bytes, require_enough
from . import checkpoint, sources

if TYPE_CHECKING:
    import torch

WARMUP = 0.1
"""Share of the steps over which the learning rate rises to its height; from there it falls evenly to a tenth of it."""

LAST_RATE = 0.1
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0
"""Of the gradient of all parameters; a longer one is shortened to it."""

INTEGERS, QUANT_LOW, QUANT_HIGH, MIDDLE = "uint4", 0, 15, 8
"""The integers of 4 bits: torch's name, their ends, and the one that stands for the zero point."""

LEAST_SCALE = 1e-6

Say = Callable[..., None]


def train(cell: Cell, facts: ModelFacts, order: Mapping[str, Any], say: Say) -> None:
    """Train as ordered, and write the checkpoint to `order["folder"]`: whole, or not at all.

    Tells `planned` when everything is checked, `step` with the loss after each, and `saved`. Raises UsageError for data that are too short,
    MeasurementError for too little memory, a layer without a kernel, or a loss that is not finite.
    """
    import torch

    training = from_json(Training, order["training"])
    source, _ = sources.base_files(cell, facts)
    tokenizer = sources.load_tokenizer(cell, facts)
    rows = _check_data(tokenizer, order, training, facts)
    _plan(cell, facts, source, training, order["room"], len(rows), say)
    say("stage", stage="loading")
    torch.manual_seed(cell.seed)
    pickled = {} if checkpoint.may_be_pickled(cell, facts.source) else {"use_safetensors": True}
    model = _load(cell, source, **pickled).to(machine.require_device(cell.device))
    _freeze(model, training)
    teacher = _teacher(model) if training.loss == "distill" else None
    prepare(model, cell.group_size)
    say("stage", stage="training")
    _learn(model, teacher, rows, training, cell.seed, say)
    say("stage", stage="saving")
    _save(model, tokenizer, Path(order["scratch"]), Path(order["folder"]), order["recipe"])
    say("saved", folder=order["folder"])


# Before it starts


def _check_data(tokenizer: Any, order: Mapping[str, Any], training: Training, facts: ModelFacts) -> list[list[int]]:
    """The sequences that are trained on. Raises UsageError if they are too few, too long for the model, or too little is held out."""
    if facts.context is not None and training.sequence_tokens > facts.context:
        raise UsageError(
            f"sequence_tokens={training.sequence_tokens} is more than the context of {facts.name}, {facts.context}. Give fewer."
        )
    learned, held = (Path(order[name]).read_text(encoding="utf-8") for name in ("learned", "held_out"))
    rows = sequences(tokenizer, learned, training.sequence_tokens)
    prefix = len(tokenizer("")["input_ids"])
    require_enough(training, sum(map(len, rows)), len(tokenizer(held)["input_ids"]) - prefix)
    return rows


def sequences(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    """A text as rows of `length` ids one after another, each with what the tokenizer puts before every text; what is left over is left out."""
    prefix = list(tokenizer("")["input_ids"])
    ids = list(tokenizer(text)["input_ids"])[len(prefix) :]
    own = length - len(prefix)
    return [[*prefix, *ids[start : start + own]] for start in range(0, len(ids) - own + 1, own)]


def _plan(
    cell: Cell, facts: ModelFacts, source: str, training: Training, room: Sequence[Any], rows: int, say: Say
) -> None:
    """Tell what will be trained and what it needs, before a weight is read. Raises MeasurementError if it cannot be done here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=cell.trust_remote_code)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=cell.trust_remote_code)
    _freeze(model, training)
    layers = quantized_layers(model)
    odd = {name: layer.in_features for name, layer in layers.items() if layer.in_features % cell.group_size}
    if odd or not layers:
        name, inputs = next(iter(odd.items()), ("", 0))
        what = (
            f"{name} has {inputs} inputs, which group_size={cell.group_size} does not divide"
            if odd
            else "it has no linear layers"
        )
        raise MeasurementError(
            f"quant=int4-wo cannot be trained for with {cell.model}: {what}. Use another group_size, or another model."
        )
    counts = {needs: sum(p.numel() for p in model.parameters() if p.requires_grad is needs) for needs in (True, False)}
    vocabulary = int(model.config.get_text_config().vocab_size)
    needed = models.PROCESS_BYTES + needed_bytes(counts[True], counts[False], vocabulary, training)
    available, where = room
    if available is not None and needed > available:
        raise MeasurementError(
            f"Training {cell.model} needs about {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB {where}. Use a smaller model, fewer sequence_tokens or "
            "loss=lm, or try it all the same with force=true."
        )
    say("planned", trained=counts[True], frozen=counts[False], layers=len(layers), needed=needed, sequences=rows)


def _load(cell: Cell, source: str, **keywords: Any) -> Any:
    """The checkpoint in float32, without dropout: small steps on weights in 16 bits are lost in rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        source, local_files_only=True, trust_remote_code=cell.trust_remote_code, dtype=torch.float32, **keywords
    ).eval()


def _freeze(model: Any, training: Training) -> None:
    if training.freeze_embeddings:
        for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            module.requires_grad_(False)


def _teacher(model: Any) -> Any:
    """The model as it is now, never trained; it shares what is frozen."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


# Fake quantization


def quantized_layers(model: Any) -> dict[str, Any]:
    """Name → each layer that the cell will quantize: linear, and not the output head (what transformers leaves out as well)."""
    import torch

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def prepare(model: Any, group_size: int) -> None:
    """Put fake quantization by torchao into each layer that the cell will quantize."""
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torchao.quantization.quant_primitives import ZeroPointDomain

    config = IntxFakeQuantizeConfig(
        getattr(torch, INTEGERS),
        group_size=group_size,
        is_symmetric=False,
        scale_precision=torch.bfloat16,
        zero_point_precision=torch.bfloat16,
        zero_point_domain=ZeroPointDomain.FLOAT,
        eps=LEAST_SCALE,
    )
    names = set(quantized_layers(model))
    quantize_(model, QATConfig(weight_config=config, step="prepare"), filter_fn=lambda _, name: name in names)
    for name in names:
        model.get_submodule(name).weight_fake_quantizer = _quantizer()(config)


def convert(model: Any) -> None:
    """Take fake quantization out again: ordinary linear layers with the weights that were learned."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(step="convert"))


@functools.cache
def _quantizer() -> Any:
    """The fake quantizer of torchao with the arithmetic of the kernels that the cell runs; the class is made here, where torch is."""
    import torch
    from torchao.quantization.qat import IntxFakeQuantizer
    from torchao.quantization.quant_primitives import _quantize_affine_tinygemm
    from torchao.quantization.utils import get_groupwise_affine_qparams

    class AsLoaded(IntxFakeQuantizer):  # type: ignore[misc]
        """The weight as the loaded cell has it: cast to bfloat16, which is what is saved and loaded, its scale and zero point in bfloat16.

        The integers are torchao's, by the functions with which it packs weights. Their values, (q − 8) · scale + zero, are computed
        in float32, as the kernels do (aten `int4mm_kernel.cpp`); torchao's own fake quantizer rounds product and sum to bfloat16.
        """

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            size = self.config.group_size
            with torch.no_grad():
                stored = weight.to(torch.bfloat16)
                scale, zero = get_groupwise_affine_qparams(stored, 4, size, torch.bfloat16, eps=LEAST_SCALE)
                number = _quantize_affine_tinygemm(stored, (1, size), scale, zero, torch.int32, QUANT_LOW, QUANT_HIGH)
                groups = (number - MIDDLE).view(*scale.shape, size).float()
                value = groups.mul_(scale.float()[..., None]).add_(zero.float()[..., None]).view_as(weight)
            # The difference is exactly 0, and its gradient that of the weight.
            rounded: torch.Tensor = value + (weight - weight.detach())
            return rounded

    return AsLoaded


# Learning


def _learn(model: Any, teacher: Any, rows: Sequence[Sequence[int]], training: Training, seed: int, say: Say) -> None:
    """Take the steps. Raises MeasurementError as soon as a loss or a gradient is not finite."""
    import torch

    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=training.learning_rate, betas=BETAS, weight_decay=0.0)
    device = learned[0].device
    for number, batch in enumerate(batches(rows, training, seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * rate_at(number, training.steps)
        total = 0.0
        for row in batch:
            loss: Any = _loss(model, teacher, torch.tensor([row], device=device)) / len(batch)
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(learned, LARGEST_NORM))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise MeasurementError(
                f"The loss at step {number} is not finite ({total:g}, gradient {norm:g}), so nothing was kept. Use a smaller learning_rate than "
                f"{training.learning_rate:g}."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        say("step", number=number, limit=training.steps, loss=total)


def batches(rows: Sequence[Sequence[int]], training: Training, seed: int) -> Iterator[list[Sequence[int]]]:
    """The sequences of each step: all rows in a seeded order, then all again in another, so that none comes twice before each came once."""
    draw = random.Random(f"qat/{seed}")
    waiting: list[Sequence[int]] = []
    for _ in range(training.steps):
        while len(waiting) < training.batch_size:
            waiting += draw.sample(list(rows), len(rows))
        yield waiting[: training.batch_size]
        del waiting[: training.batch_size]


def rate_at(number: int, steps: int) -> float:
    """The learning rate of step `number` of `steps` as a share of its height: up over the first tenth, then evenly down to a tenth."""
    rising = max(round(WARMUP * steps), 1)
    if number <= rising:
        return number / rising
    return 1 - (1 - LAST_RATE) * (number - rising) / (steps - rising)


def _loss(model: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean over the positions of one sequence, nats: KL(teacher‖model) of the next token, or −log p of the next token without a teacher."""
    import torch

    own = model(input_ids=ids, use_cache=False).logits[0]
    if teacher is None:
        return torch.nn.functional.cross_entropy(own[:-1], ids[0, 1:])
    with torch.no_grad():
        its = torch.log_softmax(teacher(input_ids=ids, use_cache=False).logits[0], -1)
    return torch.nn.functional.kl_div(torch.log_softmax(own, -1), its, reduction="sum", log_target=True) / len(own)


# Keeping


def _save(model: Any, tokenizer: Any, scratch: Path, folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write the checkpoint in bfloat16, which is what the cell quantizes; the folder gets its name when it is whole."""
    import torch
    from transformers import GenerationConfig

    convert(model)
    # Settings of sampling have no part in it, and some that are read cannot be written.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        **{name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    model.to(torch.bfloat16).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / RECIPE).write_text(json.dumps(dict(recipe), indent=1), encoding="utf-8")
    os.rename(scratch, folder)
