"""A CPU that treats heads as a GPU does: it takes a GPU's plans, GEMMs read 16 bits and write float32, logits pass in
float32 and what waits for a gradient does so in 16 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from align_kernels import gemm
from align_kernels.backends.cpu import products
from align_kernels.schedules import plan, tiles
from align_kernels.schedules.request import row_step

from .oracle import Case, judge, run, truth
from .test_logprobs import upstream


def product(acc: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """What cuBLAS gives with a float32 output: every product exact, the sum in float32."""
    a, b = a.to(acc.dtype), b.to(acc.dtype)
    torch.addmm(acc, a, b, out=acc) if add else torch.mm(a, b, out=acc)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    dtype_of = lambda hidden, weight, *_: torch.promote_types(hidden, weight.dtype)  # noqa: E731
    monkeypatch.setattr(tiles, "gemm_dtype", dtype_of)
    monkeypatch.setattr(tiles, "logits_dtype", lambda *dtypes: torch.promote_types(dtype_of(*dtypes), torch.float32))
    monkeypatch.setattr(gemm, "product", product)
    monkeypatch.setattr(products, "ADVISED", set())  # the CPU's own products keep a LoRA in float32
    monkeypatch.setattr(tiles, "row_step", lambda device: row_step("cuda"))
    asked = plan.request_of
    of_a_gpu = lambda *args: dataclasses.replace(asked(*args), device="cuda", may_alias=False)  # noqa: E731
    monkeypatch.setattr(plan, "request_of", of_a_gpu)
    yield


def verify_narrow(case: Case, impl: str, which: str = "logp", **options) -> None:
    """Fields and gradients against float64, judged by what eager torch errs in the same dtypes."""
    g, h = upstream(case, which)
    judge(case, run(case, g, h, impl=impl, **options), truth(case, g, h), truth(case, g, h, None))
