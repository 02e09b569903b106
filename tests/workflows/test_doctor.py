"""Examination of a machine and its environment, with real processes, files and servers, and once on this machine."""

import http.server
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_llmbench.backends.packages import NEEDED, version
from mlflow_llmbench.measure import runtime
from mlflow_llmbench.measure.runtime import Item
from mlflow_llmbench.records.backends import known_backends
from mlflow_llmbench.records.codec import from_json, to_json
from mlflow_llmbench.records.quantizations import LIBRARIES, QUANTIZATIONS
from mlflow_llmbench.reports.doctor import format_report, format_summary
from mlflow_llmbench.workflows import doctor
from mlflow_llmbench.workflows.doctor import Report
from tests.servers import serving

GPU = {"index": 0, "name": "NVIDIA T4", "memory_bytes": 16_106_127_360, "driver": "570.1", "cuda": "12.8"}
ROOT = Path(__file__).resolve().parents[2]


# The report


REPORT = Report(
    True,
    (
        Item("Machine", "CPU", "ok", "a CPU, 2 cores to use"),
        Item("Machine", "energy", "missing", "none", "Measure without it."),
        Item("Software", "torch runs", "ok", "on the CPU", needed=True, data={"device": "cpu"}),
        Item("Quantizations", "fp32", "ok", "torch"),
        Item("Quantizations", "int4", "missing", "needs bitsandbytes", "Run: pip install bitsandbytes"),
    ),
)


def test_a_report_as_text() -> None:
    assert format_report(REPORT.items) == (
        "Machine\n"
        "  ok       CPU         a CPU, 2 cores to use\n"
        "  missing  energy      none\n"
        "                       Measure without it.\n"
        "\n"
        "Software\n"
        "  ok       torch runs  on the CPU\n"
        "\n"
        "Quantizations\n"
        "  ok       fp32        torch\n"
        "  missing  int4        needs bitsandbytes\n"
        "                       Run: pip install bitsandbytes\n"
        "\n"
        "Ready: models can be measured with device=cpu and quant=fp32."
    )


def test_a_report_of_a_machine_that_cannot_measure() -> None:
    lacking = Report(
        False,
        (*REPORT.items, Item("Software", "mlflow", "missing", "not installed", "Run: pip install mlflow", needed=True)),
    )
    assert format_report(lacking.items).splitlines()[-1] == "Not ready. mlflow: not installed. Run: pip install mlflow"


def test_a_summary_has_four_lines_and_the_verdict() -> None:
    assert format_summary(REPORT.items) == (
        "Machine   a CPU, 2 cores to use\n"
        "Software\n"
        "Runs      ; 1 of 2 quantizations\n"
        "Missing   energy, 1 quantization\n"
        "\n"
        "Ready: models can be measured with device=cpu.\n"
        "`llmbench doctor -v` shows everything, with the commands that install what is missing."
    )


def test_a_report_as_json() -> None:
    data = json.loads(json.dumps(to_json(REPORT)))
    assert data["ready"] is True
    assert data["items"][2] == {
        "section": "Software",
        "name": "torch runs",
        "status": "ok",
        "found": "on the CPU",
        "advice": None,
        "needed": True,
        "data": {"device": "cpu"},
    }
    assert from_json(Report, data) == REPORT


def test_this_machine() -> None:
    report = doctor.examine()
    assert report.ready
    items = {(item.section, item.name): item for item in report.items}
    assert len(items) == len(report.items)
    assert {item.status for item in report.items} <= {"ok", "missing", "limited"}
    assert [item.name for item in report.items if item.status != "ok" and not item.advice] == []
    assert [item.name for item in report.items if item.found.startswith("could not be examined")] == []
    assert {name for section, name in items if section == "Quantizations"} == set(QUANTIZATIONS)
    converter = {"llama.cpp's converter"} if importlib.util.find_spec("llama_cpp") else set()
    assert {name for section, name in items if section == "Backends"} == {*known_backends(), *converter}
    assert items["Machine", "memory"].data["available_bytes"] > 0
    assert items["Software", "torch"].data["version"] == version("torch")
    assert items["Software", "torch runs"].data["device"] in ("cpu", "cuda")
    assert items["Software", "Hugging Face Hub"].found == "not asked: HF_HUB_OFFLINE is set"
    json.dumps(to_json(report), allow_nan=False)
    text = format_report(report.items)
    assert text.splitlines()[0] == "Machine"
    assert text.splitlines()[-1].startswith("Ready: models can be measured with device=")


def test_it_does_not_load_torch_into_this_process() -> None:
    code = (
        "import sys; from mlflow_llmbench.workflows import doctor; doctor.examine(); "
        "print({'torch', 'transformers', 'mlflow', 'matplotlib'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_check_that_fails_is_an_item() -> None:
    def broken() -> Iterator[Item]:
        yield from ()
        raise PermissionError(13, "Permission denied", "/sys/x")

    (item,) = runtime._guarded("Machine", "disk", broken)
    assert (item.status, item.found) == ("limited", "could not be examined: [Errno 13] Permission denied: '/sys/x'")


# Machine


def test_memory() -> None:
    assert doctor.memory_item(21_300_000_000, 25_000_000_000).found == "21.3 GB free of 25.0 GB"
    assert doctor.memory_item(1_000_000_000, 25_000_000_000).status == "limited"
    assert doctor.memory_item(None, None).found == "not known"
    libraries = {"cuda_runtime": "13.0", "rocm": None, "cudnn": "9.20.0.48", "nccl": None}
    assert [item.found for item in doctor.gpu_library_items(libraries)] == ["CUDA of torch 13.0, cuDNN 9.20.0.48"]
    assert list(doctor.gpu_library_items(dict.fromkeys(libraries))) == []
    limited = doctor.memory_item(3_000_000_000, 4_000_000_000, (4_000_000_000, "/slurm/job_7"))
    assert limited.found == "3.0 GB free of 4.0 GB, the limit of the control group /slurm/job_7"
    assert doctor.memory_item(3_000_000_000, 4_000_000_000, (90_000_000_000, "/")).found == "3.0 GB free of 4.0 GB"
    assert doctor.cpu_item("a CPU", 1, 8, 1.5).found == (
        "a CPU, 1 core to use, 8 logical CPUs, of which a control group allows the time of 1.5"
    )


def test_gpus() -> None:
    assert [(i.name, i.status, i.found) for i in doctor.gpu_items([GPU], True)] == [
        ("GPU 0", "ok", "NVIDIA T4, 16.1 GB, driver 570.1, CUDA 12.8")
    ]
    assert [(i.status, i.found) for i in doctor.gpu_items([], True)] == [("missing", "no NVIDIA GPU answers")]
    assert [i.advice for i in doctor.gpu_items([], False)] == ["Run: pip install nvidia-ml-py"]


def test_gpus_whose_driver_is_broken(nvml: Callable[[str], None]) -> None:
    """One shares the host's memory, one is lost, one is divided and shows its instances to nobody but root."""
    nvml(
        "driver 580.95\nfail nvmlSystemGetCudaDriverVersion 999\n"
        "gpu GPU-1 NVIDIA GB10\n"
        "gpu GPU-2 NVIDIA A100\nfail nvmlDeviceGetHandleByIndex_v2 15\n"
        "gpu GPU-3 NVIDIA H100\nmig 1\nfail nvmlDeviceGetMemoryInfo 4\n"
    )
    report = doctor.examine(torch_s=0.01)
    items = [item for item in report.items if item.section == "Machine" and item.name.startswith("GPU")]
    assert [(item.name, item.status, item.found) for item in items] == [
        ("GPU 0", "ok", "NVIDIA GB10, memory not known, driver 580.95, CUDA not known"),
        ("GPU 1", "ok", "NVIDIA H100, memory not known, driver 580.95, CUDA not known"),
        ("GPU problem", "limited", "GPU 1 of nvidia-smi does not answer: GPU is lost"),
    ]  # fmt: skip
    json.dumps(to_json(report), allow_nan=False)
    assert "GPU is lost" in format_report(report.items)
    assert doctor.memory_here()[1] is None


def test_a_driver_that_does_not_start_is_named(nvml: Callable[[str], None]) -> None:
    nvml("fail nvmlInitWithFlags 18\n")
    [item] = [i for i in doctor.examine(torch_s=0.01).items if i.section == "Machine" and i.name.startswith("GPU")]
    assert (item.name, item.status) == ("GPU problem", "limited")
    assert item.found == "the NVIDIA driver does not start: RM has detected an NVML/RM version mismatch."


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2 avx2 avx512f avx512_bf16", [("ok", "avx2, avx512f, avx512_bf16")]),
        ("fpu sse2 avx2", [("limited", "avx2, no AVX-512")]),
        ("fpu sse2", [("limited", "SSE only, no AVX-512")]),
        ("fp asimd", []),
    ],
)
def test_vector_instructions(flags: str, expected: list[tuple[str, str]], tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t:\n")
    assert [(item.status, item.found) for item in doctor.vector_items(cpuinfo)] == expected
    assert list(doctor.vector_items(tmp_path / "absent")) == []


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "yet" / "there"
    item = doctor.disk_item("cache folder", folder, "LLMBENCH_CACHE")
    assert item.data["folder"] == str(folder)
    assert 0 < item.data["free_bytes"] <= shutil.disk_usage(tmp_path).total
    assert item.status == ("ok" if item.data["free_bytes"] >= doctor.LITTLE_DISK else "limited")
    monkeypatch.setenv("LLMBENCH_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert [item.data["folder"] for item in doctor.disk_items()] == [str(folder), str(tmp_path / "hub")]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, a folder that nobody can write")
def test_a_folder_that_cannot_be_written() -> None:
    item = doctor.disk_item("cache folder", Path("/proc/self/net/absent"), "LLMBENCH_CACHE")
    assert item.status == "limited"
    assert item.advice


# Software


@pytest.mark.parametrize(
    ("name", "installed", "status", "found"),
    [
        ("mlflow", "3.15.0", "ok", "3.15.0"),
        ("mlflow", "3.12.1", "limited", "3.12.1, but this program was written for >=3.15,<4"),
        (
            "mlflow",
            "3.9.2",
            "limited",
            "3.9.2 is older than 3.10, the oldest whose server lets no stranger read its files (CVE-2026-2614)",
        ),
        (
            "torch",
            "2.5.1",
            "limited",
            "2.5.1 is older than 2.6, the oldest that runs no code out of pickled weights (CVE-2025-32434)",
        ),
        (
            "transformers",
            "5.2.0",
            "limited",
            "5.2.0 is older than 5.3, the oldest that runs no code of a model without trust_remote_code "
            "(CVE-2026-4372)",
        ),
        ("mlflow", "4.0.0rc1", "limited", "4.0.0rc1, but this program was written for >=3.15,<4"),
        ("torch", "2.13.0+cpu", "ok", "2.13.0+cpu"),
        ("safetensors", "0.8", "ok", "0.8"),
        ("torch", None, "missing", "not installed"),
    ],
)
def test_needed_packages(name: str, installed: str | None, status: str, found: str) -> None:
    item = runtime.package_item(name, installed)
    assert (item.status, item.found, item.needed) == (status, found, True)
    assert bool(item.advice) == (status != "ok")


def test_the_command_that_installs_a_needed_package() -> None:
    assert runtime.package_item("mlflow", None).advice == "Run: pip install 'mlflow>=3.15,<4'"
    assert runtime.package_item("safetensors", None).advice == "Run: pip install safetensors"


def test_needed_versions_and_extras_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, (low, below) in NEEDED.items():
        assert f'"{name}{",".join(filter(None, [low, below]))}"' in text
    for library in LIBRARIES:
        assert not library.extra or f"\n{library.extra} = [" in text


def test_quantizations_without_their_packages() -> None:
    items = {item.name: item for item in runtime.quantization_items({"torch", "transformers"}.__contains__)}
    assert {name for name, item in items.items() if item.status == "ok"} >= {"none", "fp32", "fp16", "bf16"}
    assert (items["int4"].status, items["int4"].found) == ("missing", "needs bitsandbytes")
    assert items["int4"].advice == "Run: pip install bitsandbytes"
    nothing = {item.name: item for item in runtime.quantization_items(set[str]().__contains__)}
    assert nothing["fp32"].advice == "Run: pip install torch && pip install transformers"


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert version("no-such-distribution-of-ours") is None


def printing(text: str) -> list[str]:
    return [sys.executable, "-c", f"print({text!r})"]


def torch_answer(**data: Any) -> list[str]:
    return printing(json.dumps({"version": "2.9.0", "built_for": "12.8", "cuda": False, "devices": [], **data}))


def test_torch_of_this_environment() -> None:
    item = doctor.torch_item([])
    assert item.data["version"].partition("+")[0] == str(version("torch")).partition("+")[0]
    assert item.data["device"] == "cpu"


def test_what_torch_and_the_driver_say_together() -> None:
    works = doctor.torch_item([GPU], torch_answer(cuda=True, devices=["NVIDIA T4"]))
    assert (works.status, works.found, works.data["device"]) == ("ok", "CUDA 12.8 works: NVIDIA T4", "cuda")
    assert doctor.torch_item([], torch_answer(cuda=True, devices=["NVIDIA T4"])).data["device"] == "cpu"
    wrong_build = doctor.torch_item([GPU], torch_answer(version="2.9.0+cpu", built_for=None))
    assert (wrong_build.status, wrong_build.found) == (
        "limited",
        "on the CPU only: 2.9.0+cpu is a build without CUDA, and there is a GPU",
    )
    old_driver = doctor.torch_item([GPU], torch_answer())
    assert old_driver.found == "on the CPU only: CUDA 12.8 does not start on the GPU that the driver shows"
    assert doctor.torch_item([], torch_answer()).found == "on the CPU"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (
            "raise ImportError('libcudart.so.12: cannot open shared object file')",
            "ImportError: libcudart.so.12: cannot open shared object file",
        ),
        ("import os; os._exit(3)", "it ended with code 3"),
        ("", "it ended with code 0"),
        ("import time; time.sleep(60)", "no answer within 0.5 s"),
    ],
)
def test_a_torch_that_does_not_start(code: str, found: str) -> None:
    item = doctor.torch_item([], [sys.executable, "-c", code], seconds=0.5 if "sleep" in code else 30)
    assert (item.status, item.found, item.needed) == ("missing", found, True)


# The Hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[str]:
    """Answer HEAD with 200, or with the number in the path."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(int(self.path[1:] or 200))
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with serving(Answer) as address:
        yield address


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("path", "status", "found"),
    [
        ("", "ok", "127.0.0.1 answers"),
        ("/404", "ok", "127.0.0.1 answers"),
        ("/407", "limited", "127.0.0.1 answers with HTTP 407"),
        ("/503", "limited", "127.0.0.1 answers with HTTP 503"),
    ],
)
def test_a_hub_that_answers(server: str, path: str, status: str, found: str) -> None:
    item = doctor.hub_item(server + path, seconds=30)
    assert (item.status, item.found) == (status, found)


@pytest.mark.usefixtures("online")
def test_a_hub_that_refuses_or_keeps_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        address = f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        item = doctor.hub_item(seconds=0.2)
        assert (item.status, item.found) == ("limited", "127.0.0.1 cannot be reached: no answer within 0.2 s")
    item = doctor.hub_item(address, seconds=30)
    assert item.status == "limited"
    assert item.found.startswith("127.0.0.1 cannot be reached: ")
    assert "secret" not in str(item)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.usefixtures("online")
def test_a_hub_that_is_not_to_be_asked(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert doctor.hub_item().found == f"not asked: {variable} is set"


# Instruments


def test_pressure(tmp_path: Path) -> None:
    file = tmp_path / "cpu"
    assert doctor.pressure_item(file).found == f"{file} cannot be read: No such file or directory"
    file.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    assert doctor.pressure_item(file).status == "ok"


def test_energy_counters(tmp_path: Path) -> None:
    assert doctor.energy_item(tmp_path).status == "missing"
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("262143328850\n")
    assert doctor.energy_item(tmp_path).found == "1 counter can be read"
    (tmp_path / "intel-rapl:1").mkdir()
    (tmp_path / "intel-rapl:1" / "energy_uj").mkdir()  # nobody can read it, not even root
    item = doctor.energy_item(tmp_path)
    assert (item.status, item.found) == ("limited", "2 counters, no permission to read")
    assert item.advice
    assert item.advice.startswith(f"Run: sudo chmod a+r {tmp_path}/intel-rapl*/energy_uj")
