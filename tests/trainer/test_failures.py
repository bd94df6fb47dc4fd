"""What counts as which failure."""

from __future__ import annotations

import pytest
import torch

from elastic_batch.errors import MisusedTrainer
from elastic_batch.trainer.failures import Severity, is_out_of_memory, judge


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_failed_allocation_is_told_whoever_reports_it(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert judge(error, 4).severity is Severity.NARROWER
    assert judge(error, 1).severity is Severity.ONCE


def test_other_errors_are_not_out_of_memory() -> None:
    assert judge(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"), 4).severity is Severity.ONCE
    assert judge(MisusedTrainer("no step"), 4).severity is Severity.FINAL
