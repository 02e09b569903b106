"""Devices of torch besides the CPU, by modules that answer as torch's do, and what cannot run on them here."""

from __future__ import annotations

import platform
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlflow_llmbench.backends import accelerator
from mlflow_llmbench.backends.base import DeviceMemory
from mlflow_llmbench.backends.huggingface.backend import TransformersBackend
from mlflow_llmbench.config.backend_checks import check_declared
from mlflow_llmbench.config.spec import parse
from mlflow_llmbench.records.cell import Cell
from mlflow_llmbench.records.errors import MissingError, UsageError
from mlflow_llmbench.records.results import ModelFacts
from mlflow_llmbench.system import estimate, machine, other_devices, torch_runtime

torch = pytest.importorskip("torch")


class Module:
    """The functions that torch.cuda and torch.xpu share, for two devices."""

    def __init__(self) -> None:
        self.called: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        numbers = {"memory_allocated": 1, "memory_reserved": 2, "max_memory_reserved": 3}
        if name in numbers:
            return lambda device: numbers[name] * (10 if str(device).endswith(":1") else 1)
        if name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
            return lambda *device: self.called.append((name, *device))
        raise AttributeError(name)

    def mem_get_info(self, device: str) -> tuple[int, int]:
        return 70, 80

    def get_device_properties(self, device: str) -> SimpleNamespace:
        return SimpleNamespace(last_level_cache_size=123)

    def get_device_name(self, device: str) -> str:
        return "Intel Data Center GPU Max 1550"


class Apple:
    """The functions that torch.mps has."""

    synchronised = 0

    def synchronize(self) -> None:
        self.synchronised += 1

    def current_allocated_memory(self) -> int:
        return 5

    def driver_allocated_memory(self) -> int:
        return 7

    def recommended_max_memory(self) -> int:
        return 100

    def empty_cache(self) -> None: ...


def test_two_devices_are_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module if kind == "xpu" else None)
    both = ("xpu:0", "xpu:1")
    assert accelerator.device_memory(both, None, reset=True) == DeviceMemory(11, 22, 33, None)
    accelerator.synchronise(both)
    accelerator.empty_caches("xpu")
    resets = [("reset_peak_memory_stats", "xpu:0"), ("reset_peak_memory_stats", "xpu:1")]
    assert module.called == [*resets, ("synchronize", "xpu:0"), ("synchronize", "xpu:1"), ("empty_cache",)]
    assert (accelerator.free_bytes("xpu"), accelerator.cache_bytes("xpu")) == (70, 123)
    assert accelerator.name("xpu") == "Intel Data Center GPU Max 1550"


@pytest.mark.parametrize("named", ["xpu", "xpu:0"])
def test_a_device_without_a_number_is_the_first_when_it_is_taken(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own `set_device` refuses a device without an index: this is its check."""
    from torch.cuda._utils import _get_device_index

    taken: list[int] = []
    module = Module()
    monkeypatch.setattr(module, "set_device", lambda device: taken.append(_index(device)), raising=False)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)

    def _index(device: torch.device) -> int:
        return int(_get_device_index(torch.device("cuda", device.index) if device.index is not None else "cuda"))

    accelerator.take(named)
    assert taken == [0]


def test_an_apple_gpu_has_one_pool_no_peak_and_no_known_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Apple()
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module if kind == "mps" else None)
    assert accelerator.device_memory(("mps",), None, reset=True) == DeviceMemory(5, 7, 7, 7)
    accelerator.synchronise(("mps",))
    accelerator.take("mps")
    assert (module.synchronised, accelerator.free_bytes("mps"), accelerator.cache_bytes("mps")) == (1, 93, None)
    assert (accelerator.name("mps") or "").startswith("GPU of ")


def test_a_cpu_has_nothing_to_ask() -> None:
    assert accelerator.device_memory(("cpu",), None) is None and accelerator.name("cpu") is None
    accelerator.synchronise(("cpu",))
    accelerator.empty_caches("cpu")
    accelerator.take("cpu")
    assert accelerator.has_bfloat16("cpu") and accelerator.cache_bytes("cpu") == machine.last_level_cache_bytes()


def test_double_precision_is_computed_in_host_memory_where_a_device_has_none() -> None:
    class OnApple:
        device = torch.device("mps")

        def cpu(self) -> Any:
            return torch.ones(2)

    found = accelerator.doubled(OnApple())  # type: ignore[arg-type]
    assert found.dtype == torch.float64 and found.device.type == "cpu"
    assert accelerator.doubled(torch.ones(2)).dtype == torch.float64


def test_each_step_is_looked_at_in_that_step_on_apple_gpus() -> None:
    utils = pytest.importorskip("transformers.generation.utils")
    if not hasattr(utils, "DeferredStopCheck"):
        pytest.skip("this transformers looks at each step at once everywhere")
    asked = (torch.device("mps"), None, False, False)
    assert utils.DeferredStopCheck.is_supported(*asked)
    with accelerator.stopping_at_once("mps"):
        assert not utils.DeferredStopCheck.is_supported(*asked)
    with accelerator.stopping_at_once("cpu"):
        assert utils.DeferredStopCheck.is_supported(*asked)


def test_devices_that_this_machine_has_not_are_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse({"device": "xpu:1"}).axes["device"] == ("xpu:1",)
    with pytest.raises(UsageError, match=r"^Unknown device: tpu\. Give auto, cpu, cuda, cuda:N, xpu, xpu:N or mps\.$"):
        parse({"device": "tpu"})
    with pytest.raises(MissingError, match=r"^The installed torch has no support for Intel GPUs, which device=xpu:1 "):
        machine.require_device("xpu:1")
    monkeypatch.setattr(torch_runtime, "has_xpu", lambda: True)
    assert machine.require_device("xpu:1") == "xpu:1" and estimate.available_memory("xpu", 5) == (None, estimate.ON_GPU)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(MissingError, match=r"^There is no Apple GPU for device=mps: this machine is "):
        machine.require_device("mps")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert machine.require_device("mps") == "mps" and estimate.available_memory("mps", 5)[0] == 5


@pytest.mark.parametrize("device", ["xpu", "xpu:1", "mps"])
def test_only_what_was_made_for_a_device_runs_on_it(device: str) -> None:
    check_declared(Cell(device=device))
    with pytest.raises(UsageError, match=rf"^llama\.cpp does not run on device={device}\. Use device=cpu,cuda\."):
        check_declared(Cell(device=device, backend="llama_cpp", quant="none"))
    facts = ModelFacts("m", "folder", "/m", "r", {"model_type": "llama"})
    for setting in ({"placement": "auto"}, {"tensor_parallel": 2}):
        refused = TransformersBackend.refusal(Cell(device=device, **setting), facts)  # type: ignore[arg-type]
        assert refused and refused.endswith("Use device=cpu.")


def test_a_mac_names_its_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert other_devices.apple_cpu_name() is None or sys.platform == "darwin"
    program = tmp_path / "sysctl"
    program.write_text('#!/bin/sh\n[ "$*" = "-n machdep.cpu.brand_string" ] && echo Apple M2 Pro\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert other_devices.apple_cpu_name() == "Apple M2 Pro"
