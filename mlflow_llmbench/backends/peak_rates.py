"""Best rates of a device, of which MBU and MFU are shares, measured with the library and threads that run the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from ..analysis import probe
from ..records.errors import MissingError
from ..system import machine
from ..system.python_command import code_command, safe
from .base import COMMAND_PYTHON

T = TypeVar("T")

REPEATS = 4
MOST_ROUNDS = 6
MOST_S = 5.0
"""Most rounds of a probe, and seconds after which no further one begins; its two best may then disagree."""

CACHE_FACTOR = 4
"""The buffer has at least this many times the size of the last-level cache, so that it is read from memory."""


def measure_peaks(device: str, last_level_cache_bytes: int) -> dict[str, float]:
    """Measure `read_bytes_per_s` and `flops_per_s` of a device (torch's name). Takes about a second on a quiet machine.

    Bandwidth: a sum over float32 or a matrix–vector product, whichever reads faster. FLOP/s: a square matrix product
    (2n³ operations) in float32 or bfloat16, whichever is faster. Each is the best of several rounds, because
    disturbances only make it slower; rounds are added until the two best agree. The evidence for `analysis.probe` is
    among the returned numbers: their agreement, and what others did meanwhile.
    """
    import torch

    cuda = device.startswith("cuda")
    size = max(256_000_000, CACHE_FACTOR * last_level_cache_bytes)
    if cuda:
        size = min(2_000_000_000, torch.cuda.mem_get_info(device)[0] // 4)
    columns = 4096
    matrix = torch.ones((size // 4 // columns, columns), device=device)
    vector = torch.ones(columns, device=device)
    read_bytes = matrix.numel() * 4

    def finish() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    before = machine.take_readings(device)
    with torch.inference_mode():
        reads = (matrix.sum, partial(torch.mv, matrix, vector))
        read_s, read_agreement = until_two_agree(partial(_quickest, reads, finish))
        del matrix, vector, reads
        n = 8192 if cuda else 1024

        def product(dtype: torch.dtype, side: int) -> Callable[[], object]:
            square = torch.ones((side, side), device=device, dtype=dtype)
            return partial(torch.mm, square, square)

        trials = {dtype: _best(product(dtype, n // 8), finish) for dtype in (torch.float32, torch.bfloat16)}
        flops = []
        for dtype in worth_measuring(trials):
            seconds, agreement = until_two_agree(partial(_best, product(dtype, n), finish))
            flops.append((2 * n**3 / seconds, agreement))
    noise = machine.noise_between(before, machine.take_readings(device))
    best, flops_agreement = max(flops)
    return {
        probe.READ: read_bytes / read_s,
        probe.FLOPS: best,
        probe.AGREEMENT[probe.READ]: read_agreement,
        probe.AGREEMENT[probe.FLOPS]: flops_agreement,
        **probe.evidence(noise),
    }


def worth_measuring(trials: Mapping[T, float]) -> list[T]:
    """Return what may be the fastest, by the seconds of a small trial: all that took at most ten times the shortest.

    Without instructions for bfloat16, a CPU takes 200 times as long as in float32: seconds for one large product.
    """
    return [one for one, seconds in trials.items() if seconds <= 10 * min(trials.values())]


def until_two_agree(
    measure: Callable[[], float], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Repeat a round until the two shortest of at least two agree; return the shortest in s, and its ratio to the next.

    Stops after `MOST_ROUNDS`, or when `MOST_S` have passed by `clock`.
    """
    started = clock()
    rounds = sorted([measure(), measure()])
    while rounds[0] < probe.LEAST_AGREEMENT * rounds[1] and len(rounds) < MOST_ROUNDS and clock() - started < MOST_S:
        rounds = sorted([*rounds, measure()])
    return rounds[0], rounds[0] / rounds[1]


ASK_PEAKS = (
    "import json, sys; from mlflow_llmbench.backends.peak_rates import measure_peaks; "
    "print(json.dumps(measure_peaks('cpu', int(sys.argv[1]))))"
)


def measure_peaks_apart() -> dict[str, float]:
    """Measure the same rates of the CPU with torch in a process of its own.

    For workers without torch, whose memory it would dominate. Uses the command's interpreter if the worker has another
    one. Raises MissingError if torch does not run there.
    """
    python = os.environ.get(COMMAND_PYTHON) or sys.executable
    command = code_command(python, ASK_PEAKS, str(machine.last_level_cache_bytes() or 0))
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=safe(os.environ)
    )
    if done.returncode:
        raise MissingError(
            "The best rates of this machine cannot be measured: torch does not run. See `llmbench doctor`."
        )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _quickest(works: Sequence[Callable[[], object]], finish: Callable[[], None]) -> float:
    return min(_best(work, finish) for work in works)


def _best(work: Callable[[], object], finish: Callable[[], None]) -> float:
    """Return the shortest of several runs in seconds; the first one is discarded."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - started)
    return min(times[1:])
