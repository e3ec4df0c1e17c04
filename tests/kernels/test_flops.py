"""GEMM FLOPs of every schedule, counted by torch: kept rows alone, nothing multiplied twice that need not be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from align_kernels import LogitGradClamp, dpo_loss, explain, linear_logprobs, ppo_clip_loss, sft_loss
from align_kernels.schedules.request import profiled

B, T, V, D = 6, 40, 300, 24
TINY = 1 << 10
IMPLS = ("torch", "cpu")


class Problem:
    """Sequences whose prompt and padding are NaN in `hidden`: a row that is multiplied in vain shows."""

    def __init__(self, *train: str, dtype: torch.dtype = torch.float32, rank: int = 0) -> None:
        rng = torch.Generator().manual_seed(0)
        self.targets = torch.randint(0, V, (B, T), generator=rng)
        for row, (begin, end) in enumerate([(3, 40), (0, 9), (5, 5), (2, 30), (1, 2), (20, 33)]):
            self.targets[row, :begin] = self.targets[row, end:] = -100
        self.mask = self.targets != -100
        self.kept = int(self.mask.sum())
        made = dict(
            hidden=torch.randn(B, T, D, generator=rng).masked_fill(~self.mask[..., None], torch.nan),
            weight=torch.randn(V, D, generator=rng) * 0.3,
            bias=torch.randn(V, generator=rng),
            lora_A=torch.randn(rank, D, generator=rng) * 0.1,
            lora_B=torch.randn(V, rank, generator=rng),
        )
        leaves = {name: x.to(dtype).requires_grad_(name in train) for name, x in made.items()}
        self.leaves = leaves
        self.hidden, self.weight = leaves["hidden"], leaves["weight"]
        self.head: dict = dict(bias=leaves["bias"] if "bias" in train else None)
        if rank:
            self.head["lora"] = (leaves["lora_A"], leaves["lora_B"], 0.5)

    def finite(self) -> None:
        for name, x in self.leaves.items():
            assert x.grad is None or x.grad.isfinite().all(), f"gradient of {name}"


Loss = Callable[[Problem, dict], Tensor]


def sft(p: Problem, options: dict) -> Tensor:
    return sft_loss(p.hidden, p.weight, p.targets, **p.head, **options).loss


def dpo(p: Problem, options: dict) -> Tensor:
    return dpo_loss(p.hidden, p.weight, p.targets, torch.full((B,), -90.0), **p.head, **options).loss


def kto(p: Problem, options: dict) -> Tensor:
    """Written on the log-probs: its gradient arrives late."""
    logp = linear_logprobs(p.hidden, p.weight, p.targets, **p.head, **options).logp
    sign = torch.tensor([1.0, -1, 1, -1, 1, -1])
    return (1 - torch.sigmoid(sign * 0.1 * (logp.sum(1) + 90.0))).mean()


def ppo(p: Problem, options: dict) -> Tensor:
    out = linear_logprobs(p.hidden, p.weight, p.targets, **p.head, **options)
    ratio = (out.logp - out.logp.detach()).exp()
    advantages = torch.linspace(-2.0, 2.0, B)[:, None]
    return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[p.mask].mean()


def count(loss: Loss, p: Problem, options: dict) -> int:
    """GEMM FLOPs of forward and backward, in units of (kept rows) V D."""
    with FlopCounterMode(display=False) as counter:
        y = loss(p, options)
        if y.requires_grad:
            y.backward()
    p.finite()
    return counter.get_total_flops()


FUSED, LATE = {"sft": sft, "dpo": dpo}, {"kto": kto, "ppo": ppo}
BOTH, HIDDEN, WEIGHT = ("hidden", "weight"), ("hidden",), ("weight",)
CAP = {"softcap": 30.0}  # its slope is none of the plain logits' constants
TABLE = [  # schedule, trained tensors, options, FLOPs over (kept rows) V D
    *(("one pass", FUSED, train, {}, n) for train, n in ((BOTH, 6), (WEIGHT, 4))),
    *(("one pass", FUSED, train, CAP, n) for train, n in ((BOTH, 6), (HIDDEN, 4), (WEIGHT, 4))),
    *(("recompute", FUSED, train, {"workspace": TINY}, n) for train, n in ((BOTH, 8), (WEIGHT, 6))),
    *(("recompute", FUSED, train, CAP | {"workspace": TINY}, n) for train, n in ((BOTH, 8), (HIDDEN, 6), (WEIGHT, 6))),
    *(("forward", FUSED | LATE, (), {"workspace": workspace}, 2) for workspace in (None, TINY)),
    *(("keep", LATE, train, {}, n) for train, n in ((BOTH, 6), (WEIGHT, 4))),
    *(("recompute", LATE, train, {"workspace": TINY}, n) for train, n in ((BOTH, 8), (WEIGHT, 6))),
    ("recompute", LATE, HIDDEN, CAP | {"workspace": TINY}, 6),
    ("frozen", LATE, HIDDEN, CAP, 4),
    *(("online", FUSED | LATE, HIDDEN, {"workspace": workspace}, 4) for workspace in (None, TINY)),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("schedule", "name", "train", "options", "flops"),
    [(schedule, name, *rest) for schedule, losses, *rest in TABLE for name in losses],
)
def test_table(schedule: str, name: str, train: tuple, options: dict, flops: int, impl: str):
    p, options = Problem(*train), options | {"impl": impl}
    loss = name if name in FUSED else None
    plan = explain(p.hidden, p.weight, p.targets, loss=loss, **options)
    assert (plan.schedule, plan.rows) == (schedule, p.kept)
    counted = count((FUSED | LATE)[name], p, options)
    assert counted == plan.gemm_flops == flops * p.kept * V * D


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("train", [BOTH, HIDDEN])
@pytest.mark.parametrize("name", [*FUSED, *LATE])
def test_small_chunks_cost_the_same(name: str, train: tuple, impl: str):
    p = Problem(*train)
    with profiled("cpu", max_rows=17, min_rows=4, tile_bytes=17 * 64 * 4):
        plan = explain(p.hidden, p.weight, p.targets, loss=name if name in FUSED else None, impl=impl)
        counted = count((FUSED | LATE)[name], p, dict(impl=impl))
    assert counted == plan.gemm_flops == (6 if train == BOTH else 4) * p.kept * V * D


@pytest.mark.parametrize("train", [("bias",), ("hidden", "bias"), ("hidden", "weight", "bias")])
@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("name", [*FUSED, *LATE])
def test_a_bias_costs_no_gemm(name: str, workspace: int | None, train: tuple):
    p, options = Problem(*train), dict(workspace=workspace)
    plan = explain(p.hidden, p.weight, p.targets, loss=name if name in FUSED else None, **p.head, **options)
    once = 2 * (1 + len(train) - 1)
    assert count((FUSED | LATE)[name], p, options) == (once + 2 * (workspace == TINY)) * p.kept * V * D
    assert plan.gemm_flops == (once + 2 * (workspace == TINY)) * p.kept * V * D


@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("name", [*FUSED, *LATE])
def test_lora_never_pays_for_its_frozen_base(name: str, workspace: int | None):
    """The head's own GEMMs, and beside them no more than six of rank R each way."""
    R = 3
    p, options = Problem("hidden", "lora_A", "lora_B", rank=R), dict(workspace=workspace)
    plan = explain(p.hidden, p.weight, p.targets, loss=name if name in FUSED else None, **p.head, **options)
    head = (4 if workspace is None else 6) * p.kept * V * D
    assert plan.gemm_flops == head
    assert head < count((FUSED | LATE)[name], p, options) <= head + 6 * 2 * p.kept * R * (V + D)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("workspace", "train", "each"), [(None, BOTH, 4), (TINY, BOTH, 6), (TINY, WEIGHT, 4)])
def test_rows_without_coefficient_are_dropped_from_the_backward(
    workspace: int | None, train: tuple, each: int, impl: str
):
    """PPO's clipped tokens and groups without advantage, in a loss on log-probs and in the fused one."""
    p, options = Problem(*train), dict(impl=impl, workspace=workspace)
    with torch.no_grad():
        logp = linear_logprobs(p.hidden, p.weight, p.targets).logp
    advantages = torch.tensor([1.0, 0, 1, -1, 1, 0])[:, None].expand(B, T)
    old = logp - torch.where(torch.arange(T) % 3 == 0, 0.5, 0.0)  # a third of the ratios lies above 1.2
    clipped = (logp - old > 0.2) & (advantages > 0)
    live = int((p.mask & ~clipped & (advantages != 0)).sum())
    assert 0 < live < 0.7 * p.kept

    def by_hand(p: Problem, options: dict) -> Tensor:
        ratio = (linear_logprobs(p.hidden, p.weight, p.targets, **options).logp - old).exp()
        return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[p.mask].mean()

    def fused(p: Problem, options: dict) -> Tensor:
        return ppo_clip_loss(p.hidden, p.weight, p.targets, old, advantages, **options).loss

    for loss in (by_hand, fused):
        assert count(loss, p, options) == (2 * p.kept + each * live) * V * D


@pytest.mark.parametrize("impl", IMPLS)
def test_pairs_that_hinge_has_settled_are_dropped(impl: str):
    p = Problem(*BOTH)
    with torch.no_grad():
        logps = linear_logprobs(p.hidden, p.weight, p.targets).logp.sum(1)
    ref = logps + torch.tensor([-50.0, 0.0, -50.0, 50.0, 0.0, 50.0])  # the first and third pair are settled
    counted = count(lambda p, _: dpo_loss(p.hidden, p.weight, p.targets, ref, loss_type="hinge", impl=impl).loss, p, {})
    live = int(p.mask[[1, 4]].sum())
    assert counted == (2 * p.kept + 4 * live) * V * D


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("workspace", "flops"), [(None, 4), (TINY, 6)])
def test_a_clamp_in_residual_units_costs_nothing(workspace: int | None, flops: int, impl: str):
    p = Problem("hidden")
    options = dict(impl=impl, workspace=workspace, grad_clamp=LogitGradClamp(0.1))
    assert count(kto, p, options) == flops * p.kept * V * D


@pytest.mark.parametrize("impl", IMPLS)
def test_an_entropy_gradient_of_a_frozen_head_is_made_again(impl: str):
    """dX was kept for the log-probs alone; the planner cannot know that an entropy will be used."""
    p = Problem("hidden")

    def loss(p: Problem, options: dict) -> Tensor:
        out = linear_logprobs(p.hidden, p.weight, p.targets, **options)
        return (out.logp - out.entropy).sum()

    assert count(loss, p, dict(impl=impl)) == 8 * p.kept * V * D


@pytest.mark.parametrize("name", [*FUSED, *LATE])
def test_no_kept_row_costs_nothing(name: str):
    p = Problem(*BOTH)
    p.targets.fill_(-100)
    p.mask.zero_()
    assert count((FUSED | LATE)[name], p, {}) == 0
    assert all(x.grad is None or not x.grad.any() for x in p.leaves.values())
