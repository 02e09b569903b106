"""Report what this machine and environment can do, with advice for everything that is missing or limited.

Nothing heavy is imported: torch is queried in its own process, and versions are read from installed metadata. A missing
thing is an item of the report, never an exception. `reports.doctor` formats the items.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..backends.packages import ALSO_SHOWN, NEEDED, version
from ..config.spec import parse
from ..measure import interpreter
from ..measure.runtime import Item, _guarded, optional_items, package_item, runtime_items
from ..records.backends import recorded_capabilities
from ..records.environment import GPU_RUNTIME
from ..records.installation import pip_install
from ..records.invocation import command_text
from ..records.redaction import redact
from ..records.text import plural
from ..system import cgroups, gpu, machine, memory, torch_runtime
from ..system.python_command import code_command, safe

LITTLE_MEMORY = 2_000_000_000
LITTLE_DISK = 10_000_000_000
TORCH_S = 60.0
HUB_S = 5.0

ASK_TORCH = """
import json, torch
seen = torch.cuda.is_available()
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if seen else []
print(json.dumps({"version": torch.__version__, "built_for": torch.version.cuda, "cuda": seen, "devices": devices}))
"""

ASK_HUB = """
import sys, huggingface_hub
print(huggingface_hub.get_session().head(sys.argv[1], timeout=float(sys.argv[2])).status_code)
"""


@dataclass(frozen=True)
class Report:
    """All items in display order. `ready` is True if models can be measured here: nothing needed is missing."""

    ready: bool
    items: tuple[Item, ...]


def examine_worker(python: str) -> Report:
    """Report what a worker of another interpreter can run; the runtimes installed there are really imported.

    `python` is as in the parameter `worker_python`. Raises UsageError or MeasurementError.
    """
    python = str(parse({"worker_python": python}).first.worker_python)
    environment = interpreter.examine(python)
    packages = ", ".join(f"{name} {found}" for name, found in environment["packages"].items())
    items = [
        Item("Interpreter", "Python", "ok", f"{environment['python']}, {python}"),
        Item("Interpreter", "packages", "ok", packages or "none of ours"),
    ]
    for item in (Item(**found) for found in interpreter.ask_doctor(python)):
        problem = (
            interpreter.try_import(python, item.name)
            if item.section == "Backends" and item.status == "ok" and recorded_capabilities(item.name).own_environment
            else ""
        )
        items.append(
            replace(item, status="limited", found=f"cannot be imported: {problem}", advice=IMPORT_ADVICE)
            if problem
            else item
        )
    return Report(any(item.section == "Backends" and item.status == "ok" for item in items), tuple(items))


IMPORT_ADVICE = "The packages there do not work together. See docs/runtimes.md for a set that does."


def examine(torch_s: float = TORCH_S, hub_s: float = HUB_S) -> Report:
    """Check everything. Takes about a second more than importing torch, at most about `torch_s` + `hub_s` seconds."""
    checks: tuple[tuple[str, str, Callable[[], Iterable[Item]]], ...] = (
        ("Machine", "machine", machine_items),
        ("Machine", "GPU", lambda: gpu_items(gpu.gpus(), version("nvidia-ml-py") is not None, gpu.problems())),
        ("Machine", "disk", disk_items),
        ("Software", "packages", software_items),
        ("Software", "torch runs", lambda: [torch_item(gpu.gpus(), seconds=torch_s)]),
        ("Software", "Hugging Face Hub", lambda: [hub_item(seconds=hub_s)]),
        ("Backends", "runtimes", runtime_items),
        ("Optional", "optional packages", optional_items),
        ("Instruments", "instruments", instrument_items),
    )
    items = tuple(item for section, name, check in checks for item in _guarded(section, name, check))
    return Report(not any(item.needed and item.status == "missing" for item in items), items)


def memory_here() -> tuple[int | None, int | None]:
    """Return the free bytes of host memory, and the bytes of the first GPU; None if unknown or there is none."""
    devices = gpu.gpus()
    return memory.available_bytes(), devices[0]["memory_bytes"] if devices else None


def machine_items() -> Iterator[Item]:
    """Yield CPU, vector instructions, memory and operating system."""
    yield cpu_item(machine.cpu_name(), machine.physical_cores(), len(machine.usable_cpus()), cgroups.cpu_quota())
    yield from vector_items(Path("/proc/cpuinfo"))
    yield memory_item(memory.available_bytes(), memory.total_bytes(), cgroups.memory_limit())
    yield Item("Machine", "system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")


def cpu_item(name: str, cores: int, logical: int, quota: float | None) -> Item:
    """Return the item of the CPU: physical cores to use, logical CPUs, and the quota of its control groups in CPUs."""
    data = {"name": name, "physical_cores": cores, "usable_cpus": logical, "quota_cpus": quota}
    found = f"{name}, {plural(cores, 'core')} to use, {plural(logical, 'logical CPU')}"
    allowed = "" if quota is None else f", of which a control group allows the time of {quota:g}"
    return Item("Machine", "CPU", "ok", found + allowed, data=data)


def vector_items(cpuinfo: Path) -> Iterator[Item]:
    """Yield the vector instructions that make quantized and 16-bit models fast on an x86 CPU; nothing on others."""
    try:
        found = re.search(r"^flags\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return
    flags = set(found[1].split()) if found else set()
    if "sse2" not in flags:
        return
    useful = [
        flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if flag in flags
    ]
    data = {"useful": useful}
    if "avx512f" in flags:
        yield Item("Machine", "vector instructions", "ok", ", ".join(useful), data=data)
    else:
        advice = (
            "int4 and fp4 fall back to slow code on a CPU without AVX-512: "
            "compare them with fp32 before you choose them."
        )
        yield Item(
            "Machine",
            "vector instructions",
            "limited",
            f"{', '.join(useful) or 'SSE only'}, no AVX-512",
            advice,
            data=data,
        )


def memory_item(available: int | None, total: int | None, limit: tuple[int, str] | None = None) -> Item:
    """Return the item of free memory; both arguments are bytes, None if unknown.

    `limit`: bytes and name of the control group with the least limit.
    """
    data = {"available_bytes": available, "total_bytes": total, "limit_bytes": limit[0] if limit else None}
    if available is None or total is None:
        advice = "Estimates cannot be compared with free memory; a model that is too large fails while it loads."
        return Item("Machine", "memory", "limited", "not known", advice, data=data)
    found = f"{available / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
    if limit and limit[0] == total:
        found += f", the limit of the control group {limit[1]}"
    if available < LITTLE_MEMORY:
        advice = f"Close other programs; `{command_text('models')}` shows what fits."
        return Item("Machine", "memory", "limited", found, advice, data=data)
    return Item("Machine", "memory", "ok", found, data=data)


def gpu_items(gpus: Sequence[Mapping[str, Any]], reader: bool, problems: Sequence[str] = ()) -> Iterator[Item]:
    """Yield the NVIDIA GPUs, and what keeps others from being used (`gpu.problems`).

    `reader` is True if the package that reads them (nvidia-ml-py) is installed.
    """
    if not reader:
        why = "not checked: the package nvidia-ml-py is not installed"
        yield Item("Machine", "GPU", "missing", why, f"Run: {pip_install('nvidia-ml-py')}")
    elif not gpus and not problems:
        advice = (
            "Models run on the CPU. If there is a GPU, `nvidia-smi` must show it: install the driver, "
            "or give the container access (--gpus all)."
        )
        yield Item("Machine", "GPU", "missing", "no NVIDIA GPU answers", advice)
    for one in gpus:
        size = "memory not known" if one["memory_bytes"] is None else f"{one['memory_bytes'] / 1e9:.1f} GB"
        found = f"{one['name']}, {size}, driver {one['driver'] or 'not known'}, CUDA {one['cuda'] or 'not known'}"
        yield Item("Machine", f"GPU {one['index']}", "ok", found, data=one)
    for number, problem in enumerate(problems):
        advice = "Look at `nvidia-smi` and at the kernel's log. A restart of the machine usually helps."
        name = "GPU problem" if len(problems) == 1 else f"GPU problem {number + 1}"
        yield Item("Machine", name, "limited", problem, advice)


def disk_items() -> Iterator[Item]:
    """Yield the free space of the folders for checkpoints: our cache and the Hub's."""
    yield disk_item("cache folder", machine.cache_folder(), "LLMBENCH_CACHE")
    home = Path(
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    yield disk_item("Hub cache", Path(os.environ.get("HF_HUB_CACHE") or home / "hub"), "HF_HOME")


def disk_item(name: str, folder: Path, variable: str) -> Item:
    """Return the free space for a folder, which need not exist yet; the environment variable `variable` sets it."""
    there = next((parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir()), Path.cwd())
    free = shutil.disk_usage(there).free
    found, data = f"{free / 1e9:.1f} GB free in {folder}", {"folder": str(folder), "free_bytes": free}
    if not os.access(there, os.W_OK):
        advice = f"Set {variable} to a folder that you own."
        return Item("Machine", name, "limited", f"{folder} cannot be written", advice, data=data)
    if free < LITTLE_DISK:
        advice = f"A 7 B model takes 14 GB: free some space, or set {variable} to a folder on a larger disk."
        return Item("Machine", name, "limited", found, advice, data=data)
    return Item("Machine", name, "ok", found, data=data)


def software_items() -> Iterator[Item]:
    """Yield Python, the required packages, and the versions of other packages that can affect a result."""
    python_ok = sys.version_info >= (3, 10)
    yield Item(
        "Software",
        "Python",
        "ok" if python_ok else "limited",
        platform.python_version(),
        None if python_ok else "Use Python 3.10 or later.",
    )
    for name in NEEDED:
        yield package_item(name, version(name))
    yield from gpu_library_items(torch_runtime.versions())
    others = {name: found for name in ALSO_SHOWN if (found := version(name))}
    if others:
        yield Item(
            "Software", "also", "ok", ", ".join(f"{name} {found}" for name, found in others.items()), data=others
        )


def gpu_library_items(versions: Mapping[str, str | None]) -> Iterator[Item]:
    """Yield the versions of the GPU libraries that torch uses (`torch_runtime.versions`); nothing without any."""
    found = {name: versions[key] for key, name in GPU_RUNTIME.items() if versions[key]}
    if found:
        text = ", ".join(f"{name} {version}" for name, version in found.items())
        yield Item("Software", "GPU libraries", "ok", text, data=dict(versions))


def hub_item(endpoint: str | None = None, seconds: float = HUB_S) -> Item:
    """Return the item of the Hugging Face Hub. It is not contacted if an environment variable says offline."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            advice = f"Local folders, cached models and --weights random work. Unset {variable} to download."
            return Item("Software", "Hugging Face Hub", "limited", f"not asked: {variable} is set", advice)
    address = endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    host = urlsplit(address).hostname or "the given address"
    answer, problem = _ask(code_command(sys.executable, ASK_HUB, address, str(seconds)), seconds)
    code = int(answer) if answer else 0
    if 0 < code < 400 or code in (404, 405):  # a mirror need not have a front page
        return Item("Software", "Hugging Face Hub", "ok", f"{host} answers")
    found = f"{host} answers with HTTP {code}" if code else f"{host} cannot be reached: {problem}"
    advice = (
        "Check the network or the proxy (HTTPS_PROXY). "
        "Local folders, cached models and --weights random work without the Hub."
    )
    return Item("Software", "Hugging Face Hub", "limited", found, advice)


def torch_item(gpus: Sequence[Mapping[str, Any]], command: Sequence[str] = (), seconds: float = TORCH_S) -> Item:
    """Return what torch says about CUDA, compared with the `gpus` that the driver shows.

    torch is imported in a separate process (`command`).
    """
    answer, problem = _ask(command or code_command(sys.executable, ASK_TORCH), seconds)
    if not answer:
        again = (
            f"Try `{sys.executable} -c 'import torch'`. To reinstall it, "
            f"run: {pip_install('--force-reinstall', 'torch>=2.6')}"
        )
        return Item("Software", "torch runs", "missing", problem, again, needed=True)
    data = json.loads(answer)
    data["device"] = "cuda" if data["cuda"] and gpus else "cpu"
    advice = None
    if data["cuda"]:
        found = f"CUDA {data['built_for']} works: {', '.join(data['devices'])}"
        if not gpus:
            advice = f"device=cuda also needs the driver's answer through NVML. Run: {pip_install('nvidia-ml-py')}"
    elif not gpus:
        found = "on the CPU"
    elif data["built_for"] is None:
        found = f"on the CPU only: {data['version']} is a build without CUDA, and there is a GPU"
        advice = "Install a build for CUDA: https://pytorch.org/get-started/locally"
    else:
        found = f"on the CPU only: CUDA {data['built_for']} does not start on the GPU that the driver shows"
        advice = "Update the driver, or install a build for an older CUDA. CUDA_VISIBLE_DEVICES may also hide the GPU."
    return Item("Software", "torch runs", "limited" if advice else "ok", found, advice, needed=True, data=data)


def _ask(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """Return the last line that a process prints and "", or "" and the reason: its last error line, or the timeout."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
            env=safe({**os.environ, **gpu.PCI_ORDER}),
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {seconds:g} s"
    out, err = (stream.decode(errors="replace").strip().splitlines() for stream in (done.stdout, done.stderr))
    if done.returncode == 0 and out:
        return out[-1], ""
    return "", redact(err[-1])[:200] if err else f"it ended with code {done.returncode}"


def instrument_items() -> Iterator[Item]:
    """Yield the instruments for memory peaks, CPU pressure and energy."""
    if memory.reset_peak():
        yield Item("Instruments", "memory peaks", "ok", "exact: the kernel's high-water mark can be reset")
    else:
        advice = "Peaks of a cell are then taken from 20 samples per second, which can miss a short peak."
        yield Item("Instruments", "memory peaks", "limited", "/proc/self/clear_refs cannot be written", advice)
    yield pressure_item(Path("/proc/pressure/cpu"))
    yield energy_item(Path("/sys/class/powercap"))


def pressure_item(file: Path) -> Item:
    """Return the item of pressure stall information: how long tasks waited for a CPU."""
    try:
        file.read_text()
    except OSError as error:
        advice = "Disturbance is then judged only by the CPU time of other processes. Boot with psi=1 for more."
        return Item("Instruments", "CPU pressure", "missing", f"{file} cannot be read: {error.strerror}", advice)
    return Item("Instruments", "CPU pressure", "ok", f"{file} can be read")


def energy_item(folder: Path) -> Item:
    """Return the item of the CPU's energy counters (RAPL), which since 2020 only root can read by default."""
    counters = sorted(folder.glob("intel-rapl*/energy_uj"))
    if not counters:
        advice = (
            "Energy of the CPU cannot be measured. Virtual machines have no counters; "
            "on hardware load the module intel_rapl_common."
        )
        return Item("Instruments", "energy counters", "missing", f"none in {folder}", advice)
    try:
        for counter in counters:
            int(counter.read_text())
    except (OSError, ValueError):
        advice = (
            f"Run: sudo chmod a+r {folder}/intel-rapl*/energy_uj (until the next boot; it lets every program read them)"
        )
        return Item(
            "Instruments",
            "energy counters",
            "limited",
            f"{plural(len(counters), 'counter')}, no permission to read",
            advice,
        )
    return Item("Instruments", "energy counters", "ok", f"{plural(len(counters), 'counter')} can be read")
