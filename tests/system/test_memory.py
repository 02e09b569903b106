"""Host memory as the kernel accounts for it: real allocations, real mappings."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlflow_llmbench.system import memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MB = 1024 * 1024


@linux
def test_anonymous_memory_grows_by_what_is_allocated() -> None:
    """In a process of its own: one that ran other tests may have memory left that was freed, and takes none."""
    code = f"""
import numpy as np
from mlflow_llmbench.system import memory
before = memory.read()
block = np.ones({64 * MB}, dtype=np.uint8)
after = memory.read()
print(after.anonymous - before.anonymous, after.rss - before.rss, block.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    anonymous, rss, allocated = map(int, done.stdout.split())
    assert anonymous == pytest.approx(allocated, rel=0.05)
    assert rss == pytest.approx(allocated, rel=0.05)


@linux
def test_peak_after_reset_is_exact_and_not_that_of_the_past() -> None:
    code = """
import numpy as np
from mlflow_llmbench.system import memory
big = np.ones(200 * 2**20, dtype=np.uint8); del big
if not memory.reset_peak():
    print("no reset"); raise SystemExit
base = memory.read().rss
small = np.ones(50 * 2**20, dtype=np.uint8); del small
print(memory.read().peak_rss - base)
"""
    root = Path(__file__).resolve().parents[2]
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    ).stdout
    if "no reset" in printed:
        pytest.skip("this kernel does not let a process reset its peak")
    assert int(printed) == pytest.approx(50 * MB, rel=0.1)


@linux
def test_bytes_in_file_mappings(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(4 * MB))
    with file.open("rb") as opened:
        mapped = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    own = np.ones(4 * MB, dtype=np.uint8)
    spans = [(mapped.ctypes.data + 100, 1 * MB), (own.ctypes.data, own.nbytes)]
    assert memory.union_bytes(memory.mapped_parts(spans)) == 1 * MB


@linux
def test_parts_of_files_are_told_by_their_place_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(os.urandom(4 * MB))
    page = mmap.ALLOCATIONGRANULARITY
    with file.open("rb") as opened:
        mapped = np.frombuffer(mmap.mmap(opened.fileno(), 2 * MB // page * page, access=mmap.ACCESS_READ, offset=page),
                               dtype=np.uint8)  # fmt: skip
    assert memory.mapped_parts([(mapped.ctypes.data + 100, 50)]) == [(str(file), page + 100, page + 150)]


def test_what_lies_in_several_parts_of_files_counts_once() -> None:
    parts = [("b", 0, 10), ("a", 0, 10), ("a", 5, 8), ("a", 8, 12), ("a", 20, 21), ("b", 0, 10)]
    assert memory.union_bytes(parts) == 12 + 1 + 10
    assert memory.union_bytes([]) == 0


def test_an_ended_process_has_no_memory() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert memory.read(child.pid) is None


def test_available_is_less_than_total() -> None:
    total, available = memory.total_bytes(), memory.available_bytes()
    assert total and available
    assert 0 < available < total
