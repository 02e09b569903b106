"""A plan of mixed quantization: what each block costs in each scheme, as it was measured, and the scheme that each block gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

QUANTIZED = ("int8", "int4")
"""Schemes of a block beside the dtype that is kept: LLM.int8 and NF4 of bitsandbytes."""

NOMINAL_BITS = {"fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
"""Bits of a weight by scheme, without scales."""


@dataclass(frozen=True)
class Block:
    """Linear layers that get one scheme: the attention of a layer, or its MLP.

    `modules`: names of the layers · `weights`: how many weights they have · `stored`: scheme → bytes that they are held in, metadata
    included, as it is after the first forward pass · `kl`: scheme → KL divergence from the unquantized model in nats, one mean per
    passage, where this block alone has the scheme.
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    stored: Mapping[str, int]
    kl: Mapping[str, tuple[float, ...]]

    def cost(self, scheme: str) -> float:
        """Mean KL divergence in nats; 0 in the dtype that is kept, where nothing changes."""
        return fmean(self.kl[scheme]) if scheme in self.kl else 0.0


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing each block of a model costs, whatever the budget.

    `kept`: the dtype of blocks that are not quantized (`bf16`, `fp16`) · `fixed_bytes`: bytes of everything outside the blocks ·
    `calibration`: what the passages are, `positions`: how many positions of each were compared · `uniform`: scheme → KL divergence per
    passage where every block has it · `seconds`: what measuring took.
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
        """What uniform quantization would cost if the costs of blocks added up, nats."""
        return sum(block.cost(scheme) for block in self.blocks)


@dataclass(frozen=True)
class QuantPlan:
    """A budget and the scheme of each block under it (block name → scheme).

    `measured_kl`: KL divergence per passage of the whole plan, on the passages that the blocks were measured with; empty where it was not measured.
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
            sum(NOMINAL_BITS[self.schemes[block.name]] * block.weights for block in self.sensitivity.blocks)
            / self.sensitivity.weights
        )

    @property
    def predicted_kl(self) -> float:
        """Sum of what the blocks cost alone, nats. That costs add up is an assumption; `measured_kl` tells how far it holds."""
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
