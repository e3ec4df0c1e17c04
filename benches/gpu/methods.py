"""Cross-entropy from hidden states in every way that is compared: the library's backends, eager torch and peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels import linear_logprobs, sft_loss


class Batch(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    softcap: float | None


Method = Callable[[Batch], Tensor]  # the mean cross-entropy, or where no gradient is needed any tensor of log-probs


def ours(impl: str) -> Method:
    def run(b: Batch) -> Tensor:
        if not torch.is_grad_enabled():
            return -linear_logprobs(b.hidden, b.weight, b.targets, softcap=b.softcap, impl=impl).logp
        return sft_loss(b.hidden, b.weight, b.targets, softcap=b.softcap, impl=impl).loss

    return run


def eager(b: Batch) -> Tensor:
    z = F.linear(b.hidden, b.weight).float()
    z = z if b.softcap is None else b.softcap * torch.tanh(z / b.softcap)
    return F.cross_entropy(z, b.targets)


def trl(b: Batch) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    out = ChunkedLogProbFunction.apply(b.hidden, b.weight, None, b.targets, 1.0, 32768, b.softcap, 1.0, ("entropy",))
    return -out[0].mean()


def liger(b: Batch) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(softcap=b.softcap, accum_dtype=torch.float32)(b.weight, b.hidden, b.targets)


def cce(b: Batch) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(b.hidden, b.weight, b.targets, softcap=b.softcap)


def torch_own(b: Batch) -> Tensor:
    if b.softcap is not None:
        raise ValueError("no softcap")
    return F.linear_cross_entropy(b.hidden, b.weight, b.targets)


def quack(b: Batch) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if b.softcap is not None:
        raise ValueError("no softcap")
    return chunked_linear_cross_entropy(b.hidden, b.weight, b.targets)


def methods(dry: bool) -> dict[str, Method]:
    """By name; one that is not installed, or cannot serve, fails with its reason when it is run."""
    own = ("torch", "cpu") if dry else ("triton", "cuda", "torch")
    return {
        **{f"align_kernels, {impl}": ours(impl) for impl in own},
        "eager": eager,
        "TRL": trl,
        **({} if dry else {"Liger": liger, "Cut Cross-Entropy": cce}),  # Triton's kernels, not for a CPU
        "torch.nn.functional.linear_cross_entropy": torch_own,
        "QuACK": quack,
    }
