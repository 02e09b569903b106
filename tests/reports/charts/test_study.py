"""Charts of a study: suspect cells, shared scales, names that do not cover each other, the paper's figures."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis.scaling.findings import Findings, find
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.reports.charts import lines, placing, style, sweep
from mlflow_llmbench.reports.charts.catalogue import charts_of, figures_text
from mlflow_llmbench.reports.charts.figure_data import FigureData, figure_data
from mlflow_llmbench.reports.charts.scaling import law_figures
from mlflow_llmbench.reports.scaling import scaling_sections

from ...analysis.scaling.test_study import grid, measured
from .test_result import points_of

pytestmark = pytest.mark.charts

SUSPECT = [("opt-125m", "bf16", 1, 128), ("pythia-70m", "int8", 4, 64)]
MODELS = ("pythia-70m", "opt-125m", "pythia-160m")


def shape(one: RunResult) -> tuple[str, str, int, int | None]:
    return one.cell.model, one.cell.quant, one.cell.batch_size, one.cell.prompt_tokens


@pytest.fixture(scope="module")
def quiet() -> FigureData:
    return figure_data(find(grid(MODELS, ("bf16", "int8"))))


@pytest.fixture(scope="module")
def busy() -> FigureData:
    cells = grid(MODELS, ("bf16", "int8"))
    return figure_data(find([dataclasses.replace(one, steady=shape(one) not in SUSPECT) for one in cells]))


@pytest.fixture(autouse=True)
def our_style() -> Iterator[None]:
    with style.chart_style():
        yield


def draw(name: str, data: FigureData) -> Any:
    [chart] = [chart for chart in charts_of("study") if chart.name == name]
    return chart.draw(data)


def hollow_points(figure: Any) -> int:
    drawn = [line for axes in figure.axes for line in axes.lines if line.get_markerfacecolor() == "white"]
    return sum(len(line.get_xdata()) for line in drawn)


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def drawn(figure: Any) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("against_model_size", 2),  # of the two panels, one cell each: the other is not at this shape
        ("memory_against_model_size", 2),
        ("against_batch_size", 2),
        ("against_prompt_length", 2),
        ("per_instance", 1),
        ("memory_against_throughput", 2),
        ("quantization_effect", 2),  # the ratio of int8 to a suspect reference is as doubtful
        ("quantization_radar", 4),
    ],
)
def test_a_suspect_cell_is_hollow_and_the_legend_says_so(
    name: str, marks: int, quiet: FigureData, busy: FigureData
) -> None:
    assert hollow_points(draw(name, quiet)) == 0
    assert "hollow: suspect" not in legend_of(draw(name, quiet))
    figure = draw(name, busy)
    assert hollow_points(figure) == marks
    assert legend_of(figure)[-1] in ("hollow: suspect", "front")
    assert "hollow: suspect" in legend_of(figure)


@pytest.mark.parametrize(("name", "marks"), [("models", 4), ("memory_by_quantization", 1)])
def test_the_bar_of_a_suspect_cell_is_hatched(name: str, marks: int, quiet: FigureData, busy: FigureData) -> None:
    def hatched(figure: Any) -> int:
        return sum(patch.get_hatch() is not None for axes in figure.axes for patch in axes.patches)

    assert hatched(draw(name, quiet)) == 0
    figure = draw(name, busy)
    assert hatched(figure) == marks
    assert "hatched: suspect" in legend_of(figure)


def test_the_field_of_a_suspect_cell_is_hatched(busy: FigureData) -> None:
    figure = draw("heatmap_throughput", busy)
    assert sum(patch.get_hatch() is not None for axes in figure.axes for patch in axes.patches) == 2
    assert "hatched: suspect" in figure.texts[1].get_text()


def test_suspect_results_of_a_sweep_and_of_its_quality_are_marked() -> None:
    points = [point._replace(suspect=point.cell.quant == "int8") for point in points_of()]
    figure = sweep.metric_figure(points, "throughput/output_tokens_per_s")
    assert [bool(patch.get_hatch()) for patch in figure.axes[0].patches] == [False, True, False, True]
    scored = [one._replace(metrics={**one.metrics, "quality/kl_vs_reference": 0.1}) for one in points]
    assert hollow_points(sweep.quality_figure(scored)) == 2


def test_the_laws_mark_suspect_cells_and_count_them(busy: FigureData) -> None:
    figures = law_figures(busy.found.scaling)
    assert not isinstance(figures, str)
    by_size: Any = figures["throughput_by_size"]  # type: ignore[index]
    assert hollow_points(by_size) == 1  # bf16: of all groups the first nine are drawn
    assert "hollow: suspect" in legend_of(by_size)


def test_panels_of_a_row_share_their_scale(busy: FigureData) -> None:
    for figure in (law_figures(busy.found.scaling)["latency_by_batch"], draw("against_batch_size", busy)):  # type: ignore[index]
        rows: dict[int, set[tuple[float, float]]] = {}
        for axes in figure.axes:
            rows.setdefault(axes.get_subplotspec().rowspan.start, set()).add(axes.get_ylim())
        assert [len(limits) for limits in rows.values()] == [1] * len(rows)


def test_a_cliff_beside_a_suspect_cell_says_so() -> None:
    """At batch size 4 and more the first token takes four times as long."""

    def cell(batch: int, **other: Any) -> RunResult:
        return measured(batch=batch, speed=0.25 if batch >= 4 else 1.0, **other)

    def told(found: Findings) -> list[str]:
        return [line for line in scaling_sections(found.scaling)["Latency cliffs"] if line.startswith("Latency cliff")]

    batches = (1, 2, 4, 8)
    first, *_ = told(find([cell(batch) for batch in batches]))
    assert "from batch size 2 to 4" in first and "suspect" not in first
    doubtful, *_ = told(find([dataclasses.replace(cell(batch), steady=batch != 4) for batch in batches]))
    assert doubtful.startswith(first.removesuffix("."))
    assert doubtful.endswith(
        "The cell at 4 (not_steady) is suspect, so the step may come from a disturbance. "
        "Measure again on a quiet machine."
    )


def test_an_interval_that_reaches_0_leaves_a_logarithmic_axis_readable() -> None:
    assert lines.value_limits([2.0, 100.0], [(0.0, 5.0), (50.0, 20_000.0)]) == pytest.approx((2 / 3 / 1.2, 360.0))
    assert lines.value_limits([2.0, 10.0], [(0.0, 5.0), (5.0, 20.0)]) == pytest.approx((0.0, 22.0))
    points = (lines.Point(1, 2.0, 0.0, 5.0), lines.Point(4, 100.0, 50.0, 150.0))
    panels = [
        lines.Panel("", "x", "y", (lines.Line("a", "red", "o", own),), {1: "1", 4: "4"})
        for own in (points, points[:1], points[1:])
    ]
    figure = lines.lines_figure("title", "subtitle", panels, 3)
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    assert figure.axes[0].get_ylim()[0] > 0.1


def test_memory_is_linear_with_the_papers_slopes(quiet: FigureData) -> None:
    figure = draw("memory_against_model_size", quiet)
    for axes in figure.axes:
        assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
        ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in axes.lines if line.get_linestyle() == "--"]
        assert [y / x for x, y in ends] == pytest.approx([4.0, 2.0, 1.0, 0.5])
    assert "the paper: bytes per weight" in legend_of(figure)


def test_each_machine_has_a_line_as_soon_as_there_are_two() -> None:
    here = grid(MODELS, ("bf16", "int8"))
    assert draw("by_hardware", figure_data(find(here))).startswith("it needs two machines")
    xeon = {"cpu": {"name": "Xeon", "usable_cpus": 8}}
    other = [dataclasses.replace(one, environment=xeon) for one in grid(MODELS, ("bf16",), speed=2.0, env="b")]
    data = figure_data(find([*here, *other], prices={"EPYC": 0.1, "Xeon": 0.4}))
    figure = draw("by_hardware", data)
    assert legend_of(figure) == ["AMD EPYC, 2 CPUs", "Xeon, 8 CPUs"]
    assert "quantization bf16" in figure.texts[1].get_text()
    rate, first, money = (
        {line.get_label(): line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")}
        for axes in figure.axes
    )
    for k in range(3):
        assert rate["Xeon, 8 CPUs"][k] == pytest.approx(2 * rate["AMD EPYC, 2 CPUs"][k], rel=0.01)
        assert first["Xeon, 8 CPUs"][k] == pytest.approx(first["AMD EPYC, 2 CPUs"][k] / 2, rel=0.01)
        assert money["Xeon, 8 CPUs"][k] == pytest.approx(rate["Xeon, 8 CPUs"][k] * 3600e-6 / 0.4)
    ratios = draw("quantization_effect", data)  # of the machine with most cells alone
    assert sum(len(line.get_ydata()) for line in ratios.axes[0].lines if line.get_label() == "int8") == 9


def test_places_are_moved_apart_as_little_as_needed() -> None:
    assert placing.spread([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])
    assert placing.spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
    assert placing.spread([0.0, 0.02, 0.5], 0.1) == pytest.approx([0.0, 0.1, 0.5])
    assert placing.spread([0.98, 0.99, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])
    assert placing.spread([0.2, 0.3, 0.4], 0.7) == pytest.approx([0.0, 0.5, 1.0])  # there is no room
    assert placing.spread([0.3], 0.1) == [0.3] and placing.spread([], 0.1) == []


def test_names_of_models_of_like_size_do_not_cover_each_other(quiet: FigureData) -> None:
    figure = draw("against_model_size", quiet)
    renderer = drawn(figure)
    for axes in figure.axes:
        names = [text for text in axes.texts if "·" in text.get_text()]
        assert len(names) == 3
        ends = sorted(text.get_window_extent(renderer).x1 for text in names)
        assert all(after - before > 0.18 * figure.dpi for before, after in itertools.pairwise(ends))


def test_the_front_is_what_no_other_point_beats() -> None:
    points = [(1.0, 5.0), (2.0, 9.0), (2.0, 7.0), (3.0, 8.0), (4.0, 12.0)]
    assert placing.front_of(points, (-1, 1)) == [(1.0, 5.0), (2.0, 9.0), (4.0, 12.0)]
    assert placing.front_of(points, (1, -1)) == [(1.0, 5.0), (2.0, 7.0), (3.0, 8.0), (4.0, 12.0)]


def test_labels_never_cover_each_other_nor_a_point() -> None:
    figure, (axes,) = style.new_figure("title", "subtitle")
    points = [(0.5 + 0.01 * math.cos(k), 0.5 + 0.01 * math.sin(k), f"a long label {k}") for k in range(9)]
    axes.plot([x for x, *_ in points], [y for _, y, _ in points], "o")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    placing.label_points(axes, points)
    renderer = drawn(figure)
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert 1 <= len(boxes) < 9
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[k + 1 :])


def test_many_points_have_a_front_and_few_are_named(busy: FigureData) -> None:
    many = draw("memory_against_throughput", busy)
    assert "front" in legend_of(many)
    few = draw("memory_against_throughput", figure_data(find(grid(("opt-125m",), ("bf16",)))))
    assert "front" not in legend_of(few)
    assert "opt-125m bf16 b16" in [text.get_text() for text in few.axes[0].texts]


def test_every_figure_of_the_paper_has_ours_and_the_page_names_them() -> None:
    charts = charts_of("study")
    ours = {number: [chart.name for chart in charts if number in chart.paper] for number in range(2, 17)}
    assert all(ours.values())
    page = (Path(__file__).parents[3] / "docs" / "study.md").read_text()
    rows = re.findall(r"^\| (\d+) \|[^|]*\|([^|]*)\|$", page, re.M)
    assert {int(number): re.findall(r"`(\w+)`", names) for number, names in rows} == ours
    assert figures_text((2, 6, 16)) == "Figures 2, 6 and 16" and figures_text((5,)) == "Figure 5"
    [batch] = [chart for chart in charts if chart.name == "against_batch_size"]
    assert batch.legend.endswith("at one prompt length. (Figures 3 and 7 of the EffiLLM paper.)")
