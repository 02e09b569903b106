"""Load and run every architecture that transformers has for causal language models, and say what holds.

    .venv/bin/python benchmarks/architectures.py [--only gpt2,mamba] [--write]

Each is built tiny from its configuration class (tests/architectures.py), saved, and loaded with transformers with each
quantization of `QUANTS`: it must hold what was asked for, generate, and give finite logits. The layers that the backend
calls linear are compared with the matrices that a forward pass multiplies by, which PyTorch's dispatcher tells.
`--write` writes docs/reference/architectures.md. It takes about fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from mlflow_llmbench.backends.base import backend_class  # noqa: E402
from mlflow_llmbench.backends.huggingface import recipe  # noqa: E402
from mlflow_llmbench.backends.huggingface.inspection import _experts  # noqa: E402
from mlflow_llmbench.records.cell import Cell  # noqa: E402
from mlflow_llmbench.records.errors import LlmbenchError  # noqa: E402
from tests.architectures import causal_types, write_tiny  # noqa: E402

QUANTS = ("none", "bf16", "int8", "int4")
PAGE = ROOT / "docs" / "reference" / "architectures.md"
LIMIT_S = 180
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]]


@dataclass
class Outcome:
    """One architecture with one quantization. `said`: the error, or the bits and classes of the linear layers."""

    holds: bool
    said: str


def measured(folder: Path, quant: str, multiplied: dict[str, int] | None = None) -> Outcome:
    """Load a checkpoint, generate with it, and look at its logits; `multiplied` takes what no layer accounts for."""
    import torch

    cell = Cell(model=str(folder), quant=quant, device="cpu")
    kind: Any = backend_class("transformers")
    try:
        backend = kind(cell, kind.resolve(cell))
    except LlmbenchError as error:
        return Outcome(False, f"refused before it is loaded: {error}")
    try:
        info = backend.load()
        steps: list[Any] = []
        backend.generate(PROMPTS, 4, steps.append)
        if len(steps) != 4:
            return Outcome(False, f"generates {len(steps)} tokens for 4")
        if not bool(torch.isfinite(backend.logits(PROMPTS[0], 2)).all()):
            return Outcome(False, "logits that are not finite")
        if multiplied is not None:
            multiplied.update(unaccounted(backend.model))
        bits = info.facts.get("quant.bits_per_weight", "no linear layers")
        return Outcome(True, f"{bits} ({info.facts['quant.kernel']})")
    except LlmbenchError as error:
        return Outcome(False, str(error))
    finally:
        backend.close()


def unaccounted(model: Any) -> dict[str, int]:
    """Return the parameters that a forward pass multiplies by, and that are in no linear layer, expert, head or table.

    The dispatcher shows every matrix product with its operands, whatever class computes it.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    of_storage = {p.untyped_storage().data_ptr(): (name, p) for name, p in model.named_parameters() if p.ndim > 1}
    found: dict[str, int] = {}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(word in str(func) for word in ("mm", "linear", "matmul", "einsum", "mv")):
                flat = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]
                for one in flat:
                    if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() in of_storage:
                        name, parameter = of_storage[one.untyped_storage().data_ptr()]
                        found[name] = parameter.numel()
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        model(torch.tensor(PROMPTS))
    known = {id(parameter) for layer in recipe.linear_layers(model).values() for parameter in layer.parameters()}
    known |= {id(tensor) for tensor in _experts(model)}
    head = model.get_output_embeddings()
    known |= {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    return {name: count for name, count in found.items() if id(dict(model.named_parameters())[name]) not in known}


def _late(*_: Any) -> None:
    raise TimeoutError(f"not done after {LIMIT_S} s")


def one(model_type: str, folder: Path) -> tuple[dict[str, Outcome], dict[str, int]]:
    """Measure one architecture with each quantization."""
    signal.signal(signal.SIGALRM, _late)
    signal.alarm(LIMIT_S)
    left: dict[str, int] = {}
    try:
        write_tiny(model_type, folder)
    except Exception as error:
        signal.alarm(0)
        return {"": Outcome(False, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")}, left
    found = {}
    for quant in QUANTS:
        try:
            found[quant] = measured(folder, quant, left if quant == "none" else None)
        except Exception as error:
            found[quant] = Outcome(False, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    signal.alarm(0)
    return found, left


def page(found: dict[str, dict[str, Outcome]]) -> str:
    """Return the Markdown page: bits per weight where it holds, else the number of the reason."""
    reasons: dict[str, int] = {}

    def cell(outcome: Outcome | None) -> str:
        if outcome is None:
            return ""
        if outcome.holds:
            return outcome.said.partition(" (")[0]
        said = re.sub(r"^refused before it is loaded: \S+ ", "", outcome.said)
        said = re.sub(r"quant=int\d was asked for, but ", "", said)
        said = re.sub(r": [\d,]+ of its [\d,]+ weights stay.*", ", and stay as they are.", said)
        return f"[{reasons.setdefault(said, len(reasons) + 1)}]"

    rows = []
    for name, of in sorted(found.items()):
        whole = of.get("")
        cells = [cell(of.get(quant, whole)) for quant in QUANTS]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    heads = " | ".join(f"`{quant}`" for quant in QUANTS)
    why = [f"{number}. {text}" for text, number in reasons.items()]
    return "\n".join(
        [
            "# Architectures",
            "",
            f"{len(found)} of the {len(causal_types())} causal language models of transformers, each built tiny from",
            "its configuration class with random weights (encoders with `is_decoder`), loaded and run on a CPU by",
            "`benchmarks/architectures.py --write`, with transformers",
            f"{importlib.metadata.version('transformers')}. A number is the bits per weight of the linear layers: it",
            "loads as asked, generates, and its logits are finite. Numbers in brackets are",
            "reasons why not, below. Some reasons are those of the tiny sizes, not of published models.",
            "",
            f"| architecture | {heads} |",
            f"|{'---|' * (len(QUANTS) + 1)}",
            *rows,
            "",
            "## Reasons",
            *why,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    found: dict[str, dict[str, Outcome]] = {}
    started = time.perf_counter()
    for model_type in asked.only.split(",") if asked.only else causal_types():
        with tempfile.TemporaryDirectory() as scratch:
            found[model_type], left = one(model_type, Path(scratch) / model_type)
        for quant, outcome in found[model_type].items():
            print(f"{model_type:24} {quant:5} {'holds' if outcome.holds else 'FAILS'} {outcome.said}", flush=True)
        if left:
            print(f"{model_type:24} other matrices: {left}", flush=True)
    for quant in QUANTS:
        print(quant, dict(Counter(of[quant].holds for of in found.values() if quant in of)))
    print(f"{time.perf_counter() - started:.0f} s")
    if asked.write:
        PAGE.write_text(page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
