"""Plan of a mixed quantization: measured cost of each block in each scheme, and the scheme chosen for each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from .quantizations import SCHEMES

QUANTIZED = ("int8", "int4")
"""Schemes of a block besides the kept dtype: bitsandbytes LLM.int8 and NF4."""


@dataclass(frozen=True)
class Block:
    """Linear layers that share one scheme: the attention or the MLP of one layer.

    `modules`: names of the linear layers · `weights`: number of their weights · `stored`: scheme → bytes, including
    metadata, after the first forward pass · `kl`: scheme → KL divergence from the unquantized model in nats, one mean
    per passage, when only this block has the scheme.
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    stored: Mapping[str, int]
    kl: Mapping[str, tuple[float, ...]]

    def cost(self, scheme: str) -> float:
        """Mean KL divergence in nats; 0 for the kept dtype, which changes nothing."""
        return fmean(self.kl[scheme]) if scheme in self.kl else 0.0


@dataclass(frozen=True)
class Sensitivity:
    """Cost of quantizing each block of a model, independent of a budget.

    `kept`: dtype of blocks that are not quantized (`bf16`, `fp16`) · `fixed_bytes`: bytes of everything outside the
    blocks · `calibration`: description of the passages · `positions`: positions compared per passage ·
    `uniform`: scheme → KL divergence per passage when every block has the scheme · `seconds`: duration of the
    measurement.
    """

    model: str
    revision: str
    device: str
    kept: str
    fixed_bytes: int
    blocks: tuple[Block, ...]
    uniform: Mapping[str, tuple[float, ...]]
    calibration: str
    positions: int
    versions: Mapping[str, str]
    seconds: float

    @property
    def schemes(self) -> tuple[str, ...]:
        """All schemes, from most to fewest bits."""
        return (self.kept, *QUANTIZED)

    @property
    def weights(self) -> int:
        """Weights in all blocks."""
        return sum(block.weights for block in self.blocks)

    def additive_kl(self, scheme: str) -> float:
        """Sum of the blocks' costs in nats: the cost of uniform quantization if costs added up."""
        return sum(block.cost(scheme) for block in self.blocks)


@dataclass(frozen=True)
class QuantPlan:
    """A budget and the scheme that each block gets under it (block name → scheme).

    `measured_kl`: KL divergence per passage of the whole plan, on the passages used for the blocks; empty if it was not
    measured.
    """

    sensitivity: Sensitivity
    budget: str
    schemes: Mapping[str, str]
    measured_kl: tuple[float, ...] = ()
    schema: int = 1

    @property
    def block_bytes(self) -> int:
        """Bytes of all blocks, metadata included."""
        return sum(block.stored[self.schemes[block.name]] for block in self.sensitivity.blocks)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model."""
        return self.sensitivity.fixed_bytes + self.block_bytes

    @property
    def bits(self) -> float:
        """Mean stored bits per weight of the blocks, metadata included."""
        return 8 * self.block_bytes / self.sensitivity.weights

    @property
    def nominal_bits(self) -> float:
        """Mean bits per weight of the blocks, without scales."""
        return (
            sum((SCHEMES[self.schemes[block.name]].bits or 0) * block.weights for block in self.sensitivity.blocks)
            / self.sensitivity.weights
        )

    @property
    def predicted_kl(self) -> float:
        """Sum of the blocks' costs in nats. Additivity is an assumption; `measured_kl` shows how far it holds."""
        return sum(block.cost(self.schemes[block.name]) for block in self.sensitivity.blocks)

    @property
    def modules(self) -> dict[str, str]:
        """Name of each linear layer → its scheme."""
        return {module: self.schemes[block.name] for block in self.sensitivity.blocks for module in block.modules}

    @property
    def counts(self) -> dict[str, int]:
        """Scheme → number of blocks that have it, from most to fewest bits."""
        given = list(self.schemes.values())
        return {scheme: given.count(scheme) for scheme in self.sensitivity.schemes if scheme in given}
