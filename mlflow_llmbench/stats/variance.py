"""Variance of a difference from several sources, and the tests that rest on it.

A difference of means has the variance of both means, and that of what all values of one side share. Each part is
estimated from other data, with other degrees of freedom. Their sum is tested with the degrees of freedom of
Satterthwaite (Biometrics Bulletin 2, 1946, 110–114): ν = (Σ v)² ÷ Σ v²/ν.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Part:
    """A part of the variance of a difference, and its `share` v²/ν of Satterthwaite's denominator.

    ν are the degrees of freedom of the estimate v; a known variance has the share 0. If v is an estimate less another
    one, it can be far below its own error: `degrees` are then those of the first, otherwise 0.
    """

    variance: float
    share: float
    degrees: float = 0.0


@dataclass(frozen=True)
class MeanDifference:
    """Difference of means, second − first, with its 95 % interval and the two-sided p value of no difference."""

    difference: float
    low: float
    high: float
    statistic: float
    degrees: float
    p_value: float


@dataclass(frozen=True)
class Equivalence:
    """Difference of means, second − first, compared with ±margin; `low` to `high` is its 90 % interval.

    `p_within` is the p value of the two one-sided tests (small: the difference lies inside), `p_beyond` that of the
    test against the nearer margin (small: it lies outside). Both can be large, never both small.
    """

    difference: float
    low: float
    high: float
    p_within: float
    p_beyond: float


def mean_part(values: Sequence[float], independent: bool = True) -> Part:
    """The variance of a mean: s²/n of at least 2 values.

    If the values are not independent, it is s², that of one value: so many say no more than one of them.
    """
    centre = fmean(values)  # statistics.variance is exact, and a hundred times slower
    squares = math.fsum((value - centre) ** 2 for value in values)
    own = squares / (len(values) - 1) / (len(values) if independent else 1)
    return Part(own, own**2 / (len(values) - 1))


def error_of(parts: Sequence[Part]) -> tuple[float, float]:
    """Standard error of a difference, and its degrees of freedom; infinite if nothing was estimated.

    A part that was subtracted leaves its uncertainty in Satterthwaite's denominator even where it is 0: the more
    precise the rest, the fewer degrees of freedom, and the less a test could find. So the variance is at least so large
    that such a part has the degrees of freedom of its first estimate.
    """
    share = sum(part.share for part in parts)
    least = math.sqrt(sum(part.degrees * part.share for part in parts))
    total = max(sum(part.variance for part in parts), least)
    return math.sqrt(total), max(1.0, total**2 / share) if share else math.inf


def t_test(difference: float, parts: Sequence[Part]) -> MeanDifference:
    """Student's t of a difference. Without variation the interval is a point, and p is 0 or 1."""
    error, degrees = error_of(parts)
    if error == 0:
        t = math.copysign(math.inf, difference) if difference else 0.0
        return MeanDifference(difference, difference, difference, t, degrees, 0.0 if difference else 1.0)
    from scipy import special  # type: ignore[import-untyped]

    t = difference / error
    half = float(special.stdtrit(degrees, 0.975)) * error
    return MeanDifference(
        difference, difference - half, difference + half, t, degrees, 2 * float(special.stdtr(degrees, -abs(t)))
    )


def tost(difference: float, parts: Sequence[Part], margin: float) -> Equivalence:
    """Two one-sided t tests (Schuirmann 1987) of a difference against ±margin.

    At 5 % they agree with the 90 % interval: the difference is inside if all of the interval lies within ±margin.
    """
    error, degrees = error_of(parts)
    if error == 0:
        inside = abs(difference) < margin
        return Equivalence(difference, difference, difference, float(not inside), float(inside))
    from scipy import special

    half = float(special.stdtrit(degrees, 0.95)) * error
    inner, outer = (abs(difference) - margin) / error, (abs(difference) + margin) / error
    within = float(special.stdtr(degrees, inner))
    beyond = float(special.stdtr(degrees, -inner) + special.stdtr(degrees, -outer))
    return Equivalence(difference, difference - half, difference + half, within, min(beyond, 1.0))
