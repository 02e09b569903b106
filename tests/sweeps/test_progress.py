"""The exact progress display, driven by a scripted clock and the worker's own events."""

import io
import os
import time
from pathlib import Path

import pytest

from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.measure.events import (
    CellBegun,
    CellMeasured,
    Event,
    GroupBegun,
    JobEnded,
    JobFailed,
    ModelLoaded,
    PeaksMeasured,
    RepetitionEnded,
    Stage,
    StageMemory,
    WarmupEnded,
)
from mlflow_llmbench.measure.supervise import run_worker
from mlflow_llmbench.measure.task import WorkerJob
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import LoadInfo
from mlflow_llmbench.sweeps.progress import STAGES, WRITES_PER_S, Progress, duration, rough_duration
from mlflow_llmbench.system.memory import HostMemory

HOST = HostMemory(1000, 800)
STARTED = [Stage("starting"), PeaksMeasured({}, None), StageMemory("baseline", HOST)]
LOADING = Stage("loading")
LOADED = [ModelLoaded(LoadInfo(3.21)), StageMemory("loaded", HOST)]
PEAK = StageMemory("peak", HOST)
UNLOADED = StageMemory("unloaded", HOST)
FAILED = JobFailed("oom", "OutOfMemory", "Memory ran out.")
END = JobEnded(())


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")


def warmup(number: int, seconds: float = 1.0) -> Event:
    return WarmupEnded(number, 12, seconds, number_of_cell=0)


def repetition(number: int, limit: int = 30) -> Event:
    return RepetitionEnded(number, limit, number_of_cell=0)


def screen(written: str) -> list[str]:
    """Return the lines on a terminal of endless width after these characters, without trailing spaces."""
    lines = [""]
    column = 0
    for character in written:
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


class Shown:
    """A display on a terminal, and the text that it wrote at each event after `seconds`."""

    def __init__(self, total: int) -> None:
        self.clock, self.stream = Clock(), Terminal()
        self.progress = Progress(self.stream, self.clock)
        self.progress.start(total)

    def after(self, seconds: float, *events: Event) -> str:
        """The last line of the screen after `seconds` pass and the events come."""
        self.clock.now += seconds
        for event in events:
            self.progress.event(event)
        return screen(self.stream.getvalue())[-1]


def run_cell(progress: Progress, clock: Clock, number: int, runs: int = 5, run_s: float = 2.0) -> None:
    """One cell of a group that is loaded: 3 warm-ups and `runs` repetitions of `run_s` seconds each."""
    progress.event(CellBegun(number))
    for k in range(1, 4):
        clock.now += run_s
        progress.event(warmup(k, run_s))
    for k in range(1, runs + 1):
        clock.now += run_s
        progress.event(repetition(k))
    progress.event(PEAK)
    progress.event(CellMeasured(number))


def test_a_log_gets_one_line_per_change_and_none_per_repetition() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, clock)
    progress.start(3)
    progress.cell(1, "opt-125m int4 b4")
    for event in [*STARTED, LOADING]:
        progress.event(event)
    clock.now += 4
    for event in LOADED:
        progress.event(event)
    run_cell(progress, clock, 0)
    progress.cell(2, "opt-125m int4 b1")
    run_cell(progress, clock, 1, runs=6, run_s=0.5)
    progress.event(UNLOADED)
    progress.event(END)
    progress.note("opt-6.7b int4 b1 does not fit.")
    progress.cell(3, "opt-6.7b int4 b1")
    progress.event(LOADING)
    progress.event(FAILED)
    progress.finish()
    assert stream.getvalue() == (
        "cell 1/3: opt-125m int4 b4\n"
        "cell 1/3: starting\n"
        "cell 1/3: loading\n"
        "cell 1/3: loaded in 3.2 s\n"
        "cell 1/3: warming up\n"
        "cell 1/3: measuring\n"
        "cell 1/3: measured in 20 s, about 40 s left\n"
        "cell 2/3: opt-125m int4 b1\n"
        "cell 2/3: warming up\n"
        "cell 2/3: measuring\n"
        "cell 2/3: measured in 4.5 s, about 15 s left\n"
        "opt-6.7b int4 b1 does not fit.\n"
        "cell 3/3: opt-6.7b int4 b1\n"
        "cell 3/3: loading\n"
        "cell 3/3: opt-6.7b int4 b1 failed: Memory ran out.\n"
    )


def test_a_terminal_has_one_line_that_is_rewritten() -> None:
    shown = Shown(2)
    shown.progress.cell(1, "opt-1.3b int4 b1")
    assert shown.stream.getvalue() == "\rcell 1/2 · opt-1.3b int4 b1"
    assert shown.after(1, *STARTED) == "cell 1/2 · opt-1.3b int4 b1 · starting"
    assert shown.after(1, LOADING) == "cell 1/2 · opt-1.3b int4 b1 · loading"
    assert shown.after(4, *LOADED) == "cell 1/2 · opt-1.3b int4 b1 · loaded in 3.2 s"
    assert shown.after(1, CellBegun(0)) == "cell 1/2 · opt-1.3b int4 b1 · warming up"
    assert shown.after(2, warmup(1)) == "cell 1/2 · opt-1.3b int4 b1 · warm-up 1/12"
    # 29 more repetitions of 2 s, and a second cell as long as this one: 9 s until here + 30 · 2 s
    assert shown.after(2, repetition(1)) == "cell 1/2 · opt-1.3b int4 b1 · repetition 1/30 · up to 3 min left"
    assert shown.after(2, repetition(2)) == "cell 1/2 · opt-1.3b int4 b1 · repetition 2/30 · up to 3 min left"
    assert shown.after(2, PEAK) == "cell 1/2 · opt-1.3b int4 b1 · finishing · up to 15 s left"
    assert shown.after(1, CellMeasured(0)) == "cell 1/2 · opt-1.3b int4 b1 · measured in 16 s · about 20 s left"
    shown.progress.finish()
    assert screen(shown.stream.getvalue()) == [""]
    assert shown.stream.getvalue().endswith("\r")
    assert not {"\n", "\x1b"} & set(shown.stream.getvalue())


def test_a_shorter_line_leaves_nothing_of_a_longer_one() -> None:
    shown = Shown(1)
    shown.progress.cell(1, "a")
    shown.after(1, LOADING)
    shown.clock.now += 1
    before = len(shown.stream.getvalue())
    shown.progress.cell(1, "b")
    assert shown.stream.getvalue()[before:] == "\rcell 1/1 · b          "


def test_time_left_in_a_later_cell() -> None:
    shown = Shown(3)
    shown.progress.cell(1, "a")
    shown.after(10, *LOADED)
    run_cell(shown.progress, shown.clock, 0, runs=6, run_s=10)  # 10 + 90 s
    shown.progress.cell(2, "b")
    assert shown.progress.seconds_left() == 200
    shown.after(5, CellBegun(1))
    assert shown.progress.seconds_left() == 195  # the rest of this one by the mean, and one more
    shown.after(5, warmup(1))
    assert shown.progress.seconds_left() == 190
    shown.after(4, repetition(1))
    assert shown.progress.seconds_left() == 5 * 4 + 100  # the first cell needed 6 repetitions, so 5 are likely here
    assert shown.after(4, repetition(2)) == "cell 2/3 · b · repetition 2/30 · about 2 min left"
    shown.after(40, *[repetition(k) for k in range(3, 13)])
    assert shown.progress.seconds_left() == 4 + 100  # over the expectation: one more, again and again
    shown.after(0, CellMeasured(1))
    assert shown.progress.seconds_left() == (100 + 58) / 2


def test_a_fixed_number_of_repetitions_ends_the_estimate_of_its_cell() -> None:
    shown = Shown(1)
    shown.progress.cell(1, "a")
    shown.after(1, CellBegun(0))
    assert shown.progress.seconds_left() is None
    assert shown.after(2, warmup(1), repetition(1, limit=3)).endswith("repetition 1/3 · up to 5 s left")
    shown.after(4, repetition(2, limit=3), repetition(3, limit=3))
    assert shown.progress.seconds_left() == 0
    assert shown.after(1, CellMeasured(0)) == "cell 1/1 · a · measured in 8.0 s"


def test_download_skipped_and_failed_cells_are_not_counted_as_the_pace() -> None:
    shown = Shown(4)
    shown.after(600, END)  # a worker that only prepared files
    shown.progress.cell(1, "kept from an earlier run")
    shown.progress.cell(2, "fails")
    shown.after(50, LOADING, FAILED)
    assert shown.progress.seconds_left() is None
    shown.progress.cell(3, "works")
    shown.after(20, CellBegun(0), CellMeasured(0))
    assert shown.progress.seconds_left() == 20


def test_a_download_is_not_part_of_the_pace_either() -> None:
    shown = Shown(2)
    shown.progress.cell(1, "a")
    assert shown.after(1, Stage("preparing")) == "cell 1/2 · a · preparing the files"
    shown.after(600, *STARTED)
    shown.after(20, CellBegun(0), CellMeasured(0))
    assert shown.progress.seconds_left() == 20


def test_cells_are_counted_as_they_come() -> None:
    shown = Shown(3)
    for place, number in enumerate((3, 2, 1), 1):  # a group measures its largest cell first
        shown.progress.cell(number, f"b{number}")
        line = shown.after(60, CellBegun(place - 1), CellMeasured(place - 1))
        left = ["about 2 min left", "60 s", ""][place - 1]
        assert line.startswith(f"cell {place}/3 · b{number} · measured in 1 min 0 s")
        assert left in line
    assert "left" not in line


def test_a_failure_stays_on_the_terminal() -> None:
    shown = Shown(2)
    shown.progress.cell(1, "a")
    shown.after(1, LOADING, FAILED)
    shown.clock.now += 1
    shown.progress.cell(2, "b")
    assert screen(shown.stream.getvalue()) == ["cell 1/2: a failed: Memory ran out.", "cell 2/2 · b"]


def test_a_sweep_may_name_the_cell_before_the_worker_and_at_its_event() -> None:
    shown = Shown(2)
    shown.progress.cell(1, "a")
    shown.after(30, LOADING)
    before = shown.stream.getvalue()
    shown.progress.cell(1, "a")
    assert shown.stream.getvalue() == before
    shown.after(0, CellBegun(0), CellMeasured(0))
    assert shown.progress.seconds == {1: 30}


def test_several_workers_for_one_cell_add_up() -> None:
    shown = Shown(2)
    shown.progress.cell(1, "a")
    for _ in range(3):
        shown.after(10, CellBegun(0), CellMeasured(0), END)
    assert shown.progress.seconds_left() == 30


def test_a_terminal_gets_at_most_four_writes_in_any_second() -> None:
    clock, moments = Clock(), []

    class Counting(Terminal):
        def write(self, text: str) -> int:
            moments.append(clock.now)
            return super().write(text)

    progress = Progress(Counting(), clock)
    progress.start(100)
    for number in range(100):
        progress.cell(number + 1, "a")
        for k in range(1, 20):
            clock.now += 0.013
            progress.event(repetition(k))
        progress.event(CellMeasured(number))
    assert len(moments) > 60
    assert all(sum(start <= m < start + 1 for m in moments) <= WRITES_PER_S for start in moments)


def test_a_change_of_stage_is_shown_at_once_although_a_write_was_just_made() -> None:
    shown = Shown(1)
    shown.progress.cell(1, "a")
    assert shown.after(0.01, LOADING) == "cell 1/1 · a · loading"
    assert shown.after(0.01, CellBegun(0)) == "cell 1/1 · a · warming up"
    assert shown.after(2, repetition(1)).startswith("cell 1/1 · a · repetition 1/30")
    assert shown.after(0.01, repetition(2)).startswith("cell 1/1 · a · repetition 1/30")
    assert shown.after(0.01, PEAK).startswith("cell 1/1 · a · finishing")


def test_a_note_stays_and_the_line_goes_on_below() -> None:
    shown = Shown(1)
    shown.progress.note("before anything")
    shown.progress.cell(1, "a rather long name")
    shown.progress.note("short\nand a second line")
    assert screen(shown.stream.getvalue()) == [
        "before anything",
        "short",
        "and a second line",
        "cell 1/1 · a rather long name",
    ]
    shown.progress.finish()
    assert screen(shown.stream.getvalue())[-1] == ""


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (60, "cell 1/9 · EleutherAI-pythia-12b-deduped in… · warm-up 1/12"),
        (40, "cell 1/9 · EleutherAI-p… · warm-up 1/12"),
        (30, "cell 1/9 · EleutherAI-… · wa…"),
        (2, "…"),
    ],
)
def test_a_line_never_wraps(columns: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = Shown(9)
    shown.progress.cell(1, "EleutherAI-pythia-12b-deduped int4 batch_size=16")
    assert shown.after(1, warmup(1)) == line
    assert len(line) < columns


def test_wide_characters_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    shown = Shown(1)
    shown.progress.cell(1, "模型模型模型模型")
    assert shown.stream.getvalue() == "\rcell 1/1 · 模型模型模…"  # 11 + 10 + 1 columns of 23
    assert shown.progress.shown == 22


def test_a_dumb_terminal_and_a_pipe_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    progress = Progress(stream, Clock())
    progress.cell(1, "a")
    assert stream.getvalue() == "cell 1/1: a\n"


def test_before_the_first_cell_there_is_no_count() -> None:
    stream = io.StringIO()
    Progress(stream, Clock()).event(LOADING)
    assert stream.getvalue() == "loading\n"


@pytest.mark.parametrize(
    "event", [PeaksMeasured({}, None), Stage("baseline"), Stage("of a later version"), GroupBegun(), END]
)
def test_other_events_write_nothing(event: Event) -> None:
    shown = Shown(1)
    shown.progress.event(event)
    assert shown.stream.getvalue() == ""


def test_a_load_by_a_server_has_no_time() -> None:
    assert Shown(1).after(1, ModelLoaded(LoadInfo(None))) == "loaded"


def test_a_stream_that_breaks_ends_the_display_and_nothing_else(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    pipe = os.fdopen(writer, "w")
    progress = Progress(pipe, Clock())
    progress.cell(1, "a")
    progress.event(LOADING)
    progress.finish()
    assert progress.stream is None
    with pytest.raises(BrokenPipeError):
        pipe.close()
    closed = (tmp_path / "log").open("w", encoding="ascii")
    progress = Progress(closed, Clock())
    closed.close()
    progress.note("a")
    progress.cell(1, "a")


@pytest.mark.parametrize("fault", ["", "+fail=oom+above_batch=1"])
def test_a_real_worker(fault: str, tmp_path: Path) -> None:
    cells = [
        Cell(model=f"fake:ttft_ms=1{fault}", backend="fake", batch_size=b, output_tokens=4, warmup=2, repetitions=3)
        for b in (2, 1)
    ]
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock)
    progress.start(2)

    def tell(event: Event) -> None:
        if isinstance(event, CellBegun):
            progress.cell(2 - event.number, f"b{cells[event.number].batch_size}")
        progress.event(event)
        clock.now += 1

    progress.cell(2, "b2")
    folders = [tmp_path / str(number) for number in range(2)]
    run_worker(
        WorkerJob("measure", tuple(cells), FakeBackend.resolve(cells[0]), tuple(folders)), tmp_path / "worker.log", tell
    )
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines[:3] == ["cell 1/2: b2", "cell 1/2: starting", "cell 1/2: loading"]
    assert lines[3].startswith("cell 1/2: loaded in 0.")
    if fault:
        assert lines[4] == "cell 1/2: warming up"
        assert lines[5].startswith("cell 1/2: b2 failed: ")
        assert len(lines) == 6
    else:
        # One second per event: 7 of the worker, measuring, 2 warm-ups, 3 repetitions, the stage peak;
        # then the same without the first seven.
        assert lines[4:] == [
            "cell 1/2: warming up",
            "cell 1/2: measuring",
            "cell 1/2: measured in 15 s, about 15 s left",
            "cell 2/2: b1",
            "cell 2/2: warming up",
            "cell 2/2: measuring",
            "cell 2/2: measured in 11 s",
        ]


def test_the_stages_are_those_of_worker_and_sweep() -> None:
    folder = Path(__file__).resolve().parents[2] / "mlflow_llmbench" / "measure"
    source = "".join(
        (folder / name).read_text(encoding="utf-8") for name in ("worker.py", "group.py", "quality_reference.py")
    )
    for stage in STAGES:
        assert f'"{stage}"' in source


def test_an_event_costs_no_more_in_a_long_sweep_with_long_names() -> None:
    """An event does not go through all finished cells of a sweep again."""
    event = repetition(7)

    def seconds(cells: int, name: str, stream: io.StringIO) -> float:
        clock = Clock()
        progress = Progress(stream, clock)
        progress.start(cells)
        for number in range(1, cells):
            progress.cell(number, name)
            progress.event(CellBegun(number))
            progress.event(CellMeasured(number))
        started = time.perf_counter()
        for _ in range(200):
            clock.now += 1  # each one writes
            progress.event(event)
        return time.perf_counter() - started

    for kind in (Terminal, io.StringIO):
        short = min(seconds(3, "b1", kind()) for _ in range(10))
        long = min(seconds(2000, "模型 " * 300, kind()) for _ in range(10))
        assert long < 10 * short


def test_durations() -> None:
    assert [duration(s) for s in (0.04, 9.94, 9.96, 59.4, 59.6, 185, 3599, 3600, 7650)] == [
        "0.0 s",
        "9.9 s",
        "10 s",
        "59 s",
        "1 min 0 s",
        "3 min 5 s",
        "59 min 59 s",
        "1 h 0 min",
        "2 h 7 min",
    ]
    assert [rough_duration(s) for s in (0, 3, 5.1, 40, 90, 91, 121, 5400, 5401, 7200, 80_000)] == [
        "5 s",
        "5 s",
        "10 s",
        "40 s",
        "90 s",
        "2 min",
        "3 min",
        "90 min",
        "1 h 40 min",
        "2 h",
        "22 h 20 min",
    ]
