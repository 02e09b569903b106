"""Ratios, best batch sizes, cliffs (with their false alarms), and the price of a prompt."""

import math

import numpy as np
import pytest
from scipy import stats

from mlflow_llmbench.analysis.scaling import curves, tradeoffs
from mlflow_llmbench.analysis.scaling.fitting import fit
from mlflow_llmbench.analysis.scaling.tradeoffs import find_cliffs, optimal_batch, scaling_efficiency
from mlflow_llmbench.records.errors import NotFitted, OutOfRange
from mlflow_llmbench.stats import t_interval

BATCHES = np.array([1.0, 2, 4, 8, 16, 32, 64])
SMOOTH = {
    "power": BATCHES**0.5, "in proportion": BATCHES, "flat": BATCHES**0, "linear": 20 + 3 * BATCHES,
    "roofline": np.maximum(20, 4 * BATCHES), "saturated": np.minimum(8 * BATCHES, 100),
}  # fmt: skip


def measured(
    curve: np.ndarray, drift: float, seed: int, repetitions: int = 6, scatter: float = 0.02
) -> dict[float, list[float]]:
    """A series whose cells drift by `drift`, and whose repetitions scatter by `scatter`."""
    draw = np.random.default_rng(seed)
    cells = curve * np.exp(draw.normal(0, drift, len(curve)))
    return {
        float(x): [float(v) for v in cell * np.exp(draw.normal(0, scatter, repetitions))]
        for x, cell in zip(BATCHES, cells, strict=True)
    }


@pytest.mark.parametrize("drift", [0.0, 0.03])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_curves_raise_no_more_false_alarms_than_stated(name: str, drift: float) -> None:
    alarms = sum(bool(find_cliffs(measured(SMOOTH[name], drift, seed), 1.0)) for seed in range(200))
    assert alarms <= 200 * tradeoffs.LEVEL


def test_one_side_alone_makes_no_cliff() -> None:
    """A knee with much scatter: the step after it is as steep, but by chance often looks less steep."""
    alarms = 0
    for seed in range(300):
        draw = np.random.default_rng(seed)
        curve = np.maximum(20, 5 * BATCHES)
        alarms += bool(
            find_cliffs(
                {
                    float(x): [float(v) for v in y * np.exp(draw.normal(0, 0.15, 5))]
                    for x, y in zip(BATCHES, curve, strict=True)
                },
                1.0,
            )
        )
    assert alarms <= 300 * tradeoffs.LEVEL


@pytest.mark.parametrize(
    ("before", "jump"), [(1.0, 3.0), (8.0, 1.9), (32.0, 1.9)]
)  # an end has one neighbour: its jump must exceed proportion
def test_a_jump_is_found_where_it_is(before: float, jump: float) -> None:
    found = [
        find_cliffs(measured((20 + 3 * BATCHES) * np.where(before < BATCHES, jump, 1.0), 0.0, seed), 1.0)
        for seed in range(50)
    ]
    right = [cliffs[0] for cliffs in found if len(cliffs) == 1 and cliffs[0].before == before]
    assert len(right) >= 48
    assert all(cliff.after == 2 * before and cliff.factor > 1.25 and cliff.p_value < 0.05 for cliff in right)


def test_a_jump_is_found_in_more_noise() -> None:
    """Repetitions that scatter by 6 % tell a jump of 90 %: the error of a mean of six is 2.4 %."""
    curve = (20 + 3 * BATCHES) * np.where(BATCHES > 8, 1.9, 1.0)
    found = [find_cliffs(measured(curve, 0.0, seed, scatter=0.06), 1.0) for seed in range(50)]
    assert sum([cliff.before for cliff in cliffs] == [8.0] for cliffs in found) >= 48


def test_the_p_value_of_a_cliff_by_hand() -> None:
    """Step 1 → 2 against step 2 → 4 is the contrast 2·y(2) − y(1) − y(4) of logarithms: Welch, and Holm for two."""
    logs = {1.0: [0.0, 0.1, 0.05], 2.0: [0.9, 1.2, 1.05, 1.0], 4.0: [1.0, 1.3, 1.2, 1.1, 1.15]}
    [cliff] = find_cliffs({x: [math.exp(y) for y in ys] for x, ys in logs.items()}, 0.0)
    errors = [weight**2 * np.var(ys, ddof=1) / len(ys) for weight, ys in zip((1, 2, 1), logs.values(), strict=True)]
    one, two, four = (float(np.mean(ys)) for ys in logs.values())
    degrees = sum(errors) ** 2 / sum(e**2 / (len(ys) - 1) for e, ys in zip(errors, logs.values(), strict=True))
    by_hand = stats.t.sf((2 * two - one - four) / math.sqrt(sum(errors)), degrees)
    assert (cliff.before, cliff.after) == (1.0, 2.0)
    assert cliff.p_value == pytest.approx(2 * by_hand, rel=1e-6)
    assert cliff.factor == pytest.approx(math.exp(two - one - max(four - two, 0.0)))


def test_quadratic_attention_is_no_cliff_over_lengths() -> None:
    curve = 10 + BATCHES + 0.05 * BATCHES**2
    assert sum(bool(find_cliffs(measured(curve, 0.0, seed), 2.0)) for seed in range(100)) <= 5


def test_cliffs_need_places_and_repetitions() -> None:
    with pytest.raises(NotFitted, match="in 2 places: 3 with 2 repetitions each"):
        find_cliffs({1.0: [1.0, 1.1], 2.0: [2.0, 2.1]}, 1.0)
    with pytest.raises(NotFitted, match="cannot be told"):
        find_cliffs({1.0: [1.0], 2.0: [2.0], 4.0: [9.0]}, 1.0)
    exact = {1.0: [10.0, 10.0], 2.0: [10.0, 10.0], 4.0: [40.0, 40.0], 8.0: [40.0, 40.0]}
    assert [(cliff.before, cliff.after) for cliff in find_cliffs(exact, 1.0)] == [(2.0, 4.0)]


def test_scaling_efficiency_by_hand() -> None:
    [two, four] = scaling_efficiency({1: [99.0, 101.0, 100.0], 2: [160.0, 160.0, 160.0], 4: [200.0, 202.0, 198.0]})
    assert two.name == "2"
    assert two.value == pytest.approx(160 / 200, rel=1e-3)
    assert two.low is not None and two.high is not None and two.low < 0.8 < two.high
    assert four.value == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(NotFitted, match="needs batch size 1, and 2, 4 were measured"):
        scaling_efficiency({2: [1.0, 1.0], 4: [1.0, 1.0]})


def test_the_best_batch_by_both_definitions() -> None:
    near = [1.0, 1.01, 0.99, 1.005, 0.995]
    rates = {
        size: [rate * size * v for v in near]
        for size, rate in {1: 10.0, 2: 10.05, 4: 12.0, 8: 9.0, 16: 6.1, 32: 5.0}.items()
    }
    best = optimal_batch(rates)
    assert (best.per_instance, best.alike, best.largest, best.throughput) == (4, (), 16, 32)
    assert optimal_batch(rates, share=0.7).largest == 8
    twins = optimal_batch({size: [size * v for v in near] for size in (1, 2, 4)})
    assert set(twins.alike) | {twins.per_instance} == {1, 2, 4}
    with pytest.raises(NotFitted, match="at least two to choose from: 1 measured"):
        optimal_batch({1: [1.0]})


def test_the_price_of_a_prompt() -> None:
    line = curves.line("L = a + c·s", "a", "c")
    x = [128.0, 256, 512, 1024, 2048]
    y = [float(v) for v in (30 + 0.25 * np.array(x)) * np.exp(np.random.default_rng(0).normal(0, 0.005, 5))]
    found = tradeoffs.token_cost(fit(line, x, y), [19.8, 20.1, 20.0, 20.2, 19.9])
    assert found.prompt[0] == pytest.approx(128, rel=0.02)
    assert found.output[0] == pytest.approx(160, rel=0.01)
    value, low, high = found.equal_output
    assert value == pytest.approx(6.4, rel=0.02)
    assert low < 6.4 < high
    near = fit(line, [100.0, 200, 300, 400], [55.0, 80.0, 105.0, 130.1])
    with pytest.raises(OutOfRange, match="512 more prompt tokens are beyond the measured lengths 100 to 400"):
        tradeoffs.token_cost(near, [20.0, 21.0])
    flat = fit(line, x, [30.0, 31.0, 29.5, 30.5, 30.0])
    with pytest.raises(NotFitted, match="cannot be told from 0"):
        tradeoffs.token_cost(flat, [20.0, 21.0, 20.0])


def test_the_interval_of_the_exchange_covers_and_is_hardly_wider_than_those_of_its_parts() -> None:
    line, x = curves.line("L = a + c·s", "a", "c"), np.array([128.0, 256, 512, 1024, 2048, 4096])
    held, widths = 0, []
    for seed in range(300):
        draw = np.random.default_rng(seed)
        y = (30 + 0.25 * x) * np.exp(draw.normal(0, 0.02, len(x)))
        tpot = list(20 * np.exp(draw.normal(0, 0.02, 6)))
        fitted = fit(line, list(x), list(y))
        cost = tradeoffs.token_cost(fitted, tpot)
        _, low, high = cost.equal_output
        held += low <= 6.4 <= high
        slope, gaps = fitted.parameter("c"), t_interval(tpot)
        assert slope.low and slope.high and gaps
        assert cost.prompt == pytest.approx((512 * slope.value, 512 * slope.low, 512 * slope.high))
        assert cost.output == pytest.approx((8 * np.mean(tpot), 8 * gaps[0], 8 * gaps[1]))
        parts = math.log(slope.high / slope.low), math.log(gaps[1] / gaps[0])
        assert math.log(high / low) == pytest.approx(math.hypot(*parts), rel=0.05)
        widths.append(math.log(high / low))
    assert 0.93 <= held / 300 <= 0.995  # wider than need be: both parts have few degrees of freedom
    assert np.mean(widths) < 0.1


def test_the_interval_of_a_ratio_covers_and_is_as_wide_as_welchs() -> None:
    """T(4) ÷ (4·T(1)) of 6 repetitions with 2 % noise: half-widths of 2.23·0.02·√(2/6) on average."""
    held, widths = 0, []
    for seed in range(400):
        draw = np.random.default_rng(seed)
        one, four = (list(rate * np.exp(draw.normal(0, 0.02, 6))) for rate in (100.0, 320.0))
        [found] = scaling_efficiency({1: one, 4: four})
        assert found.low and found.high
        held += found.low <= 0.8 <= found.high
        widths.append(math.log(found.high / found.low) / 2)
    assert 0.92 <= held / 400 <= 0.98
    assert np.mean(widths) == pytest.approx(2.25 * 0.02 * math.sqrt(2 / 6), rel=0.1)


def test_quantization_efficiency_is_a_ratio_of_geometric_means() -> None:
    found = tradeoffs.ratio("int8", [90.0, 91.0, 89.0], [100.0, 102.0, 98.0])
    assert found.value == pytest.approx(math.prod([90, 91, 89]) ** (1 / 3) / math.prod([100, 102, 98]) ** (1 / 3))
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    assert tradeoffs.ratio("int8", [90.0], [100.0]).low is None
