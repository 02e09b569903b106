"""The search for the highest rate within the SLOs: the next rate, the result, and whole runs to MLflow."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_llmbench.analysis import goodput
from mlflow_llmbench.analysis.goodput import RateTrial, knee, next_cell, next_rate, share_interval
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.cli.main import main
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import RunResult
from mlflow_llmbench.reports.charts.catalogue import draw_charts
from mlflow_llmbench.reports.charts.load import load_figures
from mlflow_llmbench.reports.charts.sweep import SweepPoint, SweepPoints

from ..measure.test_online import CELL, MS, request, result
from ..null_server import null_server

ONLINE = {"backend": "openai", "url": "http://h"}


def tried(rate: float | None, share: float, half: float = 0.0, trusted: bool = True) -> RateTrial:
    return RateTrial(rate, rate or 10.0, share, max(0.0, share - half), min(1.0, share + half), trusted, 10.0)


def search(share_at: Callable[[float], float], first: float | None = None) -> list[RateTrial]:
    """Run the whole search on a server whose share of good requests is a function of the rate."""
    found = [tried(None, 1.0)] if first is None else [tried(first, share_at(first))]
    while (rate := next_rate(found, 0.9)) is not None:
        found.append(tried(rate, share_at(rate)))
    return found


def test_rates_are_doubled_and_then_halved_between() -> None:
    found = search(lambda rate: 1.0 if rate <= 37 else 0.2)
    assert [one.rate for one in found][:5] == [None, 10, 20, 40, 28.3]
    good = [one.rate for one in found if one.rate and one.share == 1]
    bad = [one.rate for one in found if one.rate and one.share < 1]
    assert 37 / (1 + goodput.RESOLUTION) <= max(good) <= 37 < min(bad) <= max(good) * (1 + goodput.RESOLUTION)
    assert len(found) < 10


def test_a_first_rate_that_is_too_high_is_halved() -> None:
    found = search(lambda rate: 1.0 if rate <= 3 else 0.0, first=50)
    assert [one.rate for one in found][:6] == [50, 25, 12.5, 6.25, 3.12, 1.56]
    assert goodput._ends(found, 0.9)[0] == pytest.approx(3, rel=goodput.RESOLUTION)


def test_a_search_ends_where_no_rate_is_met_and_where_none_is_too_high() -> None:
    assert [one.rate for one in search(lambda _: 0.0, first=64)] == [64, 32, 16, 8, 4, 2, 1]
    assert len(search(lambda _: 1.0)) == goodput.MOST_RATES + 1
    assert next_rate([tried(None, 0.5)], 0.9) is None  # not even one user alone
    assert next_rate([], 0.9) is None


def test_what_the_client_could_not_send_is_not_met() -> None:
    found = [tried(10, 1.0), tried(20, 1.0, trusted=False)]
    assert next_rate(found, 0.9) == 14.1
    assert goodput._ends(found, 0.9) == (10, 20)


def test_the_interval_of_a_share() -> None:
    p, low, high = share_interval([(12, 12)] * 5) or (0, 0, 0)
    assert (p, high) == (1.0, 1.0)
    assert low == pytest.approx(0.9398, abs=1e-4)  # Wilson for 60 of 60: 60 ÷ (60 + 1.96²)
    p, low, high = share_interval([(10, 10), (5, 10), (10, 10), (5, 10), (10, 10)]) or (0, 0, 0)
    assert p == 0.8
    assert (low, high) == (pytest.approx(0.46, abs=0.01), 1.0)  # Student's over repetitions is wider than Wilson's
    assert share_interval([(0, 0)]) is None


def test_the_knee_is_where_the_power_is_highest() -> None:
    """M/M/1: latency 1 ÷ (1 − load), so the power load · (1 − load) is highest at half of the capacity."""
    assert knee({load / 10: 1 / (1 - load / 10) for load in range(1, 10)}) == 0.5
    assert knee({1: 10, 2: 10, 3: 10}) is None  # it lies beyond
    assert knee({1: 10, 2: 10}) is None


def measured(rate: float | None, ttft_ms: float, **more: Any) -> RunResult:
    cell = dataclasses.replace(CELL, concurrency=1, request_rate=rate, slo_ttft_ms=20.0, **more)
    sent = [n * 1000 / (rate or 10) for n in range(12)]
    return result(
        *[request(t, t + ttft_ms, t + ttft_ms + 10, t + ttft_ms + 20, intended_ns=int(t * MS)) for t in sent], cell=cell
    )


def test_what_was_found_is_told_with_its_ends() -> None:
    results = [measured(None, 10), measured(10, 11), measured(20, 12), measured(40, 200), measured(28.3, 100)]
    [limit] = goodput.limits(results, 0.9)
    assert (limit.rate, limit.low, limit.high) == (20, 20, 28.3)
    assert limit.figures()["goodput/limit_requests_per_s"] == 20
    assert limit.sentence().startswith(
        "Goodput: 20 requests per second meet TTFT ≤ 20 ms for 90% of the requests (surely up to 20, surely not at "
        "28.3)."
    )
    nothing = goodput.limits([measured(None, 100)], 0.9)[0]
    assert (
        nothing.sentence()
        == "No rate that was tried meets TTFT ≤ 20 ms for 90% of the requests; at best 0% of them met it."
    )
    assert "goodput/limit_requests_per_s" not in nothing.figures()


def test_each_configuration_has_its_own_search() -> None:
    found = [measured(None, 10), measured(None, 10, prompt_tokens=20)]
    following = next_cell(found, 0.9)
    assert following is not None
    assert following.prompt_tokens == 10
    assert following.request_rate == pytest.approx(summarize(found[0])["throughput/requests_per_s"], rel=0.01)
    done = [found[0], *(measured(rate, 100) for rate in (10, 5, 2.5, 1.25, 0.625, 0.312, 0.156)), found[1]]
    assert (next_cell(done, 0.9) or Cell()).prompt_tokens == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"find": "goodput"}, "find=goodput searches for the highest rate that meets limits, and none is given"),
        (
            {"find": "goodput", "slo_ttft_ms": "9", "concurrency": "4"},
            "find=goodput searches among rates of an open loop, and concurrency is another load",
        ),
        ({"find": "goodputs"}, "Unknown find: goodputs. Did you mean goodput?"),
        ({"slo": "llama4"}, "Unknown slo: llama4."),
    ],
)
def test_a_search_that_cannot_be_is_refused_by_one_line(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse({**ONLINE, **settings})
    assert str(error.value).startswith(message)


def test_the_limits_of_a_benchmark() -> None:
    spec = parse({**ONLINE, "slo": "llama3.1-8b", "slo_ttft_ms": "300", "slo_tpot_ms": "none"})
    assert (spec.axes["slo_ttft_ms"], spec.axes["slo_tpot_ms"], spec.axes["slo_e2e_ms"]) == ((300,), (100,), (None,))


def test_latency_against_throughput_is_drawn(tmp_path: Path) -> None:
    results = [measured(None, 10), measured(10, 11), measured(20, 12), measured(40, 200)]
    points = [SweepPoint(one.cell, summarize(one)) for one in results]
    drawn = draw_charts("sweep", SweepPoints(points, 0.9), tmp_path).files
    assert {"load.svg", "load.png"} <= {file.name for file in drawn}
    text = (tmp_path / "load.svg").read_text()
    for word in ("latency against throughput", "Time to first token (ms)", "20/s", "c1", "limit"):
        assert word in text
    assert load_figures(SweepPoints(points[:2], 0.9)) == "it needs 3 loads of one server"


def test_a_search_that_one_user_alone_ends(store_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = "null:ttft_ms=10+itl_ms=1"
    with null_server(model) as url:
        arguments = f"online --url {url} --model {model} --find goodput --slo-ttft-ms 1 --output-tokens 4".split()
        arguments += "--prompt-tokens 8 --requests 4 --repetitions 5 --warmup 1".split()
        assert main([*arguments, "--tracking-uri", store_uri]) == 0
    assert (
        "No rate that was tried meets TTFT ≤ 1 ms for 90% of the requests; at best 0% of them met it."
        in capsys.readouterr().out
    )
    client = MlflowClient(store_uri)
    runs = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    assert len(runs) == 2 and not any("request_rate" in one.data.params for one in runs)
    assert not any("goodput/limit_requests_per_s" in one.data.metrics for one in runs)


@pytest.mark.charts
@pytest.mark.slow
def test_a_search_is_runs_in_mlflow(store_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two requests at once take 40 ms each, so above 50 per second the queue grows."""
    model = "null:ttft_ms=10+itl_ms=10+slots=2"
    with null_server(model) as url:
        arguments = f"online --url {url} --model {model} --find goodput --slo-ttft-ms 150 --output-tokens 4".split()
        arguments += "--prompt-tokens 8 --requests 40 --repetitions 5 --warmup 1 --arrival constant".split()
        assert main([*arguments, "--request-rate", "20", "--tracking-uri", store_uri]) == 0
    told = capsys.readouterr().out
    assert "Goodput: " in told
    client = MlflowClient(store_uri)
    runs = client.search_runs([client.get_experiment_by_name("llmbench").experiment_id])
    [parent] = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
    cells = {one.data.params["request_rate"]: one for one in runs if "mlflow.parentRunId" in one.data.tags}
    assert {"20", "40", "80"} <= set(cells)
    limit = parent.data.metrics["goodput/limit_requests_per_s"]
    assert limit in {float(rate) for rate in cells}
    assert 20 <= limit < 80
    assert parent.data.metrics["goodput/limit_requests_per_s_high"] > limit
    assert cells["80"].data.metrics["goodput/attainment_ratio"] < 0.9
    assert cells["80"].data.metrics["latency/ttft_ms_p50"] > 3 * cells["20"].data.metrics["latency/ttft_ms_p50"]
    found = json.loads(Path(client.download_artifacts(parent.info.run_id, "goodput.json", str(tmp_path))).read_text())
    assert found["limits"][0]["rate"] == limit
    assert found["limits"][0]["sentence"] in told
    assert {file.path for file in client.list_artifacts(parent.info.run_id, "charts")} >= {
        "charts/load.svg",
        "charts/load.png",
    }
    assert set(parent.data.params["request_rate"].split(",")) == set(cells)
    assert all(one.info.status == "FINISHED" for one in runs)
