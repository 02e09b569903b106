"""Curves fitted to positive measurements: parameters with intervals, and predictions inside the data.

Every fit minimises Σ (ln y − ln f(x))², the squared relative errors, because times and rates scatter in proportion to
their size. With one error model for all curves, their AICc are comparable. A power law is a straight line in
logarithms: its intervals are Student's, exact under normal errors. The other curves get profile-likelihood intervals
(Bates & Watts, Nonlinear Regression Analysis, 1988, 6.1): all values of a parameter for which refitting the other
parameters keeps the sum of squares at or below S·(1 + t(0.975; n − p)²/(n − p)). These may be asymmetric, and open at
an end that the data do not bound.

One point is one measured cell. All intervals assume that the curve is right; check it by `Fit.residuals` and the
rivals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...records.errors import NotFitted, OutOfRange
from ...stats import t_quantile_975
from .curves import Form

if TYPE_CHECKING:
    from .curves import Array

EXACT = 1e-24
"""Mean squared relative error below which a residual is only rounding."""


@dataclass(frozen=True)
class Parameter:
    """A fitted parameter and its 95 % interval. An end is None if the data do not bound it."""

    name: str
    value: float
    low: float | None
    high: float | None

    @property
    def determined(self) -> bool:
        """True if the data bound it on both sides."""
        return self.low is not None and self.high is not None

    def __str__(self) -> str:
        """Return `β = 0.620 (0.553 to 0.687)`, with as many digits as the interval supports."""
        if self.low is None and self.high is None:
            return f"{self.name} not determined"
        width = max(abs(end - self.value) for end in (self.low, self.high) if end is not None)
        value, low, high = (rounded(number, width) for number in (self.value, self.low, self.high))
        return f"{self.name} = {value} ({low} to {high})"


@dataclass(frozen=True)
class Prediction:
    """A curve's prediction for a cell that was not measured: the value and the 95 % interval of one new measurement."""

    x: tuple[float, ...]
    value: float
    low: float
    high: float
    mean_low: float  # 95 % interval of the curve itself
    mean_high: float
    predicted: bool = True


@dataclass(frozen=True)
class Fit:
    """A curve fitted to points; undefined figures are None.

    `residuals`: y/f − 1 · `sigma`: their standard deviation · `loo_error`: the typical relative error (root mean square
    of ln y − ln f) when each point is predicted from the others.
    """

    form: Form
    parameters: tuple[Parameter, ...]
    x: tuple[tuple[float, ...], ...]
    y: tuple[float, ...]
    residuals: tuple[float, ...]
    sigma: float
    r_squared: float | None
    aicc: float | None
    loo_error: float | None

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Lowest and highest x of the data, per column."""
        return tuple((min(column), max(column)) for column in zip(*self.x, strict=True))

    def parameter(self, name: str) -> Parameter:
        """Return the parameter of this name."""
        return next(parameter for parameter in self.parameters if parameter.name == name)

    @property
    def undetermined(self) -> list[str]:
        """Names of the parameters that the points do not bound on either side."""
        return [p.name for p in self.parameters if p.low is None and p.high is None]

    def predict(self, *x: float, beyond: bool = False) -> Prediction:
        """Predict the value at x with 95 % intervals (delta method; exact for a power law).

        Raises OutOfRange outside the range of the data, unless `beyond` is set.
        """
        import numpy as np

        for value, (low, high) in zip(x, self.ranges, strict=True):
            if not beyond and not low <= value <= high:
                raise OutOfRange(
                    f"{value:g} lies outside the measured range {low:g} to {high:g} of {self.form.formula}. "
                    "Measure there; a law is not extrapolated."
                )
        theta = np.array([parameter.value for parameter in self.parameters])
        points, there = _columns(self.x), _columns([x])
        slopes = self.form.gradient(theta, points) / self.form.value(theta, points)[:, None]
        value = float(self.form.value(theta, there)[0])
        leverage = self.form.gradient(theta, there)[0] / value @ np.linalg.pinv(slopes)
        t, share = t_quantile_975(len(self.y) - len(theta)) * self.sigma, float(leverage @ leverage)
        new, mean = math.exp(t * math.sqrt(1 + share)), math.exp(t * math.sqrt(share))
        return Prediction(x, value, value / new, value * new, value / mean, value * mean)


def fit(form: Form, x: Sequence[float] | Sequence[tuple[float, ...]], y: Sequence[float | None]) -> Fit:
    """Fit a curve. Raises NotFitted, with a one-line message, if the data do not determine parameters with intervals.

    With only as many distinct x as parameters, the curve would pass through every point and test nothing, so one more
    distinct x is required.
    """
    import numpy as np

    rows = [tuple(map(float, value)) if isinstance(value, tuple | list) else (float(value),) for value in x]
    values = _checked(form, rows, y)
    points, logs = _columns(rows), np.log(values)
    found = _search(form, points, logs)
    if found is None:
        raise NotFitted(
            f"{form.formula} cannot be fitted: no parameters give positive values at all {len(rows)} points. "
            "Check the points."
        )
    theta, left = found
    n, p = len(rows), len(form.names)
    left = left if left > n * EXACT else 0.0
    total = float(((logs - logs.mean()) ** 2).sum())
    k = p + 1  # the variance is a parameter too
    aicc = n * math.log(max(left, n * EXACT) / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else None
    return Fit(
        form,
        tuple(_intervals(form, points, logs, theta, left)),
        tuple(rows),
        tuple(values),
        tuple(float(v) for v in np.exp(logs) / form.value(theta, points) - 1),
        math.sqrt(left / (n - p)),
        1 - left / total if total > n * EXACT else None,
        aicc,
        _leave_one_out(form, points, logs, theta),
    )


def left_out_error(
    form: Form, x: Sequence[tuple[float, ...]], y: Sequence[float], groups: Sequence[object]
) -> float | None:
    """Typical relative error (root mean square of ln y − ln f) of each point, with f fitted to the other groups alone.

    None if the others do not determine the curve, or if it has no positive value at a point that was left out.
    """
    import numpy as np

    points, logs, errors = _columns(x), np.log(np.array(y, dtype=np.float64)), []
    for group in dict.fromkeys(groups):
        out = np.array([one == group for one in groups])
        if len(np.unique(points[~out], axis=0)) < len(form.names):
            return None
        done = _search(form, points[~out], logs[~out])
        there = form.value(done[0], points[out]) if done else np.zeros(1)
        if not (np.isfinite(there).all() and (there > 0).all()):
            return None
        errors += list(logs[out] - np.log(there))
    return math.sqrt(sum(float(error) ** 2 for error in errors) / len(errors))


def _checked(form: Form, rows: Sequence[tuple[float, ...]], y: Sequence[float | None]) -> list[float]:
    """Return the values as floats. Raises NotFitted if x or y cannot be used for this curve."""
    refused = f"{form.formula} cannot be fitted:"
    if len(rows) != len(y):
        raise NotFitted(f"{refused} {len(rows)} x and {len(y)} values. Give one value for each x.")
    values: list[float] = []
    for place, value in zip(rows, y, strict=True):
        at = ", ".join(f"{part:g}" for part in place)
        if value is None or not math.isfinite(value) or not all(map(math.isfinite, place)):
            raise NotFitted(f"{refused} the value at {at} is missing. Leave that point out, or measure it.")
        if value <= 0 or min(place) <= 0:
            raise NotFitted(
                f"{refused} a value or its x is not above 0: {value:g} at {at}. "
                "Leave that point out: it has no relative error."
            )
        values.append(float(value))
    need, distinct = len(form.names) + 1, len(set(rows))
    if distinct < need:
        raise NotFitted(
            f"{refused} {distinct} distinct points, and {len(form.names)} parameters with intervals "
            f"need {need}. Measure more of them."
        )
    return values


def _columns(rows: Sequence[tuple[float, ...]]) -> Array:
    import numpy as np

    table = np.array(rows, dtype=np.float64)
    return table[:, 0] if table.shape[1] == 1 else table


def _search(form: Form, x: Array, logs: Array) -> tuple[Array, float] | None:
    """Return the parameters with the smallest sum of squares over all starting points, and that sum."""
    import numpy as np

    found = [done for start in form.starts(x, np.exp(logs)) if (done := _descend(form, x, logs, start))]
    return min(found, key=lambda done: done[1], default=None)


def _descend(form: Form, x: Array, logs: Array, start: Array, held: int | None = None) -> tuple[Array, float] | None:
    """Gauss–Newton iteration with step halving. The parameter with index `held` stays fixed.

    Return the parameters and the sum of squares, or None if the curve is not positive at the start.
    """
    import numpy as np

    def squares(at: Array) -> tuple[float, Array, Array] | None:
        curve = form.value(at, x)
        if not (np.isfinite(curve).all() and (curve > 0).all()):
            return None
        away = logs - np.log(curve)
        return float(away @ away), away, curve

    free = [i for i in range(start.size) if i != held]
    theta, now = start, squares(start)
    if now is None:
        return None
    for _ in range(60):
        slopes = form.gradient(theta, x)[:, free] / now[2][:, None]
        size = np.sqrt((slopes**2).sum(axis=0))
        size[size == 0] = 1.0
        step = np.linalg.lstsq(slopes / size, now[1], rcond=1e-9)[0] / size
        better = None
        for halving in range(20):
            trial = theta.copy()
            trial[free] += step * 0.5**halving
            if form.bounds and form.bounds[0] != held:
                trial[form.bounds[0]] = min(max(trial[form.bounds[0]], form.bounds[1]), form.bounds[2])
            better = squares(trial)
            if better and better[0] < now[0]:
                break
        if better is None or better[0] >= now[0]:
            break
        gained, theta, now = now[0] - better[0], trial, better
        if gained <= 1e-10 * now[0]:
            break
    return theta, now[0]


def _intervals(form: Form, x: Array, logs: Array, theta: Array, left: float) -> Iterator[Parameter]:
    """Yield each parameter with its profile interval. For a power law it equals Student's, which needs no search."""
    import numpy as np

    degrees = len(logs) - theta.size
    t = t_quantile_975(degrees)
    slopes = form.gradient(theta, x) / form.value(theta, x)[:, None]
    size = np.maximum(np.sqrt((slopes**2).sum(axis=0)), 1e-300)
    spread = np.sqrt(np.diag(np.linalg.pinv((slopes / size).T @ (slopes / size)))) / size
    for i, name in enumerate(form.names):
        value, error = float(theta[i]), float(spread[i]) * math.sqrt(left / degrees)
        if left == 0:
            yield Parameter(name, value, value, value)
        elif form.name == "power":
            low, high = (
                (value * math.exp(-t * error / value), value * math.exp(t * error / value))
                if i == 0
                else (value - t * error, value + t * error)
            )
            yield Parameter(name, value, low, high)
        else:
            limit = left * (1 + t**2 / degrees)
            ends = [_profile_end(form, x, logs, theta, i, side * t * error, left, limit) for side in (-1, 1)]
            yield Parameter(name, value, ends[0], ends[1])


def _profile_end(
    form: Form, x: Array, logs: Array, theta: Array, index: int, step: float, least: float, limit: float
) -> float | None:
    """Find the value at which a parameter's profiled sum of squares S reaches `limit`, first trying `step` away.

    `least`: S at `theta`. √(S − least) is about linear in the parameter, so its root is bracketed and then found by
    regula falsi (Illinois variant: Dahlquist & Björck, Numerical Methods, 1974, 6.2.2). None if the limit is not
    reached in that direction.
    """
    warm, goal = theta, math.sqrt(limit - least)

    def beyond(value: float) -> float:
        """Return √(S − least) − goal; above 0 if the value lies outside the interval."""
        nonlocal warm
        start = warm.copy()
        start[index] = value
        done = _descend(form, x, logs, start, held=index) or _restart(form, x, logs, index, value)
        if done is None:  # no start gives a positive curve: as impossible as a value beyond the limit
            return math.inf
        if done[1] <= limit:
            warm = done[0]
        return math.sqrt(max(done[1] - least, 0.0)) - goal

    inner, at_inner = float(theta[index]), -goal
    for _ in range(14):
        outer = inner + step
        stuck = form.bounds is not None and form.bounds[0] == index and not form.bounds[1] < outer < form.bounds[2]
        if form.bounds and stuck:
            outer = form.bounds[1] if step < 0 else form.bounds[2]
        at_outer = beyond(outer)
        if at_outer > 0:
            break
        if stuck:
            return None
        inner, at_inner, step = outer, at_outer, 2 * step
    else:
        return None
    return _root(beyond, (inner, at_inner), (outer, at_outer), abs(step) * 1e-4, goal * 1e-4)


def _root(
    function: Callable[[float], float], inner: tuple[float, float], outer: tuple[float, float], x: float, y: float
) -> float:
    """Return a root between two places (argument, value ≤ 0) and (argument, value > 0, maybe infinite).

    Ends where the places are within `x` of each other, or the value within `y` of 0.
    """
    side = 0
    for _ in range(60):
        (a, at_a), (b, at_b) = inner, outer
        middle = (a + b) / 2 if math.isinf(at_b) else a + (b - a) * at_a / (at_a - at_b)
        value = function(middle)
        if abs(value) <= y or abs(b - a) <= x:
            return middle
        if value > 0:
            inner, outer = (a, at_a / 2 if side > 0 else at_a), (middle, value)
        else:
            inner, outer = (middle, value), (b, at_b / 2 if side < 0 else at_b)
        side = 1 if value > 0 else -1
    return middle


def _restart(form: Form, x: Array, logs: Array, index: int, value: float) -> tuple[Array, float] | None:
    """Return the best fit with one parameter held at `value`, from the form's own starting points, or None."""
    import numpy as np

    found = []
    for start in form.starts(x, np.exp(logs)):
        start[index] = value
        if done := _descend(form, x, logs, start, held=index):
            found.append(done)
    return min(found, key=lambda done: done[1], default=None)


def _leave_one_out(form: Form, x: Array, logs: Array, theta: Array) -> float | None:
    """Root mean square of ln y − ln f with f fitted without that point.

    None if too few points are left without one, or if the curve has no positive value there.
    """
    import numpy as np

    errors = []
    for i in range(len(logs)):
        rest = np.arange(len(logs)) != i
        if len(np.unique(x[rest], axis=0)) < theta.size:
            return None
        done = _descend(form, x[rest], logs[rest], theta) or _search(form, x[rest], logs[rest])
        there = float(form.value(done[0], x[i : i + 1])[0]) if done else 0.0
        if not 0 < there < math.inf:  # beyond a pole of the curve
            return None
        errors.append(float(logs[i]) - math.log(there))
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def rounded(value: float | None, width: float) -> str:
    """Format a number to two digits of its uncertainty, with three to six significant digits: 201.3 ± 90 is `201`.

    None is `no limit`.
    """
    if value is None:
        return "no limit"
    if value == 0 or width <= 0:
        return f"{value:.6g}"
    digits = 2 + math.floor(math.log10(abs(value))) - math.floor(math.log10(width))
    text = f"{value:.{min(6, max(3, digits))}g}"
    return f"{float(text):.0f}" if "e+" in text and abs(value) < 1e9 else text
