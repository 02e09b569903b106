"""The table of charts: a module that declares a chart is enough to have it drawn, or its absence explained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from mlflow_llmbench.reports.charts import catalogue
from mlflow_llmbench.reports.charts.catalogue import Subject, charts_of, draw_charts

NEW_CHART = '''
"""A chart."""

from .catalogue import Chart
from .style import new_figure


def _stamps(result):
    if not result:
        return "nothing was measured"
    figure, (axes,) = new_figure("stamps", "as measured")
    axes.plot(result)
    return figure


CHARTS = (Chart("stamps", "cell", _stamps, "Stamps as measured."), Chart("never", "cell", lambda _: "never is late"))
'''


@pytest.fixture
def folder_of_one_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the table see, beside the style, a single module with a chart."""
    package = tmp_path / "charts_of_one"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "stamps.py").write_text(NEW_CHART)
    for name in ("style", "catalogue"):
        monkeypatch.setitem(sys.modules, f"charts_of_one.{name}", sys.modules[f"{catalogue.__package__}.{name}"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(catalogue, "__package__", "charts_of_one")
    monkeypatch.setattr(catalogue, "__file__", str(package / "catalogue.py"))
    charts_of.cache_clear()
    yield
    charts_of.cache_clear()


@pytest.mark.usefixtures("folder_of_one_chart")
def test_a_new_module_is_all_that_a_chart_needs(tmp_path: Path) -> None:
    drawn = draw_charts("cell", [1.0, 2.0], tmp_path)
    assert [file.name for file in drawn.files] == ["stamps.svg"]
    assert drawn.missing == (("never", "never is late"),)
    assert draw_charts("cell", [], tmp_path / "none").missing[0] == ("stamps", "nothing was measured")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("subject", get_args(Subject))
def test_charts_of_a_subject_have_names_of_their_own(subject: Subject) -> None:
    names = [chart.name for chart in charts_of(subject)]
    assert names
    assert len(names) == len(set(names))


def test_every_figure_of_a_study_has_a_caption() -> None:
    assert [chart.name for chart in charts_of("study") if not chart.caption] == []
