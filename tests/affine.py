"""Affine quantization as the EffiLLM paper writes it, for checking what quantizations of the libraries hold and lose. Not a product."""

from __future__ import annotations

import torch


def quantize(x: torch.Tensor, bits: int, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q(x) = round((x − min) / (max − min) · (2^b − 1)): codes, and min and step (max − min) / (2^b − 1) of each group.

    `group`: values in a row that share a range; None: all values (per tensor); the length of a row: per channel.
    """
    rows = x.double().reshape(-1, group or x.numel())
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    step = (high - low).clamp(min=1e-300) / (2**bits - 1)
    return ((rows - low) / step).round(), low, step


def dequantize(codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """min + code · step, in the shape of the original; off by at most half a step."""
    return (low + codes * step).reshape(shape)


def bits_per_weight(bits: int, group: int, scale_bits: int) -> float:
    """Stored bits of a weight where each group has a step and a minimum of `scale_bits` together."""
    return bits + scale_bits / group
