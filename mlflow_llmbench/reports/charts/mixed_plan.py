"""Chart of a mixed quantization: the cost of quantizing each block, by layer, and the choice of the plan."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ...records.mixed_plan import QUANTIZED, Block, QuantPlan
from ...records.quantizations import COLOURS
from ...records.results import RunResult
from ...stats import t_interval
from .catalogue import Chart, Drawing
from .style import GREY, INK, WIDTH, new_figure, plain_numbers, put_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _sensitivity(result: RunResult) -> Drawing:
    plan = result.load.quant_plan if result.load else None
    return sensitivity_figure(plan) if plan else "the quantization is not mixed"


def sensitivity_figure(plan: QuantPlan) -> Figure:
    """Draw the cost of each block by layer, one panel per kind of block.

    Rings mark the choice of the plan. Blocks that keep their dtype have a square at the foot of the panel.
    """
    kinds: dict[str, list[tuple[int, Block]]] = {}
    for number, block in enumerate(plan.sensitivity.blocks):
        kind, layer = place(block.name, number)
        kinds.setdefault(kind, []).append((layer, block))
    measured = f", measured {fmean(plan.measured_kl):.3g}" if plan.measured_kl else ""
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
    return figure


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
    plain_numbers(axes.yaxis)


def _legend(plan: QuantPlan) -> list[Any]:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=COLOURS[scheme], marker="o", markersize=4, label=f"this block alone in {scheme}")
        for scheme in QUANTIZED
    ]
    ring = Line2D([], [], linestyle="none", marker="o", color=GREY, markersize=10, mfc="none", mec=INK, label="chosen")
    kept = plan.sensitivity.kept
    return [*lines, ring, Line2D([], [], linestyle="none", marker="s", color=COLOURS[kept], label=f"kept in {kept}")]


CHARTS = (Chart("sensitivity", "cell", _sensitivity),)
