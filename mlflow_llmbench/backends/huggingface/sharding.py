"""Shard a model over ranks with transformers' tensor parallelism: what can be sharded, and how ranks meet.

Each rank holds a part of every layer, and they add up or gather their results in collectives: NCCL between GPUs, gloo
between processes on a CPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ...config.model_shape import Shape
from ...records.cell import Cell
from ...records.errors import MissingError, NotRealised, foreign_errors
from ...records.quantizations import FLOAT_DTYPES
from ...records.results import LoadInfo, ModelFacts, RankLoad
from ...system import gpu, machine, memory
from ..checkpoints import architectures, sources
from . import recipe
from .inspection import Inspection

SHARDED = ("none", *FLOAT_DTYPES)
"""Quantizations whose layers transformers shards as it shards unquantized ones."""

NOT_REALISED = ("doge", "hrm_text", "inkling_text")
"""Model types whose plan in transformers 5.23 fails in the first call, or gives other logits (hrm_text)."""

MOST_HELD = 0.9
"""Largest share of a model that a rank may hold: hardly any layer is sharded if it is more."""

PATIENCE = timedelta(hours=2)
"""Time that a rank waits for another in a collective. One that has ended is noticed at once."""


@dataclass(frozen=True)
class Part:
    """Sizes in bytes of the part of a model that one rank holds. `mapped`: file, begin and end of its file mappings."""

    weight_bytes: int
    step_bytes: int
    load_s: float
    mapped: Sequence[tuple[str, int, int]] = ()

    @classmethod
    def of(cls, info: LoadInfo, found: Inspection) -> Part:
        """Return the part that this process has loaded."""
        return cls(found.weight_bytes, info.step_bytes or 0, info.load_s or 0.0, found.mapped)


def require(cell: Cell) -> None:
    """Raise MissingError if the installed transformers cannot shard a model by a number of ranks."""
    if cell.tensor_parallel == 1:
        return
    found = importlib.util.find_spec("transformers")
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder, "distributed", "configuration_utils.py")
        if file.is_file() and "tp_size:" in file.read_text(encoding="utf-8"):
            return
    raise MissingError(
        f"tensor_parallel={cell.tensor_parallel} needs a later transformers, whose DistributedConfig has tp_size. "
        "Run: pip install -U transformers"
    )


def refusal(cell: Cell, model: ModelFacts) -> str | None:
    """Say why a model cannot be measured in as many ranks as asked for, and what to do; None if it can."""
    ranks = cell.tensor_parallel
    if ranks == 1:
        return None
    asked = f"tensor_parallel={ranks}"
    if cell.device.startswith(("xpu", "mps")):
        return f"{asked} runs on NVIDIA GPUs or a CPU, not on device={cell.device}. Use device=cpu."
    if cell.decode != "generate" or cell.kv_cache is not None:
        other = f"decode={cell.decode}" if cell.decode != "generate" else f"kv_cache={cell.kv_cache}"
        return f"{asked} works with decode=generate and kv_cache=auto only, and {other} is asked for. Use one of them."
    config = model.config or {}
    method = (config.get("quantization_config") or {}).get("quant_method")
    if cell.quant not in SHARDED or method or model.source in sources.GGUF_SOURCES:
        what = method or ("a GGUF file" if model.source in sources.GGUF_SOURCES else f"quant={cell.quant}")
        return f"{asked} cannot shard {what}. Use an unquantized checkpoint with quant={','.join(SHARDED)}."
    text = config.get("text_config") or config
    if architectures.has_tensor_plan(text) is False:
        return (
            f"{asked} is not possible with {cell.model}: transformers has no plan to shard the architecture "
            f"{text.get('model_type')}. Use tensor_parallel=1, or another model such as a Llama or Qwen."
        )
    if text.get("model_type") in NOT_REALISED:
        return (
            f"{asked} is not possible with {cell.model}: transformers' plan to shard the architecture "
            f"{text['model_type']} fails, or changes what the model computes. Use tensor_parallel=1."
        )
    return _uneven(cell, config) or _too_few(cell)


def _uneven(cell: Cell, config: Any) -> str | None:
    shape, ranks = Shape.from_config(config), cell.tensor_parallel
    if shape is None:
        return None
    heads = {"attention": shape.attention_heads, "key and value": shape.kv_heads}
    fitting = [str(n) for n in range(1, ranks) if not any(count % n for count in heads.values())]
    for what, count in heads.items():
        if count % ranks:
            return (
                f"tensor_parallel={ranks} does not divide the {count} {what} heads of {cell.model}. "
                f"Use tensor_parallel={','.join(fitting)}."
            )
    return None


def _too_few(cell: Cell) -> str | None:
    """Say that a machine has too few GPUs, or a cell too few threads, for its ranks."""
    ranks, device = cell.tensor_parallel, machine.require_device(cell.device)
    if device == "cpu":
        if cell.threads is None or cell.threads % ranks == 0:
            return None
        return f"threads={cell.threads} cannot be divided over tensor_parallel={ranks}. Give threads={ranks}."
    if ":" in device:
        return (
            f"tensor_parallel={ranks} takes the first {ranks} GPUs, and device={device} is one of them. "
            "Give device=cuda, and choose GPUs by CUDA_VISIBLE_DEVICES."
        )
    found = len(gpu.gpus())
    if found < ranks:
        return (
            f"tensor_parallel={ranks} needs {ranks} GPUs, and this machine has {found}. Use device=cpu, or fewer ranks."
        )
    return None


def threads_of(cell: Cell) -> int:
    """Return the number of CPU threads of each rank: its share of those of the cell, at least one."""
    return max(1, (cell.threads or machine.physical_cores()) // cell.tensor_parallel)


def device_of(device: str, cell: Cell, rank: int) -> str:
    """Return the device of a rank: the CPU, or the GPU of its number."""
    return device if cell.tensor_parallel == 1 or device == "cpu" else f"cuda:{rank}"


def join(cell: Cell, device: str, rank: int, store: str) -> None:
    """Make this process a rank: divide its threads, and wait until all ranks have found each other in `store`, a file.

    transformers takes the process group that is there. On a CPU the group uses the loopback interface only.
    """
    import torch
    import torch.distributed as dist

    on_gpu = device.startswith("cuda")
    torch.set_num_threads(threads_of(cell))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(cell.tensor_parallel))
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers would use the GPUs
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with foreign_errors("joining the other ranks"):
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.FileStore(store, cell.tensor_parallel),  # type: ignore[attr-defined]
            rank=rank,
            world_size=cell.tensor_parallel,
            timeout=PATIENCE,
            device_id=torch.device(device) if on_gpu else None,
        )
        meet()


def leave() -> None:
    """Make this process no rank any more, where the other ranks need not take part: with gloo."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def connects_later() -> bool:
    """Return True if ranks may still have to find each other in the store: with NCCL."""
    import torch.distributed as dist

    return dist.get_backend() != "gloo"


def meet() -> None:
    """Wait until every rank is here."""
    import torch
    import torch.distributed as dist

    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def collective_share(run: Callable[[], None]) -> float | None:
    """Run something; return the share of its time that gloo's collectives took in this rank. None with NCCL.

    They are timed by torch's profiler, which makes the rest a little longer.
    """
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    if dist.get_backend() != "gloo":
        return None
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    inside = sum(event.cpu_time_total for event in seen.key_averages() if event.key.startswith("gloo:"))
    return min(float(inside) / 1e6 / seconds, 1.0)


def load_keywords(cell: Cell) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that shard a model; none for one rank."""
    if cell.tensor_parallel == 1:
        return {}
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=cell.tensor_parallel)}


def verify(cell: Cell, model: Any) -> None:
    """Raise NotRealised if this rank holds nearly the whole model, because its plan names hardly any of its layers."""
    sizes = [(recipe.local(one).nbytes, one.numel() * one.element_size()) for one in model.parameters()]
    held, total = (sum(column) for column in zip(*sizes, strict=True))
    if cell.tensor_parallel > 1 and held > MOST_HELD * total:
        raise NotRealised(
            f"tensor_parallel={cell.tensor_parallel} was asked for, but each rank holds {held / total:.0%} of the "
            f"model: transformers' plan for {type(model).__name__} shards hardly any layer. Use tensor_parallel=1."
        )


def whole(info: LoadInfo, parts: Sequence[Part]) -> LoadInfo:
    """Return the facts of the whole model from those of the first rank, and the parts of all ranks in their order.

    A page of the checkpoint that several ranks map counts once. GPUs are one device each, processes of a CPU together
    one.
    """
    on_gpu = str(info.facts["model.device"]).startswith("cuda")
    facts = {**info.facts, "model.ranks": len(parts), "model.collectives": "nccl" if on_gpu else "gloo"}
    return dataclasses.replace(
        info,
        load_s=max(part.load_s for part in parts),
        weight_bytes=sum(part.weight_bytes for part in parts),
        step_bytes=None if info.step_bytes is None else sum(part.step_bytes for part in parts),
        mapped_weight_bytes=memory.union_bytes(span for part in parts for span in part.mapped),
        facts=facts,
        devices=len(parts) if on_gpu else None,
        ranks=tuple(RankLoad(part.weight_bytes, memory.union_bytes(part.mapped)) for part in parts),
    )


def parts_of(own: Part, answers: Iterable[Any]) -> list[Part]:
    """Return the parts of all ranks: our own, and those that the others answered."""
    others = (
        Part(one["weight_bytes"], one["step_bytes"], one["load_s"], [*map(tuple, one["mapped"])]) for one in answers
    )
    return [own, *others]
