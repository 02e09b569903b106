"""Compare mixed plans with uniform and blind ones: `python benchmarks/mixed.py MODEL [--budgets 5.5,7] [--out FILE] …`.

Plans are made as `quant=mixed` makes them. Their KL divergence from the unquantized model is measured on passages that
they were not made with. For each uniform quantization (`--uniform int4-wo:32,…`: a name and its group size) a plan of
as many bytes is compared with it. For each budget, the plan is compared with blind plans (`--blind 3`) of exactly as
many bytes, which assign the same schemes to the blocks of each kind without regard to their cost. Differences are over
the same passages, with Student's 95 % intervals. MODEL is a folder with real weights. The first run takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.backends.checkpoints import sources
from mlflow_llmbench.backends.huggingface import inspection, mixed
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.mixed_plan import QUANTIZED, Sensitivity
from mlflow_llmbench.stats import t_interval
from mlflow_llmbench.system import machine
from mlflow_llmbench.workloads.prompts import load_prompts, load_text

PASSAGES, TOKENS = 24, 64


def passages(tokenizer: Any) -> list[list[int]]:
    """Rows of the perplexity text and of `qa`, which were not used to make the plans."""
    prefix = list(tokenizer("")["input_ids"])
    length, rows = TOKENS - len(prefix), []
    for text in (load_text("bundled").content, "\n\n".join(load_prompts("qa").texts)):
        ids = list(tokenizer(text)["input_ids"])[len(prefix) :]
        starts = [number * (len(ids) - length) // (PASSAGES - 1) for number in range(PASSAGES)]
        rows += [[*prefix, *ids[start : start + length]] for start in starts]
    return rows


def blind(found: Sensitivity, schemes: Mapping[str, str], seed: int) -> dict[str, str]:
    """The same schemes, reassigned at random among the blocks of each kind, which have the same size."""
    draw, dealt = random.Random(seed), {}
    kinds: dict[str, list[str]] = {}
    for block in found.blocks:
        kinds.setdefault(re.sub(r"\d+", "", block.name), []).append(block.name)
    for names in kinds.values():
        given = [schemes[name] for name in names]
        draw.shuffle(given)
        dealt |= dict(zip(names, given, strict=True))
    return dealt


def mean_with_ends(values: Sequence[float]) -> dict[str, float]:
    """Mean and its 95 % interval."""
    low, high = t_interval(values) or (values[0], values[0])
    return {"mean": round(fmean(values), 6), "low": round(low, 6), "high": round(high, 6)}


def uniform(model: str, scheme: str, group_size: int, modules: Sequence[str]) -> tuple[Any, int]:
    """A model in one quantization throughout, and the bytes of its quantized layers."""
    cell = Cell(model=model, quant=scheme, group_size=group_size, workload="summarization", prompt_tokens=None)
    facts = TransformersBackend.resolve(cell)
    TransformersBackend.prepare(cell, facts)
    backend = TransformersBackend(cell, facts)
    backend.load()
    return backend.model, sum(inspection.layer_bytes(backend.model.get_submodule(module)) for module in modules)


def main() -> int:
    """Print one JSON object; exit code 1 if a plan was not better than each of its blind ones."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--budgets", default="5.5,7")
    parser.add_argument("--uniform", default="int4-wo:32,hqq4:32,gptq:32")
    parser.add_argument("--blind", type=int, default=3, help="blind plans for each budget")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    budgets = given.budgets.split(",")
    cell = Cell(model=given.model, quant="mixed", quant_budget=budgets[0], workload="qa", prompt_tokens=None)
    facts = TransformersBackend.resolve(cell)
    TransformersBackend.prepare(cell, facts)
    found = mixed.plan_of(cell, facts).sensitivity
    modules = [module for block in found.blocks for module in block.modules]
    rows: list[dict[str, Any]] = []

    def keep(name: str, block_bytes: int, values: Sequence[float], **more: Any) -> None:
        bits = round(8 * block_bytes / found.weights, 3)
        rows.append(
            {"plan": name, "bytes": found.fixed_bytes + block_bytes, "bits": bits, "kl": mean_with_ends(values), **more}
        )
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    with torch.inference_mode():
        model = mixed._load(cell, facts.location, found.kept)
        ids = torch.tensor(passages(sources.load_tokenizer(cell, facts)))
        reference = mixed._logits(model, ids)

        def measure(name: str, schemes: Mapping[str, str]) -> tuple[float, ...]:
            with mixed._as(
                model, {module: schemes[block.name] for block in found.blocks for module in block.modules}, "cpu"
            ):
                values = mixed._divergences(model, ids, reference)
            counts = {scheme: list(schemes.values()).count(scheme) for scheme in found.schemes}
            keep(name, sum(block.stored[schemes[block.name]] for block in found.blocks), values, blocks=counts)
            return values

        for scheme in QUANTIZED:
            measure(scheme, dict.fromkeys((block.name for block in found.blocks), scheme))
        for pair in filter(None, given.uniform.split(",")):
            scheme, _, group = pair.partition(":")
            quantized, block_bytes = uniform(given.model, scheme, int(group or 128), modules)
            other = mixed._divergences(quantized, ids, reference)
            keep(f"{scheme}, groups of {group or 128}", block_bytes, other)
            own = measure(f"mixed, bytes of {pair}", mixed.choose(found, f"{found.fixed_bytes + block_bytes}B").schemes)
            rows[-1]["mixed_less_uniform"] = mean_with_ends([a - b for a, b in zip(own, other, strict=True)])
        for budget in budgets:
            schemes = dict(mixed.choose(found, budget).schemes)
            own = measure(f"mixed, {budget}", schemes)
            for seed in range(given.blind):
                other = measure(f"blind {seed}, {budget}", blind(found, schemes, seed))
                rows[-1]["mixed_less_blind"] = mean_with_ends([a - b for a, b in zip(own, other, strict=True)])
    better = all(row["mixed_less_blind"]["high"] < 0 for row in rows if "mixed_less_blind" in row)
    text = json.dumps(
        {
            "model": Path(given.model).name,
            "better_than_blind": better,
            "plans": rows,
            "environment": machine.environment(),
        },
        indent=1,
    )
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return int(not better)


if __name__ == "__main__":
    sys.exit(main())
