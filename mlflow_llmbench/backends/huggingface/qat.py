"""Quantization-aware training for `quant=int4-wo`: train weights under the rounding of the quantized cell.

Runs in a worker of its own. torchao's fake quantization (`torchao.quantization.qat`) is put into every linear layer
but the output head: the forward pass uses the weights as the quantized cell computes with them, and the gradient
passes through the rounding unchanged (the straight-through estimator of Bengio et al., arXiv:1308.3432). By default
the loss is the KL divergence from the unquantized model (Liu et al., LLM-QAT, arXiv:2305.17888), so the model learns
to keep its knowledge and not the text.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...config import model_shape
from ...config.training import RECIPE, Training, needed_bytes
from ...records.cell import Cell
from ...records.codec import from_json
from ...records.errors import MeasurementError, UsageError
from ...records.results import ModelFacts
from ...system import machine
from ...workloads.training_texts import require_enough
from ..checkpoints import files, sources
from . import recipe
from .quantization import complete

if TYPE_CHECKING:
    import torch


WARMUP = 0.1
"""Share of the steps in which the learning rate rises to its maximum; then it falls linearly to `LAST_RATE` of it."""

LAST_RATE = 0.1
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0
"""Maximum norm of the gradient of all parameters; a larger gradient is clipped to it."""

INTEGERS, QUANT_LOW, QUANT_HIGH, MIDDLE = "uint4", 0, 15, 8
"""The 4-bit integers: torch's name, lowest, highest, and the one that represents the zero point."""

LEAST_SCALE = 1e-6


class TrainingReport(Protocol):
    """Receiver of the progress of a training."""

    def stage(self, name: str) -> None:
        """Take the beginning of a stage: loading, training, saving."""

    def planned(self, trained: int, frozen: int, layers: int, needed: int, sequences: int) -> None:
        """Take the plan, after all checks: parameters trained and frozen, quantized layers, bytes, sequences."""

    def step(self, number: int, limit: int, loss: float) -> None:
        """Take a step that is done: its number from 1, the number of steps, and the mean loss of its batch."""

    def saved(self, folder: str) -> None:
        """Take the folder of the complete checkpoint."""


def train(cell: Cell, facts: ModelFacts, order: Mapping[str, Any], report: TrainingReport) -> None:
    """Train as ordered, and write the checkpoint to `order["folder"]`, complete or not at all.

    Raises UsageError if the
    data are too short, MeasurementError for too little memory, a layer without a kernel, or a loss that is not finite.
    """
    import torch

    training = from_json(Training, order["training"])
    source, _ = sources.base_files(cell, facts)
    tokenizer = sources.load_tokenizer(cell, facts)
    rows = _check_data(tokenizer, order, training, facts)
    _plan(cell, facts, source, training, order["room"], len(rows), report)
    report.stage("loading")
    torch.manual_seed(cell.seed)
    pickled = {} if files.may_be_pickled(cell, facts.source) else {"use_safetensors": True}
    model = _load(cell, source, **pickled).to(machine.require_device(cell.device))
    _freeze(model, training)
    teacher = _teacher(model) if training.loss == "distill" else None
    prepare(model, cell.group_size)
    report.stage("training")
    _learn(model, teacher, rows, training, cell.seed, report)
    report.stage("saving")
    _save(model, tokenizer, Path(order["scratch"]), Path(order["folder"]), order["recipe"])
    report.saved(order["folder"])


# Checks before training


def _check_data(tokenizer: Any, order: Mapping[str, Any], training: Training, facts: ModelFacts) -> list[list[int]]:
    """Return the sequences to train on.

    Raises UsageError if they are too few or too long for the model, or if too little text is held out.
    """
    if facts.context is not None and training.sequence_tokens > facts.context:
        raise UsageError(
            f"sequence_tokens={training.sequence_tokens} is more than the context of {facts.name}, "
            f"{facts.context}. Give fewer."
        )
    learned, held = (Path(order[name]).read_text(encoding="utf-8") for name in ("learned", "held_out"))
    rows = sequences(tokenizer, learned, training.sequence_tokens)
    prefix = len(tokenizer("")["input_ids"])
    require_enough(training, sum(map(len, rows)), len(tokenizer(held)["input_ids"]) - prefix)
    return rows


def sequences(tokenizer: Any, text: str, length: int) -> list[list[int]]:
    """Cut a text into consecutive rows of `length` ids, each beginning with the tokenizer's prefix.

    The prefix is what the tokenizer puts before every text. A remainder shorter than a row is dropped.
    """
    prefix = list(tokenizer("")["input_ids"])
    ids = list(tokenizer(text)["input_ids"])[len(prefix) :]
    own = length - len(prefix)
    return [[*prefix, *ids[start : start + own]] for start in range(0, len(ids) - own + 1, own)]


def _plan(
    cell: Cell,
    facts: ModelFacts,
    source: str,
    training: Training,
    room: Sequence[Any],
    rows: int,
    report: TrainingReport,
) -> None:
    """Report what will be trained and the memory it needs, before any weight is read.

    Raises MeasurementError if the model cannot be trained on this machine.
    """
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
            f"{cell.model} cannot be trained for quant=int4-wo: {what}. Use another group_size, or another model."
        )
    counts = {needs: sum(p.numel() for p in model.parameters() if p.requires_grad is needs) for needs in (True, False)}
    vocabulary = int(model.config.get_text_config().vocab_size)
    needed = model_shape.PROCESS_BYTES + needed_bytes(counts[True], counts[False], vocabulary, training)
    available, where = room
    if available is not None and needed > available:
        raise MeasurementError(
            f"Training {cell.model} needs about {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB {where}. "
            "Use a smaller model, fewer sequence_tokens or loss=lm, or try it all the same with force=true."
        )
    report.planned(counts[True], counts[False], len(layers), needed, rows)


def _load(cell: Cell, source: str, **keywords: Any) -> Any:
    """Load the checkpoint in float32, without dropout; in 16 bits, small steps would be lost in rounding."""
    import torch

    with complete(cell.model):
        model, _ = recipe.load_complete(
            source, local_files_only=True, trust_remote_code=cell.trust_remote_code, dtype=torch.float32, **keywords
        )
    return model.eval()


def _freeze(model: Any, training: Training) -> None:
    if training.freeze_embeddings:
        for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            module.requires_grad_(False)


def _teacher(model: Any) -> Any:
    """Copy the model as it is now. The copy is never trained and shares the frozen parameters."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


# Fake quantization


def quantized_layers(model: Any) -> dict[str, Any]:
    """Return the layers that the cell will quantize, by name: all linear ones but the output head, as transformers."""
    import torch

    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def prepare(model: Any, group_size: int) -> None:
    """Put torchao's fake quantization into each layer that the cell will quantize."""
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
    """Remove fake quantization: restore ordinary linear layers with the learned weights."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(step="convert"))


@functools.cache
def _quantizer() -> Any:
    """Return torchao's fake quantizer with the arithmetic of the cell's kernels; made here to import torch late."""
    import torch
    from torchao.quantization.qat import IntxFakeQuantizer
    from torchao.quantization.quant_primitives import _quantize_affine_tinygemm
    from torchao.quantization.utils import get_groupwise_affine_qparams

    class AsLoaded(IntxFakeQuantizer):  # type: ignore[misc]
        """Quantizes a weight as in the loaded cell: cast to bfloat16, as saved, with scale and zero point in bfloat16.

        The integers come from the functions with which torchao packs weights. Their values, (q − 8) · scale + zero,
        are computed in float32, as in the kernels (aten
        `int4mm_kernel.cpp`); torchao's own fake quantizer rounds
        product and sum to bfloat16.
        """

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            size = self.config.group_size
            with torch.no_grad():
                stored = weight.to(torch.bfloat16)
                scale, zero = get_groupwise_affine_qparams(stored, 4, size, torch.bfloat16, eps=LEAST_SCALE)
                number = _quantize_affine_tinygemm(stored, (1, size), scale, zero, torch.int32, QUANT_LOW, QUANT_HIGH)
                groups = (number - MIDDLE).view(*scale.shape, size).float()
                value = groups.mul_(scale.float()[..., None]).add_(zero.float()[..., None]).view_as(weight)
            # The difference is exactly 0, and its gradient is that of the weight.
            rounded: torch.Tensor = value + (weight - weight.detach())
            return rounded

    return AsLoaded


# Learning


def _learn(
    model: Any, teacher: Any, rows: Sequence[Sequence[int]], training: Training, seed: int, report: TrainingReport
) -> None:
    """Train for all steps. Raises MeasurementError as soon as a loss or a gradient is not finite."""
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
                f"The loss at step {number} is not finite ({total:g}, gradient {norm:g}), so nothing was kept. "
                f"Use a smaller learning_rate than {training.learning_rate:g}."
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report.step(number, training.steps, total)


def batches(rows: Sequence[Sequence[int]], training: Training, seed: int) -> Iterator[list[Sequence[int]]]:
    """Yield the sequences of each step: all rows in a seeded order, then all again in another order, and so on.

    No row comes twice before each came once.
    """
    draw = random.Random(f"qat/{seed}")
    waiting: list[Sequence[int]] = []
    for _ in range(training.steps):
        while len(waiting) < training.batch_size:
            waiting += draw.sample(list(rows), len(rows))
        yield waiting[: training.batch_size]
        del waiting[: training.batch_size]


def rate_at(number: int, steps: int) -> float:
    """Return the learning rate of step `number` of `steps`, as a share of its maximum.

    It rises linearly over the first tenth of the steps, then falls linearly to a tenth.
    """
    rising = max(round(WARMUP * steps), 1)
    if number <= rising:
        return number / rising
    return 1 - (1 - LAST_RATE) * (number - rising) / (steps - rising)


def _loss(model: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the loss of one sequence in nats: the mean over positions of KL(teacher‖model) of the next token.

    Without a teacher, it is the mean of −log p of the next token.
    """
    import torch

    own = model(input_ids=ids, use_cache=False).logits[0]
    if teacher is None:
        return torch.nn.functional.cross_entropy(own[:-1], ids[0, 1:])
    with torch.no_grad():
        its = torch.log_softmax(teacher(input_ids=ids, use_cache=False).logits[0], -1)
    return torch.nn.functional.kl_div(torch.log_softmax(own, -1), its, reduction="sum", log_target=True) / len(own)


# Saving


def _save(model: Any, tokenizer: Any, scratch: Path, folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write the checkpoint in bfloat16, from which the cell quantizes. The folder gets its name when it is complete."""
    import torch
    from transformers import GenerationConfig

    convert(model)
    # Sampling settings do not matter here, and some that can be read cannot be written.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        **{name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    )
    model.to(torch.bfloat16).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    (scratch / RECIPE).write_text(json.dumps(dict(recipe), indent=1), encoding="utf-8")
    os.rename(scratch, folder)
