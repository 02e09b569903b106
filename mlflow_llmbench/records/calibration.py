"""Calibration: how much processes of one configuration differ on a machine, by metric."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spread:
    """Spread of one metric between processes, of logarithms (so that 0.01² is a standard deviation of 1 %).

    `between` is the variance of the means of processes, and `within` the part of it that their repetitions explain;
    both with the degrees of freedom of the estimate. The means are over `repetitions` of a process, 0 for any number:
    where neighbouring repetitions are correlated, means of few differ more than their spread explains.
    """

    between: float
    degrees: float
    within: float = 0.0
    within_degrees: int = 0
    repetitions: int = 0

    @property
    def variance(self) -> float:
        """Variance between processes beyond what their repetitions explain, at least 0."""
        return max(0.0, self.between - self.within)

    @property
    def sd(self) -> float:
        """Its square root, a relative standard deviation."""
        return math.sqrt(self.variance)


@dataclass(frozen=True)
class Calibration:
    """Noise between processes of one backend on one device of one machine, measured by runs of one configuration each.

    `spreads` are by MLflow key, for several numbers of repetitions, ascending · `hardware`: its hash · `of`: the
    configuration in words · `ended_ms`: epoch time of the newest measurement.
    """

    hardware: str
    backend: str
    device: str
    of: str
    processes: int
    repetitions: int
    ended_ms: int
    software: str = ""
    verdicts: tuple[str, ...] = ()
    spreads: Mapping[str, tuple[Spread, ...]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """Hardware, backend and device: results of these are compared with it."""
        return self.hardware, self.backend, self.device
