"""The probe of the best rates: rounds on a virtual clock, and one real probe."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlflow_llmbench.analysis import probe
from mlflow_llmbench.backends.peak_rates import (
    MOST_ROUNDS,
    MOST_S,
    WARM_S,
    launches,
    measure_peaks,
    until_two_agree,
    warm,
    worth_measuring,
)


class Rounds:
    """Rounds of given lengths on a clock that only they move."""

    def __init__(self, *seconds: float) -> None:
        self.seconds: Iterator[float] = iter(seconds)
        self.now = 0.0
        self.made = 0

    def measure(self) -> float:
        found = next(self.seconds)
        self.now += found
        self.made += 1
        return found

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "made", "best", "agreement"),
    [
        ((0.1, 0.102), 2, 0.1, 0.1 / 0.102),
        ((1.0, 0.5, 0.1, 0.11, 0.101), 5, 0.1, 0.1 / 0.101),
        ((0.6, 0.5, 0.4, 0.3, 0.2, 0.1), MOST_ROUNDS, 0.1, 0.5),
        ((3.0, 2.5, 2.0), 2, 2.5, 2.5 / 3.0),
    ],
)
def test_rounds_are_added_until_two_agree(seconds: tuple[float, ...], made: int, best: float, agreement: float) -> None:
    rounds = Rounds(*seconds)
    assert until_two_agree(rounds.measure, rounds.clock) == (best, pytest.approx(agreement))
    assert rounds.made == made
    assert sum(seconds[: made - 1]) < MOST_S


def test_a_probe_tells_what_it_rests_on() -> None:
    pytest.importorskip("torch")
    found = measure_peaks("cpu", 0)
    assert found[probe.READ] > 0 and found[probe.FLOPS] > 0
    assert all(0 < found[name] <= 1 for name in probe.AGREEMENT.values())
    assert set(found) <= {probe.READ, probe.FLOPS, *probe.EVIDENCE}


def test_what_a_small_trial_shows_to_be_far_slower_is_not_measured() -> None:
    assert worth_measuring({"float32": 1e-5, "bfloat16": 2e-3}) == ["float32"]
    assert worth_measuring({"float32": 8e-5, "bfloat16": 1e-5}) == ["float32", "bfloat16"]


def test_a_gpu_works_for_a_while_before_it_is_timed() -> None:
    rounds = Rounds(*[0.3] * 9)
    finished: list[float] = []
    assert warm(rounds.measure, lambda: finished.append(rounds.now), rounds.clock) == 4
    assert finished[-1] >= WARM_S > finished[-2]


@pytest.mark.parametrize(
    ("seconds", "most", "expected"),
    [(0.0005, 20, 20), (0.005, 20, 4), (0.0199, 20, 2), (0.1, 20, 1), (0.0005, 1, 1), (0.0, 20, 20)],
)
def test_short_launches_are_timed_together(seconds: float, most: int, expected: int) -> None:
    assert launches(seconds, most) == expected
