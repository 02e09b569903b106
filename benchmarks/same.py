"""A against A: count the false alarms of `llmbench ab`: `python benchmarks/same.py [--times N] [--out FILE]`.

Each time, one configuration of a real architecture with random weights is measured against itself, in fresh processes
and in turns. None of 10 such comparisons may show a difference in any metric. Takes a quarter of an hour; needs no
network.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlflow_llmbench.system import machine
from mlflow_llmbench.workflows.ab import run_ab

COMMON = {
    "model": "opt-125m",
    "weights": "random",
    "quant": "bf16",
    "prompt_tokens": 32,
    "output_tokens": 16,
    "repetitions": 8,
    "warmup": 3,
}
PAIRS = 5
ALARMS = ("better", "worse")


def once(folder: str) -> dict[str, Any]:
    """Run one comparison: the metrics that were called better or worse, and the smallest adjusted p value."""
    done = run_ab(
        {}, {}, COMMON | {"output_dir": f"{folder}/results"}, pairs=PAIRS, tracking_uri=f"sqlite:///{folder}/mlflow.db"
    )
    tested = [effect for effect in done.comparison.effects if effect.p_holm is not None]
    rate = done.comparison.effects[0]
    return {
        "alarms": [effect.key for effect in tested if effect.effect in ALARMS],
        "least_p_holm": min(effect.p_holm for effect in tested if effect.p_holm is not None),
        "throughput_ratio": [rate.low, rate.ratio, rate.high],
        "verdicts": [row.verdict.word for row in done.sweep.rows if row.verdict],
    }


def main() -> int:
    """Print one JSON object; exit code 1 if any comparison showed a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.times):
            found.append(once(folder))
            print(f"{number + 1}: {json.dumps(found[-1])}", file=sys.stderr, flush=True)
    alarms = sum(bool(one["alarms"]) for one in found)
    result = {
        "configuration": COMMON,
        "pairs": PAIRS,
        "false_alarms": alarms,
        "of": given.times,
        "comparisons": found,
        "environment": machine.environment(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return int(alarms > 0)


if __name__ == "__main__":
    sys.exit(main())
