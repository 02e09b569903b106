"""Versions of GPU libraries, read from files as torch's and NVIDIA's distributions have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlflow_llmbench.records.environment import GPU_RUNTIME
from mlflow_llmbench.system import torch_runtime

WHEEL = """from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip', 'rocm', 'xpu']
__version__ = '2.13.0+cu130'
debug = False
cuda: Optional[str] = '13.0'
git_version = 'cf30153c4c131c8164ee7798e5022d810682e2cb'
hip: Optional[str] = None
"""


def torch_folder(root: Path, text: str, *libraries: str) -> Path:
    """Write the folder of a torch package, with empty libraries and their usual links."""
    lib = root / "torch" / "lib"
    lib.mkdir(parents=True)
    (root / "torch" / "version.py").write_text(text)
    for name in libraries:
        (lib / name).touch()
        stem = name.partition(".so")[0]
        (lib / f"{stem}.so").symlink_to(name)
    return root / "torch"


def test_a_wheel_for_cuda_has_nvidias_distributions(tmp_path: Path) -> None:
    there = {"nvidia-cudnn-cu13": "9.20.0.48", "nvidia-nccl-cu13": "2.29.7", "nvidia-nccl-cu12": "2.21.5"}
    found = torch_runtime.versions(torch_folder(tmp_path, WHEEL), there.get, [])
    assert found == {"cuda_runtime": "13.0", "rocm": None, "cudnn": "9.20.0.48", "nccl": "2.29.7"}
    assert list(found) == list(GPU_RUNTIME)


def test_another_build_has_libraries_as_files(tmp_path: Path) -> None:
    text = "__version__ = '2.8.0a0'\ncuda = '12.9'\nhip = None\n"
    torch = torch_folder(tmp_path, text, "libcudnn.so.9.10.2")
    system = tmp_path / "system"
    system.mkdir()
    (system / "libnccl.so.2.27.3").touch()
    (system / "libnccl.so.2").symlink_to("libnccl.so.2.27.3")
    found = torch_runtime.versions(torch, lambda name: None, [tmp_path / "none", system])
    assert found == {"cuda_runtime": "12.9", "rocm": None, "cudnn": "9.10.2", "nccl": "2.27.3"}


def test_a_build_for_rocm_or_for_cpus_uses_no_cuda_library(tmp_path: Path) -> None:
    distributions = {"nvidia-cudnn-cu12": "9.1", "nvidia-nccl-cu12": "2.1"}
    rocm = torch_folder(tmp_path / "rocm", "cuda: Optional[str] = None\nhip: Optional[str] = '6.4.43482'\n")
    assert torch_runtime.versions(rocm, distributions.get)["rocm"] == "6.4.43482"
    cpu = torch_folder(tmp_path / "cpu", "__version__ = '2.13.0+cpu'\ncuda = None\nhip = None\n")
    for folder in (rocm, cpu):
        found = torch_runtime.versions(folder, distributions.get)
        assert (found["cuda_runtime"], found["cudnn"], found["nccl"]) == (None, None, None)


@pytest.mark.parametrize("text", ["cuda = (", "", "cuda = torch.version()"])
def test_an_unreadable_version_is_unknown(tmp_path: Path, text: str) -> None:
    assert set(torch_runtime.versions(torch_folder(tmp_path, text)).values()) == {None}
    assert set(torch_runtime.versions(tmp_path / "missing").values()) == {None}


def test_torch_here_says_the_same_of_itself() -> None:
    import torch

    found = torch_runtime.versions()
    assert (found["cuda_runtime"], found["rocm"]) == (torch.version.cuda, torch.version.hip)
