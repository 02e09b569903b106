"""Charts of comparisons: the files, their values and words, and that the same input gives the same bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.analysis.comparison import COMPARED, Comparison, interval_text
from mlflow_llmbench.records.results import MemoryStages
from mlflow_llmbench.reports.charts import comparison as comparison_charts
from mlflow_llmbench.reports.charts.catalogue import draw_charts
from mlflow_llmbench.reports.charts.comparison import LOOKS
from mlflow_llmbench.reports.charts.style import GREY, chart_style
from tests.analysis.test_comparison import BF16, INT4, RATE, compare, in_processes, result, spread
from tests.reports.charts.test_result import axes_of, check_files, texts

FP16 = result(spread(1.001), "fp16")


def draw_comparisons(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    return list(draw_charts("comparisons", comparisons, folder).files)


def points(axes: Any, colour: str | None = None) -> list[tuple[list[float], list[float]]]:
    """Return x and y of the drawn dots."""
    return [
        (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
        if line.get_marker() == "o" and line.get_color() == (colour or line.get_color())
    ]


def words(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_every_metric_that_is_compared_has_a_name_and_every_effect_a_look() -> None:
    assert all(entry.title and entry.unit for entry in COMPARED)
    assert {better for better, _ in comparison_charts.DIRECTIONS} >= {entry.metric.better for entry in COMPARED}
    assert {effect.effect for other in (INT4, FP16) for effect in compare(BF16, other).effects} <= set(LOOKS)


def test_the_files_and_their_words(tmp_path: Path) -> None:
    check_files(draw_comparisons([compare(BF16, INT4)], tmp_path / "one"), tmp_path / "one", ("ratios", "values"))
    ratios, values = (texts(tmp_path / "one" / f"{name}.svg") for name in ("ratios", "values"))
    for word in (
        "int4 against bf16 · ratios", "5 and 5 repetitions", "Welch's t test", "Higher is better →",
        "← Lower is better", "Output throughput", "1.33  (1.32 to 1.35)", "better", "not tested",
        "noise threshold of 1 %", "int4 ÷ bf16 (log scale)",
    ):  # fmt: skip
        assert word in ratios
    assert "worse" not in ratios
    for word in (
        "int4 against bf16 · values",
        "Output throughput · higher is better",
        "Time to first token, mean · lower is better",
        "tokens/s",
        "83.3",
    ):
        assert word in values
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {
        path.name: path.read_bytes() for path in draw_comparisons([compare(BF16, INT4)], tmp_path / "again")
    } == first


def test_ratios_and_intervals_are_those_of_the_comparison() -> None:
    comparison = compare(BF16, INT4, noise=0.02)
    with chart_style():
        [axes] = axes_of(comparison_charts._ratios_figure([comparison]))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    drawn = {labels[int(y[0])]: x[0] for x, y in points(axes)}
    assert drawn == {effect.entry.title: effect.ratio for effect in comparison.effects}
    rate = comparison.effect(RATE)
    [(low, high)] = [line.get_xdata() for line in axes.lines if list(line.get_ydata()) == [1, 1]]
    assert (low, high) == (rate.low, rate.high)
    assert labels[:3] == ["Higher is better →", "Output throughput", "← Lower is better"]
    assert axes.get_xscale() == "log"
    [shade] = axes.patches
    assert (shade.get_x(), shade.get_x() + shade.get_width()) == (pytest.approx(1 / 1.02), pytest.approx(1.02))


def test_a_metric_that_got_worse_is_red_and_one_that_did_not_change_is_grey() -> None:
    with chart_style():
        [axes] = axes_of(comparison_charts._ratios_figure([compare(INT4, BF16)]))
        [same] = axes_of(comparison_charts._ratios_figure([compare(BF16, FP16)]))
    assert len(points(axes, comparison_charts.RED)) == 5
    assert words(axes).count("worse") == 5
    assert len(points(same, GREY)) == 5
    low, high = same.get_xlim()
    assert low <= 1 / 1.03 and high >= 1.03  # a harmless difference looks harmless


def test_several_comparisons_stand_under_each_metric() -> None:
    with chart_style():
        [axes] = axes_of(comparison_charts._ratios_figure([compare(BF16, INT4), compare(BF16, FP16)]))
        bases = axes_of(comparison_charts._ratios_figure([compare(BF16, INT4), compare(FP16, INT4)]))[0]
    assert [label.get_text() for label in axes.get_yticklabels()][:8] == [
        "Higher is better →",
        "Output throughput",
        "int4",
        "fp16",
        "← Lower is better",
        "Time to first token, mean",
        "int4",
        "fp16",
    ]
    assert "int4 ÷ fp16" in {label.get_text() for label in bases.get_yticklabels()}


def test_many_comparisons_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_charts, "MOST_TOGETHER", 1)
    names = {path.stem for path in draw_comparisons([compare(BF16, INT4), compare(BF16, FP16)], tmp_path)}
    assert names == {"ratios_1", "ratios_2", "values_1", "values_2"}


def test_an_interval_beyond_the_axis_ends_in_an_arrow() -> None:
    wild = compare(result([1.0, 1.4]), dataclasses.replace(result([0.3, 0.6], "int4"), memory=MemoryStages()))
    rate = wild.effect(RATE)
    with chart_style():
        [axes] = axes_of(comparison_charts._ratios_figure([wild]))
    assert rate.high > axes.get_xlim()[1]
    arrows = [line for line in axes.lines if line.get_marker() == ">"]
    assert arrows and all(list(arrow.get_xdata()) == [axes.get_xlim()[1]] for arrow in arrows)
    assert f"({interval_text(rate)})" in " ".join(words(axes))


@pytest.mark.parametrize(("low", "high"), [(0.97, 1.03), (0.9, 1.4), (0.2, 1.7), (0.5, 40), (0.001, 2e5)])
def test_ticks_are_few_and_round(low: float, high: float) -> None:
    ticks = comparison_charts._ticks(low, high)
    assert 3 <= len(ticks) <= 9
    assert 1 in ticks
    assert low <= min(ticks) and max(ticks) <= high


def test_the_values_are_dots_in_the_order_measured_and_pairs_are_joined() -> None:
    a, b = in_processes([[f] * 2 for f in spread(1.0)]), in_processes([[f] * 2 for f in spread(0.75)], "int4")
    with chart_style():
        axes = axes_of(comparison_charts._values_figure(compare(a, b)))[0]
        joined = axes_of(comparison_charts._values_figure(compare(a, b, paired=True)))[0]
    effect = compare(a, b).effect(RATE)
    (x_a, y_a), (x_b, y_b) = points(axes)
    assert (y_a, y_b) == (list(effect.values_a), list(effect.values_b))
    assert len(y_a) == 5
    assert x_a == sorted(x_a) and max(x_a) < 0.5 < min(x_b)
    pairs = [list(line.get_ydata()) for line in joined.lines if list(line.get_xdata()) == [0, 1]]
    assert pairs == [list(pair) for pair in zip(effect.values_a, effect.values_b, strict=True)]
    assert not [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert words(axes) == ["83.3", "111"]


def test_single_values_have_no_interval_and_names_cannot_break_the_file(tmp_path: Path) -> None:
    strange = dataclasses.replace(BF16.cell, model="</text><script>$x_1$☃" + "long " * 40)
    single = dataclasses.replace(result([0.5], "int4"), cell=strange)
    comparison = compare(result([1.0]), single)
    check_files(draw_comparisons([comparison], tmp_path), tmp_path, ("ratios", "values"))
    check_files(draw_comparisons([comparison] * 2, tmp_path), tmp_path, ("ratios", "values_1", "values_2"))
    assert all(math.isfinite(effect.ratio) for effect in comparison.effects)
    assert "<script>" not in (tmp_path / "ratios.svg").read_text()


def test_nothing_to_draw_is_no_file(tmp_path: Path) -> None:
    empty = dataclasses.replace(compare(BF16, INT4), effects=())
    assert draw_comparisons([empty], tmp_path) == []
    assert draw_comparisons([], tmp_path) == []
