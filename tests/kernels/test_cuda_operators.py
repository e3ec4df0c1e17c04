"""The public operators on backend `cuda`, emulated on the CPU: log-probs, and losses with its coefficients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from align_kernels import LogitGradClamp, grpo_loss
from align_kernels.backends.cuda import losses
from align_kernels.schedules.request import profiled

from .oracle import Case, judge, run, truth
from .test_losses import BATCHES, V, batch
from .twins import dpo, grpo, kto, ppo, sft, verify

LOSSES: dict[str, tuple[Callable, str | None]] = {  # and the kernel that it takes where it is trained in one pass
    "sft": (sft, "token_loss"),
    "ppo": (ppo, "token_loss"),
    "ppo with entropy": (lambda case: ppo(case, 0.1), "token_loss"),
    "grpo": (grpo, "token_loss"),
    "grpo with KL": (lambda case: grpo(case, loss_type="grpo", beta=0.1, delta=1.5), "token_loss"),
    "grpo on policy": (lambda case: grpo(case, on_policy=True), "token_loss"),
    "gspo": (lambda case: grpo(case, level="sequence"), None),
    "dpo": (dpo, "unit_loss"),
    "ipo": (lambda case: dpo(case, loss_type="ipo", beta=0.3), "unit_loss"),
    "kto": (kto, "unit_loss"),
}
NAMES = ["pairs of very different length", "empty completions", "frozen head", "nothing trained", "lora",
         "every option", "clamp", "bfloat16", "all masked"]  # fmt: skip


@pytest.fixture
def taken(emulator, monkeypatch) -> Counter:
    """How often each fused kernel is called."""
    calls: Counter = Counter()

    def counted(name: str) -> Callable:
        kernel = getattr(losses, name)

        def call(*args, **options):
            calls[name] += 1
            return kernel(*args, **options)

        return call

    for name in ("token_loss", "unit_loss"):
        monkeypatch.setattr(losses, name, counted(name))
    return calls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss: str, name: str, taken: Counter):
    make, kernel = LOSSES[loss]
    case = BATCHES[name]()
    verify(case, make(case), dict(impl="cuda"))
    if name == "nothing trained" or (name in ("all masked", "bfloat16") and kernel == "token_loss"):
        kernel = None  # no gradient, no row, or a weight that a CPU widens tile by tile
    assert set(taken) == ({kernel} if kernel else set())


def test_small_chunks(taken: Counter):
    case = BATCHES["pairs of very different length"]()
    with profiled("cpu", max_rows=16, min_rows=4, tile_bytes=16 * 64 * 4):
        verify(case, grpo(case, beta=0.1), dict(impl="cuda"))
        assert taken["token_loss"] == -(-int(case.mask.sum()) // 16)
        verify(case, dpo(case), dict(impl="cuda"))
        assert taken["unit_loss"] > 1


@pytest.mark.parametrize("options", [{}, dict(prob_gate=(0.9, 1.0)), dict(workspace=4096)], ids=str)
def test_what_the_kernels_do_not_know_is_left_to_the_definition(options: dict, taken: Counter):
    """A gate, and logits that do not fit, take the loss's own derivative, or its rows made again."""
    case = BATCHES["even"]()
    g = torch.randn(len(case.targets))
    found = []
    for impl in ("cuda", "torch"):
        leaves = case.leaves()
        old = torch.full(case.targets.shape, -5.0)
        out = grpo_loss(leaves["hidden"], leaves["weight"], case.targets, old, g, impl=impl, **options)
        found.append((out.loss, *torch.autograd.grad(out.loss, (leaves["hidden"], leaves["weight"]))))
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert bool(taken["token_loss"]) == (not options)


def test_logprobs(emulator):
    g = torch.Generator().manual_seed(1)
    for options in ({}, dict(softcap=9.0, temperature=0.7), dict(grad_clamp=LogitGradClamp(0.05, 0.01))):
        case = Case(batch([9, 21, 0, 14], bias=True).tensors, batch([9, 21, 0, 14]).targets % V, **options)
        case.tensors["hidden"] = torch.randn(case.tensors["hidden"].shape, generator=g)
        up, down = torch.randn(case.targets.shape, generator=g), torch.randn(case.targets.shape, generator=g)
        judge(case, run(case, up, down, impl="cuda"), truth(case, up, down))
