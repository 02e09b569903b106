"""Host memory of a process, as the kernel accounts for it: from Linux's /proc, elsewhere from psutil.

Resident memory misleads in both directions: pages of a memory-mapped checkpoint count although the kernel can reclaim
them, and a bf16 model whose parameters all lie in the mapping shows almost no anonymous memory. A user needs
*anonymous pages + parameters in file mappings*, here called needed memory.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import cgroups
from .cgroups import ROOT

PROC = Path("/proc")
"""Linux's folder of processes. Where it is absent, psutil is asked."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one process now: resident, anonymous (None if the system does not report it), and peak resident."""

    rss: int
    anonymous: int | None = None
    peak_rss: int | None = None


def read(pid: int | str = "self") -> HostMemory | None:
    """Return the memory of a process; None if it has ended.

    Costs about 50 µs: one small file, never smaps, which walks every page.
    """
    try:
        fields = dict(
            line.split(":", 1)
            for line in (PROC / str(pid) / "status").read_text().splitlines()
            if line.startswith(("Vm", "Rss"))
        )
    except (FileNotFoundError, ProcessLookupError):
        return _read_psutil(pid) if not (PROC / "self" / "status").exists() else None
    if "VmRSS" not in fields:  # a process that has ended and has not been waited for
        return None
    size = {name: int(text.split()[0]) * 1024 for name, text in fields.items()}
    return HostMemory(size["VmRSS"], size.get("RssAnon"), size.get("VmHWM"))


def descendants(pid: int) -> list[int]:
    """Return the running descendants of a process, without itself, in no order. Costs some milliseconds."""
    parents: dict[int, int] = {}
    ended: set[int] = set()
    if not (PROC / "self" / "stat").exists():
        return _descendants_psutil(pid)
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            parents[int(folder.name)] = int(parent)
            ended |= {int(folder.name)} if state in "ZX" else set()
    found, new = set[int](), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return list(found - ended)


def read_all(pids: Iterable[int]) -> HostMemory:
    """Return the total memory of several processes, without a peak. Shared pages count in each of them."""
    seen = [found for found in map(read, pids) if found]
    known = [one.anonymous for one in seen if one.anonymous is not None]
    return HostMemory(sum(one.rss for one in seen), sum(known) if len(known) == len(seen) else None)


LEAST_MAPPING = 16 << 20
"""Smallest mapped file, in bytes, that counts as holding model parameters."""


def forget_references(pids: Iterable[int]) -> bool:
    """Reset the kernel's record of touched pages of mapped files (`/proc/PID/clear_refs`, proc(5)).

    Return False if it cannot be reset for any of the processes.
    """
    done = []
    for pid in pids:
        try:
            (PROC / str(pid) / "clear_refs").write_text("3")
            done.append(True)
        except OSError:
            done.append(False)
    return any(done)


def referenced_bytes(pids: Iterable[int]) -> int:
    """Bytes of mapped files touched by the processes since `forget_references`: the part of a checkpoint that was read.

    Excludes files under `LEAST_MAPPING` and executable mappings. If several processes map a file, the one that touched
    most counts. Walks every page, so never call it in a timed region. 0 if /proc/PID/smaps does not exist.
    """
    touched: dict[str, int] = {}
    for pid in pids:
        own: dict[str, int] = {}
        for name, fields in _mappings(pid):
            own[name] = own.get(name, 0) + fields.get("Referenced", 0)
        touched |= {name: max(size, touched.get(name, 0)) for name, size in own.items()}
    return sum(touched.values())


def _mappings(pid: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the large mapped files of a process, with the kernel's figures for each mapping in bytes."""
    try:
        lines = (PROC / str(pid) / "smaps").read_text(errors="replace").splitlines()
    except OSError:
        return
    name, fields = "", dict[str, int]()
    for line in [*lines, "0-0 ---p"]:
        first, *rest = line.split()
        if not first.endswith(":"):
            if name and fields.get("Size", 0) >= LEAST_MAPPING:
                yield name, fields
            path, fields = " ".join(rest[4:]), {}
            name = (
                path
                if path.startswith("/") and "x" not in rest[0] and not path.startswith(("/dev/", "/memfd:", "/SYSV"))
                else ""
            )
        elif rest and rest[0].isdigit():
            fields[first[:-1]] = int(rest[0]) * 1024


def _descendants_psutil(pid: int) -> list[int]:
    import psutil

    try:
        return [
            process.pid
            for process in psutil.Process(pid).children(recursive=True)
            if process.status() != psutil.STATUS_ZOMBIE
        ]
    except psutil.Error:
        return []


def _read_psutil(pid: int | str) -> HostMemory | None:
    import psutil

    try:
        info = psutil.Process(None if pid == "self" else int(pid)).memory_info()
    except psutil.Error:
        return None
    return HostMemory(info.rss, None, getattr(info, "peak_wset", None))


def reset_peak(pid: int | str = "self") -> bool:
    """Reset the peak resident memory of a process, so that the next reading is exact for the time since.

    Return False if the kernel does not allow it (`/proc/PID/clear_refs`, proc(5)); a peak then covers the whole life.
    """
    try:
        (PROC / str(pid) / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim() -> None:
    """Return freed memory that the C allocator keeps to the system, where possible (glibc's malloc_trim)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _file_mappings() -> list[tuple[int, int, str, int]]:
    """Return start address, end, file and offset in it of each file mapping of this process, sorted by address.

    Empty if /proc/self/maps does not exist.
    """
    try:
        lines = (PROC / "self" / "maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].startswith("/") and not parts[5].endswith("(deleted)"):
            low, high = parts[0].split("-")
            found.append((int(low, 16), int(high, 16), parts[5], int(parts[2], 16)))
    return found


def touch_mapped(files: Iterable[Path]) -> int:
    """Read a byte of each mapped page of these files, so that all of them are resident. Return the mappings' bytes."""
    names = {str(file) for file in files}
    spans = [(low, high) for low, high, name, _ in _file_mappings() if name in names]
    for low, high in spans:
        (ctypes.c_char * (high - low)).from_address(low)[:: mmap.PAGESIZE]
    return sum(high - low for low, high in spans)


FilePart = tuple[str, int, int]
"""Part of a file: its path, begin and end in bytes."""


def mapped_parts(spans: Iterable[tuple[int, int]]) -> list[FilePart]:
    """Return the parts of files in which the given (address, length) spans of this process lie.

    Parameters of a safetensors checkpoint stay there if no cast copies them. Empty if /proc/self/maps does not exist.
    """
    mappings = _file_mappings()
    starts = [low for low, *_ in mappings]
    found = []
    for address, length in spans:
        i = max(bisect.bisect_right(starts, address) - 1, 0)
        while i < len(starts) and starts[i] < address + length:
            low, high, file, offset = mappings[i]
            begin, end = max(low, address), min(high, address + length)
            if begin < end:
                found.append((file, offset + begin - low, offset + end - low))
            i += 1
    return found


def union_bytes(parts: Iterable[FilePart]) -> int:
    """Return the number of bytes in parts of files, perhaps of several processes; what lies in several counts once."""
    total, seen = 0, ("", 0)  # a file, and the end of what is counted of it
    for file, begin, end in sorted(parts):
        after = seen[1] if file == seen[0] else 0
        total += max(0, end - max(begin, after))
        seen = file, max(end, after)
    return total


def available_bytes(root: Path = ROOT) -> int | None:
    """Memory that a new process may use without swapping: MemAvailable, or less if control groups allow less.

    `root` is the folder that holds `proc` and `sys`.
    """
    return min(_known(_meminfo("MemAvailable", root), cgroups.memory_available(root)), default=None)


def total_bytes(root: Path = ROOT) -> int | None:
    """Memory of the machine, or the least limit of the control groups if that is less."""
    limit = cgroups.memory_limit(root)
    return min(_known(_meminfo("MemTotal", root), limit[0] if limit else None), default=None)


def _known(*values: int | None) -> list[int]:
    return [value for value in values if value is not None]


def _meminfo(name: str, root: Path) -> int | None:
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import psutil
    except ImportError:
        return None
    memory = psutil.virtual_memory()
    return int(memory.available if name == "MemAvailable" else memory.total)
