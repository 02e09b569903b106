"""The task of a worker that measures, in this process, with a backend that has the memory and the faults of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.backends.base import DeviceMemory
from mlflow_llmbench.backends.fake import FakeBackend
from mlflow_llmbench.measure.events import Event, StageMemory
from mlflow_llmbench.measure.supervise import environment_of
from mlflow_llmbench.measure.task import WorkerJob
from mlflow_llmbench.measure.worker import TASKS
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.results import LoadInfo

CELL = {"model": "fake", "prompt_tokens": 4, "output_tokens": 2, "warmup": 1, "repetitions": 2}
SCRATCH, WEIGHTS = 5_000, 1_000


class OnGpu(FakeBackend):
    """Holds device memory, and what its loader used until its cache is emptied."""

    held = scratch = 0

    def load(self) -> LoadInfo:
        self.held, self.scratch = WEIGHTS, SCRATCH
        return super().load()

    def trim(self) -> None:
        self.scratch = 0

    def device_memory(self, reset: bool = False) -> DeviceMemory | None:
        now = self.held + self.scratch
        return DeviceMemory(self.held, now, now)

    def close(self) -> None:
        self.held = 0
        self.trim()


class Failing(OnGpu):
    """Fails as a device does after an illegal access: in the call, and in each one after it."""

    def generate(self, prompts: Sequence[Sequence[int]], output_tokens: int, emit: Callable[[Any], None]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def close(self) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], WorkerJob]:
    """Make the job of one of the backends above, which an installed package offers."""
    info = tmp_path / "site" / "gpus-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gpus\nVersion: 1.0\n")
    names = "".join(f"{kind.__name__.lower()} = {__name__}:{kind.__name__}\n" for kind in (OnGpu, Failing))
    (info / "entry_points.txt").write_text(f"[mlflow_llmbench.backends]\n{names}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "cell").mkdir()

    def of(backend: str) -> WorkerJob:
        cell = Cell(backend=backend, **CELL)  # type: ignore[arg-type]
        return WorkerJob("measure", (cell,), FakeBackend.resolve(cell), (tmp_path / "cell",))

    return of


def test_device_memory_is_that_of_the_model(job: Callable[[str], WorkerJob]) -> None:
    """The loader's scratch is in no stage, and nothing is left at the end."""
    events: list[Event] = []
    TASKS["measure"](job("ongpu"), events.append)
    found = {event.stage: event.device.reserved for event in events if isinstance(event, StageMemory) and event.device}
    assert found == {"baseline": 0, "loaded": WEIGHTS, "peak": WEIGHTS, "unloaded": 0}


def test_the_first_error_of_a_device_is_the_one_that_is_told(
    job: Callable[[str], WorkerJob], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"):
        TASKS["measure"](job("failing"), lambda event: None)
    assert "Unloading failed too: RuntimeError: CUDA error: unspecified launch failure" in capsys.readouterr().err


def test_cuda_counts_gpus_in_a_worker_as_the_driver_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    found = environment_of(WorkerJob("measure", (Cell("m", threads=3),)))
    assert (found["CUDA_DEVICE_ORDER"], found["CUDA_VISIBLE_DEVICES"]) == ("PCI_BUS_ID", "1,0")
    assert found["OMP_NUM_THREADS"] == "3"
