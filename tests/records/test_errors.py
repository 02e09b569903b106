"""Errors of libraries, as ours."""

from __future__ import annotations

import pytest

from mlflow_llmbench.records.errors import MeasurementError, OutOfMemory, foreign_errors


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB.",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
    ],
)
def test_memory_that_ran_out_has_many_names(text: str) -> None:
    with pytest.raises(OutOfMemory, match="^RuntimeError while loading: "), foreign_errors("loading"):
        raise RuntimeError(text)


def test_other_errors_of_a_gpu_are_none_of_memory() -> None:
    with pytest.raises(MeasurementError) as caught, foreign_errors("generating"):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`")
    assert not isinstance(caught.value, OutOfMemory)
