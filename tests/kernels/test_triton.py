"""The Triton backend without a GPU: what is said where it cannot run, and what is planned for it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from align_kernels import backends_report, gemm, linear_logprobs
from align_kernels.backends import triton
from align_kernels.schedules.plan import plan
from align_kernels.schedules.request import Request


def test_a_cpu_is_refused_with_the_reason():
    hidden, weight = torch.zeros(2, 4), torch.zeros(7, 4)
    with pytest.raises(ValueError, match=r'impl="triton" cannot serve torch.float32 on cpu: it runs on a GPU'):
        linear_logprobs(hidden, weight, torch.zeros(2, dtype=torch.int64), impl="triton")
    assert {status.available for status in backends_report() if (status.name, status.device) == ("triton", "cpu")} == {
        False
    }


def test_a_gpu_without_triton_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    triton.arguments._missing.cache_clear()
    reason = triton.why_not(torch.device("cuda"), torch.float32)
    triton.arguments._missing.cache_clear()
    assert reason is not None and "Triton is not installed" in reason and "pip install triton" in reason


def test_dtypes_of_a_gpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert triton.why_not(torch.device("cuda"), dtype) is None
    assert "float64" in str(triton.why_not(torch.device("cuda"), torch.float64))


def test_float32_logits_of_16_bit_heads_on_a_gpu():
    """Shapes and dtypes alone: torch's GEMM with a float32 output is asked for as it wants to be."""
    with FakeTensorMode():
        a, b = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((4, 8), (8, 16)))
        out = torch.empty(4, 16, device="cuda")
        assert gemm.widens(out.device) is (torch.version.hip is None)
        gemm.product(out, a, b, add=False)
        assert torch.ops.aten.mm.dtype(a, b, torch.float32).dtype == torch.float32
    assert not gemm.widens(torch.device("cpu"))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("needs_head", [False, True])
@pytest.mark.parametrize("rows", [100, 3000, 100_000])
def test_a_gradient_beside_its_logits_fits_in_the_workspace(rows: int, needs_head: bool, late: bool):
    asked = Request(
        rows=rows, vocab=151936, width=4096, itemsize=4, gradient_itemsize=2, device="cuda", backend="triton",
        needs_input=True, needs_head=needs_head, needs_weight=needs_head, late=late,
    )  # fmt: skip
    made = plan(asked)
    assert made.workspace <= 2048 << 20
    assert made.tile_cols >= min(8192, made.vocab)
