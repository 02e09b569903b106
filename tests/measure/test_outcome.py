"""Memory of a load from the events of its worker and the samples of its parent."""

from __future__ import annotations

from mlflow_llmbench.backends.base import DeviceMemory
from mlflow_llmbench.measure.events import CellBegun, Event, JobFailed, ModelLoaded, Stage, StageMemory
from mlflow_llmbench.measure.outcome import GroupOutcome, stages_of
from mlflow_llmbench.records.results import LoadInfo, MemorySample
from mlflow_llmbench.system.memory import HostMemory

S = 10**9
SAMPLES = [(0, 90, 80), (1, 200, 150), (2, 700, 610), (3, 900, 400), (4, 450, 300), (5, 990, 980)]
"""Second, resident and anonymous bytes: anonymous memory is highest before resident memory is."""


def told(*events: Event) -> GroupOutcome:
    found = GroupOutcome(samples=[MemorySample(t * S, rss, anonymous) for t, rss, anonymous in SAMPLES])
    for event in (StageMemory("baseline", HostMemory(90, 80, 90), t_ns=S // 2), Stage("loading", t_ns=S), *events):
        found.take(event)
    return found


def test_the_peak_of_a_load_lies_between_its_beginning_and_its_end() -> None:
    found = told(
        ModelLoaded(LoadInfo(3.0, mapped_weight_bytes=7), t_ns=4 * S),
        StageMemory("loaded", HostMemory(450, 300, 950), DeviceMemory(100, 40, 90), t_ns=4 * S),
        CellBegun(0, t_ns=5 * S),
    )
    stages = stages_of(found, 0)
    assert (stages.host_rss["loading"], stages.host_rss["loaded"]) == (950, 450)  # the kernel's own peak
    assert (stages.host_needed["loading"], stages.host_needed["loaded"]) == (617, 307)
    assert stages.device["loading"] > stages.device["loaded"]


def test_a_load_that_failed_has_the_peak_until_then() -> None:
    found = told(JobFailed("oom", "OutOfMemory", "Memory ran out.", t_ns=5 * S))
    stages = stages_of(found, 0)
    assert (stages.host_rss["loading"], stages.host_needed["loading"]) == (990, 980)


def test_without_a_beginning_or_samples_there_is_no_peak() -> None:
    assert "loading" not in stages_of(GroupOutcome(samples=told().samples), 0).host_needed
    begun = GroupOutcome()
    begun.take(Stage("loading", t_ns=S))
    assert "loading" not in stages_of(begun, 0).host_rss
