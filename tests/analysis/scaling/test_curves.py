"""Curve fits: known parameters are found within their intervals, independent formulas agree, bad data are refused."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import optimize, stats

from mlflow_llmbench.analysis.scaling import curves
from mlflow_llmbench.analysis.scaling.curves import Form
from mlflow_llmbench.analysis.scaling.fitting import fit, rounded
from mlflow_llmbench.analysis.scaling.ranking import percent, ranked, verdict
from mlflow_llmbench.records.errors import NotFitted, OutOfRange

POWER = curves.power("y = a·x^b", "a", "b")
LINE = curves.line("y = a + b·x", "a", "b")
OFFSET = curves.offset_power("y = k + n·x^w", ("k", "n", "w"))
LENGTHS = [128.0, 256, 512, 1024, 2048, 4096, 8192]
BATCHES = [1.0, 2, 4, 8, 16, 32, 64]


def noisy(form: Form, truth: Sequence[float], x: Sequence[float], sigma: float, seed: int = 0) -> list[float]:
    noise = np.random.default_rng(seed).normal(0, sigma, len(x)) if sigma else 0
    return [float(v) for v in form.value(np.array(truth), np.array(x)) * np.exp(noise)]


@pytest.mark.parametrize(
    ("form", "truth", "x"),
    [
        (POWER, (50.0, 0.7), BATCHES),
        (curves.power("y = a·x^(−b)", "a", "b", falling=True), (300.0, 0.5), [0.125, 0.35, 1.3, 2.7, 6.7]),
        (LINE, (20.0, 30.0), [0.125, 0.35, 1.3, 2.7, 6.7]),
        (curves.rate_per_step("y = x/(a + b·x)", "a", "b"), (0.02, 0.002), BATCHES),
        (curves.reciprocal("y = 1/(a + b·x)", "a", "b"), (0.02, 1e-5), LENGTHS),
        (OFFSET, (20.0, 0.5, 0.8), LENGTHS),
        (curves.share_of("y = e·x²", "e", lambda x: x**2), (0.6,), BATCHES),
        (curves.constant("y = a", "a"), (3.0,), BATCHES),
    ],
    ids=lambda value: value.formula if isinstance(value, Form) else None,
)
def test_intervals_hold_the_known_parameters_as_often_as_they_say(
    form: Form, truth: tuple[float, ...], x: list[float]
) -> None:
    exact = fit(form, x, noisy(form, truth, x, 0))
    assert [p.value for p in exact.parameters] == pytest.approx(truth, rel=1e-4)
    times, sigma = 400, 0.02
    held, right = np.zeros(len(truth)), 0
    for seed in range(times):
        found = fit(form, x, noisy(form, truth, x, sigma, seed))
        held += [
            (p.low is None or p.low <= t) and (p.high is None or p.high >= t)
            for p, t in zip(found.parameters, truth, strict=True)
        ]
        at = math.sqrt(x[0] * x[-1])
        predicted = found.predict(at)
        new = noisy(form, truth, [at], sigma, seed + 10_000)[0]
        right += predicted.low <= new <= predicted.high
    assert ((held / times >= 0.92) & (held / times <= 0.98)).all(), held / times
    assert 0.92 <= right / times <= 0.98


def test_a_power_law_is_a_regression_of_logarithms() -> None:
    y = noisy(POWER, (50, 0.7), BATCHES, 0.05)
    found = fit(POWER, BATCHES, y)
    known = stats.linregress(np.log(BATCHES), np.log(y))
    t, n = stats.t.ppf(0.975, 5), len(y)
    slope = found.parameter("b")
    assert (slope.value, slope.low, slope.high) == pytest.approx(
        (known.slope, known.slope - t * known.stderr, known.slope + t * known.stderr)
    )
    level = found.parameter("a")
    assert level.low == pytest.approx(math.exp(known.intercept - t * known.intercept_stderr))
    assert found.r_squared == pytest.approx(known.rvalue**2)
    left = np.log(y) - known.intercept - known.slope * np.log(BATCHES)
    assert found.aicc == pytest.approx(n * math.log(left @ left / n) + 2 * 3 + 2 * 3 * 4 / (n - 4))
    design = np.column_stack([np.ones(n), np.log(BATCHES)])
    leverage = np.diag(design @ np.linalg.inv(design.T @ design) @ design.T)
    assert found.loo_error == pytest.approx(math.sqrt(np.mean((left / (1 - leverage)) ** 2)))  # Allen's PRESS
    assert found.residuals == pytest.approx(np.exp(left) - 1)


def test_the_interval_of_a_power_law_is_that_of_its_profile() -> None:
    """The same curve as a form without a closed solution gives the same intervals."""
    import dataclasses

    y = noisy(POWER, (50, 0.7), BATCHES, 0.05)
    searched = fit(dataclasses.replace(POWER, name="searched"), BATCHES, y)
    for mine, known in zip(searched.parameters, fit(POWER, BATCHES, y).parameters, strict=True):
        assert (mine.low, mine.high) == pytest.approx((known.low, known.high), rel=1e-3)


def test_the_best_offset_power_is_that_of_a_general_optimizer() -> None:
    y = noisy(OFFSET, (20, 0.5, 0.8), LENGTHS, 0.05, seed=3)
    found = fit(OFFSET, LENGTHS, y)
    known, _ = optimize.curve_fit(lambda x, k, n, w: np.log(k + n * x**w), LENGTHS, np.log(y), p0=(20, 0.5, 0.8))
    assert [p.value for p in found.parameters] == pytest.approx(known, rel=1e-3)


@pytest.mark.parametrize("form", [POWER, LINE, OFFSET], ids=lambda form: form.formula)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x[:2], y[:2]), "2 distinct points, and . parameters with intervals need"),
        (lambda x, y: ([4.0] * len(x), y), "1 distinct points"),
        (lambda x, y: (x, [0.0, *y[1:]]), "a value or its x is not above 0: 0 at 1"),
        (lambda x, y: ([0.0, *x[1:]], y), "a value or its x is not above 0"),
        (lambda x, y: (x, [-1.0, *y[1:]]), "not above 0: -1 at 1"),
        (lambda x, y: (x, [None, *y[1:]]), "the value at 1 is missing"),
        (lambda x, y: (x, [math.nan, *y[1:]]), "the value at 1 is missing"),
        (lambda x, y: (x, [math.inf, *y[1:]]), "the value at 1 is missing"),
        (lambda x, y: (x, y[1:]), "7 x and 6 values"),
        (lambda x, y: ([], []), "0 distinct points"),
    ],
)
def test_what_cannot_carry_a_curve_is_refused_in_one_line(
    form: Form, spoil: Callable[..., tuple[list[float], list[float]]], message: str
) -> None:
    with pytest.raises(NotFitted, match=message) as refused:
        fit(form, *spoil(BATCHES, [float(i + 1) for i in range(7)]))
    assert form.formula in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_left_out_point_beyond_the_pole_of_a_curve_has_no_error() -> None:
    """Four models on a noisy machine: without the largest one, the curve through the others ends before it."""
    sizes, rates = (
        [0.070426624, 0.125239296, 0.162322944, 0.268098176],
        [71.47576387, 41.82767062, 36.07588552, 10.63418143],
    )
    found = fit(curves.reciprocal("T = 1/(a + c·size)", "a", "c"), sizes, rates)
    assert found.loo_error is None
    law = fit(POWER, sizes, rates)
    assert ranked([found, law]) == [law, found]
    assert "y = a·x^b fits better than T = 1/(a + c·size)" in verdict(law, [found])


def test_equal_values_have_no_growth_and_no_exponent() -> None:
    flat = fit(POWER, BATCHES, [7.0] * 7)
    assert flat.parameter("b").value == pytest.approx(0, abs=1e-12)
    assert flat.r_squared is None
    x, scattered = [16.0, 32, 64, 128], [20.0, 20.7, 23.0, 21.6]
    noise, same = fit(OFFSET, x, scattered), fit(curves.constant("y = a", "a"), x, scattered)
    assert noise.undetermined == ["w"]
    assert noise.loo_error is not None and same.loo_error is not None and noise.loo_error < same.loo_error
    assert ranked([noise, same]) == [same, noise]  # although it is nearer
    assert "do not determine w of y = k + n·x^w; y = a is used" in verdict(noise, [same])


def test_nothing_is_said_beyond_the_data() -> None:
    found = fit(POWER, BATCHES, noisy(POWER, (50, 0.7), BATCHES, 0.05))
    inside = found.predict(12)
    assert inside.predicted
    assert inside.low < inside.mean_low < inside.value < inside.mean_high < inside.high
    for outside in (0.99, 64.1, 128):
        with pytest.raises(OutOfRange, match=f"{outside:g} lies outside the measured range 1 to 64"):
            found.predict(outside)


def test_the_true_curve_is_nearer_than_a_wrong_one() -> None:
    steps = curves.rate_per_step("T = b/(a + c·b)", "a", "c")
    y = noisy(steps, (0.02, 0.004), BATCHES, 0.01)
    law, rival = fit(POWER, BATCHES, y), fit(steps, BATCHES, y)
    assert ranked([law, rival])[0] is rival
    assert verdict(law, [rival]).startswith("T = b/(a + c·b) fits clearly better than y = a·x^b (AICc lower by ")
    y = noisy(POWER, (50, 0.7), BATCHES, 0.01)
    assert verdict(fit(POWER, BATCHES, y), [fit(steps, BATCHES, y)]).startswith("y = a·x^b fits clearly better")
    few = verdict(fit(POWER, BATCHES[:4], y[:4]), [fit(steps, BATCHES[:4], y[:4])])
    assert "4 cells are too few for AICc" in few


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [(201.34, 90, "201"), (20.0142, 0.012, "20.014"), (0.62, 0.067, "0.62"), (None, 1, "no limit"), (0.0, 1, "0")],
)
def test_digits_follow_the_uncertainty(value: float | None, width: float, text: str) -> None:
    assert rounded(value, width) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0342, "3.4 %"), (0.996, "100 %"), (-1.7, "-170 %"), (-0.998, "-100 %"), (12.3, "1230 %"), (None, "–")],
)
def test_shares_have_no_exponent(share: float | None, text: str) -> None:
    assert percent(share) == text
