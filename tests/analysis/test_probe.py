"""A doubtful bandwidth withholds MBU, says why, and never makes a run invalid."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from mlflow_llmbench.analysis import efficiency, probe
from mlflow_llmbench.analysis.summary import summarize
from mlflow_llmbench.analysis.verdict import judge
from mlflow_llmbench.records.noise import Noise
from mlflow_llmbench.records.results import LoadInfo, RunResult
from mlflow_llmbench.reports.result import report_markdown

from ..results import GB, made

GOOD = {"read_agreement_ratio": 0.99, "flops_agreement_ratio": 0.98, "probe_others_cpus": 0.02}
MBU, MFU, BANDWIDTH = "efficiency/mbu_ratio", "efficiency/mfu_ratio", "efficiency/bandwidth_gb_per_s"


def decoded(gb_per_s: float, evidence: dict[str, float], **fields: Any) -> RunResult:
    """Half a GB read in each step of 10 ms: 50 GB/s. The probe measured `gb_per_s`."""
    load = LoadInfo(1.0, weight_bytes=GB, step_bytes=GB // 2, flops_per_token=1e9)
    peaks = {probe.READ: gb_per_s * 1e9, probe.FLOPS: 1e12, **evidence}
    return dataclasses.replace(made(factors=[1.0] * 5), load=load, peaks=peaks, **fields)


def codes(one: RunResult) -> list[str]:
    return [reason.code for reason in judge(one, summarize(one)).reasons]


def test_a_trusted_probe_gives_mbu_and_its_bandwidth() -> None:
    for evidence in (GOOD, {}):  # earlier versions recorded none
        one = decoded(100.0, evidence)
        assert summarize(one)[MBU] == pytest.approx(0.5)
        assert summarize(one)[BANDWIDTH] == 100
        assert codes(one) == [] and efficiency.utilization_doubt(one) is None


@pytest.mark.parametrize(
    ("evidence", "why"),
    [
        ({"read_agreement_ratio": 0.7}, "its two best rounds differ by 30% (limit 5%)"),
        ({"probe_others_cpus": 1.0}, "others used 1.00 CPUs while it ran (limit 0.10)"),
        ({"probe_waiting_ratio": 0.4}, "it waited for a CPU for 0.4 s in each second (limit 0.05)"),
    ],
)
@pytest.mark.parametrize("measured", [70.0, 5.0])
def test_a_doubtful_probe_withholds_mbu_and_says_why(evidence: dict[str, float], why: str, measured: float) -> None:
    """70 GB/s would make an MBU of 0.71, 5 GB/s one of 10: neither is shown, and the run stays valid."""
    one = decoded(measured, GOOD | evidence)
    metrics = summarize(one)
    assert MBU not in metrics and metrics[BANDWIDTH] == measured
    assert codes(one) == []
    report = report_markdown(one, metrics, judge(one, metrics))
    assert f"MBU is left out, because the bandwidth of {measured:.3g} GB/s is doubtful: {why}." in report
    given = dataclasses.replace(one, nominal_bandwidth=100.0)
    assert summarize(given)[MBU] == pytest.approx(0.5) and summarize(given)[BANDWIDTH] == measured
    assert (MFU in metrics) == ("read_agreement_ratio" in evidence)


def test_a_probe_that_measured_too_little_is_suspect_and_a_nominal_bandwidth_exceeded_is_invalid() -> None:
    one = decoded(5.0, GOOD)
    assert MBU not in summarize(one)
    verdict = judge(one, summarize(one))
    assert (verdict.word, [r.code for r in verdict.reasons]) == ("suspect", ["bandwidth_doubtful"])
    assert verdict.reasons[0].sentence.startswith("The decode would have read 10.00 times the bandwidth of 5 GB/s")
    beyond = dataclasses.replace(one, nominal_bandwidth=5.0)
    assert summarize(beyond)[MBU] == pytest.approx(10)
    assert (judge(beyond, summarize(beyond)).word, codes(beyond)) == ("invalid", ["mbu_above_one"])


@pytest.mark.parametrize("name", ["read_agreement_ratio", "probe_others_cpus", "probe_waiting_ratio"])
def test_evidence_that_is_no_number_is_none(name: str) -> None:
    assert codes(decoded(100.0, GOOD | {name: math.nan})) == []
    broken = decoded(math.nan, GOOD)
    assert MBU not in summarize(broken) and BANDWIDTH not in summarize(broken) and codes(broken) == []


def test_the_evidence_of_what_happened_beside_a_probe() -> None:
    quiet = probe.evidence(Noise(2.0, steal_s=0.0, own_cpu_s=2.0, busy_cpu_s=2.01, run_delay_s=0.01))
    assert quiet == {"probe_others_cpus": 0.0, "probe_waiting_ratio": 0.005}
    busy = probe.evidence(Noise(2.0, steal_s=0.2, own_cpu_s=1.0, busy_cpu_s=3.0))
    assert busy["probe_others_cpus"] == pytest.approx(1.1, abs=0.02)
    assert probe.evidence(Noise(2.0)) == {}
