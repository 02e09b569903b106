"""Control groups of this process on Linux (v1, v2 and hybrid): limits of memory and CPU, and throttling by a CPU quota.

A limit holds for a group and everything below it, so each function follows the group of this process up to the top of
what is mounted, and the least limit counts (kernel documentation, admin-guide/cgroup-v1 and admin-guide/cgroup-v2).
Batch systems, `systemd-run`, containers and rented machines set limits at any level of this path.
Functions take `root`, the folder that holds `proc` and `sys`, and return None where there is nothing to read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path("/")

UNLIMITED_BYTES = 1 << 60
"""From here on a limit is none: cgroup v1 writes "no limit" as the largest multiple of a page, about 2^63."""


@dataclass(frozen=True)
class Group:
    """A group of one hierarchy: its folder, its name below the mount, and the version of the interface."""

    folder: Path
    name: str
    version: Literal[1, 2]


@dataclass(frozen=True)
class Throttling:
    """Counters of a CPU quota since the groups were made.

    `periods`: enforcement periods of the group with most of them · `throttled`: periods in which a group ran out of its
    quota, summed over the groups of the path · `throttled_s`: time for which threads were held back, in seconds, summed
    over the groups and CPUs (n CPUs held back together for a second count n seconds).
    """

    periods: int
    throttled: int
    throttled_s: float


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy: the cgroup that its top shows, the mount point, and its controllers (None for v2)."""

    shows: str
    point: str
    controllers: frozenset[str] | None


def groups(controller: str, root: Path = ROOT) -> list[Group]:
    """Return the groups of this process that may limit a controller, from its own up to the top of each mount.

    Both versions are followed, since a hybrid system has some controllers in either. Empty without cgroups.
    """
    found: list[Group] = []
    for version, path in _memberships(controller, root):
        mounts = [
            mount
            for mount in _mounts(root)
            if (mount.controllers is None if version == 2 else controller in (mount.controllers or ()))
        ]
        shown = sorted((_path_up(mount, path, version, root) for mount in mounts), key=len)
        found += shown[-1] if shown else []  # the mount that shows most ancestors
    return found


def memory_limit(root: Path = ROOT) -> tuple[int, str] | None:
    """Return the least memory limit in bytes and the name of its group; None if memory is not limited.

    `memory.high` counts as `memory.max` does: above it the kernel slows the group down while it takes pages back. A
    limit of swap is none of memory.
    """
    limits = [(limit, group.name) for group in groups("memory", root) if (limit := _least_limit(group)) is not None]
    return min(reversed(limits), default=None, key=lambda one: one[0])  # of equal ones the highest, which sets it


def memory_available(root: Path = ROOT) -> int | None:
    """Return the bytes that the groups let this process take; None if memory is not limited.

    The least, along the path, of the limit less what is used. Cached files that were not read again (inactive_file)
    count as free, since the kernel drops them first.
    """
    free = [
        max(limit - used, 0)
        for group in groups("memory", root)
        if (limit := _least_limit(group)) is not None and (used := _used(group)) is not None
    ]
    return min(free, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the CPUs' worth of time that the groups let this process use, such as 1.5; None without a quota."""
    return min(filter(None, map(_quota, groups("cpu", root))), default=None)


def cpu_set(root: Path = ROOT) -> frozenset[int] | None:
    """Return the logical CPUs that the groups allow; None if they do not say."""
    allowed: frozenset[int] | None = None
    for group in groups("cpuset", root):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if cpus := _cpu_list(_text(group.folder / name)):
                allowed = cpus if allowed is None else allowed & cpus
                break
    return allowed or None


def throttling(root: Path = ROOT) -> Throttling | None:
    """Return the counters of CPU quotas along the path; None if no group counts."""
    found = [one for group in groups("cpu", root) if (one := _throttling(group))]
    if not found:
        return None
    return Throttling(
        max(one.periods for one in found), sum(one.throttled for one in found), sum(one.throttled_s for one in found)
    )


def _memberships(controller: str, root: Path) -> Iterator[tuple[Literal[1, 2], str]]:
    """Yield version and path of this process's groups for a controller, from /proc/self/cgroup (cgroups(7))."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        path = path.removesuffix(" (deleted)")
        if number == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(root: Path) -> list[_Mount]:
    """Return the cgroup mounts of /proc/self/mountinfo (proc_pid_mountinfo(5))."""
    found = []
    for line in (_text(root / "proc/self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) >= 5 and kinds and kinds[0] in ("cgroup", "cgroup2"):
            controllers = None if kinds[0] == "cgroup2" else frozenset(kinds[-1].split(","))
            found.append(_Mount(_unescaped(fields[3]), _unescaped(fields[4]), controllers))
    return found


def _unescaped(text: str) -> str:
    r"""Return a field of mountinfo with its octal escapes replaced (`\040` is a space)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _path_up(mount: _Mount, path: str, version: Literal[1, 2], root: Path) -> list[Group]:
    """Return the groups that a mount shows, from this process's own (or the nearest that exists) to the mount's top."""
    top = root / mount.point.lstrip("/")
    own, shown = _parts(path), _parts(mount.shows)
    if shown and set(shown) == {".."}:  # mounted outside of our namespace: its top is so many levels above our root
        below = _down_to_us(top, len(shown), own, root)
    elif own[: len(shown)] == shown and ".." not in own:
        below = own[len(shown) :]
    else:  # our group is not below what is mounted; the top may still be above it, as a container's own group is
        below = []
    while below and not top.joinpath(*below).is_dir():
        below = below[:-1]
    if not top.is_dir():
        return []
    found = []
    for count in range(len(below), -1, -1):
        folder = top.joinpath(*below[:count])
        found.append(
            Group(folder, "/" + "/".join([*(part for part in shown if part != ".."), *below[:count]]), version)
        )
        if version == 1 and _text(folder.parent / "memory.use_hierarchy") == "0":
            break  # an old kernel's group that its ancestors do not limit
    return found


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _down_to_us(top: Path, levels: int, own: list[str], root: Path) -> list[str]:
    """Return the path from a mount's top to our group, found by our process id; empty if it is not found."""
    pid = (_text(root / "proc/self/stat") or "").partition(" ")[0]
    for candidate in top.glob("/".join("*" * levels)):
        if pid and pid in (_text(candidate.joinpath(*own, "cgroup.procs")) or "").split():
            return [*candidate.relative_to(top).parts, *own]
    return []


def _least_limit(group: Group) -> int | None:
    """Return the memory limit of a group in bytes; v1 tells that of its ancestors too, even of those not mounted."""
    if group.version == 2:
        values = [_number(_text(group.folder / name)) for name in ("memory.max", "memory.high")]
    else:
        inherited = _counts(group.folder / "memory.stat").get("hierarchical_memory_limit")
        values = [_number(_text(group.folder / "memory.limit_in_bytes")), inherited]
    return min((value for value in values if value is not None and value < UNLIMITED_BYTES), default=None)


def _used(group: Group) -> int | None:
    """Return the bytes that a group with its descendants uses, without inactive cached files."""
    used = _number(_text(group.folder / ("memory.current" if group.version == 2 else "memory.usage_in_bytes")))
    counts = _counts(group.folder / "memory.stat")
    own = "inactive_file" if group.version == 2 else "total_inactive_file"  # in v1 the plain one excludes descendants
    return None if used is None else max(used - counts.get(own, counts.get("inactive_file", 0)), 0)


def _quota(group: Group) -> float | None:
    if group.version == 2:
        quota, _, period = (_text(group.folder / "cpu.max") or "").partition(" ")
    else:
        quota = _text(group.folder / "cpu.cfs_quota_us") or ""
        period = _text(group.folder / "cpu.cfs_period_us") or ""
    allowed, every = _number(quota), _number(period)
    return allowed / every if allowed and every and allowed > 0 else None


def _throttling(group: Group) -> Throttling | None:
    counts = _counts(group.folder / "cpu.stat")
    if "nr_periods" not in counts:
        return None
    seconds = counts["throttled_usec"] / 1e6 if "throttled_usec" in counts else counts.get("throttled_time", 0) / 1e9
    return Throttling(counts["nr_periods"], counts.get("nr_throttled", 0), seconds)


def _cpu_list(text: str | None) -> frozenset[int]:
    """Return the numbers of a list such as `0-3,8`; empty if it is not one."""
    numbers: set[int] = set()
    with contextlib.suppress(ValueError):
        for part in filter(None, (text or "").split(",")):
            first, _, last = part.partition("-")
            numbers |= set(range(int(first), int(last or first) + 1))
        return frozenset(numbers)
    return frozenset()


def _counts(file: Path) -> dict[str, int]:
    """Return the named counters of a file; empty without it."""
    pairs = (line.split() for line in (_text(file) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(text: str | None) -> int | None:
    """Return a whole number; None for `max`, other words, or no text."""
    with contextlib.suppress(ValueError):
        return int(text or "")
    return None


def _text(file: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.read_text().strip()
    return None
