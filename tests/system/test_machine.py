"""The fingerprint and the noise counters of the machine that runs the tests."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.records.errors import MissingError
from mlflow_llmbench.records.results import hash16
from mlflow_llmbench.system import gpu, machine


def test_fingerprint_is_complete_and_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "do-not-log-me")
    first = machine.environment()
    assert {"cpu", "memory", "gpus", "driver", "cuda", "os", "python", "packages", "git", "hashes"} <= set(first)
    assert first["packages"]["torch"] and first["packages"]["transformers"]
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in first["hashes"].values())
    assert machine.environment()["hashes"] == first["hashes"]
    assert "do-not-log-me" not in json.dumps(first)


def test_a_cpu_quota_is_hardware_and_no_quota_leaves_the_hash_of_earlier_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine.cgroups, "cpu_quota", lambda root=None: None)
    free = machine.fingerprint()
    assert free["cpu"]["quota_cpus"] is None
    cpu = {k: v for k, v in free["cpu"].items() if k not in ("last_level_cache_bytes", "quota_cpus")}
    if not free["gpus"]:
        before = hash16({"cpu": cpu, "memory_gib": round(free["memory"]["total_bytes"] / 2**30), "gpus": []})
        assert free["hashes"]["hardware"] == before
    monkeypatch.setattr(machine.cgroups, "cpu_quota", lambda root=None: 1.5)
    assert machine.fingerprint()["cpu"]["quota_cpus"] == 1.5
    assert machine.fingerprint()["hashes"]["hardware"] != free["hashes"]["hardware"]


def test_gpu_libraries_are_in_the_hash_where_a_gpu_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The facts come in by the seams `gpu.gpus` and `torch_runtime.versions`, as a machine with a GPU gives them."""
    one = {"index": 0, "name": "NVIDIA T4", "memory_bytes": 16 * 10**9, "driver": "570.1", "cuda": "12.8"}
    facts = {"cuda_runtime": "12.6", "rocm": None, "cudnn": "9.10.2.21", "nccl": "2.27.5"}

    def seen(gpus: list[dict[str, object]], found: dict[str, str | None]) -> dict[str, Any]:
        monkeypatch.setattr(machine.gpu, "gpus", lambda: gpus)
        monkeypatch.setattr(machine.torch_runtime, "versions", lambda: found)
        return machine.fingerprint()

    with_gpu = seen([one], facts)
    assert {name: with_gpu[name] for name in facts} == facts
    assert (with_gpu["driver"], with_gpu["cuda"]) == ("570.1", "12.8")
    for name in ("cuda_runtime", "cudnn", "nccl"):
        other = seen([one], facts | {name: "1.0"})
        assert other["hashes"]["software"] != with_gpu["hashes"]["software"]
        assert other["hashes"]["hardware"] == with_gpu["hashes"]["hardware"]
    without = seen([], facts)
    assert {name: without[name] for name in facts} == facts
    assert without["hashes"] == seen([], dict.fromkeys(facts))["hashes"]
    before = {name: without[name] for name in ("os", "python", "packages", "driver", "cuda")}
    assert without["hashes"]["software"] == hash16(before)  # as earlier versions made it


def test_git_commit(tmp_path: Path) -> None:
    assert machine.git_commit(str(tmp_path)) is None
    for command in (
        ["init", "-q"],
        ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{40}", machine.git_commit(str(tmp_path)) or "")


def test_the_commit_is_that_of_this_program_or_else_of_the_users_own_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, own = tmp_path / "site-packages", tmp_path / "own"
    installed.mkdir()
    own.mkdir()
    commit = ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "--allow-empty", "-m", "x"]
    for command in (["init", "-q"], commit):
        subprocess.run(["git", *command], cwd=own, check=True)
    monkeypatch.setattr(machine, "PACKAGE_DIR", installed)
    monkeypatch.chdir(own)
    assert machine.own_commit() == machine.git_commit(str(own)) is not None
    monkeypatch.chdir(installed)
    assert machine.own_commit() is None
    monkeypatch.setattr(machine, "PACKAGE_DIR", own)
    assert machine.environment()["git"] == machine.git_commit(str(own))


def test_commands_that_a_strangers_checkout_names_are_not_run(tmp_path: Path) -> None:
    """A folder that was unpacked from an archive can have a `.git` of any content."""
    folder, trace = tmp_path / "checkout", tmp_path / "ran"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / ".gitattributes").write_text("*.txt filter=a=b diff=other\n")

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    clean = machine.git_commit(str(folder))
    assert re.fullmatch("[0-9a-f]{40}", clean or "")
    command = f"sh -c 'touch {trace}; cat'"
    for name in ("core.fsmonitor", "filter.a=b.clean", "filter.a=b.process", "diff.external", "diff.other.textconv"):
        git("config", name, command)
    for hook in ("post-index-change", "fsmonitor-watchman"):
        (folder / ".git/hooks" / hook).write_text(f"#!/bin/sh\ntouch {trace}\n")
        (folder / ".git/hooks" / hook).chmod(0o755)
    os.utime(folder / "a.txt", (1e9, 1e9))  # git has to look into it
    assert machine.git_commit(str(folder)) == clean
    (folder / "a.txt").write_text("b")
    assert machine.git_commit(str(folder)) == f"{clean}-dirty"
    assert not trace.exists()


def test_devices_that_are_not_there() -> None:
    if gpu.gpus():
        pytest.skip("this machine has a GPU")
    assert machine.require_device("auto") == "cpu"
    with pytest.raises(MissingError, match="There is no CUDA device for device=cuda:0"):
        machine.require_device("cuda:0")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_time_of_others_is_seen_and_our_own_is_told_apart() -> None:
    """Check lower bounds only: other work of the machine can add CPU time, never take it away."""
    before = machine.take_readings()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    noise = machine.noise_between(before, machine.take_readings())
    assert noise.foreign_cpu_s is not None and noise.own_cpu_s is not None
    assert noise.foreign_cpu_s > 0.4
    assert noise.own_cpu_s < 0.3
    before = machine.take_readings()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    assert (machine.noise_between(before, machine.take_readings()).own_cpu_s or 0) >= 0.3


def test_noise_is_the_difference_of_two_readings() -> None:
    before = machine.Readings(10.0, 1.0, 100.0, 5.0, 2.0, 7, 3, None)
    after = machine.Readings(12.0, 1.5, 103.0, 6.5, 2.25, 9, 3, None)
    noise = machine.noise_between(before, after)
    assert (noise.wall_s, noise.steal_s, noise.foreign_cpu_s, noise.own_cpu_s) == (2.0, 0.5, 1.5, 1.5)
    assert (noise.pressure_s, noise.involuntary_switches, noise.major_faults, noise.swapped_pages) == (0.25, 2, 0, None)


def kernel_files(folder: Path, stolen: int, swapped: int, pressure_us: int) -> None:
    """The files of /proc in the kernel's layout (proc(5), Documentation/accounting/psi.rst).

    `cpu` has the ticks of user, nice, system, idle, …, steal.
    """
    (folder / "pressure").mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  1000 20 300 99999 40 5 6 {stolen} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 5\n")
    (folder / "pressure" / "cpu").write_text(
        f"some avg10=1.00 avg60=0.50 avg300=0.10 total={pressure_us}\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
    )
    (folder / "vmstat").write_text(
        f"nr_free_pages 1234\npgpgin 7\npswpin {swapped}\npswpout {2 * swapped}\npgfault 99\n"
    )


def test_steal_pressure_and_swapping_are_read_as_the_kernel_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path)
    ticks = os.sysconf("SC_CLK_TCK")
    kernel_files(tmp_path, 0, 100, 1_000_000)
    before = machine.take_readings()
    assert before.busy_s == pytest.approx((1000 + 20 + 300 + 5 + 6) / ticks)
    kernel_files(tmp_path, 2 * ticks, 400, 1_750_000)
    noise = machine.noise_between(before, machine.take_readings())
    assert (noise.steal_s, noise.swapped_pages, noise.pressure_s) == (2.0, 900, 0.75)
    assert noise.foreign_cpu_s == 0.0
    for name in ("stat", "vmstat", "pressure/cpu"):
        (tmp_path / name).unlink()
    nothing = machine.noise_between(before, machine.take_readings())
    assert (nothing.steal_s, nothing.foreign_cpu_s, nothing.swapped_pages, nothing.pressure_s) == (
        None,
        None,
        None,
        None,
    )


def test_the_best_rates_are_kept_by_hardware_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBENCH_CACHE", str(tmp_path / "cache"))
    assert machine.best_peaks({"read_bytes_per_s": 5.0}, "a cpu 2") == {"read_bytes_per_s": 5.0}
    assert machine.best_peaks({"read_bytes_per_s": 3.0, "flops_per_s": 9.0}, "a cpu 2") == {
        "read_bytes_per_s": 5.0,
        "flops_per_s": 9.0,
    }
    assert machine.best_peaks({"read_bytes_per_s": 2.0}, "a cpu 1") == {"read_bytes_per_s": 2.0}
    judged = {"read_agreement_ratio": 0.99, "flops_agreement_ratio": 0.99, "probe_others_cpus": 0.0}
    doubtful = judged | {"probe_others_cpus": 1.0}
    # A disturbed probe is not kept, and stays doubtful until an undisturbed one was measured here.
    assert machine.best_peaks({"read_bytes_per_s": 1.0, **doubtful}, "new") == {"read_bytes_per_s": 1.0, **doubtful}
    assert "new" not in machine.known_peaks()
    assert machine.best_peaks({"read_bytes_per_s": 4.0, **judged}, "new") == {"read_bytes_per_s": 4.0, **judged}
    assert machine.best_peaks({"read_bytes_per_s": 0.4, **doubtful}, "new") == {"read_bytes_per_s": 4.0}
    assert machine.best_peaks({"read_bytes_per_s": 1.0, **doubtful}, "a cpu 2") == {"read_bytes_per_s": 5.0, **doubtful}
    assert machine.best_peaks({"read_bytes_per_s": math.nan}, "new") == {}
    (tmp_path / "cache" / "peaks.json").write_text("{damaged")
    assert machine.best_peaks({"read_bytes_per_s": 1.0}, "a cpu 2") == {"read_bytes_per_s": 1.0}
