"""Limits of control groups, on file trees as the kernel and container runtimes make them, and in a real group."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mlflow_llmbench.system import cgroups, machine, memory
from mlflow_llmbench.system.cgroups import Throttling

GB = 10**9
NO_LIMIT_V1 = 9223372036854771712
V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def v1(controllers: str, shows: str = "/") -> str:
    """Return the line of a v1 mount in mountinfo."""
    return f"33 31 0:30 {shows} /sys/fs/cgroup/{controllers} rw,relatime shared:12 - cgroup cgroup rw,{controllers}"


def tree(root: Path, membership: list[str], mounts: list[str], files: Mapping[str, object]) -> Path:
    """Write /proc of a machine with 25 GB, of which 22 are free, and files below /sys/fs/cgroup."""
    own = root / "proc" / "self"
    own.mkdir(parents=True)
    (own / "cgroup").write_text("".join(f"{line}\n" for line in membership))
    (own / "mountinfo").write_text(
        "23 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n" + "".join(f"{line}\n" for line in mounts)
    )
    (own / "stat").write_text("4711 (python3) R 1 1 1 0\n")
    (root / "proc" / "meminfo").write_text("MemTotal: 25000000 kB\nMemFree: 1 kB\nMemAvailable: 22000000 kB\n")
    for name, value in files.items():
        file = root / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    return root


def test_slurm_on_v2_limits_the_job_above_the_step(tmp_path: Path) -> None:
    job = "system.slice/slurmstepd.scope/job_7"
    task = f"{job}/step_0/user/task_0"
    root = tree(
        tmp_path,
        [f"0::/{task}"],
        [V2],
        {
            f"{job}/memory.max": 4 * GB,
            f"{job}/memory.high": "max",
            f"{job}/memory.current": 3 * GB,
            f"{job}/memory.stat": f"anon 1\ninactive_file {2 * GB}\nactive_file 5",
            f"{job}/cpuset.cpus.effective": "0-5",
            f"{task}/memory.max": "max",
            f"{task}/memory.current": 1 * GB,
            f"{task}/cpu.max": "max 100000",
            f"{job}/step_0/cpu.max": "150000 100000",
            "system.slice/cpu.max": "800000 100000",
            "cpuset.cpus.effective": "0-63",
        },
    )
    assert cgroups.memory_limit(root) == (4 * GB, f"/{job}")
    assert memory.total_bytes(root) == 4 * GB
    assert memory.available_bytes(root) == 3 * GB  # 4 less 3 used, of which 2 are cached files
    assert cgroups.cpu_quota(root) == 1.5
    assert machine.within_quota(8, root) == 1
    assert cgroups.cpu_set(root) == set(range(6))


def test_an_ancestor_that_others_fill_leaves_less_than_our_own_limit(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        ["0::/user.slice/run.scope"],
        [V2],
        {
            "user.slice/run.scope/memory.max": 2 * GB,
            "user.slice/run.scope/memory.current": 0,
            "user.slice/memory.max": 8 * GB,
            "user.slice/memory.current": 7 * GB,
            "user.slice/memory.stat": "inactive_file 0",
        },
    )
    assert memory.total_bytes(root) == 2 * GB
    assert memory.available_bytes(root) == 1 * GB


def test_memory_high_is_a_limit_and_one_above_the_machine_is_none(tmp_path: Path) -> None:
    files = {"a/memory.max": 90 * GB, "a/memory.high": "max", "a/memory.current": GB, "a/memory.swap.max": 0}
    root = tree(tmp_path / "max", ["0::/a"], [V2], files)
    assert (memory.total_bytes(root), memory.available_bytes(root)) == (25_600_000_000, 22_528_000_000)
    root = tree(tmp_path / "high", ["0::/a"], [V2], {**files, "a/memory.high": 3 * GB})
    assert (memory.total_bytes(root), memory.available_bytes(root)) == (3 * GB, 2 * GB)


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    root = tree(tmp_path, ["0::/a"], [V2], {"a/memory.high": GB, "a/memory.current": 2 * GB})
    assert memory.available_bytes(root) == 0


def test_slurm_on_v1_with_its_controllers_in_several_hierarchies(tmp_path: Path) -> None:
    job = "slurm/uid_1000/job_7"
    step = f"{job}/step_batch"
    root = tree(
        tmp_path,
        [f"11:memory:/{step}", f"4:cpu,cpuacct:/{job}", f"3:cpuset:/{job}", "1:name=systemd:/x", "0::/elsewhere"],
        [v1("memory"), v1("cpu,cpuacct"), v1("cpuset"), v1("name=systemd")],
        {
            f"memory/{step}/memory.limit_in_bytes": NO_LIMIT_V1,
            f"memory/{step}/memory.usage_in_bytes": GB // 2,
            f"memory/{job}/memory.limit_in_bytes": 1 * GB,
            f"memory/{job}/memory.usage_in_bytes": 800_000_000,
            f"memory/{job}/memory.stat": "inactive_file 7\nactive_file 9\ntotal_inactive_file 300000000",
            "memory/memory.limit_in_bytes": NO_LIMIT_V1,
            "memory/memory.usage_in_bytes": 20 * GB,
            f"cpu,cpuacct/{job}/cpu.cfs_quota_us": 50000,
            f"cpu,cpuacct/{job}/cpu.cfs_period_us": 50000,
            "cpu,cpuacct/slurm/cpu.cfs_quota_us": -1,
            "cpu,cpuacct/slurm/cpu.cfs_period_us": 100000,
            f"cpuset/{job}/cpuset.cpus": "2,4-5",
            "cpuset/cpuset.cpus": "0-7",
        },
    )
    assert cgroups.memory_limit(root) == (1 * GB, f"/{job}")
    assert memory.available_bytes(root) == 500_000_000
    assert cgroups.cpu_quota(root) == 1.0
    assert cgroups.cpu_set(root) == {2, 4, 5}


def test_a_v1_container_sees_its_own_group_as_the_top_and_its_ancestors_limit_in_its_statistics(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        ["5:memory:/docker/abc", "4:cpu,cpuacct:/docker/abc"],
        [v1("memory", "/docker/abc"), v1("cpu,cpuacct", "/docker/abc")],
        {
            "memory/memory.limit_in_bytes": 6 * GB,
            "memory/memory.usage_in_bytes": 1 * GB,
            "memory/memory.stat": f"hierarchical_memory_limit {2 * GB}\ntotal_inactive_file 0",
            "cpu,cpuacct/cpu.cfs_quota_us": 200000,
            "cpu,cpuacct/cpu.cfs_period_us": 100000,
        },
    )
    assert cgroups.memory_limit(root) == (2 * GB, "/docker/abc")
    assert memory.available_bytes(root) == 1 * GB
    assert cgroups.cpu_quota(root) == 2.0


@pytest.mark.parametrize("membership", ["0::/", "0::/system.slice/docker-abc.scope", "0::/../elsewhere"])
def test_a_v2_container_with_or_without_a_namespace(tmp_path: Path, membership: str) -> None:
    root = tree(tmp_path, [membership], [V2], {"memory.max": 2 * GB, "memory.current": GB, "cpu.max": "50000 100000"})
    assert (memory.total_bytes(root), memory.available_bytes(root)) == (2 * GB, GB)
    assert cgroups.cpu_quota(root) == 0.5
    assert machine.within_quota(4, root) == 1


def test_a_tree_mounted_outside_of_our_namespace_is_searched_for_our_process(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        ["0::/inner"],
        [V2.replace("0:28 / ", "0:28 /../.. ")],
        {
            "memory.max": "max",
            "pods/one/inner/cgroup.procs": 1,
            "pods/one/memory.max": 1 * GB,
            "pods/two/inner/cgroup.procs": "17\n4711",
            "pods/two/memory.max": 3 * GB,
        },
    )
    assert cgroups.memory_limit(root) == (3 * GB, "/pods/two")


def test_a_hybrid_system_has_memory_in_v1_and_cpu_in_v2(tmp_path: Path) -> None:
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
    root = tree(
        tmp_path,
        ["4:memory:/batch/one", "0::/user.slice/one"],
        [v1("memory"), unified],
        {
            "memory/batch/memory.limit_in_bytes": 3 * GB,
            "memory/batch/one/memory.limit_in_bytes": 5 * GB,
            "unified/user.slice/cpu.max": "300000 100000",
            "unified/user.slice/one/cpu.max": "max 100000",
        },
    )
    assert cgroups.memory_limit(root) == (3 * GB, "/batch")
    assert cgroups.cpu_quota(root) == 3.0


def test_the_mount_that_shows_most_ancestors_counts(tmp_path: Path) -> None:
    inner = V2.replace("0:28 / /sys/fs/cgroup ", "0:28 /outer/inner /sys/fs/cgroup/a\\040copy ")
    root = tree(
        tmp_path,
        ["0::/outer/inner"],
        [inner, V2],
        {
            "a copy/memory.max": 4 * GB,
            "outer/memory.max": 2 * GB,
            "outer/inner/memory.max": 4 * GB,
        },
    )
    assert cgroups.memory_limit(root) == (2 * GB, "/outer")
    only = tree(tmp_path / "only", ["0::/outer/inner"], [inner], {"a copy/memory.max": 4 * GB})
    assert cgroups.memory_limit(only) == (4 * GB, "/outer/inner")


def test_groups_of_an_old_kernel_without_hierarchy_are_not_limited_by_their_parents(tmp_path: Path) -> None:
    files = {
        "memory/outer/memory.limit_in_bytes": 1 * GB,
        "memory/outer/memory.use_hierarchy": 0,
        "memory/outer/inner/memory.limit_in_bytes": 2 * GB,
    }
    root = tree(tmp_path, ["4:memory:/outer/inner"], [v1("memory")], files)
    assert cgroups.memory_limit(root) == (2 * GB, "/outer/inner")


def test_throttling_is_summed_over_the_path_in_seconds_of_either_version(tmp_path: Path) -> None:
    second = tree(
        tmp_path / "v2",
        ["0::/a/b"],
        [V2],
        {
            "cpu.stat": "usage_usec 9\nuser_usec 5",
            "a/cpu.stat": "usage_usec 9\nnr_periods 100\nnr_throttled 10\nthrottled_usec 250000",
            "a/b/cpu.stat": "usage_usec 9\nnr_periods 40\nnr_throttled 5\nthrottled_usec 500000",
        },
    )
    assert cgroups.throttling(second) == Throttling(100, 15, 0.75)
    first = tree(
        tmp_path / "v1",
        ["4:cpu,cpuacct:/a"],
        [v1("cpu,cpuacct")],
        {
            "cpu,cpuacct/cpu.stat": "nr_periods 0\nnr_throttled 0\nthrottled_time 0",
            "cpu,cpuacct/a/cpu.stat": "nr_periods 7\nnr_throttled 3\nthrottled_time 1500000000",
        },
    )
    assert cgroups.throttling(first) == Throttling(7, 3, 1.5)


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    root = tree(tmp_path, [], [], {})
    assert (memory.total_bytes(root), memory.available_bytes(root)) == (25_600_000_000, 22_528_000_000)
    assert (cgroups.cpu_quota(root), cgroups.cpu_set(root), cgroups.throttling(root)) == (None, None, None)
    assert cgroups.cpu_quota(tmp_path / "nothing") is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_the_cpu_set_and_the_affinity_both_limit_the_usable_cpus(tmp_path: Path) -> None:
    own = sorted(os.sched_getaffinity(0))
    narrow = tree(tmp_path / "narrow", ["0::/a"], [V2], {"a/cpuset.cpus.effective": f"{own[0]},9999"})
    assert machine.usable_cpus(narrow) == {own[0]}
    assert machine.physical_cores(narrow) == 1
    foreign = tree(tmp_path / "foreign", ["0::/a"], [V2], {"a/cpuset.cpus.effective": "9990-9999"})
    assert machine.usable_cpus(foreign) == set(own)  # an outdated file: the scheduler knows better


def test_damaged_files_limit_nothing(tmp_path: Path) -> None:
    files = {"a/memory.max": "", "a/memory.high": "many", "a/cpu.max": "max", "a/cpuset.cpus.effective": "x-y"}
    root = tree(tmp_path, ["0::/a", "nonsense"], [V2, "1 2 3"], files)
    assert (cgroups.memory_limit(root), cgroups.cpu_quota(root), cgroups.cpu_set(root)) == (None, None, None)


@contextlib.contextmanager
def real_group(controller: str, settings: Mapping[str, object]) -> Iterator[Path]:
    """Make a group two levels below ours whose parent has these settings; skip where the machine does not allow it."""
    ours = next((group for group in cgroups.groups(controller) if (group.folder / "cgroup.procs").exists()), None)
    if ours is None:
        pytest.skip(f"no group of the controller {controller} is mounted here")
    outer = ours.folder / f"llmbench-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        inner.mkdir(parents=True)
        for name, value in settings.items():
            if not (outer / name).exists():
                pytest.skip(f"groups made in {ours.folder} have no {name}")
            (outer / name).write_text(str(value))
        yield inner
    except OSError as error:
        pytest.skip(f"no group can be made in {ours.folder}: {error.strerror}")
    finally:
        for folder in (inner, outer):
            with contextlib.suppress(OSError):
                folder.rmdir()


def told_in(group: Path, code: str) -> list[float]:
    """Run code in a process that has joined a group, and return the list that it prints as JSON."""
    join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\nimport json\n"
    done = subprocess.run(
        [sys.executable, "-c", join + code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    if "PermissionError" in done.stderr:
        pytest.skip(f"no process can be moved into {group}")
    assert done.returncode == 0, done.stderr
    found: list[float] = json.loads(done.stdout)
    return found


def version() -> int:
    """Return the version in which this machine has its memory controller; 0 without one."""
    mounted = [group for group in cgroups.groups("memory") if (group.folder / "memory.stat").exists()]
    return mounted[0].version if mounted else 0


def test_a_real_memory_limit_of_a_parent_is_seen() -> None:
    name = "memory.max" if version() == 2 else "memory.limit_in_bytes"
    ask = """
from mlflow_llmbench.system import memory
print(json.dumps([memory.total_bytes(), memory.available_bytes()]))
"""
    with real_group("memory", {name: 1 << 30}) as group:
        total, available = told_in(group, ask)
    assert total == 1 << 30
    assert 0 < available < 1 << 30


def test_a_real_cpu_quota_of_a_parent_is_seen_and_its_throttling_counted() -> None:
    v2 = version() == 2
    quota = {"cpu.max": "20000 20000"} if v2 else {"cpu.cfs_period_us": 20000, "cpu.cfs_quota_us": 20000}
    busy = """
import threading, hashlib
from mlflow_llmbench.system import cgroups, machine
block = bytes(1 << 24)
def burn():
    for _ in range(20): hashlib.sha256(block)
threads = [threading.Thread(target=burn) for _ in range(3)]
for one in threads: one.start()
for one in threads: one.join()
seen = cgroups.throttling()
allowed = [cgroups.cpu_quota(), machine.within_quota(16), machine.physical_cores()]
print(json.dumps([*allowed, seen.periods, seen.throttled, seen.throttled_s]))
"""
    with real_group("cpu", quota) as group:
        allowed, threads, cores, periods, throttled, seconds = told_in(group, busy)
    assert (allowed, threads, cores) == (1.0, 1, 1)
    assert periods > 0
    assert throttled > 0 or seconds == 0  # a group that was throttled for the first time just now has no time yet
