"""Coverage of the intervals called valid, in scripted worlds: `python benchmarks/sequence_worlds.py [--out FILE]`.

Each world gives series of throughputs with a known true mean. For 5, 10, 20, 30 and 60 repetitions, and for
`repetitions=auto`, it counts the series that the verdict on their order would call valid and those whose interval
covers the truth. The goal holds if the valid ones cover in at least 93 %, or fewer than 5 % are valid; and if at least
95 % of quiet series are valid. `--series` sets their number, `--seed` the draw.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.measure.stopping import LOOKS, enough
from mlflow_llmbench.stats import coefficient_of_variation, judge_sequence, sequence_interval
from tests.worlds import WORLDS, World, cell, repetitions

TARGET, VARIATION_LIMIT = 0.02, 0.10
NUMBERS = (5, 10, 20, 30, 60)
AUTO = {"auto, 0.5 s": 0.5, "auto, 2 s": 2.0, "auto, 10 s": 10.0}
"""Ways of `repetitions=auto`, by the duration of a repetition."""

MOST = 100


def judged(values: list[float], truth: float, stopped: bool) -> tuple[bool, bool]:
    """Return whether a series is called valid, and whether its interval covers the truth."""
    low, high = sequence_interval(values, stopped) or (0.0, 0.0)
    wide = stopped and (high - low) / 2 > TARGET * fmean(values)
    spread = (coefficient_of_variation(values) or 0.0) > VARIATION_LIMIT
    return not (wide or spread or judge_sequence(values, TARGET)), low <= truth <= high


def chosen(values: list[float], run_s: float) -> int:
    """Return the number of repetitions that auto takes."""
    every, auto = repetitions(values, run_s), cell()
    looks = sorted({*LOOKS, *range(5, 65)})
    return next((n for n in looks if n < MOST and enough(auto, every[:n])), MOST)


def row(world: World, way: int | str, series: int, seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    auto = isinstance(way, str)
    values = [one.tolist() for one in world.draw(draw, series, MOST if auto else way)]
    counts = [chosen(one, AUTO[str(way)]) if auto else len(one) for one in values]
    found = [judged(one[:n], world.truth, auto) for one, n in zip(values, counts, strict=True)]
    valid = sum(ok for ok, _ in found) / series
    covered = [cover for ok, cover in found if ok]
    coverage = fmean(covered) if covered else None
    holds = valid < 0.05 or (coverage or 0.0) >= 0.93
    return {
        "repetitions": way,
        "mean_repetitions": round(fmean(counts), 1),
        "valid": round(valid, 4),
        "coverage_of_valid": None if coverage is None else round(coverage, 4),
        "holds": holds and (not world.quiet or valid >= 0.95),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    table: dict[str, list[dict[str, Any]]] = {}
    for name, world in WORLDS.items():
        table[name] = [row(world, way, asked.series, asked.seed) for way in (*NUMBERS, *AUTO)]
        cells = [
            f"{one['repetitions']}: {one['valid']:.3f} {one['coverage_of_valid']} {'' if one['holds'] else '(misses)'}"
            for one in table[name]
        ]
        print(
            f"{name:34} {' | '.join(cells)} n = {[one['mean_repetitions'] for one in table[name][-len(AUTO) :]]}",
            flush=True,
        )
    if asked.out:
        known = {"series": asked.series, "seed": asked.seed, "precision_target": TARGET, "worlds": table}
        asked.out.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
