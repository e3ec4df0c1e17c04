"""Pairs by number: each sequence meets the head once, and the loss is that of a batch in which it is repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import align_kernels as ak
from align_kernels.fused import registered as fused_registered
from align_kernels.losses import registry
from align_kernels.schedules.request import profiled
from align_kernels.units import tied

B, T, V, D = 8, 6, 31, 8
LENGTHS = (6, 3, 2, 5, 4, 1, 6, 3)
PAIRS = torch.tensor([[0, 0, 0, 1, 1, 1, 5], [2, 3, 4, 2, 3, 4, 6]])  # 2 x 3 of one prompt, a pair, and 7 in none
TARGETS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
TARGETS[torch.arange(T) >= torch.tensor(LENGTHS)[:, None]] = -100
FLOPS = (2 * sum(LENGTHS) + 4 * sum(LENGTHS[:7])) * V * D  # what is in no pair has no gradient
REF = -10 - torch.arange(B).double().sin()
Call = Callable[..., ak.LossOutput]
BY_TOKEN = ("entropy", "mean_token_accuracy")  # each token counts once


def squared(logps: Tensor, *, ref_logps: Tensor, lengths: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    chosen, rejected = ((logps - ref_logps) / lengths).chunk(2)
    return (chosen - rejected - 1) ** 2 + chosen, {"gap": (chosen - rejected).detach()}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))
    ak.register_loss("pair", side={"ref_logps": "sequence"}, metrics=("gap",), needs=("lengths",))(squared)
    monkeypatch.setattr(fused_registered, "LOSSES", registry.LOSSES)


CALLS: dict[str, Call] = {
    "dpo": lambda h, w, t, ref, **more: ak.dpo_loss(h, w, t, ref, **more),
    "mixture": lambda h, w, t, ref, **more: ak.dpo_loss(h, w, t, ref, loss_type=["ipo", "sft", "apo_down"], **more),
    "wpo": lambda h, w, t, ref, **more: ak.dpo_loss(h, w, t, ref, use_weighting=True, beta=9.0, **more),
    "aot": lambda h, w, t, ref, **more: ak.dpo_loss(h, w, t, ref, loss_type="aot", **more),
    "gated": lambda h, w, t, ref, **more: ak.dpo_loss(h, w, t, ref, prob_gate=0.03, **more),
    "cpo": lambda h, w, t, ref, **more: ak.cpo_loss(h, w, t, **more),
    "simpo": lambda h, w, t, ref, **more: ak.simpo_loss(h, w, t, **more),
    "orpo": lambda h, w, t, ref, **more: ak.orpo_loss(h, w, t, **more),
    "slic": lambda h, w, t, ref, **more: ak.slic_loss(h, w, t, **more),
    "squared": lambda h, w, t, ref, **more: ak.fused_loss("squared", h, w, t, {"ref_logps": ref}, **more),
}


def leaves() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((B, T, D), (V, D))
    hidden, weight = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("head", [{}, {"impl": "eager"}, {"impl": "torch", "workspace": V * 8 * 9}], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_loss_is_that_of_repeated_sequences(name: str, head: dict[str, Any]) -> None:
    hidden, weight = leaves()
    order = PAIRS.flatten()
    named = CALLS[name](hidden, weight, TARGETS, REF, pairs=PAIRS, **head)
    halves = CALLS[name](hidden[order], weight, TARGETS[order], REF[order], **head)
    assert named.loss.item() == pytest.approx(halves.loss.item(), rel=1e-12)
    for got, want in zip(*(torch.autograd.grad(out.loss, [hidden, weight]) for out in (named, halves))):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12 * float(want.abs().max()))
        assert float(want.abs().max()) > 1e-6
    torch.testing.assert_close(named.logps[order], halves.logps)
    assert named.metrics.keys() == halves.metrics.keys()
    for key in named.metrics.keys() - set(BY_TOKEN):
        torch.testing.assert_close(named.metrics[key], halves.metrics[key])
        assert int(named.counts[key]) == int(halves.counts[key]), key
    assert int(named.counts["entropy"]) == sum(LENGTHS)


def test_every_row_meets_the_head_once() -> None:
    hidden, weight = leaves()
    with FlopCounterMode(display=False) as counter:
        ak.dpo_loss(hidden, weight, TARGETS, REF, pairs=PAIRS, impl="torch").loss.backward()
    assert counter.get_total_flops() == FLOPS


def test_groups_of_pairs_are_closed_chunk_by_chunk() -> None:
    """A workspace for the tree of five completions, not for all rows: the one pass remains."""
    assert tied(PAIRS, B).tolist() == [0, 0, 0, 0, 0, 1, 1, 2]
    assert tied(torch.tensor([[0, 2, 4], [1, 1, 3]]), 6).tolist() == [0, 0, 0, 1, 1, 2]
    hidden, weight = leaves()
    with FlopCounterMode(display=False) as counter, profiled("cpu", min_rows=8):
        out = ak.dpo_loss(hidden, weight, TARGETS, REF, pairs=PAIRS, impl="torch", workspace=V * 8 * 22)
        out.loss.backward()
    assert sum(LENGTHS[:5]) <= 22 < sum(LENGTHS) and counter.get_total_flops() == FLOPS


def test_what_cannot_be_paired_is_refused() -> None:
    hidden, weight = leaves()
    for wrong, said in (
        (PAIRS.T, r"\[2, P\], .* got torch.int64 of shape \(7, 2\)"),
        (PAIRS.int(), r"got torch.int32"),
        (PAIRS + 2, r"must lie in \[0, 8\)"),
        (PAIRS - 1, r"must lie in \[0, 8\)"),
    ):
        with pytest.raises(ValueError, match=said):
            ak.dpo_loss(hidden, weight, TARGETS, REF, pairs=wrong)
    with pytest.raises(ValueError, match="ld_alpha weighs a completion's tokens by the one other of its pair"):
        ak.dpo_loss(hidden, weight, TARGETS, REF[:, None].expand(B, T), ld_alpha=0.5, pairs=PAIRS)
    with pytest.raises(ValueError, match="nll_targets are of the chosen half"):
        ak.orpo_loss(hidden, weight, TARGETS, nll_targets=TARGETS[:4], pairs=PAIRS)
    with pytest.raises(ValueError, match="'sft' takes no pairs: it is a loss per token"):
        ak.fused_loss("sft", hidden, weight, TARGETS, pairs=PAIRS)
    with pytest.raises(ValueError, match="the side name 'pairs' is taken"):
        ak.register_loss("pair", side={"pairs": "batch"})


def test_no_pairs_give_no_loss() -> None:
    hidden, weight = leaves()
    out = ak.dpo_loss(hidden, weight, TARGETS, REF, pairs=PAIRS[:, :0])
    out.loss.backward()
    assert out.loss.item() == 0 and weight.grad is not None and not weight.grad.any() and out.logps.all()
