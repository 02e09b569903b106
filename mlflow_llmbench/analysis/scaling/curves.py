"""Families of curves y = f(x; p) that a law or its rival can be: formula, derivatives and starting points of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

EXPONENTS = (0.05, 5.0)
"""Search range of the exponent w of k + n·x^w. Below it x^w acts like a logarithm, above it like a step."""


@dataclass(frozen=True)
class Form:
    """A family of curves y = f(x; p): formula, parameter names, f, ∂f/∂p (n × p), and starting points for the search.

    x has shape (n,) or (n, k). `bounds` is (index of a parameter, low, high).
    """

    name: str
    formula: str
    names: tuple[str, ...]
    value: Callable[[Array, Array], Array]
    gradient: Callable[[Array, Array], Array]
    starts: Callable[[Array, Array], list[Array]]
    bounds: tuple[int, float, float] | None = None


def power(formula: str, factor: str, exponent: str, falling: bool = False) -> Form:
    """The curve a·x^b, or a·x^(−b) if `falling`: a straight line in logarithms."""
    import numpy as np

    sign = -1.0 if falling else 1.0

    def starts(x: Array, y: Array) -> list[Array]:
        slope, level = np.polyfit(np.log(x), np.log(y), 1)
        return [np.array([math.exp(level), sign * slope])]

    return Form(
        "power",
        formula,
        (factor, exponent),
        lambda p, x: p[0] * x ** (sign * p[1]),
        lambda p, x: np.column_stack([x ** (sign * p[1]), sign * p[0] * x ** (sign * p[1]) * np.log(x)]),
        starts,
    )


def _weighted(basis: Array, y: Array) -> Array:
    """Least-squares coefficients of the columns of `basis`, with errors relative to y."""
    import numpy as np

    return np.asarray(np.linalg.lstsq(basis / y[:, None], np.ones(len(y)), rcond=None)[0])


def linear(
    formula: str, names: tuple[str, ...], basis: Callable[[Array], Array], over: Callable[[Array], Array] | None = None
) -> Form:
    """A sum of columns Σ p_i·φ_i(x), for latencies that add up; or, with `over`, the rate over(x) ÷ that sum."""
    import numpy as np

    def starts(x: Array, y: Array) -> list[Array]:
        wanted = y if over is None else over(x) / y
        flat = np.zeros(len(names))
        flat[0] = float(np.median(wanted / np.maximum(basis(x)[:, 0], 1e-300)))
        found = _weighted(basis(x), wanted)
        return [found if (basis(x) @ found > 0).all() else flat]

    def value(p: Array, x: Array) -> Array:
        total = basis(x) @ p
        return np.asarray(total if over is None else over(x) / np.where(total > 0, total, np.nan))

    def gradient(p: Array, x: Array) -> Array:
        if over is None:
            return basis(x)
        return np.asarray(-(over(x) / (basis(x) @ p) ** 2)[:, None] * basis(x))

    return Form("linear", formula, names, value, gradient, starts)


def _line_basis(x: Array) -> Array:
    import numpy as np

    return np.column_stack([np.ones(len(x)), x])


def _ones(x: Array) -> Array:
    import numpy as np

    return np.ones(len(x))


def line(formula: str, level: str, slope: str) -> Form:
    """The line a + b·x."""
    return linear(formula, (level, slope), _line_basis)


def rate_per_step(formula: str, fixed: str, per_row: str) -> Form:
    """The curve x / (a + b·x): the rate of steps with a time shared by all rows (Amdahl's law) and a time per row."""
    return linear(formula, (fixed, per_row), _line_basis, lambda x: x)


def reciprocal(formula: str, level: str, slope: str) -> Form:
    """The curve 1 / (a + b·x): the rate of work whose time grows linearly."""
    return linear(formula, (level, slope), _line_basis, _ones)


def offset_power(formula: str, names: tuple[str, str, str]) -> Form:
    """The curve k + n·x^w with w in the range `EXPONENTS`."""
    import numpy as np

    def starts(x: Array, y: Array) -> list[Array]:
        found = []
        for exponent in (0.1, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0):
            level, factor = _weighted(np.column_stack([np.ones(len(x)), x**exponent]), y)
            curve = level + factor * x**exponent
            if (curve > 0).all():
                found.append((float(((np.log(y) - np.log(curve)) ** 2).sum()), np.array([level, factor, exponent])))
        return [start for _, start in sorted(found, key=lambda pair: pair[0])[:2]] or [
            np.array([float(np.median(y)), 0.0, 1.0])
        ]

    return Form(
        "offset power",
        formula,
        names,
        lambda p, x: p[0] + p[1] * x ** p[2],
        lambda p, x: np.column_stack([np.ones(len(x)), x ** p[2], p[1] * x ** p[2] * np.log(x)]),
        starts,
        (2, *EXPONENTS),
    )


def share_of(formula: str, name: str, limit: Callable[[Array], Array]) -> Form:
    """The curve p·limit(x): a constant share of a known bound, such as a roofline."""
    import numpy as np

    return Form(
        "share",
        formula,
        (name,),
        lambda p, x: p[0] * limit(x),
        lambda p, x: limit(x)[:, None],
        lambda x, y: [np.array([math.exp(float(np.mean(np.log(y / limit(x)))))])],
    )


def constant(formula: str, name: str) -> Form:
    """A constant, the null model: y does not depend on x."""
    return share_of(formula, name, _ones)
