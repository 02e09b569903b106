"""Mixed quantization: measure the cost of each block in int8 and int4, choose schemes under a budget, apply them.

The paper's "dynamic quantization". Sensitivity is measured with forward passes only: one block at a time is quantized,
and the next-token distributions are compared with those of the unquantized model (by KL divergence; Dong et al. 2019,
arXiv:1911.03852, use curvature). It runs in the process that prepares files. The result is cached by content and
shared by all budgets.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...config.parsers import read_budget
from ...records import reading
from ...records.cell import Cell
from ...records.codec import from_json, to_json
from ...records.errors import MeasurementError, NotRealised, UsageError, first_line
from ...records.mixed_plan import QUANTIZED, Block, QuantPlan, Sensitivity
from ...records.quantizations import FLOAT_DTYPES, MIXED, SCHEMES
from ...records.results import ModelFacts, hash16
from ...system import machine
from ...workloads.prompts import load_prompts
from .. import accelerator
from . import inspection, knapsack, passages, recipe, scoring
from .quantization import complete

if TYPE_CHECKING:
    import torch


PACKAGES = ("bitsandbytes", "torch", "transformers")
PASSAGES, PASSAGE_TOKENS, POSITIONS = 24, 64, 8
"""Number of passages, tokens of each, and positions at its end at which distributions are compared.

Gemma's vocabulary takes 100 MB of logits.
"""

ROWS = 8  # passages in one forward pass
THRESHOLD = float(SCHEMES[MIXED].recipe["llm_int8_threshold"])
KEPT = ("bf16", "fp16")
"""Possible schemes of blocks that are not quantized."""

NANO = 10**12  # factor that makes costs whole numbers


def kept_scheme(model: ModelFacts, bfloat16: bool) -> str:
    """Return the scheme of blocks that are not quantized.

    It is the checkpoint's own 16-bit type, or bf16 if it has more bits, or fp16 on devices without bf16.
    """
    own = next((scheme for scheme in KEPT if FLOAT_DTYPES[scheme] == model.dtype), None)
    return own if own and (bfloat16 or own != "bf16") else "bf16" if bfloat16 else "fp16"


# Cached files


def plan_of(cell: Cell, model: ModelFacts) -> QuantPlan:
    """Return the plan of a cell, given or written by `prepare`. Raises MeasurementError if it cannot be read."""
    if model.quant_plan is not None:
        return model.quant_plan
    file = _folder(cell, model) / _plan_name(cell)
    try:
        return from_json(QuantPlan, reading.read_own_json(file))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MeasurementError(
            f"The plan {file} cannot be read: {error}. Delete it, so that it is made again."
        ) from None


def is_made(cell: Cell, model: ModelFacts) -> bool:
    """Return True if the plan of a cell is there."""
    return model.quant_plan is not None or (_folder(cell, model) / _plan_name(cell)).exists()


def read_plan(path: str, model: ModelFacts) -> QuantPlan:
    """Read the `quant_plan.json` of an earlier run. Raises UsageError if it is no plan, or one of another model."""
    try:
        plan = from_json(QuantPlan, reading.read_own_json(path))
        complete = set(plan.schemes) == {block.name for block in plan.sensitivity.blocks} and set(
            plan.schemes.values()
        ) <= {*plan.sensitivity.schemes}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a plan: {first_line(error)}. Give the quant_plan.json of a run with quant=mixed."
        ) from None
    if not complete:
        raise UsageError(
            f"{path} is not a complete plan: it has blocks without a scheme, or with an unknown one. "
            "Give the quant_plan.json of a run."
        )
    # The revision of random weights is their seed, which is the same for every preset.
    other = model.revision.startswith("random-") and plan.sensitivity.model != model.name
    if other or plan.sensitivity.revision != model.identity[1]:
        raise UsageError(
            f"The plan {path} was made for {plan.sensitivity.model} {_short(plan.sensitivity.revision)}, "
            f"but the model is {model.name} {_short(model.identity[1])}. Make a plan for it with quant_budget."
        )
    return plan


def _short(revision: str) -> str:
    """Return the beginning of a revision, and all of what was pruned."""
    commit, plus, pruned = revision.partition("+")
    return f"{commit[:12]}{plus}{pruned}"


def _folder(cell: Cell, model: ModelFacts) -> Path:
    """Return the cache folder of a model's sensitivity and plans, named by a hash of everything that decides them."""
    name, revision = model.identity
    made_of = {
        "model": name,
        "revision": revision,
        "device": machine.require_device(cell.device).partition(":")[0],
        "attention": cell.attention,
        "size": [PASSAGES, PASSAGE_TOKENS, POSITIONS],
        "calibration": [_texts(texts, cell) for texts in _sets(cell)]
        or {"generator": "uniform-ids-1", "seed": cell.seed},
        "versions": _versions(),
    }
    return machine.cache_folder() / "mixed" / f"{Path(model.name).name}-{hash16(made_of)}"


def _plan_name(cell: Cell) -> str:
    return f"plan-{cell.quant_budget}.json"


def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in PACKAGES}


def _write(file: Path, record: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(to_json(record)), encoding="utf-8")
    temporary.replace(file)


# Measuring and choosing


def make(cell: Cell, model: ModelFacts, source: str, tokenizer: Callable[[], Any]) -> None:
    """Make and write the plan of a cell: measure the sensitivity unless it is cached, and choose under the budget.

    The plan as a whole is measured too. `source` is the folder of the checkpoint; `tokenizer` loads its tokenizer, and
    is not called for random weights. Raises UsageError if nothing fits the budget, and MeasurementError if the
    sensitivity cannot be measured.
    """
    if is_made(cell, model):
        return
    import torch

    device = machine.require_device(cell.device)
    words = None if cell.weights == "random" else tokenizer()
    try:
        with torch.inference_mode():
            kept = kept_scheme(model, accelerator.has_bfloat16(device))
            loaded = _load(cell, source, kept).to(device)
            ids = torch.tensor(_passages(cell, int(loaded.config.get_text_config().vocab_size), words), device=device)
            reference = _logits(loaded, ids)
            known = _folder(cell, model) / "sensitivity.json"
            if known.exists():
                found = from_json(Sensitivity, reading.read_own_json(known))
            else:
                found = _sensitivity(loaded, ids, reference, cell, model, kept, device)
                _write(known, found)
                (known.parent / "blocks.json").unlink(missing_ok=True)
            plan = choose(found, str(cell.quant_budget))
            with _as(loaded, plan.modules, device):
                measured = _divergences(loaded, ids, reference)
    except (MeasurementError, UsageError, NotRealised):
        raise
    except Exception as error:
        raise MeasurementError(
            f"The sensitivity of {cell.model} could not be measured: {type(error).__name__}: {first_line(error)}. "
            "Try a smaller model, or quant=int8."
        ) from error
    _write(_folder(cell, model) / _plan_name(cell), QuantPlan(found, plan.budget, plan.schemes, measured))


def choose(found: Sensitivity, budget: str) -> QuantPlan:
    """Return the plan of least predicted KL divergence within a budget such as `5.5` (bits per weight) or `300MB`.

    Raises UsageError if nothing fits.
    """
    bits, size = read_budget(budget)
    room = size - found.fixed_bytes if size is not None else math.floor((bits or 0) * found.weights / 8 + 1e-6)
    options = [
        [(block.stored[scheme], round(block.cost(scheme) * NANO)) for scheme in found.schemes] for block in found.blocks
    ]
    chosen = knapsack.choose(options, room)
    if chosen is None:
        least = sum(min(block.stored.values()) for block in found.blocks)
        raise UsageError(
            f"quant_budget={budget} is too small for {found.model}: int4 throughout takes "
            f"{math.ceil(800 * least / found.weights) / 100:.2f} bits per weight, "
            f"{math.ceil((found.fixed_bytes + least) / 1e5) / 10:.1f}MB with the parts that are not quantized. "
            "Give at least that."
        )
    return QuantPlan(
        found, budget, {block.name: found.schemes[number] for block, number in zip(found.blocks, chosen, strict=True)}
    )


def _sensitivity(
    model: Any, ids: torch.Tensor, reference: torch.Tensor, cell: Cell, facts: ModelFacts, kept: str, device: str
) -> Sensitivity:
    started = time.perf_counter()
    seen = inspection.inspect_model(model)
    if seen.expert_weights:
        raise MeasurementError(
            f"{cell.model} is a mixture of experts, which are not linear layers in this version of transformers: "
            f"{seen.expert_weights:,} of its {seen.parameters:,} weights would stay as they are. "
            "Use a GGUF file of it with backend=llama_cpp."
        )
    whole, groups = seen.weight_bytes, blocks_of(model)
    if not groups:
        raise MeasurementError(f"{cell.model} has no linear layers that could be quantized. Use quant=none.")
    partial = _folder(cell, facts) / "blocks.json"  # results of an interrupted measurement
    blocks = [from_json(Block, known) for known in reading.read_own_json(partial)] if partial.exists() else []
    for number, (name, modules) in enumerate(groups.items(), 1):
        if number > len(blocks):
            print(f"Sensitivity of {name} ({number}/{len(groups)})", file=sys.stderr)
            blocks.append(_measured_block(name, modules, model, ids, reference, kept, device))
            _write(partial, blocks)
    uniform = {}
    for scheme in QUANTIZED:
        with _as(model, {module: scheme for modules in groups.values() for module in modules}, device):
            uniform[scheme] = _divergences(model, ids, reference)
    return Sensitivity(
        facts.name,
        facts.identity[1],
        device.partition(":")[0],
        kept,
        whole - sum(block.stored[kept] for block in blocks),
        tuple(blocks),
        uniform,
        ", ".join(_sets(cell)) or "seeded ids",
        POSITIONS,
        _versions(),
        round(time.perf_counter() - started, 1),
    )


def _measured_block(
    name: str, modules: Sequence[str], model: Any, ids: torch.Tensor, reference: torch.Tensor, kept: str, device: str
) -> Block:
    stored = {kept: _stored(model, modules)}
    kl: dict[str, tuple[float, ...]] = {}
    for scheme in QUANTIZED:
        with _as(model, dict.fromkeys(modules, scheme), device):
            kl[scheme] = _divergences(model, ids, reference)
            stored[scheme] = _stored(model, modules)
    weights = sum(model.get_submodule(module).weight.numel() for module in modules)
    return Block(name, tuple(modules), weights, stored, kl)


def blocks_of(model: Any) -> dict[str, list[str]]:
    """Map the name of each block to its linear layers: those of a layer's attention, of its MLP, and any single ones.

    The name is the path up to the part below the layer's number, as in `model.layers.0.mlp`. Linear layers that a layer
    holds directly (OPT's MLP) form a block with the layer's own name. The output head belongs to no block.
    """
    import torch

    head = model.get_output_embeddings()
    groups: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if (type(module) is not torch.nn.Linear and not recipe.is_conv1d(module)) or module is head:
            continue
        found = re.match(r"(.*?\.\d+)(?:\.([^.]+)\..+|\.[^.]+)$", name)
        block = name if found is None else found[1] if found[2] is None else f"{found[1]}.{found[2]}"
        groups.setdefault(block, []).append(name)
    return groups


def _stored(model: Any, modules: Sequence[str]) -> int:
    return sum(inspection.layer_bytes(model.get_submodule(module)) for module in modules)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits at the last `POSITIONS` of each passage: (passages, positions, vocabulary)."""
    import torch

    keep = {"logits_to_keep": POSITIONS} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    parts: Sequence[torch.Tensor] = torch.split(ids, ROWS)
    found = [
        model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False, **keep).logits[:, -POSITIONS:]
        for rows in parts
    ]
    return torch.cat(found)


def _divergences(model: Any, ids: torch.Tensor, reference: torch.Tensor) -> tuple[float, ...]:
    """Return the mean KL divergence of each passage from the reference, in nats.

    Raises MeasurementError if one is not finite.
    """
    own = _logits(model, ids)
    means = [fmean(scoring.divergence(its, mine)[0]) for its, mine in zip(reference, own, strict=True)]
    if not all(map(math.isfinite, means)):
        raise MeasurementError(
            "A quantized block gives logits that are not finite, so its cost cannot be measured. Use quant=none."
        )
    return tuple(float(f"{mean:.6g}") for mean in means)


def _sets(cell: Cell) -> list[str]:
    """Return the workloads to calibrate with: not the measured one, whose texts the quality is judged on.

    None for random weights, which have no tokenizer.
    """
    return [] if cell.weights == "random" else [name for name in passages.BUNDLED if name != cell.workload]


def _texts(name: str, cell: Cell) -> list[str]:
    """Return the texts of a bundled workload without those that are measured."""
    own = set(load_prompts(cell.workload).texts)
    return [text for text in load_prompts(name).texts if text not in own]


def _passages(cell: Cell, vocab_size: int, tokenizer: Any) -> list[list[int]]:
    """Return `PASSAGES` passages of `PASSAGE_TOKENS` ids: cut at even distances from the joined texts of each workload.

    Without texts, they are seeded random ids.
    """
    sets = [_texts(name, cell) for name in _sets(cell)]
    if tokenizer is None or not sets:
        return passages.draw(f"mixed/{cell.seed}", vocab_size, PASSAGES, PASSAGE_TOKENS)
    return passages.cut(sets, tokenizer, PASSAGES, PASSAGE_TOKENS)


# Applying a plan


def _load(cell: Cell, source: str, kept: str) -> Any:
    import torch

    attention = {} if cell.attention == "auto" else {"attn_implementation": cell.attention}
    with complete(cell.model):
        model, _ = recipe.load_complete(
            source,
            local_files_only=True,
            trust_remote_code=cell.trust_remote_code,
            dtype=getattr(torch, FLOAT_DTYPES[kept]),
            **attention,
        )
    return model.eval()


@contextlib.contextmanager
def _as(model: Any, schemes: Mapping[str, str], device: str) -> Iterator[None]:
    """Quantize these linear layers (name → scheme) of the model, and restore them afterwards."""
    before = {name: model.get_submodule(name) for name, scheme in schemes.items() if scheme in QUANTIZED}
    try:
        realise(model, schemes, device)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def realise(model: Any, schemes: Mapping[str, str], device: str) -> None:
    """Replace linear layers (name → scheme) by quantized ones on the device.

    Raises NotRealised if the model has no such layer.
    """
    layers = {scheme: [name for name, given in schemes.items() if given == scheme] for scheme in QUANTIZED}
    known = dict(model.named_modules())
    for name in (name for names in layers.values() for name in names):
        if name not in known:
            raise NotRealised(
                f"The plan names the layer {name}, which this model does not have. "
                "Make a plan for it with quant_budget."
            )
    recipe.replace_layers(model, layers, THRESHOLD, device)


def facts(plan: QuantPlan) -> dict[str, str | int | float]:
    """Return the facts of a plan that a run logs, as dotted params."""
    found = plan.sensitivity
    said: dict[str, str | int | float] = {
        "quant.method": "mixed",
        "quant.plan": hash16(dict(plan.schemes)),
        "quant.blocks": ", ".join(f"{scheme} × {count}" for scheme, count in plan.counts.items()),
        "quant.planned_bits": round(plan.bits, 3),
        "quant.predicted_kl": float(f"{plan.predicted_kl:.4g}"),
        "quant.compute_dtype": FLOAT_DTYPES[found.kept],
        "quant.threshold": THRESHOLD,
        "quant.type": "nf4",
        "quant.calibration": found.calibration,
        "quant.calibration_samples": len(next(iter(found.uniform.values()))),
    }
    return said | ({"quant.plan_kl": float(f"{fmean(plan.measured_kl):.4g}")} if plan.measured_kl else {})
