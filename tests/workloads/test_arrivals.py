"""Schedules of open loops: the requested rate and burstiness, and the same times for the same seed."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest

from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.workloads.arrivals import arrival_times_ns, request_count


def cell(**settings: Any) -> Cell:
    return Cell(**{"url": "http://h", "backend": "openai"} | settings)


def times(repetition: int = 0, **settings: Any) -> tuple[int, ...]:
    found = arrival_times_ns(cell(**settings), repetition)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("arrival", "burstiness", "variation"),
    [("constant", 1, 0), ("poisson", 1, 1), ("gamma", 0.25, 2), ("gamma", 4, 0.5)],
)
def test_gaps_have_the_asked_rate_exactly_and_their_own_variation(
    arrival: str, burstiness: float, variation: float
) -> None:
    found = times(request_rate=50, requests=5001, arrival=arrival, burstiness=burstiness)
    gaps = [b - a for a, b in pairwise(found)]
    assert found[0] == 0
    assert found[-1] == pytest.approx(100e9, abs=1)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(variation, rel=0.08, abs=1e-6)
    assert min(gaps) >= 0


def test_poisson_is_gamma_of_shape_one_and_ends_are_spread() -> None:
    gaps = sorted(b - a for a, b in pairwise(times(request_rate=10, requests=4001)))
    assert gaps[2000] / 1e8 == pytest.approx(0.693, rel=0.06)  # the median of an exponential: ln 2


def test_a_seed_gives_the_same_times_in_every_process_and_repetitions_differ() -> None:
    first = times(request_rate=7, requests=20, seed=3)
    assert first == times(request_rate=7, requests=20, seed=3)
    assert len({first, times(1, request_rate=7, requests=20, seed=3), times(request_rate=7, requests=20, seed=4)}) == 3
    code = (
        "from mlflow_llmbench.workloads.arrivals import arrival_times_ns; "
        "from mlflow_llmbench.records.cell import Cell; "
        "print(arrival_times_ns(Cell(url='http://h', request_rate=7.0, requests=20, seed=3), 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.stdout.strip() == str(first)


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 12),
        ({"concurrency": 16}, 64),
        ({"requests": 5}, 5),
        ({"duration_s": 9.0}, None),
        ({"request_rate": 5.0}, 51),
        ({"request_rate": 0.1}, 12),
        ({"request_rate": 5.0, "duration_s": 2.0}, 11),
        ({"request_rate": 5.0, "duration_s": 2.0, "requests": 3}, 3),
        ({"request_rate": 5.0, "duration_s": 2.0, "requests": 300}, 11),
        ({"request_rate": 0.1, "duration_s": 2.0}, 1),
    ],
)
def test_how_many_requests_a_repetition_has(settings: dict[str, Any], count: int | None) -> None:
    assert request_count(cell(**settings)) == count
    if "request_rate" in settings:
        assert len(times(**settings)) == count
    else:
        assert arrival_times_ns(cell(**settings), 0) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"url": "http://h"},
            "url is given, and backend=transformers runs the model in this process. Add backend=openai",
        ),
        ({"backend": "openai"}, "backend=openai needs the address of a server. Give url="),
        ({"concurrency": "4"}, "concurrency has a meaning only if a server is measured."),
        ({"url": "http://h", "backend": "openai", "concurrency": "4", "request_rate": "2"}, "Give one of them."),
        ({"url": "http://h", "backend": "openai", "burstiness": "2"}, "Add arrival=gamma."),
        ({"url": "http://h", "backend": "openai", "quant": "int4"}, "are the server's own settings"),
        ({"url": "http://user:secret@h", "backend": "openai"}, "url has a user, a password or a query"),
        ({"url": "http://h?key=secret", "backend": "openai"}, "url has a user, a password or a query"),
        ({"url": "ftp://h", "backend": "openai"}, "url is not a server's address: ftp://h."),
        ({"url": "http://h:99999", "backend": "openai"}, "url is not a server's address"),
        ({"url": "http://", "backend": "openai"}, "url is not a server's address"),
        ({"url": "http://a..b:8000", "backend": "openai"}, "url is not a server's address"),
        ({"url": f"http://{'a' * 64}.example.com", "backend": "openai"}, "url is not a server's address"),
        ({"url": "http://h", "backend": "openai", "arrival": "weekly"}, "Unknown arrival: weekly."),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(given)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_url_may_have_its_version_and_a_slash() -> None:
    assert parse({"url": "https://h/api/v1/", "backend": "openai"}).axes["url"] == ("https://h/api",)


def test_the_rate_of_a_ramp_rises_evenly() -> None:
    found = times(request_rate=10.0, ramp_to=50.0, duration_s=100.0, arrival="constant")
    assert (len(found), found[0]) == (3001, 0)
    assert found[-1] == pytest.approx(100e9, abs=2)
    # 10 t + 40 t²/200 requests until t: 300 in the first quarter of the time, 1 + 12.5 % of it at half.
    for seconds in (25, 50, 75):
        assert sum(at <= seconds * 1e9 for at in found) == pytest.approx(10 * seconds + 0.2 * seconds**2, abs=1.01)
    gaps = [b - a for a, b in pairwise(found)]
    assert (gaps[0] / 1e9, gaps[-1] / 1e9) == (pytest.approx(1 / 10, rel=0.03), pytest.approx(1 / 50, rel=0.03))
    assert gaps == sorted(gaps, reverse=True)


def test_a_ramp_of_random_gaps_is_seeded_ordered_and_as_long_as_asked() -> None:
    settings = {"request_rate": 1.0, "ramp_to": 9.0, "requests": 501, "seed": 5}
    found = times(**settings)
    assert found == times(**settings) != times(1, **settings)
    assert list(found) == sorted(found)
    assert found[-1] == pytest.approx(100e9, abs=2)  # 500 gaps at 5 per second on average
    assert sum(at < 50e9 for at in found) == pytest.approx(150, abs=45)  # t + 0.04 t² at 50 s


def test_a_ramp_that_does_not_rise_is_a_constant_rate() -> None:
    assert times(request_rate=4.0, ramp_to=4.0, requests=21) == times(request_rate=4.0, requests=21)


@pytest.mark.parametrize(
    ("rate", "message"),
    [("none", "request_rate, where it begins, is none"), ("2,10", "is 2,10. Give a lower"), ("12", "is 12.")],
)
def test_a_ramp_begins_below_its_end(rate: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse({"url": "http://h", "backend": "openai", "request_rate": rate, "ramp_to": "10"})
    assert message in str(caught.value)
