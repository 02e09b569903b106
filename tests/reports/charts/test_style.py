"""Style shared by all charts: a legend that fits stands under the subtitle, a longer one in rows at the bottom."""

from __future__ import annotations

from typing import Any

import pytest

from mlflow_llmbench.reports.charts.style import chart_style, new_figure, put_legend


@pytest.mark.parametrize(("entries", "rows"), [(3, 1), (12, 2)])
def test_no_entry_of_a_legend_is_cut_off(entries: int, rows: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with chart_style():
        figure, (axes,) = new_figure("title", "subtitle")
        for number in range(entries):
            axes.plot([0, 1], [number, number], label=f"model-{number} int4")
        put_legend(figure, axes.get_legend_handles_labels()[0])
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        [legend] = figure.legends
        places = [text.get_window_extent(canvas.get_renderer()) for text in legend.get_texts()]
    assert all(figure.bbox.x0 <= place.x0 and place.x1 <= figure.bbox.x1 for place in places)
    assert len({round(place.y0) for place in places}) == rows


def test_without_entries_there_is_no_legend() -> None:
    with chart_style():
        figure, _ = new_figure("title", "subtitle")
        put_legend(figure, [])
    assert figure.legends == []


def test_a_label_wider_than_the_figure_is_shortened_and_rows_are_read_from_left_to_right() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with chart_style():
        figure, (axes,) = new_figure("title", "subtitle")
        height = figure.get_figheight()
        for number in range(3):
            axes.plot([0, 1], [number, number], label=f"{number}: {'a very long name of a group ' * 9}")
        put_legend(figure, axes.get_legend_handles_labels()[0])
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        [legend] = figure.legends
        places = [text.get_window_extent(canvas.get_renderer()) for text in legend.get_texts()]
    assert all(place.x1 <= figure.bbox.x1 for place in places)
    assert [text.get_text()[:2] for text in legend.get_texts()] == ["0:", "1:", "2:"]
    assert all(text.get_text().endswith("…") for text in legend.get_texts())
    assert figure.get_figheight() > height  # the axes keep their size
