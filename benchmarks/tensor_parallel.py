"""Run every architecture for which transformers has a tensor-parallel plan in one rank and in two, on this CPU.

The models are tiny, with random weights in fp32. Told are whether two ranks give the tokens and logits of one, and the
share of the model that a rank holds.

    python benchmarks/tensor_parallel.py [--out FILE] [--types llama,mixtral,…]

Exits 1 if an architecture that the program does not refuse gives other results, or fails in two ranks only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mlflow_llmbench.backends.checkpoints.architectures import has_tensor_plan
from mlflow_llmbench.backends.huggingface import recipe, sharding
from mlflow_llmbench.records.cell import Cell
from tests.architectures import causal_types, write_tiny

TWO = Cell(model="tiny", quant="fp32", tensor_parallel=2)
CLOSE = 1e-3
"""Largest difference of logits, as a share of the largest logit, that is rounding."""

Outcome = dict[str, Any]


def computed(folder: Path, cell: Cell) -> Outcome:
    """Load a checkpoint as one rank of a cell; return tokens, logits (rows, words) and the share that is held here."""
    from transformers import GenerationConfig

    ids = torch.randint(1, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True)
    try:
        keywords = {"local_files_only": True, "use_safetensors": True, **sharding.load_keywords(cell)}
        model, _ = recipe.load(str(folder), {}, device="cpu", dtype="float32", **keywords)
        model.generation_config = GenerationConfig()
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        sizes = [(recipe.local(one).numel(), one.numel()) for one in model.parameters()]
        held, total = (sum(column) for column in zip(*sizes, strict=True))
        return {"tokens": tokens.tolist(), "logits": logits.float(), "held": round(held / total, 3)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
    finally:
        gc.collect()


def told(kind: str, one: Outcome, two: Outcome) -> Outcome:
    """Compare the results of one rank and of two."""
    if "failed" in one or "failed" in two:
        which = "one" if "failed" in one else "two"
        return {"type": kind, "result": f"fails in {which}", "message": (one if which == "one" else two)["failed"]}
    difference = float((one["logits"] - two["logits"]).abs().max() / one["logits"].abs().max())
    same = difference < CLOSE and one["tokens"] == two["tokens"]
    return {
        "type": kind,
        "result": "same" if same else "other",
        "difference": float(f"{difference:.2g}"),
        "held": two["held"],
    }


def as_rank(rank: int, folder: Path, kinds: list[str]) -> list[Outcome]:
    """Compute every architecture as one of two ranks."""
    sharding.join(TWO, "cpu", rank, str(folder / "store"))
    found = []
    for kind in kinds:
        found.append(computed(folder / kind, TWO))
        sharding.meet()
    return found


def main() -> int:
    """Run all architectures, print a line for each, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--types")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sharding.PATIENCE = timedelta(seconds=120)
    if given.rank_of:
        as_rank(1, given.rank_of, given.types.split(","))
        return 0
    asked = given.types.split(",") if given.types else causal_types()
    kinds, lines = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for kind in asked:
            if has_tensor_plan({"model_type": kind}):
                with contextlib.suppress(Exception):  # its tiny configuration makes no model
                    write_tiny(kind, folder / kind)
                    kinds.append(kind)
        alone = [computed(folder / kind, Cell(model="tiny", quant="fp32")) for kind in kinds]
        command = [sys.executable, __file__, "--rank-of", str(folder), "--types", ",".join(kinds)]
        with subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL) as other:
            together = as_rank(0, folder, kinds)
            other.wait()
    for kind, one, two in zip(kinds, alone, together, strict=True):
        lines.append(told(kind, one, two))
        print(json.dumps(lines[-1]), flush=True)
    counts = Counter(line["result"] for line in lines)
    print(", ".join(f"{result}: {count}" for result, count in counts.most_common()))
    if given.out:
        import transformers

        facts = {"transformers": transformers.__version__, "torch": torch.__version__, "counts": counts}
        given.out.write_text(json.dumps({**facts, "architectures": lines}, indent=1) + "\n")
    wrong = [line for line in lines if line["result"] in ("other", "fails in two")]
    return int(any(line["type"] not in sharding.NOT_REALISED for line in wrong))


if __name__ == "__main__":
    sys.exit(main())
