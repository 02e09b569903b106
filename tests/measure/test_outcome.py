"""Memory of a load from the events of its worker and the samples of its parent."""

from __future__ import annotations

from mlflow_llmbench.backends.base import DeviceMemory
from mlflow_llmbench.measure.events import (
    CellBegun,
    CellMeasured,
    Event,
    JobFailed,
    MeasuringBegun,
    ModelLoaded,
    Stage,
    StageMemory,
)
from mlflow_llmbench.measure.outcome import Clock, GroupOutcome, stages_of, timeline_of
from mlflow_llmbench.records.results import CellMeasurements, LoadInfo, MemorySample, Repetition, RequestRecord
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


def repetition(index: int, begin_s: int, end_s: int) -> Repetition:
    return Repetition(index, 0, (RequestRecord(begin_s * S, (begin_s * S + S // 2, end_s * S)),))


def measured_twice(peak: HostMemory, device: DeviceMemory | None = None) -> GroupOutcome:
    """A cell of seconds 4 to 11 in a load of 20 s: repetitions of 5 to 7 and of 8 to 10 s; a sample each second."""
    found = GroupOutcome(samples=[MemorySample(t * S, 100 + t, 50 + t) for t in range(21)])
    for event in (
        Stage("loading", t_ns=S),
        ModelLoaded(LoadInfo(1.0, mapped_weight_bytes=7), t_ns=2 * S),
        StageMemory("loaded", HostMemory(102, 52, 102), t_ns=2 * S),
        CellBegun(0, t_ns=3 * S),
        MeasuringBegun(0, t_ns=4 * S),
        CellMeasured(
            0, CellMeasurements(1.0, (), True, (repetition(0, 5, 7), repetition(1, 8, 10)), ()), texts=None, t_ns=10 * S
        ),
        StageMemory("peak", peak, device, t_ns=11 * S),
    ):
        found.take(event)
    return found


def test_the_steady_memory_is_that_of_the_second_half_of_the_last_repetition() -> None:
    """The samples at 9 and 10 s; the peak is that of the kernel, with the file pages of the end taken off."""
    stages = stages_of(measured_twice(HostMemory(105, 60, 300), DeviceMemory(1, 300, 400, 500)), 0)
    assert (stages.host_rss["steady"], stages.host_needed["steady"]) == (109, 59 + 7)
    assert (stages.host_rss["peak"], stages.host_needed["peak"]) == (300, 300 - (105 - 60) + 7)
    assert (stages.device["peak"], stages.device["steady"], stages.device_reserved_peak) == (600, 500, 400)
    sampled = stages_of(measured_twice(HostMemory(105, 60, None)), 0)  # a kernel without a peak: the highest sample
    assert (sampled.host_rss["peak"], sampled.host_needed["peak"]) == (111, 61 + 7)


def test_the_timeline_has_the_load_the_cell_and_the_end_but_no_other_cell() -> None:
    found = measured_twice(HostMemory(105, 60, 300))
    assert [one.t_ns // S for one in timeline_of(found, 0)] == [0, 1, 2, *range(4, 12), 19, 20]
    failed = told(
        StageMemory("loaded", HostMemory(450, 300, 950), t_ns=2 * S),
        CellBegun(0, t_ns=4 * S),
        JobFailed("oom", "OutOfMemory", "Memory ran out.", t_ns=5 * S),
    )
    assert [one.t_ns // S for one in timeline_of(failed, 0)] == [0, 1, 2, 4, 5]
    assert (stages_of(failed, 0).host_rss["peak"], stages_of(failed, 0).host_needed["peak"]) == (990, 980)


def test_a_cell_is_dated_by_the_clock_of_its_worker_as_far_as_it_is_known() -> None:
    """The first cell has the start and the load; a later one begins when the worker turns to it."""
    found = measured_twice(HostMemory(105, 60, 300))
    assert found.dates_ms(0) == found.dates_ms(1) == (None, None)  # journals of earlier versions have no clock
    found.clock = Clock(50_000, S)
    assert found.dates_ms(0) == (50_000, 59_000)
    assert found.dates_ms(1) == (None, None)
    found.take(CellBegun(1, t_ns=12 * S))
    found.take(MeasuringBegun(1, t_ns=13 * S))
    assert found.dates_ms(1) == (61_000, None)
    assert GroupOutcome(clock=found.clock).dates_ms(0) == (50_000, None)
