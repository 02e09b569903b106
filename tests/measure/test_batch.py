"""The measurement of a backend with known delays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import pytest

from mlflow_llmbench.analysis import latency, summary
from mlflow_llmbench.backends.fake import FakeBackend, parse_script
from mlflow_llmbench.measure.batch import measure_cell, natural_lengths, time_forward, time_request, time_texts
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MeasurementError, OutOfMemory, UsageError
from mlflow_llmbench.records.results import CellMeasurements, Hashes, RunResult, TextTimes
from mlflow_llmbench.workloads.prompts import load_prompts


def fake(script: str, **settings: Any) -> tuple[FakeBackend, Cell]:
    cell = Cell(model=f"fake:{script}", backend="fake", **{"output_tokens": 8, "prompt_tokens": 4} | settings)
    return FakeBackend(cell, FakeBackend.resolve(cell)), cell


def measure(script: str, **settings: Any) -> tuple[CellMeasurements, Cell]:
    backend, cell = fake(script, **settings)
    return measure_cell(backend, cell, load_prompts(cell.workload), 1000, lambda *_, **__: None), cell


def least(values: list[float]) -> float:
    """Return the least disturbed value: on a shared machine, events can only be late, never early."""
    return min(values)


def test_stamps_are_those_of_the_script() -> None:
    """No token is early. Its delay on a shared machine is that in the least disturbed of eight repetitions."""
    measured, _ = measure("ttft_ms=40+itl_ms=20", repetitions=8)
    requests = [r.requests[0] for r in measured.repetitions]
    assert all(stamp - r.t0_ns >= (40 + 20 * i) * 1e6 for r in requests for i, stamp in enumerate(r.stamps_ns))
    assert least([latency.ttft_ms(r) for r in requests]) == pytest.approx(40, rel=0.25)
    assert median(g for r in requests for g in latency.gaps_ms(r)) == pytest.approx(20, rel=0.5)
    assert least([latency.e2e_ms(r) for r in requests]) == pytest.approx(40 + 7 * 20, rel=0.25)


def test_a_stall_lands_on_its_token_and_nowhere_else() -> None:
    backend, cell = fake("ttft_ms=5+itl_ms=2+stall_ms=300+stall_at=5")
    record, _ = time_request(backend, [[1, 2, 3, 4]], cell.output_tokens)
    gaps = latency.gaps_ms(record)
    assert gaps.index(max(gaps)) == 3  # the gap before token 5
    assert max(gaps) > 200


def test_a_late_streamer_shows_in_the_first_token() -> None:
    prompt, late, punctual = [[1, 2, 3, 4]], [], []
    for _ in range(5):
        for script, found in (("ttft_ms=10+itl_ms=40+late=1", late), ("ttft_ms=10+itl_ms=40", punctual)):
            backend, cell = fake(script)
            found.append(latency.ttft_ms(time_request(backend, prompt, cell.output_tokens)[0]))
    assert least(late) - least(punctual) == pytest.approx(40, rel=0.5)


def test_rows_share_stamps_and_are_counted() -> None:
    measured, cell = measure("ttft_ms=2+itl_ms=1", batch_size=3, repetitions=5)
    assert {r.requests[0].rows for r in measured.repetitions} == {3}
    assert {r.requests[0].output_tokens for r in measured.repetitions} == {cell.output_tokens}
    assert {r.requests[0].prompt_tokens for r in measured.repetitions} == {4}


def test_auto_warms_up_at_least_three_times_and_repeats_until_the_order_can_be_judged() -> None:
    measured, _ = measure("ttft_ms=5+itl_ms=1", precision_target=1.0, max_repetitions=30)
    assert len(measured.warmup_s) >= 3
    assert len(measured.repetitions) == 30


def test_an_answer_ends_at_the_first_token_by_which_the_model_ends() -> None:
    backend, _ = fake("ttft_ms=1")
    outputs = [([1], [7, 5, 2, 2]), ([1], [5, 5]), ([1], [9])]
    assert natural_lengths(backend, outputs) is None  # it is not known
    backend.ends = frozenset({2, 9})  # type: ignore[attr-defined]
    assert natural_lengths(backend, outputs) == (3, None, 1)
    assert natural_lengths(backend, []) is None


class Passing(FakeBackend):
    """A fake that can run a forward pass alone, of at least 20 ms."""

    def forward(self, prompts: Sequence[Sequence[int]]) -> None:
        self.passes = [*getattr(self, "passes", []), [list(row) for row in prompts]]
        time.sleep(0.02)


def test_the_forward_pass_alone_is_timed_over_the_prompts_of_the_repetitions() -> None:
    cell = Cell(model="fake:ttft_ms=1", backend="fake", output_tokens=4, prompt_tokens=6, batch_size=2)
    backend, prompts = Passing(cell, FakeBackend.resolve(cell)), load_prompts(cell.workload)
    found = time_forward(backend, cell, prompts, 1000, 3)
    assert len(found) == 3 and min(found) >= 20e6
    batches = [prompts.batch(cell, number, 1000, None) for number in (0, 0, 1, 2)]  # one more at first, discarded
    assert backend.passes == batches
    assert len(time_forward(backend, cell, prompts, 1000, 64)) == 10
    assert time_forward(*fake("ttft_ms=1"), prompts, 1000, 3) == ()  # it has no such pass


def test_auto_stops_at_the_maximum_when_the_interval_stays_wide() -> None:
    measured, _ = measure("ttft_ms=0+itl_ms=0", precision_target=0.0001, max_repetitions=7, warmup=1)
    assert len(measured.repetitions) == 7
    assert len(measured.warmup_s) == 1


def test_one_output_token() -> None:
    measured, _ = measure("ttft_ms=3", output_tokens=1, repetitions=5)
    record = measured.repetitions[0].requests[0]
    assert latency.gaps_ms(record) == []
    assert latency.tpot_ms(record) is None
    assert latency.e2e_ms(record) == latency.ttft_ms(record)


def test_outputs_are_kept_for_texts_only() -> None:
    assert measure("ttft_ms=0+itl_ms=0", repetitions=5)[0].outputs == ()
    measured, _ = measure("ttft_ms=0+itl_ms=0", workload="qa", prompt_tokens=None, repetitions=10)
    assert len(measured.outputs) == 10
    assert bytes(measured.outputs[3][0]).decode() == load_prompts("qa").texts[3]
    assert all(len(output) == 8 for _, output in measured.outputs)


def test_faults_come_out_as_ours() -> None:
    with pytest.raises(OutOfMemory, match="Scripted out-of-memory"):
        measure("fail=oom")
    with pytest.raises(MeasurementError, match="generated no token"):
        measure("stop_after=0")
    backend, cell = fake("fail=oom+above_batch=2", batch_size=2)
    assert time_request(backend, [[1], [2]], cell.output_tokens)[0].rows == 2
    with pytest.raises(OutOfMemory):
        time_request(backend, [[1], [2], [3]], cell.output_tokens)


def test_a_backend_that_stops_early_is_counted_not_assumed() -> None:
    measured, cell = measure("ttft_ms=1+itl_ms=1+stop_after=5", repetitions=5)
    assert {r.requests[0].output_tokens for r in measured.repetitions} == {5}
    assert cell.output_tokens == 8


def test_scripts_with_unknown_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="does not know the setting speed=9. Known: load_ms"):
        parse_script("fake:speed=9")
    with pytest.raises(UsageError, match="fail=maybe"):
        parse_script("fake:fail=maybe")


def result_of(measured: CellMeasurements, cell: Cell) -> RunResult:
    facts = FakeBackend.resolve(cell)
    return RunResult(
        cell,
        "ok",
        0,
        0,
        Hashes("", "", "", "", ""),
        facts,
        {},
        repetitions=measured.repetitions,
        warmup_s=measured.warmup_s,
        steady=measured.steady,
    )


def test_summary_of_a_real_measurement_agrees_with_the_script() -> None:
    measured, cell = measure("ttft_ms=10+itl_ms=2", batch_size=4, repetitions=6)
    metrics = summary.summarize(result_of(measured, cell))
    assert metrics["latency/e2e_ms_mean"] == pytest.approx(
        metrics["latency/ttft_ms_mean"] + 7 * metrics["latency/tpot_ms_mean"]
    )
    assert metrics["throughput/output_tokens_per_s"] <= 4 * 8 / 0.024
    assert metrics["throughput/per_instance_tokens_per_s"] == metrics["throughput/output_tokens_per_s"] / 4
    assert metrics["settings/prompt_tokens"] == 4


def test_each_text_has_the_time_of_its_own_encoding_and_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the tokenizer moves on: 1 ms per byte that is encoded, 3 ms per id that is decoded."""
    now, ms = [10**15], 1_000_000
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])

    class Slow(FakeBackend):
        def encode(self, text: str) -> Sequence[int]:
            now[0] += ms * len(text)
            return super().encode(text)

        def decode(self, ids: Sequence[int]) -> str:
            now[0] += 3 * ms * len(ids)
            return super().decode(ids)

    backend, cell = fake("ttft_ms=1")
    texts, outputs = [{"prompt": "ab"}, {"prompt": "abcde"}], [([1, 2], [7]), ([1, 2, 3, 4, 5], [7, 8, 9, 10])]
    found = time_texts(Slow(cell, backend.resolve(cell)), texts, outputs)
    assert found == TextTimes((2 * ms, 5 * ms), (3 * ms, 12 * ms))
