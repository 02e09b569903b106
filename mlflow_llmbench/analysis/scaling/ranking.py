"""Rank curves fitted to the same points, and say in a sentence which one fits best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .fitting import Fit

AS_GOOD, CLEARLY = 2.0, 10.0
"""AICc differences: below the first, two curves fit equally well; above the second, the worse one has no support
(Burnham & Anderson 2002, 2.6)."""

ALIKE = 1.25
"""Ratio of leave-one-out errors up to which two curves fit equally well; used if there are too few points for AICc."""


def ranked(fits: Sequence[Fit]) -> list[Fit]:
    """Sort fits of the same points, best first: by AICc if all have one, else by the leave-one-out error.

    A curve with an undetermined parameter comes after those without one, however well it fits: it has followed the
    noise.
    """
    by_aicc = all(found.aicc is not None for found in fits)

    def merit(found: Fit) -> tuple[bool, float]:
        value = found.aicc if by_aicc else found.loo_error
        return bool(found.undetermined), math.inf if value is None else value

    return sorted(fits, key=merit)


def verdict(law: Fit, rivals: Sequence[Fit]) -> str:
    """Say in one sentence whether a law or a rival fits the same points better. Empty without rivals."""
    if not rivals:
        return ""
    best, *rest = ranked([law, *rivals])
    second = law if best is not law else rest[0]
    first, other = best.form.formula, second.form.formula
    if second.undetermined and not best.undetermined:
        return (
            f"The cells do not determine {', '.join(second.undetermined)} of {other}; {first} is used "
            f"(leave-one-out error {percent(best.loo_error)})."
        )
    errors = f"leave-one-out error {percent(best.loo_error)} against {percent(second.loo_error)}"
    if best.aicc is None or second.aicc is None:
        few = f"{len(law.y)} cells are too few for AICc"
        if (second.loo_error or math.inf) < ALIKE * (best.loo_error or 0.0):
            return f"{first} and {other} fit about equally well ({errors}; {few})."
        return f"{first} fits better than {other} ({errors}; {few})."
    gap = second.aicc - best.aicc
    if gap < AS_GOOD:
        return f"{first} and {other} fit about equally well (AICc differs by {gap:.1f}; {errors})."
    if (best.loo_error or 0.0) > (second.loo_error or math.inf):
        return f"AICc prefers {first} to {other} by {gap:.1f}, but it predicts left-out cells less well ({errors})."
    return (
        f"{first} fits {'clearly better' if gap > CLEARLY else 'better'} than {other} "
        f"(AICc lower by {gap:.1f}; {errors})."
    )


def percent(value: float | None) -> str:
    """Format a share with two digits and no exponent: `3.4 %`, `-170 %`. A dash for None."""
    return "–" if value is None else f"{100 * value:.2g} %" if abs(value) < 0.995 else f"{100 * value:.0f} %"
