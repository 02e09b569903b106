"""The table of metrics: each place that it names has what it needs, and the reference page is the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_llmbench.records.metric import (
    Bars,
    Claim,
    Column,
    Compared,
    Entry,
    Gated,
    Goal,
    Line,
    Metric,
    Panel,
    Place,
    QualityBound,
    Tag,
    first_known,
)
from mlflow_llmbench.records.metrics import KEYS, METRICS, SECTIONS, SERIES, TPOT, TTFT, by_name, peak_memory, shown_in
from mlflow_llmbench.reports.metrics import metrics_markdown

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
PLACES = sorted(Place.__subclasses__(), key=lambda place: place.__name__)


def test_a_key_has_its_section_and_its_statistic() -> None:
    assert TTFT.key("p50") == "latency/ttft_ms_p50"
    assert TPOT.percentiles == (50, 95)
    with pytest.raises(KeyError, match="no statistic 'p99'"):
        TPOT.key("p99")


def test_every_key_is_that_of_one_metric() -> None:
    assert len(KEYS) == sum(len(metric.statistics) for metric in METRICS)
    assert {metric.section for metric in METRICS} == set(SECTIONS)
    assert not set(KEYS) & set(SERIES)


@pytest.mark.parametrize("place", PLACES)
def test_a_place_has_one_order_and_keys_that_exist(place: type[Place]) -> None:
    entries = shown_in(place)
    orders = [entry.place.order for entry in entries]
    assert orders == sorted(set(orders)), "two metrics of a place have the same order"
    assert {entry.key for entry in entries} <= set(KEYS)
    assert place.where
    assert entries


@pytest.mark.parametrize("place", [Line, Compared, Bars, Goal, QualityBound])
def test_a_place_that_uses_words_has_them(place: type[Place]) -> None:
    assert all(entry.words for entry in shown_in(place))


@pytest.mark.parametrize("place", [Compared, Gated, Goal, QualityBound, Bars, Claim])
def test_what_is_judged_has_a_better_direction(place: type[Place]) -> None:
    assert {entry.metric.better for entry in shown_in(place)} <= {"lower", "higher"}


def test_a_claim_is_about_cells_that_can_be_told_apart() -> None:
    assert all(entry.metric.tolerance is not None for entry in shown_in(Claim))


def test_the_place_overrides_the_metric() -> None:
    metric = Metric("memory", "x_gb", "", "GB", ("peak",), "lower", "peak x", "x GB")
    own, other = (Entry(metric, place) for place in (Column(1, "peak"), Line(1, "peak", "the x", unit="MB", scale=1e3)))
    assert (own.key, own.heading, own.words, own.title, own.unit, own.scale, own.name) == (
        "memory/x_gb_peak", "x GB", "peak x", "Peak x", "GB", 1.0, "memory/x_gb_peak"
    )  # fmt: skip
    assert (other.words, other.unit, other.scale) == ("the x", "MB", 1e3)
    assert Entry(Metric("trust", "y", "", "0–1"), Tag(1)).unit == ""


def test_metrics_of_one_name_stand_in_for_each_other() -> None:
    for place in (Claim, Gated, Panel, Bars):
        [peaks] = [entries for entries in by_name(place).values() if len(entries) > 1]
        assert [entry.key for entry in peaks][:2] == ["memory/device_gb_peak", "memory/host_needed_gb_peak"]
    assert peak_memory({"memory/host_needed_gb_peak": 2.0}) == 2.0
    assert peak_memory({"memory/host_needed_gb_peak": 2.0, "memory/device_gb_peak": 1.0}) == 1.0
    assert peak_memory({}) is None


def test_the_page_of_metrics_is_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == metrics_markdown(), (
        "docs/reference/metrics.md differs from the table of metrics. Write it again: make reference"
    )


def test_the_first_known_metric_of_a_name_is_shown() -> None:
    first, answer, other = (
        Entry(Metric("latency", name, "a time", statistics=("p50",)), Line(order, "p50", name=shared))
        for name, order, shared in (("ttft", 1, "latency"), ("e2e", 2, "latency"), ("rate", 3, ""))
    )
    every = [first, answer, other]
    assert first_known(every, lambda key: True) == [first, other]
    assert first_known(every, lambda key: "ttft" not in key) == [answer, other]
    assert first_known(every, lambda key: False) == []
