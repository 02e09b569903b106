"""The cost of quantizing each block of a model, and the plan based on it, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from ..records.mixed_plan import QUANTIZED, Block, QuantPlan
from ..stats import t_interval
from .escaping import markdown
from .tables import markdown_table


def plan_markdown(plan: QuantPlan) -> str:
    """Return quant_plan.md: the choice, the predicted and measured divergence (uniform schemes too), and all blocks."""
    found = plan.sensitivity
    given = ", ".join(f"{count} in {scheme}" for scheme, count in plan.counts.items())
    parts = [
        f"# Mixed quantization of {markdown(found.model)}",
        f"Of {len(found.blocks)} blocks, {given}: {plan.bits:.2f} bits per weight, {plan.weight_bytes / 1e6:.1f} MB "
        f"with the parts that are never quantized. The budget was {markdown(plan.budget)}. No other choice of these "
        "schemes within the budget has a smaller sum of the blocks' costs.",
        f"The cost of a block is the KL divergence from the unquantized model ({found.kept}) with only this block "
        f"quantized, at the last {found.positions} positions of {_passages(found.uniform)} passages "
        f"({markdown(found.calibration)}); intervals are over passages. The sum assumes that costs add up. To check "
        "this, the whole plan and uniform quantization were measured on the same passages.",
        markdown_table(
            ["quantization", "bits per weight", "model, MB", "sum of costs, nats", "measured, nats"], _totals(plan)
        ),
        markdown_table(
            ["block", "weights", *(f"{scheme}, nats" for scheme in QUANTIZED), "scheme"],
            [_row(plan, block) for block in found.blocks],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _totals(plan: QuantPlan) -> list[list[str]]:
    found = plan.sensitivity
    rows = [
        [
            "this plan",
            f"{plan.bits:.2f}",
            f"{plan.weight_bytes / 1e6:.1f}",
            f"{plan.predicted_kl:.4g}",
            _mean(plan.measured_kl),
        ]
    ]
    for scheme, measured in found.uniform.items():
        size = sum(block.stored[scheme] for block in found.blocks)
        figures = (
            f"{8 * size / found.weights:.2f}",
            f"{(found.fixed_bytes + size) / 1e6:.1f}",
            f"{found.additive_kl(scheme):.4g}",
        )
        rows.append([f"{scheme} throughout", *figures, _mean(measured)])
    return rows


def _row(plan: QuantPlan, block: Block) -> list[str]:
    return [
        block.name,
        f"{block.weights:,}",
        *(_mean(block.kl[scheme]) for scheme in QUANTIZED),
        plan.schemes[block.name],
    ]


def _mean(values: Sequence[float]) -> str:
    """Format a mean with its 95 % interval; – if nothing was measured."""
    if not values:
        return "–"
    ends = t_interval(values)
    return f"{fmean(values):.3g}" + (f" ({max(ends[0], 0):.2g}–{ends[1]:.2g})" if ends else "")


def _passages(uniform: Mapping[str, Sequence[float]]) -> int:
    return len(next(iter(uniform.values())))
