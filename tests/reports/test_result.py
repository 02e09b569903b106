"""The tables of a result, and the texts of commands about versions."""

from __future__ import annotations

import math

from mlflow_llmbench.records.text import finite
from mlflow_llmbench.reports.result import statistics_cells
from mlflow_llmbench.reports.versions import format_logged, format_promoted, format_registered
from tests.analysis.test_summary import result


def test_the_table_of_statistics() -> None:
    heading, body = statistics_cells(result([[f] * 3 for f in (1.0, 2.0, 3.0, 4.0, 10.0)], rows=1))
    assert heading == [
        "metric",
        "values",
        "mean",
        "95 % interval (t)",
        "median",
        "95 % interval (bootstrap)",
        "sd",
        "MAD",
    ]
    [e2e] = [line for line in body if line[0] == "latency/e2e_ms"]
    assert e2e[1:5] == ["5 repetitions", "22.00", "6.855 to 37.15", "19.00"]
    assert e2e[6:] == ["10.61", "3.000"]
    assert body[-1] == ["steps/itl_ms", "3 tokens", "3.000", "–", "3.000", "–", "0", "0"]
    once = statistics_cells(result([[1.0] * 3]))[1]
    assert once[0][1] == "1 repetition"
    assert once[0][3] == once[0][5] == once[0][6] == "–"
    assert statistics_cells(result([])) == (heading, [])


def test_a_registered_version_says_how_to_serve_it() -> None:
    assert format_registered("models:/a/b/7", "candidate", "f00d", new=True) == (
        "Registered models:/a/b/7, alias candidate. Its evidence is the run f00d.\n"
        "Serve it: mlflow models serve -m models:/a/b@candidate --env-manager local"
    )
    assert format_registered("models:/m/7", "x", "f00d", new=False).startswith("Already registered as models:/m/7,")


def test_a_promotion_names_the_way_back() -> None:
    assert format_promoted("models:/bot/1", None) == (
        "models:/bot/1 is the champion of bot. It is the first, so there was nothing to gate it against."
    )
    [champion, back] = format_promoted("models:/bot/3", "2").splitlines()
    assert champion == "models:/bot/3 is the champion of bot."
    assert back.startswith("Version 2 is kept as previous. To go back: ")
    assert back.endswith("promote models:/bot@previous")


def test_a_recommendation_that_cannot_be_logged_names_the_store_without_its_password() -> None:
    text = format_logged(None, "https://user:hunter2@host/", "20260101T000000Z-abcdef")
    assert text.endswith("has no run of the sweep 20260101T000000Z-abcdef.") and "hunter2" not in text
    assert format_logged("f00d", "sqlite://", "s") == "Logged on run f00d: recommendation.md."
    assert format_logged("f00d", "sqlite://", "s", "Why.") == "Logged on run f00d: recommendation.md. Why."


def test_only_numbers_that_json_has_are_written() -> None:
    assert [finite(value) for value in (1.5, math.inf, -math.inf, math.nan, 3, "inf", None)] == [
        1.5, None, None, None, 3, "inf", None,
    ]  # fmt: skip
