"""Every way from hidden states to log-probs and losses that benches compare: align_kernels and its peers.

Peers are imported when they run: one that is not there, or cannot do what is asked, says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from questions import BETA, CLIP, IGNORE, LOSSES, Batch, Question
from torch import Tensor

from align_kernels import (
    LogitGradClamp,
    dpo_loss,
    grpo_loss,
    kto_loss,
    linear_logprobs,
    ppo_clip_loss,
    sft_loss,
)

OURS, TREES, GEMMS = "align_kernels", "align_kernels, trees", "GEMMs alone"


class CannotRun(Exception):
    """A method does not do what a question asks; the message says why."""


@dataclass(frozen=True)
class Method:
    """A way to answer.

    Args:
        logps: log-probs (S, T), 0 where there is no target; None: it gives none.
        losses: losses of its own by name; the others of questions.LOSSES are taken of `logps`.
        clamps: it knows `Batch.clamp`.
        compiled: torch.compile makes its code, on a CPU at least.
    """

    logps: Callable[[Batch], Tensor] | None = None
    losses: Mapping[str, Callable[[Batch], Tensor]] = field(default_factory=dict)
    clamps: bool = False
    compiled: bool = False


def value(method: Method, question: Question, b: Batch) -> Tensor:
    """Log-probs or a loss, to be differentiated.

    Raises:
        CannotRun: the method has no such thing.
    """
    what = question.what.removesuffix(" step")
    if b.clamp is not None and not method.clamps:
        raise CannotRun("it has no clamp")
    if what in method.losses:
        return method.losses[what](b)
    if method.logps is None:
        raise CannotRun(f"it has no {what if what in LOSSES else 'log-prob of a token'}")
    return LOSSES[what](method.logps(b), b) if what in LOSSES else method.logps(b)


def answer(method: Method, question: Question, b: Batch) -> Tensor:
    """The same; what gradients it has are left in the leaves of `b`."""
    with torch.set_grad_enabled(question.what != "forward"):
        out = value(method, question, b)
    if question.what == "gradient":
        out.backward(b.g.to(out.dtype))
    elif question.what != "forward":
        out.backward()
    return out.detach()


def products(x: Tensor, w: Tensor, count: int) -> None:
    """The first `count` of those that log-probs and their gradients need: logits, dX, dW."""
    z = torch.mm(x, w.T)
    if count > 1:
        torch.mm(z, w)
    if count > 2:
        torch.mm(z.T, x)


def gemms(question: Question, b: Batch) -> None:
    """The matrix products that the answer needs, and nothing else."""
    products(b.hidden.detach()[kept(b)], b.weight.detach(), question.products)


# -- shapes -------------------------------------------------------------------------------------------------------
def kept(b: Batch) -> Tensor:
    return b.targets != IGNORE


def labels(b: Batch) -> Tensor:
    """Targets with something harmless where there is none."""
    return b.targets.clamp(min=0)


def spread(values: Tensor, b: Batch) -> Tensor:
    """(S, T), 0 where there is no target, from one number a target."""
    return values.new_zeros(b.targets.shape).masked_scatter(kept(b), values)


# -- align_kernels ------------------------------------------------------------------------------------------------
def ours(impl: str = "auto", **more: Any) -> Method:
    def head(b: Batch) -> dict[str, Any]:
        return dict(impl=impl, grad_clamp=None if b.clamp is None else LogitGradClamp(b.clamp), **more)

    def of(b: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return b.hidden, b.weight, b.targets

    return Method(
        lambda b: linear_logprobs(*of(b), **head(b)).logp,
        {
            "sft": lambda b: sft_loss(*of(b), **head(b)).loss,
            "dpo": lambda b: dpo_loss(*of(b), b.ref, beta=BETA, **head(b)).loss,
            "kto": lambda b: kto_loss(*of(b), b.ref, b.desirable, b.kl, beta=BETA, **head(b)).loss,
            "ppo-clip": lambda b: (
                ppo_clip_loss(*of(b), b.old, b.advantages[:, None].expand_as(b.old), cliprange=CLIP, **head(b)).loss
            ),
            "grpo": lambda b: grpo_loss(*of(b), b.old, b.advantages, epsilon=CLIP, **head(b)).loss,
        },
        clamps=True,
    )


# -- eager, and compiled ------------------------------------------------------------------------------------------
class Clamped(torch.autograd.Function):
    """log p of labels from whole logits; the residual of each logit is clipped in the backward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, limit: float) -> Tensor:  # z (..., V) float32, y (...)
        logp = z.log_softmax(-1)
        ctx.save_for_backward(logp, y)
        ctx.limit = limit
        return logp.gather(-1, y[..., None])[..., 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logp, y = ctx.saved_tensors
        r = logp.exp().neg_().scatter_add_(-1, y[..., None], torch.ones_like(logp[..., :1]))
        return r.clamp_(-ctx.limit, ctx.limit).mul_(grads[0][..., None]), None, None


def eager(b: Batch) -> Tensor:
    z = F.linear(b.hidden, b.weight)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if b.clamp is not None:
        return Clamped.apply(z, labels(b), b.clamp) * kept(b)
    return z.log_softmax(-1).gather(-1, labels(b)[..., None])[..., 0] * kept(b)


def gathered(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return F.linear(x, weight).float().log_softmax(-1).gather(-1, y[:, None])[:, 0]


@cache
def compiled_logp() -> Callable[..., Tensor]:
    return torch.compile(gathered)


def compiled(b: Batch) -> Tensor:
    """Rows compacted by hand."""
    return spread(compiled_logp()(b.hidden[kept(b)], b.weight, b.targets[kept(b)]), b)


# -- peers --------------------------------------------------------------------------------------------------------
def trl(b: Batch) -> Tensor:
    """As its trainers call it: all rows, with what they log."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    x, outputs = b.hidden.flatten(0, 1), ("entropy", "mean_logits", "is_top1")
    out = ChunkedLogProbFunction.apply(x, b.weight, None, labels(b).flatten(), 1.0, 32768, None, 1.0, outputs)
    return out[0].view(b.targets.shape) * kept(b)


def liger_sft(b: Batch) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
    return loss(b.weight, b.hidden.flatten(0, 1), b.targets.flatten())


def liger_dpo(b: Batch) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    return LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)(b.weight, b.hidden, b.targets)[0]


def liger_kto(b: Batch) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    loss = LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=False)
    return loss(b.hidden, b.weight, b.targets, preference_labels=b.desirable, kl=b.kl)[0]


def liger_grpo(b: Batch) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP)
    mask = kept(b).to(b.hidden.dtype)
    return loss(b.hidden, b.weight, labels(b), mask, b.advantages, old_per_token_logps=b.old)[0]


def liger_cute(b: Batch) -> Tensor:
    from liger_kernel.ops.cutedsl.ops import LigerFusedScaledCrossEntropySM90Function

    nll = LigerFusedScaledCrossEntropySM90Function.apply(b.hidden.flatten(0, 1), b.weight, labels(b).flatten())
    return -nll.view(b.targets.shape) * kept(b)


def cce(b: Batch) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if b.hidden.is_cuda else "torch_compile"
    nll = linear_cross_entropy(b.hidden, b.weight, b.targets, reduction="none", impl=impl)
    return -nll.view(b.targets.shape)


def quack(b: Batch) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(b.hidden.flatten(0, 1), b.weight, b.targets.flatten())


def torch_own(b: Batch, reduction: str) -> Tensor:
    """In chunks where its documentation advises them, from as many rows as the width on."""
    x, y = b.hidden[kept(b)], b.targets[kept(b)]
    options = torch.nn.LinearCrossEntropyOptions() if x.shape[0] >= x.shape[1] else None
    return F.linear_cross_entropy(x, b.weight, y, reduction=reduction, options=options)


@cache
def verl_functions() -> ModuleType:
    """verl's file of fused functions alone: the package around it asks for ray, which they do not."""
    found = importlib.util.find_spec("verl")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'verl'")
    path = Path(found.submodule_search_locations[0]) / "utils/experimental/torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verl(b: Batch) -> Tensor:
    logps, _ = verl_functions().FusedLinearForPPO()(b.hidden, b.weight, labels(b))
    return logps * kept(b)


METHODS: dict[str, Method] = {
    OURS: ours(),
    "eager": Method(eager, clamps=True),
    "torch.compile": Method(compiled, compiled=True),
    "torch linear_cross_entropy": Method(
        lambda b: spread(-torch_own(b, "none"), b), {"sft": lambda b: torch_own(b, "mean")}
    ),
    "TRL": Method(trl),
    "Liger": Method(None, {"sft": liger_sft, "dpo": liger_dpo, "kto": liger_kto, "grpo": liger_grpo}, compiled=True),
    "Cut Cross-Entropy": Method(cce, compiled=True),
    "verl": Method(verl),
    "QuACK": Method(None, {"sft": quack}),
}
