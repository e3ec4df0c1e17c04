"""Sums whose rows are written when they are first reached, in the strict interpreter."""

from __future__ import annotations

import pytest
import torch

from align_kernels.backends.triton import row_sums

from ..kernels.test_row_sums import ORDERS, verify


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_columns_in_any_order(order: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    verify(order, dtype, "triton", monkeypatch)


@pytest.mark.parametrize("D", [1, 1030])
def test_rows_that_are_not_reached_are_not_read(D: int):
    sums, values = torch.full((6, D), torch.nan), torch.randn(3, D, generator=torch.Generator().manual_seed(D))
    reached, rows = torch.zeros(6, dtype=torch.bool), torch.tensor([4, 0, 3])
    for times in (1, 2):
        row_sums.add(sums, reached, rows, values)
        assert torch.equal(sums[rows], times * values) and reached.tolist() == [True, False, False, True, True, False]
    for out in (torch.empty(6, D, dtype=torch.float16), sums):
        row_sums.finish(sums, reached, out)
        assert torch.equal(out[rows], (2 * values).to(out.dtype)) and not out[~reached].any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(sums=torch.zeros(6, 4).T), "sums must be"),
        (dict(reached=torch.zeros(6, dtype=torch.uint8)), "reached .*uint8"),
        (dict(rows=torch.zeros(3, dtype=torch.int32)), "rows .*int32"),
        (dict(values=torch.zeros(2, 4)), r"values .*got .*\(2, 4\)"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict, message: str):
    right: dict = dict(sums=torch.zeros(6, 4), reached=torch.zeros(6, dtype=torch.bool))
    right |= dict(rows=torch.zeros(3, dtype=torch.int64), values=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        row_sums.add(**(right | wrong))
