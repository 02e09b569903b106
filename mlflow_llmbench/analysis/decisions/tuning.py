"""Search a grid of configurations for the best one with few measurements: what to measure next. Pure, deterministic.

The logarithm of each figure is modelled as a Gaussian process over the grid: a sum of one function of each parameter
and a smaller one of all together, so that a quantization that was measured at one batch size tells of the others. Each
quantization (or other value without an order) is tried once first, in the middle of the ordered parameters. The next
configuration is the one with the largest expected improvement (Jones, Schonlau & Welch, J. Global Optim. 13, 1998)
times the probability of keeping the limits (Gardner et al., ICML 2014). Nothing is drawn: the same trials lead to the
same choice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...records.cell import Cell, differing
from ...records.results import RunResult
from .candidates import Limit, Measure, candidates
from .recommend import missed_limits, untrusted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

GROWTH = {"throughput": 0.5, "goodput": 0.5, "latency": 0.5, "cost": -0.5, "efficiency": -0.5}
"""Section of a metric → power of the rows (or users) by which it is assumed to grow where nothing was measured.

A step takes between one and as many times as long with twice the rows: the middle of that, in logarithms.
"""

LEAST_TOLD = 2
"""Trials from which on the chances of others are worth telling."""

LEFT = 2
"""Trials that the first ones leave for the model at least."""

LENGTH = 0.7
"""Length scale of the processes, as a share of an ordered axis. Fixed, since few trials cannot tell it."""

CATEGORY = 0.52
"""Coordinate of a value without an order, one dimension each: two of them then correlate by a half."""

OF_EACH, OF_ALL = 1.6, 0.4
"""Variance of the functions of single parameters together, and of the function of all, for values of variance 1."""

NOISE = 1e-3
"""Variance of a measurement, for values of variance 1."""

DOUBT = 0.1
"""The same of a suspect measurement: it guides the search roughly, and what is trusted nearby outweighs it."""


@dataclass(frozen=True)
class Trial:
    """What a trial says: the figure to optimize and those of the limits, in order.

    `value` is None if it says nothing: the result is invalid, or lacks the figure. `failed`: it cannot be measured at
    all. `doubtful`: it is suspect and not accepted. `keeps`: it keeps all limits.
    """

    value: float | None = None
    limits: tuple[float | None, ...] = ()
    failed: bool = False
    doubtful: bool = False
    keeps: bool = False


def read_trial(result: RunResult, target: Measure, limits: Sequence[Limit], accept_suspect: str | None = None) -> Trial:
    """Return what a result says to the search. So that it does not mislead, only what `recommend` would use counts.

    An invalid result says nothing. A suspect one that is not accepted is doubtful: its figures guide the search as far
    as `DOUBT` allows, and are no bar that others have to pass.
    """
    if result.outcome != "ok":
        return Trial(failed=True)
    [one] = candidates([result])
    value = one.value(target)
    if one.verdict.word == "invalid" or value is None:
        return Trial()
    figures = tuple(one.value(limit.measure) for limit in limits)
    doubtful = untrusted(one, accept_suspect) is not None
    return Trial(value, figures, doubtful=doubtful, keeps=missed_limits(one, limits) is None)


class Grid:
    """The configurations of a search as points: a coordinate from 0 to 1 for each ordered axis, several for others."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = tuple(cells)
        self.axes = [_Axis(name, cells) for name in differing(cells)]
        self.points = [[x for axis in self.axes for x in axis.coordinates(cell)] for cell in self.cells]
        self.log_rows = [math.log(cell.batch_size * cell.concurrency) for cell in self.cells]

    def unseen(self, numbers: Collection[int]) -> dict[str, list[object]]:
        """Return the values of each axis that none of these cells has."""
        found = {}
        for axis in self.axes:
            seen = {getattr(self.cells[number], axis.name) for number in numbers}
            if missing := [value for value in axis.values if value not in seen]:
                found[axis.name] = missing
        return found

    def first_trials(self, trials: int) -> int:
        """Return how many of all trials are made before the model is asked: one for each value without an order."""
        return min(max((len(axis.values) for axis in self.axes if not axis.ordered), default=1), max(trials - LEFT, 1))

    def first(self, step: int) -> list[float]:
        """Return the point of trial `step` of the first ones: the middle of the ordered axes, other values in turn."""
        points = ([0.5] if axis.ordered else axis.of_value(axis.values[step % len(axis.values)]) for axis in self.axes)
        return [x for point in points for x in point]


class _Axis:
    """A parameter with several values. It is ordered if they are numbers; positive ones lie on a logarithmic scale."""

    def __init__(self, name: str, cells: Sequence[Cell]) -> None:
        self.name = name
        values = list(dict.fromkeys(getattr(cell, name) for cell in cells))
        self.ordered = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        self.values = sorted(values) if self.ordered else values
        self.dimensions = 1 if self.ordered else len(values)

    def coordinates(self, cell: Cell) -> list[float]:
        return self.of_value(getattr(cell, self.name))

    def of_value(self, value: object) -> list[float]:
        place = self.values.index(value)
        if not self.ordered:
            return [CATEGORY if number == place else 0.0 for number in range(self.dimensions)]
        low, high = self.values[0], self.values[-1]
        if low <= 0:
            return [place / (len(self.values) - 1)]
        return [math.log(self.values[place] / low) / math.log(high / low)]


def choose(
    grid: Grid,
    trials: Mapping[int, Trial],
    open_cells: Sequence[int],
    target: Measure,
    limits: Sequence[Limit],
    first_trials: int = 1,
) -> int | None:
    """Return the number of the cell to measure next, among `open_cells`; None if there is none.

    `trials` has what was told so far, by the number of the cell. The `first_trials` ask no model.
    """
    if not open_cells:
        return None
    if len(trials) < first_trials or all(trial.value is None for trial in trials.values()):
        wanted = grid.first(len(trials))
        return min(open_cells, key=lambda number: math.dist(grid.points[number], wanted))
    import numpy as np
    from scipy.stats import norm  # type: ignore[import-untyped]

    gain, keeps = _gain(grid, trials, open_cells, target), _log_keeps(grid, trials, open_cells, limits)
    if gain is None:
        return open_cells[int(np.argmax(keeps))]
    mean, sd = gain
    score = np.log(np.maximum(mean * norm.cdf(mean / sd) + sd * norm.pdf(mean / sd), 1e-300)) + keeps
    return open_cells[int(np.argmax(score))]


def chances(
    grid: Grid, trials: Mapping[int, Trial], open_cells: Sequence[int], target: Measure, limits: Sequence[Limit]
) -> dict[int, float]:
    """Return for each cell that was not tried the model's probability that it is better than all that were.

    Better: it keeps the limits, and its figure is better than that of the best trusted trial that keeps them. Empty if
    there is none, or fewer than `LEAST_TOLD` have told something.
    """
    told = [trial for trial in trials.values() if trial.value is not None]
    if not open_cells or len(told) < LEAST_TOLD or not any(trial.keeps and not trial.doubtful for trial in told):
        return {}
    gain = _gain(grid, trials, open_cells, target)
    assert gain
    import numpy as np
    from scipy.stats import norm

    chance = np.exp(_log_keeps(grid, trials, open_cells, limits)) * norm.cdf(gain[0] / gain[1])
    return {number: float(one) for number, one in zip(open_cells, chance, strict=True)}


def growth(measure: Measure) -> float:
    """Return the power of the rows by which a figure is assumed to grow, see `GROWTH`."""
    return GROWTH.get(measure.keys[-1].partition("/")[0], 0.0)


def _gain(grid: Grid, trials: Mapping[int, Trial], at: Sequence[int], target: Measure) -> tuple[Array, Array] | None:
    """Return mean and standard deviation of the logarithmic gain over the best trial that keeps the limits.

    Doubtful trials are that bar only where there is no other. None if no trial keeps the limits.
    """
    sign = 1 if target.better == "higher" else -1
    told = {number: trial for number, trial in trials.items() if trial.value is not None}
    values = {number: sign * one for number, one in _logs({n: t.value or 0.0 for n, t in told.items()}).items()}
    keeping = [number for number, trial in told.items() if trial.keeps]
    bar = [number for number in keeping if not told[number].doubtful] or keeping
    if not bar:
        return None
    mean, sd = _posterior(grid, trials, values, at, sign * growth(target))
    return mean - max(values[number] for number in bar), sd


def _log_keeps(grid: Grid, trials: Mapping[int, Trial], at: Sequence[int], limits: Sequence[Limit]) -> Array:
    """Return the logarithm of the probability that each cell keeps all limits, which are taken as independent."""
    import numpy as np
    from scipy.stats import norm

    total = np.zeros(len(at))
    for place, limit in enumerate(limits):
        known = {
            number: figure
            for number, trial in trials.items()
            if trial.value is not None and (figure := trial.limits[place]) is not None
        }
        if known:
            mean, sd = _posterior(grid, trials, _logs(known), at, growth(limit.measure))
            room = math.log(limit.bound) - mean
            total += norm.logcdf((room if limit.measure.better == "lower" else -room) / sd)
    return total


def _logs(figures: Mapping[int, float]) -> dict[int, float]:
    """Return the logarithms of figures. One of 0, such as no goodput, counts as half of the smallest other one."""
    least = min((figure for figure in figures.values() if figure > 0), default=1.0)
    return {number: math.log(figure if figure > 0 else least / 2) for number, figure in figures.items()}


def _posterior(
    grid: Grid, trials: Mapping[int, Trial], values: Mapping[int, float], at: Sequence[int], slope: float
) -> tuple[Array, Array]:
    """Return mean and standard deviation of the process at some cells, given its values at others.

    `slope`: how much the values are assumed to grow with the logarithm of the rows where nothing was measured.
    """
    import numpy as np
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    far = 1e9  # a length scale that makes a coordinate count for nothing
    kernel = OF_ALL * Matern(LENGTH, nu=2.5)
    begin, dimensions = 0, len(grid.points[0])
    for axis in grid.axes:
        scales = np.full(dimensions, far)
        scales[begin : begin + axis.dimensions] = LENGTH
        kernel += OF_EACH / len(grid.axes) * Matern(scales, nu=2.5)
        begin += axis.dimensions
    noise = np.array([DOUBT if trials[number].doubtful else NOISE for number in values])
    process = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None, normalize_y=True)
    process.fit(
        [grid.points[number] for number in values],
        [value - slope * grid.log_rows[number] for number, value in values.items()],
    )
    mean, sd = process.predict([grid.points[number] for number in at], return_std=True)
    return mean + slope * np.array([grid.log_rows[number] for number in at]), np.maximum(sd, 1e-9)
