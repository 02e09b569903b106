"""Scripted worlds for tests and benchmarks: series of throughputs with a known truth, and repetitions made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import Repetition, RequestRecord

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TOKENS = 64
HORIZON = 30
"""Repetitions over which a trend or a step takes place."""


@dataclass(frozen=True)
class World:
    """A world: `draw(generator, series, n)` gives an array (series, n) of throughputs; `truth` is their mean.

    The truth of a trend or step is the mean over its 30 repetitions.
    """

    draw: Callable[[Any, int, int], Any]
    truth: float
    quiet: bool = False


def normal(sd: float) -> Callable[[Any, int, int], Any]:
    return lambda draw, series, n: 1 + sd * draw.standard_normal((series, n))


def lognormal(sd: float) -> Callable[[Any, int, int], Any]:
    import numpy as np

    return lambda draw, series, n: np.exp(sd * draw.standard_normal((series, n)) - sd * sd / 2)


def autoregressive(phi: float, sd: float) -> Callable[[Any, int, int], Any]:
    def draw_series(draw: Any, series: int, n: int) -> Any:
        import numpy as np

        noise = draw.standard_normal((series, n)) * sd * (1 - phi * phi) ** 0.5
        values = np.empty((series, n))
        values[:, 0] = sd * draw.standard_normal(series)
        for i in range(1, n):
            values[:, i] = phi * values[:, i - 1] + noise[:, i]
        return 1 + values

    return draw_series


def two_speeds(share: float, faster: float, block: int, sd: float) -> Callable[[Any, int, int], Any]:
    """Repetitions of which a share is faster, independently in blocks of `block` neighbours."""

    def draw_series(draw: Any, series: int, n: int) -> Any:
        import numpy as np

        fast = (draw.random((series, n // block + 2)) < share).repeat(block, axis=1)
        places = draw.integers(0, block, series)[:, None] + np.arange(n)
        return (1 + faster * np.take_along_axis(fast, places, 1)) * (1 + sd * draw.standard_normal((series, n)))

    return draw_series


def rarely_slow(share: float, sd: float) -> Callable[[Any, int, int], Any]:
    return lambda draw, series, n: (
        (1 - 0.5 * (draw.random((series, n)) < share)) * (1 + sd * draw.standard_normal((series, n)))
    )


def course(change: float, step: bool, sd: float) -> Callable[[Any, int, int], Any]:
    """A change over `HORIZON` repetitions, or over all if they are fewer: a line, or a step halfway."""

    def draw_series(draw: Any, series: int, n: int) -> Any:
        import numpy as np

        length = min(n, HORIZON) if n < 10 else HORIZON
        at = np.minimum(np.arange(n), length - 1)
        line = (at >= length / 2) if step else at / (length - 1)
        return 1 + change * line + sd * draw.standard_normal((series, n))

    return draw_series


def processes(between: float, within: float) -> Callable[[Any, int, int], Any]:
    return lambda draw, series, n: (
        (1 + between * draw.standard_normal((series, 1))) * (1 + within * draw.standard_normal((series, n)))
    )


WORLDS: dict[str, World] = {
    "normal 1 %": World(normal(0.01), 1.0, quiet=True),
    "normal 2 %": World(normal(0.02), 1.0, quiet=True),
    "normal 3 %": World(normal(0.03), 1.0, quiet=True),
    "lognormal 2 %": World(lognormal(0.02), 1.0, quiet=True),
    "AR(1) φ = 0.5, 2 %": World(autoregressive(0.5, 0.02), 1.0),
    "AR(1) φ = 0.8, 2 %": World(autoregressive(0.8, 0.02), 1.0),
    "30 % of repetitions 15 % faster": World(two_speeds(0.3, 0.15, 1, 0.02), 1.045),
    "the same in blocks of 5": World(two_speeds(0.3, 0.15, 5, 0.02), 1.045),
    "5 % of repetitions twice as slow": World(rarely_slow(0.05, 0.02), 0.975),
    "trend of +20 %": World(course(0.2, False, 0.02), 1.1),
    "trend of +30 %": World(course(0.3, False, 0.02), 1.15),
    "step of −15 % halfway": World(course(-0.15, True, 0.02), 0.925),
    "processes differ by 3 %": World(processes(0.03, 0.01), 1.0),
}


def repetition(index: int, rate: float, run_s: float = 0.5) -> Repetition:
    """A repetition of `TOKENS` tokens that takes run_s ÷ `rate`: a prompt, then evenly spaced tokens."""
    span = run_s / rate
    first = 0.2 * span
    gap = (span - first) / (TOKENS - 1)
    begin = int(index * 3 * run_s * 1e9)
    stamps = tuple(begin + int((first + i * gap) * 1e9) for i in range(TOKENS))
    return Repetition(index, int(index * 3 * run_s * 1e3), (RequestRecord(begin, stamps, prompt_tokens=16),))


def repetitions(rates: Sequence[float], run_s: float = 0.5) -> tuple[Repetition, ...]:
    return tuple(repetition(index, rate, run_s) for index, rate in enumerate(rates))


def cell(**settings: Any) -> Cell:
    return Cell(backend="fake", model="ttft_ms=1", prompt_tokens=16, output_tokens=TOKENS, **settings)
