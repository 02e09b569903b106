"""The exact progress display, driven by a scripted clock and the worker's own events."""

import io
import os
import re
import time
from pathlib import Path

import pytest

from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.measure import supervise
from mlflow_llmbench.measure.events import (
    CellBegun,
    CellMeasured,
    Event,
    GroupBegun,
    JobEnded,
    JobFailed,
    LoadObserved,
    MeasuringBegun,
    ModelLoaded,
    PeaksMeasured,
    RepetitionEnded,
    Stage,
    StageMemory,
    Waited,
    WarmupEnded,
)
from mlflow_llmbench.measure.supervise import run_worker
from mlflow_llmbench.measure.task import WorkerJob
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import LoadInfo
from mlflow_llmbench.records.text import rough_duration
from mlflow_llmbench.reports.result import Row
from mlflow_llmbench.sweeps.live_display import LiveDisplay
from mlflow_llmbench.sweeps.progress import STAGES, WRITES_PER_S, Progress, duration, load_text
from mlflow_llmbench.system.memory import HostMemory

from ..work import calls

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
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    for variable in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(variable, raising=False)


def warmup(number: int, seconds: float = 1.0, until_steady: bool | None = None) -> Event:
    return WarmupEnded(number, 12, seconds, until_steady, number_of_cell=0)


def repetition(number: int, limit: int = 30, rate: float | None = None) -> Event:
    return RepetitionEnded(number, limit, tokens_per_s=rate, number_of_cell=0)


def row(batch_size: int = 1, outcome: str = "ok", linked: str = "") -> Row:
    figures = {
        "throughput/output_tokens_per_s": 412.3,
        "latency/ttft_ms_p50": 31.2,
        "memory/host_needed_gb_peak": 0.613437440,
    }
    return Row(Cell(batch_size=batch_size), outcome, figures, linked=linked)


TOKEN = re.compile("\x1b\\[\\??(?P<number>[0-9;]*)(?P<code>[A-Za-z])|(?P<plain>.)", re.DOTALL)


def screen(written: str) -> list[str]:
    """Return the lines on a terminal of endless width after these characters, without spaces and empty lines at ends.

    Knows what rich sends: colours, showing the cursor, one line up, and erasing a line.
    """
    lines, line, column = [""], 0, 0
    for found in TOKEN.finditer(written):
        character, code = found["plain"], found["code"]
        if code in ("m", "h", "l"):
            continue
        if code == "A":
            line -= int(found["number"] or 1)
        elif code == "K":
            assert found["number"] == "2"
            lines[line] = ""
        elif character == "\n":
            line, column = line + 1, 0
            lines += [""] if line == len(lines) else []
        elif character == "\r":
            column = 0
        else:
            assert character, found[0]
            lines[line] = lines[line][:column].ljust(column) + character + lines[line][column + 1 :]
            column += 1
    shown = [one.rstrip() for one in lines]
    while len(shown) > 1 and not shown[-1]:
        shown.pop()
    return shown


BAR = re.compile("[━╸╺]+ ?")


def block(written: str) -> str:
    """The two lines that are redrawn as one: without the bar, with what stands beside it."""
    shown = screen(written)
    assert BAR.match(shown[-1]), shown
    return " · ".join(filter(None, [shown[-2], BAR.sub("", shown[-1])]))


class Shown:
    """A display on a terminal, and the text that it wrote at each event after `seconds`."""

    def __init__(self, total: int) -> None:
        self.clock, self.stream = Clock(), Terminal()
        self.progress = Progress(self.stream, self.clock, wall=lambda: 0.0)
        self.progress.start(total)

    def after(self, seconds: float, *events: Event) -> str:
        """The last line of the screen after `seconds` pass and the events come."""
        self.clock.now += seconds
        for event in events:
            self.progress.event(event)
        return block(self.stream.getvalue())


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
        "cell 1/3: warming up: the first calls are slower\n"
        "cell 1/3: measuring, up to 4 min left\n"
        "cell 1/3: measured in 20 s, about 40 s left\n"
        "cell 2/3: opt-125m int4 b1\n"
        "cell 2/3: warming up: the first calls are slower\n"
        "cell 2/3: measuring\n"
        "cell 2/3: measured in 4.5 s, about 15 s left\n"
        "opt-6.7b int4 b1 does not fit.\n"
        "cell 3/3: opt-6.7b int4 b1\n"
        "cell 3/3: loading\n"
        "cell 3/3: opt-6.7b int4 b1 failed: Memory ran out.\n"
    )


def test_a_long_cell_gets_a_line_a_minute_in_a_log() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(stream, clock)
    progress.start(1)
    progress.cell(1, "opt-1.3b int4 b1")
    progress.event(CellBegun(0))
    progress.event(warmup(1))
    for number in range(1, 11):
        clock.now += 25
        progress.event(repetition(number, 10))
    assert stream.getvalue().splitlines()[2:] == [
        "cell 1/1: measuring, up to 4 min left",
        "cell 1/1: repetition 4/10, up to 3 min left",
        "cell 1/1: repetition 7/10, up to 75 s left",
        "cell 1/1: repetition 10/10",
    ]


def test_a_long_load_is_shown_while_it_is_sent() -> None:
    seen = LoadObserved(10.0, 124, 2, 38, (41.2, 95.3), (910.0, 1450.0), 98)
    assert load_text(seen) == (
        "12.4 requests/s · 38 in flight · 2 failed · TTFT 41.2, p95 95.3 ms · e2e 910, p95 1450 ms"
        " · goodput 9.80/s (79%)"
    )
    assert load_text(LoadObserved(3.0, 0, 0, 5, None, None, 0)) == "0 requests/s · 5 in flight · goodput 0/s"
    begun = [*STARTED, LOADING, *LOADED, CellBegun(0), warmup(1), repetition(1)]
    plain = LoadObserved(10.0, 50, 0, 8, (20.0, 30.0), (200.0, 300.0), None)
    text = load_text(plain)
    shown = Shown(1)
    shown.progress.cell(1, "m online c8")
    shown.after(1, *begun)
    shown.after(2, plain)
    assert screen(shown.stream.getvalue())[-2] == text
    shown.after(2, repetition(2))
    assert text not in screen(shown.stream.getvalue())
    clock, log = Clock(), io.StringIO()
    progress = Progress(log, clock)
    progress.start(1)
    progress.cell(1, "m online c8")
    for event in begun:
        progress.event(event)
    before = log.getvalue()
    for seconds, more in ((30, ""), (31, f"cell 1/1: {text}\n")):  # a line a minute
        clock.now += seconds
        progress.event(plain)
        assert log.getvalue() == before + more


def test_a_terminal_has_a_block_that_is_redrawn() -> None:
    shown = Shown(2)
    shown.progress.cell(1, "opt-1.3b int4 b1")
    assert screen(shown.stream.getvalue()) == ["cell 1/2 · opt-1.3b int4 b1", "━" * 30]
    assert shown.after(1, *STARTED) == "cell 1/2 · opt-1.3b int4 b1 · starting"
    assert shown.after(1, LOADING) == "cell 1/2 · opt-1.3b int4 b1 · loading"
    assert shown.after(3, Waited()) == "cell 1/2 · opt-1.3b int4 b1 · loading · 3.0 s"
    assert shown.after(1, *LOADED) == "cell 1/2 · opt-1.3b int4 b1 · loaded in 3.2 s"
    assert shown.after(1, CellBegun(0)) == "cell 1/2 · opt-1.3b int4 b1 · warming up: the first calls are slower"
    assert shown.after(2, warmup(1)) == "cell 1/2 · opt-1.3b int4 b1 · warm-up 1/12"
    # 29 more repetitions of 2 s, and a second cell as long as this one: 9 s until here + 30 · 2 s
    left = "up to 3 min left, until 00:03"
    assert shown.after(2, repetition(1)) == f"cell 1/2 · opt-1.3b int4 b1 · repetition 1/30 · {left}"
    assert shown.after(2, repetition(2)) == f"cell 1/2 · opt-1.3b int4 b1 · repetition 2/30 · 2.0 s · {left}"
    assert shown.after(2, PEAK) == "cell 1/2 · opt-1.3b int4 b1 · finishing · up to 15 s left"
    assert shown.after(1, CellMeasured(0)) == "cell 1/2 · opt-1.3b int4 b1 · measured in 16 s · about 20 s left"
    assert screen(shown.stream.getvalue())[-1] == "━━━━━━━━━━━━━━━╺━━━━━━━━━━━━━━ about 20 s left"
    shown.progress.finish()
    assert screen(shown.stream.getvalue()) == [""]
    assert shown.stream.getvalue().rindex("\x1b[?25h") > shown.stream.getvalue().rindex("\x1b[?25l"), "cursor is hidden"


def test_the_warm_up_tells_why_it_waits() -> None:
    shown = Shown(1)
    shown.progress.cell(1, "a")
    assert shown.after(1, warmup(1, until_steady=True)) == "cell 1/1 · a · warm-up 1/12, until the times are steady"
    assert shown.after(1, warmup(2)) == "cell 1/1 · a · warm-up 2/12 · 1.0 s"


def test_the_speed_is_the_mean_of_this_cells_repetitions() -> None:
    shown = Shown(2)
    shown.progress.cell(1, "a")
    shown.after(1, CellBegun(0))
    assert "· 400 tokens/s ·" in shown.after(1, repetition(1, rate=400))
    assert "· 410 tokens/s ·" in shown.after(2, repetition(2, rate=420))
    assert "tokens/s" not in shown.after(2, CellMeasured(0))
    shown.progress.cell(2, "b")
    shown.after(1, CellBegun(1))
    assert "tokens/s" not in shown.after(1, repetition(1))


def test_the_bar_grows_with_cells_and_their_repetitions() -> None:
    shown = Shown(4)

    def filled() -> int:
        drawn = re.findall("\x1b\\[([0-9;]*)m([━╸╺]+)", shown.stream.getvalue().rpartition("\x1b[2K")[2])
        return sum(len(bar) for colour, bar in drawn if colour not in ("90", "38;5;237"))

    shown.progress.cell(1, "a")
    shown.after(1, CellBegun(0))
    seen = [filled()]
    for number in (5, 10):
        shown.after(2, repetition(number, limit=10))
        seen.append(filled())
    shown.after(2, CellMeasured(0))
    shown.clock.now += 2
    shown.progress.cell(2, "b")
    assert [*seen, filled()] == [0, 4, 8, 8]  # of 30


def test_finished_rows_come_once_above_the_block_and_as_lines_elsewhere() -> None:
    told = "412 tokens/s · TTFT 31.2 ms · 0.613 GB · ok"
    shown, stream = Shown(2), io.StringIO()
    for progress in (shown.progress, Progress(stream, Clock())):
        progress.cell(1, "opt-125m int4")
        progress.event(LOADING)
        progress.row("opt-125m int4", row())
        progress.row("b", row(2))
        progress.row("b", row(2))
        progress.row("c", row(outcome="oom"))
        progress.row("d", row(linked="earlier"))
    lines = screen(shown.stream.getvalue())
    assert lines[:3] == [f"✓ opt-125m int4  {told}", f"✓ b              {told}", "cell 1/2 · opt-125m int4 · loading"]
    assert stream.getvalue().splitlines()[-2:] == [f"opt-125m int4: {told}", f"b: {told}"]


def test_a_name_from_outside_draws_nothing_of_its_own() -> None:
    shown = Shown(1)
    shown.progress.cell(1, "a\x1b[2Jb\nc")
    shown.progress.row("x\x1b[31m", row())
    shown.progress.note("y\x1b[5m")
    lines = screen(shown.stream.getvalue())
    assert lines[:3] == [
        "✓ x\\x1b[31m  412 tokens/s · TTFT 31.2 ms · 0.613 GB · ok",
        "y\\x1b[5m",
        r"cell 1/1 · a\x1b[2Jb\nc",
    ]


def test_a_shorter_line_leaves_nothing_of_a_longer_one() -> None:
    shown = Shown(1)
    shown.progress.cell(1, "a")
    shown.after(1, LOADING)
    shown.clock.now += 1
    shown.progress.cell(1, "b")
    assert block(shown.stream.getvalue()) == "cell 1/1 · b"


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
    assert shown.after(4, repetition(2)) == "cell 2/3 · b · repetition 2/30 · 4.0 s · about 2 min left"
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
    shown.clock.now += 600
    shown.progress.event(END)  # of a worker that only prepared files
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
    assert screen(shown.stream.getvalue())[:2] == ["cell 1/2: a failed: Memory ran out.", "cell 2/2 · b"]


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
    del moments[:3]  # the first draw, and the cursor
    assert len(moments) > 60
    assert all(sum(start <= m < start + 1 for m in moments) <= WRITES_PER_S for start in moments)


def test_a_change_of_stage_is_shown_at_once_although_a_write_was_just_made() -> None:
    shown = Shown(1)
    shown.progress.cell(1, "a")
    assert shown.after(0.01, LOADING) == "cell 1/1 · a · loading"
    assert shown.after(0.01, CellBegun(0)) == "cell 1/1 · a · warming up: the first calls are slower"
    assert shown.after(2, repetition(1)).startswith("cell 1/1 · a · repetition 1/30")
    assert shown.after(0.9, repetition(2)).startswith("cell 1/1 · a · repetition 1/30"), "once a second"
    assert shown.after(0.01, PEAK).startswith("cell 1/1 · a · finishing")


def test_a_note_stays_and_the_block_goes_on_below() -> None:
    shown = Shown(1)
    shown.progress.note("before anything")
    shown.progress.cell(1, "a rather long name")
    shown.progress.note("short\nand a second line")
    assert screen(shown.stream.getvalue())[:-1] == [
        "before anything",
        "short",
        "and a second line",
        "cell 1/1 · a rather long name",
    ]
    shown.progress.finish()
    assert screen(shown.stream.getvalue()) == ["before anything", "short", "and a second line"]


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
    shown.clock.now += 1
    shown.progress.event(warmup(1))
    drawn = screen(shown.stream.getvalue())
    assert drawn[0] == line
    assert all(len(one) < max(columns, 3) for one in drawn)


def test_wide_characters_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    shown = Shown(1)
    shown.progress.cell(1, "模型模型模型模型")
    assert screen(shown.stream.getvalue())[0] == "cell 1/1 · 模型模型模 …"  # 11 + 10 + 2 columns of 23


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
    shown = LiveDisplay(pipe)
    shown.note("a")
    shown.stop()
    assert shown.stream is None
    with pytest.raises(BrokenPipeError):
        pipe.close()
    closed = (tmp_path / "log").open("w", encoding="ascii")
    progress = Progress(closed, Clock())
    closed.close()
    progress.note("a")
    progress.cell(1, "a")


def test_time_is_told_while_a_model_loads_and_never_while_a_cell_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "WAITED_S", 0.02)
    cell = Cell(
        model="fake:load_ms=300+ttft_ms=200", backend="fake", output_tokens=2, prompt_tokens=4, warmup=1, repetitions=5
    )
    told: list[Event] = []
    job = WorkerJob("measure", (cell,), FakeBackend.resolve(cell), (tmp_path / "0",))
    outcome = run_worker(job, tmp_path / "worker.log", told.append, waited=told.append)
    assert outcome.error is None
    kinds = [type(event) for event in told]
    loaded, begun, measured = (kinds.index(kind) for kind in (ModelLoaded, MeasuringBegun, CellMeasured))
    assert Waited in kinds[:loaded]
    assert Waited not in kinds[begun:measured]
    assert b"waited" not in (tmp_path / "worker.jsonl").read_bytes()
    rates = [event.tokens_per_s for event in told if isinstance(event, RepetitionEnded)]
    assert len(rates) == 5
    assert all(rate and 0 < rate < 10 for rate in rates)  # 2 tokens in 0.2 s or more


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
        assert lines[4] == "cell 1/2: warming up: the first calls are slower"
        assert lines[5].startswith("cell 1/2: b2 failed: ")
        assert len(lines) == 6
    else:
        # One second per event: 7 of the worker, measuring, 2 warm-ups, 3 repetitions, the stage peak;
        # then the same without the first seven.
        assert lines[4:] == [
            "cell 1/2: warming up: the first calls are slower",
            "cell 1/2: measuring",
            "cell 1/2: measured in 15 s, about 15 s left",
            "cell 2/2: b1",
            "cell 2/2: warming up: the first calls are slower",
            "cell 2/2: measuring",
            "cell 2/2: measured in 11 s",
        ]


def test_the_stages_are_those_of_worker_sweep_and_command() -> None:
    folder = Path(__file__).resolve().parents[2] / "mlflow_llmbench" / "measure"
    source = "".join(
        (folder / name).read_text(encoding="utf-8")
        for name in ("worker.py", "group.py", "quality_reference.py", "../cli/output.py")
    )
    for stage in STAGES:
        assert f'"{stage}"' in source


def test_an_event_costs_no_more_in_a_long_sweep_with_long_names() -> None:
    """An event does not go through all finished cells of a sweep again."""
    event = repetition(7)

    def work(cells: int, name: str, stream: io.StringIO) -> int:
        clock = Clock()
        progress = Progress(stream, clock)
        progress.start(cells)
        for number in range(1, cells):
            progress.cell(number, name)
            progress.event(CellBegun(number))
            progress.event(CellMeasured(number))

        def events() -> None:
            for _ in range(200):
                clock.now += 1  # each one writes
                progress.event(event)

        return calls(events)

    for kind in (Terminal, io.StringIO):
        assert work(2000, "模型 " * 300, kind()) < 4 * work(3, "b1", kind())


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
