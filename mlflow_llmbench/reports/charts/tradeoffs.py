"""Figures of trade-offs: quantization relative to its reference, a radar, tokens per unit of money, machines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...analysis.comparison import DEVICE_PEAK, HOST_PEAK, RATE
from ...analysis.scaling.cells import MEDIAN_TTFT, Measured, describe
from ...analysis.scaling.findings import Findings
from ...analysis.scaling.focus import at_focus, with_interval
from ...analysis.scaling.memory_account import REFERENCES
from ...analysis.scaling.paper_claims import QuantEffect
from ...analysis.scaling.study import MEAN_TPOT
from ...analysis.scaling.tradeoffs import Ratio
from ...records.metrics import ENERGY, TOP1
from ...records.quantizations import COLOURS
from .catalogue import Chart, Drawing
from .figure_data import FigureData
from .style import (
    BLUE,
    BROWN,
    GREY,
    HATCH,
    INK,
    WIDTH,
    hollow,
    new_figure,
    put_legend,
    suspect_handle,
    suspect_patch,
    value_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MOST_ROWS = 24
"""Most rows of a chart of ratios or costs; scaling.json and the report's tables have all."""

AGREEMENT = TOP1.key()
LEAST_SPOKES = 3

SPOKES = (
    ("throughput", RATE, True),
    ("first token", MEDIAN_TTFT, False),
    ("decoding", MEAN_TPOT, False),
    ("memory", "", False),
    ("energy", ENERGY.key(), False),
    ("quality", AGREEMENT, True),
)
"""Axes of the radar: name, metric (memory: the peak), True if more is better."""


def _quantization(data: FigureData) -> Drawing:
    """Draw the throughput of each quantized cell ÷ that of its reference, one panel per model, one row per shape."""
    found, names = data.found, data.names
    here = {id(m) for m in data.cells}
    own = [e for e in found.effects if id(e.measured) in here]
    if not own:
        return "no quantized cell was measured together with a reference that differs only in quantization"
    by_size = sorted(own, key=lambda e: e.measured.variable("parameters") or 0.0)
    models = list(dict.fromkeys(names[e.measured.result.hashes.config] for e in by_size))
    shapes = sorted({_shape(e.measured) for e in own}, reverse=True)
    kept = shapes[-MOST_ROWS:]
    columns = min(3, len(models))
    rows = -(-len(models) // columns)
    references = ", ".join(dict.fromkeys(e.memory.reference for e in own))
    notes = [
        f"1 = {references}",
        "lines: 95 % intervals",
        f"{len(kept)} of {len(shapes)} shapes" if len(kept) < len(shapes) else "",
        found.focus.machine.name,
    ]
    size = max(WIDTH, 3.6 * columns), 1.3 + rows * max(1.8, 0.6 + 0.27 * len(kept))
    figure, panels = new_figure(
        "Throughput of quantizations relative to the reference", " · ".join(filter(None, notes)), size, (rows, columns)
    )
    for number, (axes, model) in enumerate(zip(panels, models, strict=False)):
        _draw_ratios(axes, [e for e in own if names[e.measured.result.hashes.config] == model], kept)
        axes.set(
            title=textwrap.shorten(model, 40, placeholder="…"),
            ylabel="Batch × prompt tokens" if number % columns == 0 else "",
        )
        axes.set_xlabel("Throughput ÷ reference" if number + columns >= len(models) else "")
    for axes in panels[len(models) :]:
        axes.remove()
    top = _ratio_limit([e.speed for e in own if _shape(e.measured) in kept])
    for axes in panels[: len(models)]:
        axes.set_xlim(0, top)
    doubtful = [suspect_handle()] if any(e.is_suspect and _shape(e.measured) in kept for e in own) else []
    put_legend(figure, [*_handles(panels[: len(models)]), *doubtful])
    return figure


def _ratio_limit(ratios: Sequence[Ratio]) -> float:
    """Return the end of an axis of ratios from 0: an interval that goes twice as far as all ratios is cut off."""
    most = max([1.0, *(one.value for one in ratios)])
    return 1.06 * max([most, *(min(one.high, 2 * most) for one in ratios if one.high is not None)])


def _handles(panels: Sequence[Axes]) -> list[Any]:
    """Return the legend handles of all panels, one for each label."""
    every = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels)
    return list({label: handle for pairs in every for handle, label in pairs}.values())


def _shape(measured: Measured) -> tuple[float, int]:
    return measured.variable("prompt_tokens") or 0.0, measured.cell.batch_size


def _draw_ratios(axes: Axes, own: Sequence[QuantEffect], shapes: Sequence[tuple[float, int]]) -> None:
    quants = [quant for quant in COLOURS if any(e.quant == quant for e in own)]
    drawn: dict[str, list[tuple[float, Ratio, bool]]] = {}
    for effect in own:
        if _shape(effect.measured) not in shapes:
            continue
        shift = 0.22 * (quants.index(effect.quant) - (len(quants) - 1) / 2) if effect.quant in quants else 0.0
        drawn.setdefault(effect.quant, []).append(
            (shapes.index(_shape(effect.measured)) - shift, effect.speed, effect.is_suspect)
        )
    for quant, ratios in drawn.items():
        _draw_ratio(axes, ratios, COLOURS.get(quant, BROWN), quant)
    axes.axvline(1.0, color=INK, linewidth=1.0, zorder=1)
    axes.set(
        yticks=range(len(shapes)),
        yticklabels=[f"{batch} × {prompt:g}" for prompt, batch in shapes],
        ylim=(-0.6, len(shapes) - 0.4),
    )
    axes.grid(visible=True, axis="x")


def _draw_ratio(axes: Axes, ratios: Sequence[tuple[float, Ratio, bool]], colour: str, label: str) -> None:
    """Draw ratios, each at its height, with their intervals; hollow where one of the two cells is suspect."""
    ends = [(y, one.low, one.high) for y, one, _ in ratios if one.low is not None and one.high is not None]
    if ends:
        axes.hlines(*zip(*ends, strict=True), color=colour, linewidth=1.3)
    places, values = [y for y, *_ in ratios], [one.value for _, one, _ in ratios]
    axes.plot(values, places, "o", color=colour, markersize=4.5, label=label, zorder=3)
    doubtful = [(one.value, y) for y, one, suspect in ratios if suspect]
    if doubtful:
        axes.plot(*zip(*doubtful, strict=True), "o", markersize=4.5, zorder=4, **hollow(colour))


def _radar(data: FigureData) -> Drawing:
    """Draw the quantizations of each model at the shape of comparison.

    On every axis further out is better, and the best of the model is 1; quality is the share itself.
    """
    found, names = data.found, data.names
    order = list(COLOURS)
    here = [m for m in found.focus.cells if at_focus(m, found.focus)]
    own = sorted(
        here,
        key=lambda m: (
            m.variable("parameters") or 0.0,
            order.index(m.cell.quant) if m.cell.quant in order else len(order),
        ),
    )
    groups: dict[str, list[Measured]] = {}
    for measured in own:
        groups.setdefault(names[measured.result.hashes.config], []).append(measured)
    groups = {
        name: cells
        for name, cells in groups.items()
        if len({m.cell.quant for m in cells}) > 1 and len(_spokes(cells)) >= LEAST_SPOKES
    }
    if not groups:
        return "it needs two quantizations of one model, measured with the same batch size and prompt length"
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    quality = any(AGREEMENT in m.metrics for m in own)
    notes = [
        "each axis: best of the model = 1, others by their ratio to it",
        "quality: top-1 agreement as it is" if quality else "quality not measured",
    ]
    size = max(WIDTH, 3.7 * columns), 1.2 + 3.4 * rows
    figure, panels = new_figure(
        "Trade-offs of quantization", " · ".join([*notes, _where(found)]), size, (rows, columns), polar=True
    )
    for axes, (name, cells) in zip(panels, groups.items(), strict=False):
        _draw_radar(axes, cells)
        axes.set_title(textwrap.shorten(name, 40, placeholder="…"), pad=16)
    for axes in panels[len(groups) :]:
        axes.remove()
    doubtful = [suspect_handle()] if any(m.is_suspect for cells in groups.values() for m in cells) else []
    put_legend(figure, [*_handles(panels[: len(groups)]), *doubtful])
    return figure


def _where(found: Findings) -> str:
    return f"batch size {found.focus.batch} · {found.focus.prompt:g} prompt tokens"


def _spokes(cells: Sequence[Measured]) -> dict[str, list[float]]:
    """Map axis → the value of each cell, 1 for the best. An axis that a cell lacks is left out.

    A throughput is divided by the highest; the lowest time, size or energy is divided by each. Agreement with the
    unquantized model is shown as it is: a share, and 1 for that model itself.
    """
    found = {}
    for name, key, more in SPOKES:
        keys = [key] if key else [DEVICE_PEAK] if all(DEVICE_PEAK in m.metrics for m in cells) else [HOST_PEAK]
        values = [
            m.metrics.get(
                keys[0], 1.0 if key == AGREEMENT and m.cell.quant in REFERENCES and _is_judged(cells) else None
            )
            for m in cells
        ]
        known = [value for value in values if value is not None and value > 0]
        if len(known) == len(cells):
            found[name] = (
                known if key == AGREEMENT else [value / max(known) if more else min(known) / value for value in known]
            )
    return found


def _is_judged(cells: Sequence[Measured]) -> bool:
    return any(AGREEMENT in m.metrics for m in cells)


def _draw_radar(axes: Axes, cells: Sequence[Measured]) -> None:
    spokes = _spokes(cells)
    angles = np.linspace(0, 2 * np.pi, len(spokes), endpoint=False)
    for number, measured in enumerate(cells):
        values = [spokes[name][number] for name in spokes]
        colour = COLOURS.get(measured.cell.quant, BROWN)
        axes.plot(
            [*angles, angles[0]],
            [*values, values[0]],
            "o-",
            color=colour,
            linewidth=1.5,
            markersize=3.5,
            label=measured.cell.quant,
        )
        if measured.is_suspect:
            axes.plot(angles, values, "o", markersize=3.5, **hollow(colour))
        axes.fill(angles, values, color=colour, alpha=0.08)
    axes.set(ylim=(0, 1.05), yticks=(0.25, 0.5, 0.75, 1.0))
    axes.set_yticklabels(("", "0.5", "", "1"), size=7, color=GREY)
    # The first axis points up, so that few names lie beside the circle.
    axes.set_theta_offset(np.pi / 2)  # type: ignore[attr-defined]
    axes.set_xticks(angles, list(spokes), size=9)
    axes.tick_params(axis="x", pad=2)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = np.sin(angle)
        label.set_horizontalalignment("center" if abs(side) < 0.1 else "right" if side > 0 else "left")
    axes.grid(visible=True, axis="both")
    axes.spines["polar"].set_color("#d5d9de")


def _cost(data: FigureData) -> Drawing:
    """Draw the tokens per unit of money of the best cell of each machine, model and quantization."""
    found = data.found
    prices = {machine.env: machine for machine in found.machines if machine.price}
    best: dict[tuple[str, str, str], Measured] = {}
    for measured in found.cells:
        key = (measured.result.hashes.env, describe(measured.cell, ["model"]), measured.cell.quant)
        if (
            key[0] in prices
            and RATE in measured.metrics
            and (key not in best or measured.metrics[RATE] > best[key].metrics[RATE])
        ):
            best[key] = measured
    if not best:
        return "no price was given; give --price with money per hour"
    rows = sorted(best.items(), key=lambda row: row[1].metrics[RATE] / (prices[row[0][0]].price or 1.0))[-MOST_ROWS:]
    told = "; ".join(f"{m.name}: {m.price:g} per hour" for m in prices.values())
    subtitle = f"the best batch size of each, in brackets · lines: 95 % intervals · {told}"
    doubtful = [suspect_patch()] if any(m.is_suspect for _, m in rows) else []
    size = WIDTH + 2, 1.5 + 0.32 * len(rows)
    figure, (axes,) = new_figure("Tokens per unit of money, by hardware", subtitle, size, legend=bool(doubtful))
    put_legend(figure, doubtful)
    for y, ((env, _, quant), measured) in enumerate(rows):
        scale = 3600e-6 / (prices[env].price or 1.0)
        value, low, high = with_interval(measured, RATE, scale) or (0.0, 0.0, 0.0)
        looks: Any = {"hatch": HATCH, "edgecolor": "white", "linewidth": 0} if measured.is_suspect else {}
        axes.barh(y, value, 0.7, color=COLOURS.get(quant, BROWN), **looks)
        axes.hlines(y, low, high, color=INK, linewidth=1.2)
        axes.annotate(
            value_label(value), (max(value, high), y), (4, 0), textcoords="offset points", va="center", size=8
        )
    machine = "" if len(prices) == 1 else " · {}"
    texts = [
        f"{model} {quant} (batch {m.cell.batch_size}){machine.format(prices[env].name)}"
        for (env, model, quant), m in rows
    ]
    axes.set(yticks=range(len(rows)), yticklabels=[textwrap.shorten(text, 70, placeholder="…") for text in texts])
    axes.set(xlabel="Million output tokens per unit of money", xlim=(0, axes.dataLim.x1 * 1.14))
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    return figure


def _machines(data: FigureData) -> Drawing:
    """Draw the throughput of each configuration on another machine ÷ that on the machine with most cells."""
    found = data.found
    if not found.across:
        return "it needs one configuration that two machines have measured"
    shown = found.across[:MOST_ROWS]
    width = max(WIDTH, 6 + 0.075 * max(len(one.name) for one in shown))
    notes = [
        f"÷ {shown[0].first}",
        "lines: 95 % intervals",
        f"first {len(shown)} of {len(found.across)}" if len(shown) < len(found.across) else "",
    ]
    figure, (axes,) = new_figure(
        "Throughput on other machines", " · ".join(filter(None, notes)), (min(width, 14.0), 1.6 + 0.3 * len(shown))
    )
    others = list(dict.fromkeys(one.second for one in shown))
    colours = (BLUE, "#d9820f", "#2e8b57", "#c0392b", "#8e44ad")
    for y, one in enumerate(reversed(shown)):
        _draw_ratio(axes, [(y, one.speed, one.suspect)], colours[others.index(one.second) % len(colours)], one.second)
    axes.axvline(1.0, color=INK, linewidth=1.0, zorder=1)
    axes.set(
        yticks=range(len(shown)),
        yticklabels=[textwrap.shorten(one.name, 80, placeholder="…") for one in reversed(shown)],
    )
    axes.set(
        xlabel="Throughput ÷ reference",
        xlim=(0, _ratio_limit([one.speed for one in shown])),
        ylim=(-0.7, len(shown) - 0.3),
    )
    axes.grid(visible=True, axis="x")
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    doubtful = [suspect_handle()] if any(one.suspect for one in shown) else []
    put_legend(figure, [*handles.values(), *doubtful])
    return figure


CHARTS = (
    Chart(
        "quantization_effect",
        "study",
        _quantization,
        "Each quantization against the reference that differs only in quantization.",
        (13,),
    ),
    Chart(
        "quantization_radar",
        "study",
        _radar,
        "Trade-offs of each quantization. Throughput is divided by the highest of the model; the lowest time, memory "
        "or energy is divided by each; quality is the share of positions with the unquantized model's most probable "
        "token. 1 is best on every axis.",
        (14,),
    ),
    Chart("cost_by_hardware", "study", _cost, "Output tokens per unit of money at the given prices.", (16,)),
    Chart("machines", "study", _machines, "The same configurations on other machines."),
)
