"""Hidden states of the kept rows alone, [N, D], in place of [B, T, D]: the same numbers, and no padded copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import align_kernels as ak

from .losses_table import ROWS, TARGETS, B, T, tensors

KEPT = TARGETS != -100
HEADS: dict[str, dict[str, Any]] = {
    "auto": {}, "eager": {"impl": "eager"}, "chunks": {"impl": "torch", "workspace": 61 * 8 * 12},
}  # fmt: skip


def leaves(compact: bool) -> tuple[Tensor, Tensor]:
    hidden, weight = (x.double() for x in tensors().values())
    return (hidden[KEPT] if compact else hidden).requires_grad_(), weight.requires_grad_()


def assert_same(call: Callable[..., Any], value: Callable[[Any], Tensor]) -> None:
    found = []
    for compact in (True, False):
        hidden, weight = leaves(compact)
        out = call(hidden, weight, TARGETS)
        gradients = torch.autograd.grad(value(out), [hidden, weight])
        found.append((out, gradients[0] if compact else gradients[0][KEPT], gradients[1]))
    (got, *gradients), (want, *oracle) = found
    torch.testing.assert_close(got, want)
    for one, other in zip(gradients, oracle):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ROWS)
def test_losses(name: str, head: str) -> None:
    assert_same(lambda h, w, t: ROWS[name][0](h, w, t, **HEADS[head]), lambda out: out.loss)


@pytest.mark.parametrize("head", HEADS)
def test_log_probs_with_a_temperature_of_each_row(head: str) -> None:
    temperature = torch.rand(B, T).double() + 0.5
    mixed = torch.rand(B, T).double()
    assert_same(
        lambda h, w, t: ak.linear_logprobs(h, w, t, temperature=temperature, **HEADS[head]),
        lambda out: (out.logp * mixed - out.entropy * mixed.sin()).sum(),
    )


def test_pairs_by_number() -> None:
    pairs = torch.tensor([[0, 0, 1, 5], [2, 7, 2, 3]])
    ref = torch.arange(B).double()
    assert_same(lambda h, w, t: ak.dpo_loss(h, w, t, ref, pairs=pairs), lambda out: out.loss)


def test_another_number_of_rows_is_refused() -> None:
    hidden, weight = leaves(compact=True)
    said = rf"hidden's leading shape \({len(hidden) - 1},\), got \({B}, {T}\), {len(hidden)} of them not ignored"
    with pytest.raises(ValueError, match=said):
        ak.linear_logprobs(hidden[1:], weight, TARGETS)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_one_long_sequence_among_short_ones_makes_no_padded_copy() -> None:
    """[16, 400] targets, 430 of them kept: nothing of 16 x 400 x D is made in forward or backward."""
    lengths, D, V = [400, *[2] * 15], 32, 20
    targets = torch.randint(0, V, (16, 400), generator=torch.Generator().manual_seed(0))
    targets[torch.arange(400) >= torch.tensor(lengths)[:, None]] = -100
    hidden, weight = torch.randn(sum(lengths), D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    with Largest() as seen:
        ak.dpo_loss(hidden, weight, targets, torch.zeros(16), impl="torch").loss.backward()
        ak.linear_logprobs(hidden, weight, targets, impl="torch").logp.sum().backward()
    assert seen.elements <= 2 * sum(lengths) * D < targets.numel() * D / 6
