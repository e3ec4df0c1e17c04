"""What the library asks of torch beside its operations: tags, FLOP formulas, defaults that a compiler reads, memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils import flop_counter

from align_kernels import gemm, ops
from align_kernels.head import Settings
from align_kernels.losses import registry
from align_kernels.schedules.tiles import narrowed


@pytest.mark.parametrize("name", ["mm", "addmm"])
def test_products_of_two_dtypes_are_counted(name: str):
    """On a GPU 16-bit matrices are multiplied into float32: the formulas get what FlopCounterMode hands them there."""
    a, b = (torch.zeros(*shape, dtype=torch.bfloat16, device="meta") for shape in ((7, 5), (5, 3)))
    acc = torch.zeros(7, 3, device="meta")
    formula = flop_counter.flop_registry[getattr(torch.ops.aten, name)]
    given = (acc, a, b) if name == "addmm" else (a, b)
    assert formula(*given, torch.float32, out=acc, out_val=acc) == 2 * 7 * 5 * 3


def test_products_of_one_dtype_are_counted_as_ever():
    with flop_counter.FlopCounterMode(display=False) as counter:
        torch.addmm(torch.zeros(3), torch.zeros(7, 5), torch.zeros(5, 3))
        torch.nn.functional.linear(torch.zeros(2, 7, 5), torch.zeros(3, 5), torch.zeros(3))
    assert counter.get_total_flops() == 2 * 7 * 5 * 3 * 3


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch has no such tag")
def test_the_operators_stay_out_of_cuda_graphs():
    for op in (ops.logprobs_op, ops.logprobs_backward_op, ops.loss_op):
        assert torch.Tag.cudagraph_unsafe in op._opoverload.tags


def test_no_default_is_an_object_that_a_compiler_cannot_make():
    """torch.compile of torch 2.11 takes numbers, words and None as the defaults of a dataclass."""
    for field in dataclasses.fields(Settings):
        default = None if field.default is dataclasses.MISSING else field.default
        assert default is None or isinstance(default, int | float | str), field.name


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_narrow_gradient_keeps_twice_its_memory_on_a_cpu_alone(device: str):
    """There it lies in the memory of its sum; elsewhere that would stay allocated until the optimiser's step."""
    sums = torch.zeros(64, 100, device=device)
    grad = narrowed(sums, torch.bfloat16)
    assert grad.dtype == torch.bfloat16 and grad.shape == sums.shape
    assert grad.untyped_storage().nbytes() == grad.nbytes * (2 if device == "cpu" else 1)


def test_a_taken_name_of_a_loss_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))

    def dpo(logps: Tensor) -> tuple[Tensor, dict]:
        return -logps, {}

    with pytest.raises(
        ValueError, match=r"the loss name 'dpo' is taken by align_kernels\.losses\.dpo\.dpo: give .*dpo a"
    ):
        registry.register_loss("pair")(dpo)
    assert registry.LOSSES["dpo"].fn is not dpo

    def mine(logps: Tensor) -> tuple[Tensor, dict]:
        return -logps, {}

    registry.register_loss("token")(mine)
    registry.register_loss("sequence")(mine)  # the same again
    assert registry.LOSSES["mine"].unit == "sequence"


def test_logits_of_two_dtypes_are_wide():
    t = torch.zeros(2, 4, dtype=torch.bfloat16)
    assert gemm.logits_dtype(t.dtype, t) == torch.float32
