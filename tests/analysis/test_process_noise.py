"""Noise between processes: variances by hand, its source, and what a calibration refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest

from mlflow_llmbench.analysis.process_noise import ASSUMED, calibration_of, noise_of
from mlflow_llmbench.records.calibration import Spread
from mlflow_llmbench.records.errors import UsageError
from mlflow_llmbench.records.results import RunResult

from ..results import known_noise, made

RATE = "throughput/output_tokens_per_s"


def in_processes(logs: Sequence[Sequence[float]]) -> RunResult:
    """A result whose repetitions have these logarithms of their throughput, process by process."""
    flat = made(factors=[math.exp(-x) for own in logs for x in own])
    numbers = [number for number, own in enumerate(logs) for _ in own]
    return dataclasses.replace(
        flat,
        repetitions=tuple(dataclasses.replace(r, process=n) for r, n in zip(flat.repetitions, numbers, strict=True)),
    )


def test_what_repetitions_explain_is_taken_off_by_hand() -> None:
    """Means of −0.02, 0, 0.02 have the variance 4e-4; ±0.01 within each process has 2e-4, a half of it in a mean."""
    found = calibration_of([in_processes([[m - 0.01, m + 0.01] for m in (-0.02, 0.0, 0.02)])])
    [spread] = found.spreads[RATE]
    assert (spread.between, spread.within) == (pytest.approx(4e-4, rel=1e-5), pytest.approx(1e-4, rel=1e-4))
    assert (spread.degrees, spread.within_degrees, spread.repetitions) == (pytest.approx(2), 3, 2)
    assert spread.sd == pytest.approx(math.sqrt(3e-4), rel=1e-4)
    assert (found.processes, found.repetitions, found.of) == (3, 6, "fake:x none")


def test_repetitions_that_follow_each_other_raise_the_spread_of_few() -> None:
    """Three alike processes of two blocks of five: means of 5 differ by what the blocks do, means of 10 do not."""
    block = [0.0, 0.001, -0.001, 0.0005, -0.0005]
    one = [*(x - 0.05 for x in block), *(x + 0.05 for x in block)]
    five, ten = calibration_of([in_processes([one, one, one])]).spreads[RATE]
    assert (five.repetitions, ten.repetitions) == (5, 10)
    # Between the means of processes nothing, and half of the variance 2 · 0.05² of the two means around their own.
    assert five.between == pytest.approx(0.05**2, rel=1e-3)
    assert five.degrees == pytest.approx(3)
    assert ten.sd == 0
    assert five.sd > 0.04


def test_results_are_pooled_by_their_degrees_of_freedom() -> None:
    first = in_processes([[m, m] for m in (-0.02, 0.0, 0.02)])
    second = dataclasses.replace(in_processes([[m, m] for m in (0.0, 0.0, 0.0, 0.0, 0.0)]), ended_ms=9000)
    found = calibration_of([first, second])
    assert found.spreads[RATE][0].between == pytest.approx(2 * 4e-4 / 6, rel=1e-4)
    assert (found.processes, found.ended_ms) == (8, 9000)


def test_the_source_is_the_calibration_else_the_other_result_else_an_assumption() -> None:
    alone, several = made(), in_processes([[0.0, 0.0], [0.01, 0.01], [0.02, 0.02]])
    assert noise_of(several, alone, [], disturbed=False) is None
    calibrated = noise_of(alone, several, [known_noise(alone, 0.01)], disturbed=False)
    other, assumed = noise_of(alone, several, [], disturbed=False), noise_of(alone, alone, [], disturbed=False)
    assert calibrated and other and assumed
    assert [noise.source for noise in (calibrated, other, assumed)] == ["calibrated", "the other result", "assumed"]
    assert calibrated.spread(RATE).sd == pytest.approx(0.01)
    assert other.spread(RATE).between == pytest.approx(1e-4, rel=1e-3)
    assert assumed.spread(RATE) == ASSUMED == Spread(0.03**2, 5)
    elsewhere = dataclasses.replace(known_noise(alone), hardware="another machine")
    unknown = noise_of(alone, alone, [elsewhere], disturbed=False)
    assert unknown and unknown.source == "assumed"


def test_a_disturbed_result_has_at_least_the_assumed_noise() -> None:
    noise = noise_of(made(), made(), [known_noise(made(), 0.001)], disturbed=True)
    loud = noise_of(made(), made(), [known_noise(made(), 0.08)], disturbed=True)
    assert noise and loud
    assert noise.spread(RATE) == ASSUMED
    assert loud.spread(RATE).sd == pytest.approx(0.08)


def test_both_sides_share_one_estimate() -> None:
    noise = noise_of(made(), made(), [], disturbed=False)
    assert noise
    one, two = noise.part(RATE, 1), noise.part(RATE, 2)
    assert (one.variance, one.share) == (pytest.approx(9e-4), pytest.approx(9e-4**2 / 5))
    assert (two.variance, two.share) == (pytest.approx(18e-4), pytest.approx(18e-4**2 / 5))


def test_what_repetitions_explain_counts_in_the_uncertainty() -> None:
    spreads = {RATE: (Spread(4e-4, 2, 1e-4, 4),)}
    noise = noise_of(made(), made(), [dataclasses.replace(known_noise(made()), spreads=spreads)], disturbed=False)
    assert noise
    part = noise.part(RATE, 2)
    assert part.variance == pytest.approx(2 * 3e-4)
    assert part.share == pytest.approx((2 * 4e-4) ** 2 / 2 + (2 * 1e-4) ** 2 / 4)
    assert part.degrees == 2


def test_what_cannot_calibrate_is_refused_in_one_line() -> None:
    three = in_processes([[0.0, 0.0], [0.01, 0.01], [0.02, 0.02]])
    elsewhere = dataclasses.replace(three, hashes=dataclasses.replace(three.hashes, hardware="x"))
    for results, told in (
        ([], "There is no result to calibrate with."),
        ([made()], "A calibration needs results of at least 3 processes, and fake:x none has 1. Measure it with"),
        ([three, elsewhere], "A calibration is of one machine, backend and device, and the results are of h fake auto"),
    ):
        with pytest.raises(UsageError) as caught:
            calibration_of(results)
        assert str(caught.value).startswith(told)
        assert "\n" not in str(caught.value)
