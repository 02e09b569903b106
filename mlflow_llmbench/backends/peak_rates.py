"""Best rates of a device, of which MBU and MFU are shares, measured with the library and threads that run the model."""

from __future__ import annotations

import json
import math
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
from . import accelerator
from .base import COMMAND_PYTHON

T = TypeVar("T")

REPEATS = 4
MOST_ROUNDS = 6
MOST_S = 5.0
"""Most rounds of a probe, and seconds after which no further one begins; its two best may then disagree."""

WARM_S = 1.0
BATCH_S = 0.02
MOST_LAUNCHES = 20
"""Seconds of work before a GPU is probed, seconds that a timed batch of launches takes, and most launches in one."""

CACHE_FACTOR = 4
"""The buffer has at least this many times the size of the last-level cache, so that it is read from memory."""


def measure_peaks(device: str, last_level_cache_bytes: int) -> dict[str, float]:
    """Measure `read_bytes_per_s` and `flops_per_s` of a device (torch's name). Takes about a second on a quiet machine.

    Bandwidth: a sum over float32 or a matrix–vector product, whichever reads faster. FLOP/s: a square matrix product
    (2n³ operations) in float32, bfloat16 or, on a GPU, float16, whichever is fastest: GPUs before Ampere have no units
    for bfloat16. A GPU first works for `WARM_S`, since it idles at a fraction of its clocks, and is timed over many
    launches at once. Each is the best of several rounds, because disturbances only make it slower; rounds are added
    until the two best agree. The evidence for `analysis.probe` is among the returned numbers: their agreement, and what
    others did meanwhile.
    """
    import torch

    on_gpu = device != "cpu"
    size = max(256_000_000, CACHE_FACTOR * last_level_cache_bytes)
    if on_gpu:
        size = min(2_000_000_000, accelerator.free_bytes(device) // 4)
    columns = 4096
    matrix = torch.ones((size // 4 // columns, columns), device=device)
    vector = torch.ones(columns, device=device)
    read_bytes = matrix.numel() * 4

    def finish() -> None:
        accelerator.synchronise((device,))

    with torch.inference_mode():
        if on_gpu:
            warm(matrix.sum, finish)
        before = machine.take_readings(device)
        reads = (matrix.sum, partial(torch.mv, matrix, vector))
        most = MOST_LAUNCHES if on_gpu else 1
        read_s, read_agreement = until_two_agree(partial(_quickest, reads, finish, most))
        del matrix, vector, reads
        n = 8192 if on_gpu else 1024

        def product(dtype: torch.dtype, side: int) -> Callable[[], object]:
            square = torch.ones((side, side), device=device, dtype=dtype)
            return partial(torch.mm, square, square)

        dtypes = (torch.float32, torch.bfloat16, *((torch.float16,) if on_gpu else ()))
        trials = {dtype: _best(product(dtype, n // 8), finish, most) for dtype in dtypes}
        flops = []
        for dtype in worth_measuring(trials):
            seconds, agreement = until_two_agree(partial(_best, product(dtype, n), finish, most))
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


def warm(work: Callable[[], object], finish: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> int:
    """Repeat a piece of work for `WARM_S` and return how often: clocks then are those of a busy GPU."""
    started, times = clock(), 0
    while clock() - started < WARM_S:
        work()
        finish()
        times += 1
    return times


def launches(seconds: float, most: int) -> int:
    """Return how many launches of `seconds` each are timed together, at most `most`, to last `BATCH_S`.

    The end of a single short one would be seen late: waiting for a GPU takes some 10 µs.
    """
    return max(1, min(most, math.ceil(BATCH_S / seconds))) if seconds > 0 else most


def _quickest(works: Sequence[Callable[[], object]], finish: Callable[[], None], most: int) -> float:
    return min(_best(work, finish, most) for work in works)


def _best(work: Callable[[], object], finish: Callable[[], None], most: int) -> float:
    """Return the shortest of several runs in seconds, each the mean of up to `most` launches; the first is discarded.

    The number of launches is chosen by the second run, since the first one may choose an algorithm.
    """

    def timed(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            work()
        finish()
        return (time.perf_counter() - started) / count

    timed(1)
    count = launches(timed(1), most) if most > 1 else 1
    return min(timed(count) for _ in range(REPEATS))
