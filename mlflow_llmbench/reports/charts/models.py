"""Figures of a study that show all models at one shape."""

from __future__ import annotations

from ...analysis.comparison import RATE
from ...analysis.scaling.cells import MEDIAN_TTFT
from ...records.metrics import ITL, KL
from .catalogue import Chart, Drawing
from .figure_data import FigureData, memory_key, points_at_focus
from .sweep import overview_figure, quality_figure


def _models(data: FigureData) -> Drawing:
    points = points_at_focus(data)
    if len({point.cell.model for point in points}) < 2:
        return "it needs two models that were measured with the same batch size and prompt length"
    keys = [
        RATE,
        MEDIAN_TTFT,
        *([ITL.key("p50")] if any(ITL.key("p50") in m for _, m, _ in points) else []),
        memory_key(data.cells),
    ]
    return overview_figure(points, keys)


def _quality(data: FigureData) -> Drawing:
    scored = [point for point in points_at_focus(data) if KL.key() in point.metrics]
    return (
        quality_figure(scored)
        if len(scored) > 1
        else "it needs two cells at the shape of comparison with figures of quality: use real weights and quality=auto"
    )


CHARTS = (
    Chart("models", "study", _models, "All models at one shape."),
    Chart(
        "quality_against_speed",
        "study",
        _quality,
        "Divergence of each quantization from the unquantized model, against its speed.",
    ),
)
