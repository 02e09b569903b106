"""Affine quantization as the EffiLLM paper defines it, to check size and error of the libraries' quantizations."""

from __future__ import annotations

import torch


def quantize(x: torch.Tensor, bits: int, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the codes Q(x) = round((x − min) / (max − min) · (2^b − 1)), and minimum and step of each group.

    The step is (max − min) / (2^b − 1). `group`: number of consecutive values that share a range; None: all values (per
    tensor); the length of a row: per channel.
    """
    rows = x.double().reshape(-1, group or x.numel())
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = (high - low).clamp(min=1e-300) / (2**bits - 1)
    return ((rows - low) / step).round(), low, step


def dequantize(codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return min + code · step in the shape of the original, with an error of at most half a step."""
    return (low + codes * step).reshape(shape)


def bits_per_weight(bits: int, group: int, scale_bits: int) -> float:
    """Return the stored bits per weight if step and minimum of each group take `scale_bits` together."""
    return bits + scale_bits / group
