"""The cost of quantizing each block of a model, and the plan based on it: a table in Markdown and a chart by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..records.mixed_plan import QUANTIZED, Block, QuantPlan
from ..records.quantizations import COLOURS
from ..stats import t_interval
from .charts.style import GREY, INK, WIDTH, chart_style, new_figure, plain_numbers, put_legend, save_figure
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


def draw_plan(plan: QuantPlan, folder: Path) -> list[Path]:
    """Write `sensitivity.svg` and `.png`: the cost of each block by layer, one panel per kind of block.

    Rings mark the choice of the plan. Blocks that keep their dtype have a square at the foot of the panel. Returns the
    files. Creates `folder`.
    """
    kinds: dict[str, list[tuple[int, Block]]] = {}
    for number, block in enumerate(plan.sensitivity.blocks):
        kind, layer = place(block.name, number)
        kinds.setdefault(kind, []).append((layer, block))
    measured = f", measured {fmean(plan.measured_kl):.3g}" if plan.measured_kl else ""
    with chart_style():
        title = f"Sensitivity to quantization: {plan.sensitivity.model}"
        told = (
            f"{plan.bits:.2f} bits per weight: sum of costs {plan.predicted_kl:.3g} nats{measured}. "
            "Bars are 95 % intervals over passages"
        )
        figure, panels = new_figure(title, told, (WIDTH, 1.2 + 2.6 * len(kinds)), (len(kinds), 1))
        for axes, (kind, blocks) in zip(panels, kinds.items(), strict=True):
            _draw_panel(axes, plan, blocks)
            axes.set_title(kind)
        panels[-1].set_xlabel("layer")
        put_legend(figure, _legend(plan))
        return save_figure(figure, folder, "sensitivity")


def place(name: str, number: int) -> tuple[str, int]:
    """Return the kind and the layer of a block, from its name.

    The kind is `layer` if the name ends with the layer's number. If the name has no layer, the kind is the name itself
    and the layer is `number`.
    """
    found = re.match(r".*?\.(\d+)(?:\.(.+))?$", name)
    return (found[2] or "layer", int(found[1])) if found else (name, number)


def _draw_panel(axes: Any, plan: QuantPlan, blocks: Sequence[tuple[int, Block]]) -> None:
    axes.set_yscale("log", nonpositive="mask")
    axes.set_ylabel("KL divergence, nats")
    for scheme in QUANTIZED:
        points = [(layer, block.cost(scheme), block) for layer, block in blocks if block.cost(scheme) > 0]
        ends = [t_interval(block.kl[scheme]) or (cost, cost) for _, cost, block in points]
        layers, costs = [layer for layer, _, _ in points], [cost for _, cost, _ in points]
        # An interval that reaches 0 has no lower end on a logarithmic scale.
        reach: Any = [
            [min(cost - low, 0.99 * cost) for cost, (low, _) in zip(costs, ends, strict=True)],
            [e[1] - c for c, e in zip(costs, ends, strict=True)],
        ]
        axes.errorbar(
            layers,
            costs,
            yerr=reach,
            color=COLOURS[scheme],
            marker="o",
            markersize=4,
            linewidth=1,
            elinewidth=0.8,
            capsize=0,
            zorder=2,
        )
        chosen = [(layer, cost) for layer, cost, block in points if plan.schemes[block.name] == scheme]
        axes.plot(
            [x for x, _ in chosen], [y for _, y in chosen], "o", markersize=10, mfc="none", mec=INK, mew=1.1, zorder=3
        )
    kept = plan.sensitivity.kept
    layers = [layer for layer, block in blocks if plan.schemes[block.name] == kept]
    if layers:  # the layout cannot place an empty line in these coordinates
        axes.plot(
            layers,
            [0.03] * len(layers),
            "s",
            color=COLOURS[kept],
            markersize=6,
            transform=axes.get_xaxis_transform(),
            zorder=3,
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    plain_numbers(axes)


def _legend(plan: QuantPlan) -> list[Any]:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=COLOURS[scheme], marker="o", markersize=4, label=f"this block alone in {scheme}")
        for scheme in QUANTIZED
    ]
    ring = Line2D([], [], linestyle="none", marker="o", color=GREY, markersize=10, mfc="none", mec=INK, label="chosen")
    kept = plan.sensitivity.kept
    return [*lines, ring, Line2D([], [], linestyle="none", marker="s", color=COLOURS[kept], label=f"kept in {kept}")]
