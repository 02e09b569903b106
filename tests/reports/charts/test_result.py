"""Charts of real records: the files, their values and words, and that the same input gives the same bytes."""

import dataclasses
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import (
    Hashes,
    MemorySample,
    MemoryStages,
    ModelFacts,
    Repetition,
    RequestRecord,
    RunResult,
)
from mlflow_llmbench.reports.charts import result as result_charts
from mlflow_llmbench.reports.charts import style, sweep
from mlflow_llmbench.reports.charts.catalogue import draw_charts
from mlflow_llmbench.reports.charts.sweep import Points, SweepPoint, SweepPoints
from mlflow_llmbench.stats import percentile

MS = 1_000_000  # ns
S = 1000 * MS
CELL_CHARTS = ("itl_by_token", "latency_distribution", "memory_timeline")
SWEEP_CHARTS = ("overview", "throughput", "ttft", "itl", "memory", "padding", "quality")
TESTED = (*CELL_CHARTS, *SWEEP_CHARTS, "ratios", "values")
MARKS = {"baseline": 1, "loading": 1, "loaded": 3, "measuring": 4, "peak": 9, "unloaded": 10}  # s


def result_of(
    gaps: Sequence[Sequence[float]], ttft: Sequence[float] = (), rows: int = 1, quant: str = "int8"
) -> RunResult:
    """A cell with one request per repetition, of the given gaps and TTFTs in ms, and a memory timeline of 10 s."""
    repetitions = []
    for index, values in enumerate(gaps):
        first = (ttft[index] if ttft else 100.0 + index) * MS
        stamps = tuple(int(s) for s in S + np.cumsum([first, *(np.array(values) * MS)]))
        repetitions.append(Repetition(index, 1_700_000_000_000 + index, (RequestRecord(S, stamps, rows, 128),)))
    return RunResult(
        cell=Cell(model="facebook/opt-125m", quant=quant, batch_size=rows, output_tokens=len(gaps[0]) + 1),
        outcome="ok",
        started_ms=0,
        ended_ms=1,
        hashes=Hashes(*["0" * 16] * 5),
        model=ModelFacts("opt-125m", "preset", "facebook/opt-125m", "main"),
        environment={},
        repetitions=tuple(repetitions),
        memory=MemoryStages({"baseline": 400_000_000, "peak": 900_000_000}, {"loaded": 600_000_000}),
        timeline=tuple(MemorySample(i * S // 10, (400 + 5 * i) * 10**6, (200 + 5 * i) * 10**6) for i in range(101)),
        marks={stage: t * S for stage, t in MARKS.items()},
    )


def noisy(tokens: int, repetitions: int) -> list[list[float]]:
    generator = np.random.default_rng(0)
    return [list(30 + generator.gamma(2.0, 1.0, tokens - 1)) for _ in range(repetitions)]


def points_of(
    quants: Sequence[str] = ("fp32", "int8"), batches: Sequence[int] = (4, 1), models: Sequence[str] = ("opt-125m",)
) -> list[SweepPoint]:
    """Cells whose throughput is 10 · (position of the quantization + 1) · batch · (position of the model + 1)."""
    found = []
    for m, model in enumerate(models):
        for q, quant in enumerate(quants):
            for batch in batches:
                rate = 10.0 * (q + 1) * batch * (m + 1)
                metrics = {
                    "throughput/output_tokens_per_s": rate,
                    "throughput/output_tokens_per_s_ci_low": rate * 0.9,
                    "throughput/output_tokens_per_s_ci_high": rate * 1.1,
                    "latency/ttft_ms_p50": 12.0 * batch,
                    "latency/itl_ms_p50": 1000 * batch / rate,
                    "memory/host_needed_gb_peak": 2 / (q + 1),
                    "memory/weight_gb": 1 / (q + 1),
                }
                found.append(SweepPoint(Cell(model=model, quant=quant, batch_size=batch), metrics))
    return found


def draw_cell(result: RunResult, folder: Path) -> list[Path]:
    return list(draw_charts("cell", result, folder).files)


def draw_sweep(points: Points, folder: Path) -> list[Path]:
    return list(draw_charts("sweep", SweepPoints(points, 0.9), folder).files)


def texts(path: Path) -> str:
    """Return all text of an SVG. Fails if it is not well-formed XML or if text was drawn as paths."""
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    found = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert found
    return "\n".join(found)


def check_files(paths: list[Path], folder: Path, names: Sequence[str], kinds: Sequence[str] = ("svg", "png")) -> None:
    """Check that of the charts that have tests just these were drawn. A chart that is added is none of them."""
    assert [path.relative_to(folder).as_posix() for path in paths if path.stem in TESTED or path.stem in names] == [
        f"{name}.{kind}" for name in names for kind in kinds
    ]
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        else:
            texts(path)


def axes_of(figure: Any) -> list[Any]:
    """The panels of a figure that must exist. Typed Any, because matplotlib's stubs make every array a union of nine
    types."""
    assert figure is not None
    return list(figure.axes)


def heights(axes: Any) -> list[float]:
    return [patch.get_height() for patch in axes.patches]


def test_a_cell_gives_three_charts_with_their_words(tmp_path: Path) -> None:
    charts = tmp_path / "new" / "charts"
    check_files(draw_cell(result_of(noisy(40, 3)), charts), charts, CELL_CHARTS, ("svg",))
    itl, distribution, memory = (texts(charts / f"{name}.svg") for name in CELL_CHARTS)
    assert "opt-125m · inter-token latency by token" in itl
    for word in ("Token index", "Inter-token latency (ms)", "lowest to highest", "n = 3 repetitions"):
        assert word in itl
    for word in ("n = 117 gaps", "n = 3 repetitions", "p50", "p90", "median"):
        assert word in distribution
    assert "p99" not in distribution  # 117 gaps do not support it
    for word in (*MARKS, "Memory (GB)", "host resident", "host anonymous", "needed at stage"):
        assert word in memory
    assert "device" not in memory


def test_itl_chart_draws_medians_and_the_spread() -> None:
    axes = axes_of(result_charts.itl_figure(result_of([[10, 20, 30], [12, 20, 33], [17, 26, 31]])))
    line = axes[0].lines[0]
    assert list(line.get_xdata()) == [2, 3, 4]
    assert list(line.get_ydata()) == pytest.approx([12, 20, 31])
    corners = axes[0].collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(10) and corners[:, 1].max() == pytest.approx(33)


def test_requests_of_unlike_length_are_drawn_as_far_as_they_go() -> None:
    axes = axes_of(result_charts.itl_figure(result_of([[10, 20, 30], [14]])))
    assert list(axes[0].lines[0].get_ydata()) == pytest.approx([12, 20, 30])


def test_a_long_series_is_drawn_by_bins_and_stays_small(tmp_path: Path) -> None:
    result = result_of(noisy(8192, 10))
    for path in draw_cell(result, tmp_path):
        assert path.stat().st_size < 300_000
    assert "bins of 21 tokens" in texts(tmp_path / "itl_by_token.svg")
    assert "10–90 %" in texts(tmp_path / "itl_by_token.svg")
    assert "n = 81,910 gaps" in texts(tmp_path / "latency_distribution.svg")


def test_one_lone_gap_does_not_flatten_the_rest() -> None:
    gaps = noisy(200, 3)
    gaps[1][50] = 5000.0
    axes = axes_of(result_charts.itl_figure(result_of(gaps)))
    assert axes[0].get_ylim()[1] < 100
    assert [text.get_text() for text in axes[0].texts] == ["beyond the axis: 5000 ms at token 52"]


@pytest.mark.parametrize("rows", [1, 4])
def test_percentiles_are_those_of_the_summary(rows: int) -> None:
    gaps = noisy(48, 7)
    axes = axes_of(result_charts.latency_figure(result_of(gaps, rows=rows)))
    pool = [gap for values in gaps for gap in values for _ in range(rows)]
    marked = [(float(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axes[0].lines[1:]]
    assert [q for _, q in marked] == [50, 90, 99]
    assert [value for value, _ in marked] == pytest.approx([percentile(pool, q) for q in (50, 90, 99)], rel=1e-6)


def test_ttft_chart_has_a_dot_per_repetition_and_the_median() -> None:
    axes = axes_of(result_charts.latency_figure(result_of(noisy(4, 3), ttft=[90, 120, 100])))
    dots, median = axes[1].lines
    assert list(dots.get_xdata()) == pytest.approx([1, 2, 3])
    assert list(dots.get_ydata()) == pytest.approx([90, 120, 100])
    assert list(median.get_ydata()) == pytest.approx([100, 100])


def test_a_single_output_token_has_no_itl(tmp_path: Path) -> None:
    paths = draw_cell(result_of([[], [], []]), tmp_path)
    check_files(paths, tmp_path, ("latency_distribution", "memory_timeline"), ("svg",))
    assert "gap" not in texts(tmp_path / "latency_distribution.svg")
    assert "n = 3 repetitions" in texts(tmp_path / "latency_distribution.svg")


def test_one_repetition_of_two_tokens_can_be_drawn(tmp_path: Path) -> None:
    check_files(draw_cell(result_of([[20.0]]), tmp_path), tmp_path, CELL_CHARTS, ("svg",))
    assert "n = 1 repetition" in texts(tmp_path / "itl_by_token.svg")


def test_an_answer_that_came_in_one_read_can_be_drawn(tmp_path: Path) -> None:
    assert draw_cell(result_of([[0.0] * 40] * 3), tmp_path)


def test_what_was_not_seen_is_left_out(tmp_path: Path) -> None:
    failed = dataclasses.replace(result_of([[20.0]]), repetitions=(), timeline=())
    assert draw_cell(failed, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_memory_chart_draws_samples_marks_and_exact_readings() -> None:
    result = result_of([[20.0]])
    result = dataclasses.replace(result, timeline=tuple(dataclasses.replace(s, device=10**9) for s in result.timeline))
    axes = axes_of(result_charts.memory_figure(result))
    lines = {str(line.get_label()): line for line in axes[0].lines}
    assert lines["host resident"].get_ydata()[-1] == pytest.approx(0.9)
    assert lines["host resident"].get_xdata()[-1] == pytest.approx(10)
    assert set(lines["device"].get_ydata()) == {1.0}
    assert list(zip(*lines["resident at stage"].get_data(), strict=True)) == [(1.0, 0.4), (9.0, 0.9)]
    assert list(zip(*lines["needed at stage"].get_data(), strict=True)) == [(3.0, 0.6)]


def test_names_of_stages_do_not_overlap() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with style.chart_style():
        crowded = dataclasses.replace(result_of([[20.0]]), marks={stage: t * S // 4 for stage, t in MARKS.items()})
        figure: Any = result_charts.memory_figure(crowded)
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [text.get_window_extent(canvas.get_renderer()) for text in figure.axes[0].texts]
    assert len(boxes) == len(MARKS)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.x1 < figure.bbox.x1 and box.y1 < figure.bbox.y1 for box in boxes)


def test_a_peak_of_a_single_sample_stays() -> None:
    result = result_of([[20.0]])
    timeline = [MemorySample(i * MS, 5 * 10**8, 10**8) for i in range(50_000)]
    timeline[23_456] = MemorySample(23_456 * MS, 2 * 10**9, 10**8)
    axes = axes_of(result_charts.memory_figure(dataclasses.replace(result, timeline=tuple(timeline))))
    assert max(axes[0].lines[0].get_ydata()) == 2.0
    assert len(axes[0].lines[0].get_ydata()) <= 2 * result_charts.MOST_BINS


def test_a_sweep_gives_an_overview_and_four_charts(tmp_path: Path) -> None:
    check_files(draw_sweep(points_of(), tmp_path), tmp_path, ("overview", "throughput", "ttft", "itl", "memory"))
    overview, throughput = texts(tmp_path / "overview.svg"), texts(tmp_path / "throughput.svg")
    for word in (
        "opt-125m · overview",
        "Throughput · higher is better",
        "fp32",
        "int8",
        "Batch size",
        "weights",
        "128 prompt tokens",
    ):
        assert word in overview
    for word in (
        "opt-125m · throughput",
        "Throughput (output tokens/s)",
        "95 % interval",
        "fp32",
        "int8",
        "10.0",
        "20.0",
        "40.0",
        "80.0",
    ):
        assert word in throughput
    assert "Peak host memory (GB)" in texts(tmp_path / "memory.svg")


def test_bars_stand_by_batch_size_and_quantization() -> None:
    points = points_of()
    (axes,) = axes_of(sweep.metric_figure(points, "throughput/output_tokens_per_s"))
    assert heights(axes) == [10, 20, 40, 80]  # batch 1: fp32, int8; batch 4: fp32, int8
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "4"]
    assert axes.collections[0].get_segments()[0][:, 1] == pytest.approx([9, 11])
    (memory,) = axes_of(sweep.metric_figure(points, "memory/host_needed_gb_peak"))
    assert heights(memory) == pytest.approx([2, 1, 1, 0.5, 2, 1, 1, 0.5])  # each bar with its weights


@pytest.mark.parametrize(
    ("axis", "values", "told"),
    [("concurrency", (1, 4), ""), ("prompt_tokens", (16, 32), "4 users · "), ("request_rate", (1.0, 2.0), "")],
)
def test_of_a_server_the_load_is_told_and_no_batch(axis: str, values: tuple[Any, ...], told: str) -> None:
    cell = Cell(backend="openai", url="http://127.0.0.1:1", model="m", concurrency=4, prompt_tokens=16)
    points = [
        SweepPoint(dataclasses.replace(cell, **{axis: value}), {"throughput/output_tokens_per_s": 10.0})
        for value in values
    ]
    figure = sweep.metric_figure(points, "throughput/output_tokens_per_s")
    constant = "" if axis == "prompt_tokens" else "16 prompt tokens · "
    assert [text.get_text() for text in figure.texts][
        1
    ] == f"higher is better · {told}{constant}128 output tokens · synthetic prompts"


def test_a_backend_that_the_quantization_tells_makes_no_groups() -> None:
    points = [
        SweepPoint(Cell(quant=quant, backend=backend), {"throughput/output_tokens_per_s": 10.0})
        for quant, backend in PACKED
    ]
    (axes,) = axes_of(sweep.metric_figure(points, "throughput/output_tokens_per_s"))
    assert heights(axes) == [10, 10, 10]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["bf16", "q8_0", "q4_k_m"]


PACKED = (("bf16", "transformers"), ("q4_k_m", "llama_cpp"), ("q8_0", "llama_cpp"))


def test_quality_is_set_against_speed_with_both_intervals(tmp_path: Path) -> None:
    kl = {"fp32": 0.0, "int8": 0.25}
    points = [
        SweepPoint(
            cell,
            {
                **metrics,
                "quality/kl_vs_reference": kl[cell.quant],
                "quality/kl_vs_reference_ci_low": 0.0,
                "quality/kl_vs_reference_ci_high": 0.5,
            },
        )
        for cell, metrics, _ in points_of()
    ]
    check_files(draw_sweep(points, tmp_path), tmp_path, ("overview", "throughput", "ttft", "itl", "memory", "quality"))
    (axes,) = axes_of(sweep.quality_figure(points))
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines] == [
        (40.0, 0.0),
        (10.0, 0.0),
        (80.0, 0.25),
        (20.0, 0.25),
    ]
    across, upright = axes.collections[:2]
    assert across.get_segments()[0].tolist() == [[36.0, 0.0], [44.0, 0.0]]
    assert upright.get_segments()[0].tolist() == [[40.0, 0.0], [40.0, 0.5]]
    words = texts(tmp_path / "quality.svg")
    assert all(text in words for text in ("0.25 (4)", "in brackets: batch size", "right and down is better", "int8"))


def test_without_two_cells_of_known_quality_there_is_no_such_chart(tmp_path: Path) -> None:
    first, *others = points_of()
    points = [first._replace(metrics={**first.metrics, "quality/kl_vs_reference": 0.1}), *others]
    assert not [path for path in draw_sweep(points, tmp_path) if path.stem == "quality"]


def test_a_cell_that_failed_leaves_its_place_empty() -> None:
    (axes,) = axes_of(sweep.metric_figure(points_of()[:-1], "throughput/output_tokens_per_s"))  # without int8, batch 1
    assert heights(axes) == [10, 40, 80]
    assert [text.get_text() for text in axes.texts] == ["10.0", "–", "40.0", "80.0"]


def test_each_model_has_a_panel_with_one_scale() -> None:
    panels = axes_of(
        sweep.metric_figure(points_of(models=("facebook/opt-125m", "opt-350m")), "throughput/output_tokens_per_s")
    )
    assert [axes.get_title(loc="left") or axes.get_title() for axes in panels] == ["opt-125m", "opt-350m"]
    assert heights(panels[1]) == [20, 40, 80, 160]
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_models_are_groups_where_only_the_quantization_varies_besides() -> None:
    (axes,) = axes_of(sweep.metric_figure(points_of(models=("b", "a"), batches=(1,)), "throughput/output_tokens_per_s"))
    assert heights(axes) == [10, 20, 20, 40]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["b", "a"]


def test_other_parameters_make_combinations() -> None:
    points = [
        point._replace(cell=dataclasses.replace(point.cell, threads=threads))
        for point in points_of()
        for threads in (None, 2)
    ]
    (axes,) = axes_of(sweep.metric_figure(points, "latency/ttft_ms_p50"))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1\n2", "1\nauto", "4\n2", "4\nauto"]
    assert axes.get_xlabel() == "Batch size · threads"


def test_a_sweep_of_one_cell_or_none_has_no_charts(tmp_path: Path) -> None:
    assert draw_sweep([], tmp_path) == []
    assert draw_sweep(points_of(("int8",), (1,)), tmp_path) == []
    assert draw_sweep([point._replace(metrics={}) for point in points_of()], tmp_path) == []


def test_metrics_that_no_cell_has_are_left_out(tmp_path: Path) -> None:
    left_out = ("latency/itl_ms_p50", "memory/host_needed_gb_peak")
    points = [
        point._replace(metrics={key: value for key, value in point.metrics.items() if key not in left_out})
        for point in points_of()
    ]
    check_files(draw_sweep(points, tmp_path), tmp_path, ("overview", "throughput", "ttft", "memory"))
    assert "Weights (GB)" in texts(tmp_path / "memory.svg")


def test_odd_names_are_drawn(tmp_path: Path) -> None:
    odd = ("a$b$c_^{", "模型", "<b>&", "x" * 300)
    result = result_of([[20.0, 21.0]], quant="gguf-q4")
    draw_cell(dataclasses.replace(result, cell=dataclasses.replace(result.cell, model=odd[0])), tmp_path)
    assert "a$b$c_^{ · memory over time" in texts(tmp_path / "memory_timeline.svg")
    draw_sweep(points_of(("gguf-q4", "none"), (1,), models=odd), tmp_path)
    for word in ("4 models · overview", "a$b$c_^{", "??", "<b>&", "gguf-q4"):
        assert word in texts(tmp_path / "overview.svg")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    import matplotlib

    result, points = result_of(noisy(40, 10)), points_of()
    first = [path.read_bytes() for path in draw_cell(result, tmp_path / "a") + draw_sweep(points, tmp_path / "a")]
    with matplotlib.rc_context({"font.size": 20, "axes.grid": False}):  # the caller's style
        second = [path.read_bytes() for path in draw_cell(result, tmp_path / "b") + draw_sweep(points, tmp_path / "b")]
        assert matplotlib.rcParams["font.size"] == 20
    assert first == second


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mlflow_llmbench.reports.charts import catalogue, sweep;"
        "assert 'matplotlib' not in sys.modules;"
        "from mlflow_llmbench.records.cell import Cell; k = 'latency/itl_ms_p50';"
        "one = sweep.SweepPoint(Cell(), {k: 1.0}); two = sweep.SweepPoint(Cell(quant='int8'), {k: 2.0});"
        "points = sweep.SweepPoints([one, two], 0.9);"
        "catalogue.draw_charts('sweep', points, Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).resolve().parents[3])
    assert (tmp_path / "itl.svg").exists()
