"""Write checkpoints with random weights: a preset's real architecture, cached in a folder and loaded like a real one.

Speed and memory depend on shapes and dtypes, hardly on values, so a model can be measured with no download and no
licence. Weights are drawn from N(0, 0.02²), the usual initialisation, so that logits stay finite at any depth.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config.models import Preset
from ...records.errors import ModelError
from ...system import machine

if TYPE_CHECKING:
    import torch


FORMAT = 1
"""Version of the written format. It is part of the folder's name, so a new version makes new folders."""

BLOCK = 1 << 24
"""Size of the block of normal deviates that tensors are cut from. Drawing 10⁹ single numbers would take minutes."""

SHARD_BYTES = 4_000_000_000
STANDARD_DEVIATION = 0.02


def checkpoint_folder(preset: Preset, seed: int) -> Path:
    """Return the folder of a preset's synthetic checkpoint. It exists only once it is complete."""
    return machine.cache_folder() / "checkpoints" / f"{preset.name}-seed{seed}-v{FORMAT}"


def is_written(preset: Preset, seed: int) -> bool:
    """Return True if the checkpoint is written. Its folder is renamed to its final name once it is complete."""
    return (checkpoint_folder(preset, seed) / "config.json").exists()


def write_checkpoint(preset: Preset, seed: int) -> Path:
    """Write the checkpoint unless it exists, and return its folder.

    It has safetensors shards of the published dtype, made tensor by tensor from a seeded block. Raises ModelError if
    the disk is too full.
    """
    import torch

    folder = checkpoint_folder(preset, seed)
    if is_written(preset, seed):
        return folder
    dtype: torch.dtype = getattr(torch, preset.dtype)
    needed = preset.parameters * dtype.itemsize
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < needed * 1.05 + 1e8:
        raise ModelError(
            f"The random weights of {preset.name} need {needed / 1e9:.1f} GB in {folder.parent}, but only "
            f"{free / 1e9:.1f} GB are free. Free some space, or set LLMBENCH_CACHE to a folder on a larger disk."
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_shards(temporary, preset, seed, dtype)
        try:
            temporary.rename(folder)
        except OSError:
            if not is_written(preset, seed):  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_shards(folder: Path, preset: Preset, seed: int, dtype: torch.dtype) -> None:
    import torch
    from safetensors.torch import save_file

    model = skeleton(preset, dtype)
    model.config.save_pretrained(folder)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).mul_(STANDARD_DEVIATION).to(dtype)
    shards: list[list[str]] = [[]]
    shapes = {name: tuple(tensor.shape) for name, tensor in _stored(model)}
    held = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if held and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(torch.Size(s).numel() for s in shapes.values()) * dtype.itemsize},
        "weight_map": {},
    }
    position = 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = _tensor(name, shapes[name], block, position, preset.family)
            position += tensors[name].numel()
            index["weight_map"][name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def skeleton(preset: Preset, dtype: torch.dtype) -> Any:
    """Return the preset's model on the meta device: every shape, no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**dict(preset.config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    return model


def architecture(preset: Preset) -> str:
    """Return the name of a preset's class in transformers."""
    import torch

    return type(skeleton(preset, getattr(torch, preset.dtype))).__name__


def _stored(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and persistent buffers of a state dict, each tied tensor once, under its first name."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield name, tensor


def _tensor(name: str, shape: tuple[int, ...], block: torch.Tensor, position: int, family: str) -> torch.Tensor:
    """Return the values of one tensor: norm scales 1 (Gemma stores scale − 1), biases 0, others cut from the block."""
    import torch

    parts = name.lower().split(".")
    if parts[-1] == "bias":
        return torch.zeros(shape, dtype=block.dtype)
    if parts[-1] == "weight" and len(shape) == 1:
        return torch.full(shape, 0.0 if family.startswith("gemma") else 1.0, dtype=block.dtype)
    count = torch.Size(shape).numel()
    start = position % BLOCK
    flat = torch.empty(count, dtype=block.dtype)
    done = 0
    while done < count:
        take = min(BLOCK - start, count - done)
        flat[done : done + take] = block[start : start + take]
        done, start = done + take, 0
    return flat.reshape(shape)
