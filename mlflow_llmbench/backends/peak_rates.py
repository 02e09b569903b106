"""Best rates of a device, of which MBU and MFU are shares, measured with the library and threads that run the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

from ..records.errors import MissingError
from ..system import machine
from .base import COMMAND_PYTHON

REPEATS = 8
CACHE_FACTOR = 4
"""The buffer has at least this many times the size of the last-level cache, so that it is read from memory."""


def measure_peaks(device: str, last_level_cache_bytes: int) -> dict[str, float]:
    """Measure `read_bytes_per_s` and `flops_per_s` of a device (torch's name). Takes about a second.

    Bandwidth: a sum over float32 or a matrix–vector product, whichever reads faster. FLOP/s: a square matrix product
    (2n³ operations) in float32 or bfloat16, whichever is faster. Each is the best of several runs, because disturbances
    only make it slower.
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

    with torch.inference_mode():
        seconds = min(_best(matrix.sum, finish), _best(partial(torch.mv, matrix, vector), finish))
        del matrix, vector
        n = 8192 if cuda else 1024
        flops = 0.0
        for dtype in (torch.float32, torch.bfloat16):
            square = torch.ones((n, n), device=device, dtype=dtype)
            flops = max(flops, 2 * n**3 / _best(partial(torch.mm, square, square), finish))
    return {"read_bytes_per_s": read_bytes / seconds, "flops_per_s": flops}


ASK_PEAKS = (
    "import json, sys; from mlflow_llmbench.backends.peak_rates import measure_peaks; "
    "print(json.dumps(measure_peaks('cpu', int(sys.argv[1]))))"
)


def measure_peaks_apart() -> dict[str, float]:
    """Measure the same rates of the CPU with torch in a process of its own.

    For workers without torch, whose memory it would dominate. Uses the command's interpreter if the worker has another
    one. Raises MissingError if torch does not run there.
    """
    command = [
        os.environ.get(COMMAND_PYTHON) or sys.executable,
        "-c",
        ASK_PEAKS,
        str(machine.last_level_cache_bytes() or 0),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingError(
            "The best rates of this machine cannot be measured: torch does not run. See `llmbench doctor`."
        )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _best(work: Callable[[], object], finish: Callable[[], None]) -> float:
    """Return the shortest of several runs in seconds; the first one is discarded."""
    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - started)
    return min(times[1:])
