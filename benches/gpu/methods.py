"""Cross-entropy from hidden states in every way that is compared: the library's backends, eager torch and peers.

Peers are imported when they run: one that is not there fails with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels import linear_logprobs, sft_loss
from align_kernels.backends import triton


class Batch(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    g: Tensor  # (N,) float32: dL/d(cross-entropy) of each token, where it arrives late


class Method(NamedTuple):
    tokens: Callable[[Batch], Tensor] | None  # (N,) cross-entropies
    mean: Callable[[Batch], Tensor] | None = None  # their mean; None: of `tokens`


def ours(impl: str) -> Method:
    return Method(
        lambda b: -linear_logprobs(b.hidden, b.weight, b.targets, impl=impl).logp,
        lambda b: sft_loss(b.hidden, b.weight, b.targets, impl=impl).loss,
    )


@contextmanager
def through_tiles() -> Iterator[None]:
    """The Triton backend without its forward that writes no logits."""
    before = triton.on_chip.why_not
    triton.on_chip.why_not = lambda hidden, weight: "tiles are measured"
    try:
        yield
    finally:
        triton.on_chip.why_not = before


def tiles(b: Batch) -> Tensor:
    with through_tiles():
        return -linear_logprobs(b.hidden, b.weight, b.targets, impl="triton").logp


def eager(b: Batch) -> Tensor:
    return F.cross_entropy(F.linear(b.hidden, b.weight).float(), b.targets, reduction="none")


def trl(b: Batch) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    out = ChunkedLogProbFunction.apply(b.hidden, b.weight, None, b.targets, 1.0, 32768, None, 1.0, ("entropy",))
    return -out[0]


def liger(b: Batch) -> Tensor:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)(b.weight, b.hidden, b.targets)


def liger_cute(b: Batch) -> Tensor:
    from liger_kernel.ops.cutedsl.ops import LigerFusedScaledCrossEntropySM90Function

    return LigerFusedScaledCrossEntropySM90Function.apply(b.hidden, b.weight, b.targets)


def cce(b: Batch) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(b.hidden, b.weight, b.targets, reduction="none")


def quack(b: Batch) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(b.hidden, b.weight, b.targets)


def torch_own(b: Batch) -> Tensor:
    return F.linear_cross_entropy(b.hidden, b.weight, b.targets)


def methods(dry: bool) -> dict[str, Method]:
    own = ("triton", "torch", "cpu") if dry else ("triton", "cuda", "torch")
    triton_peers = {"Liger": Method(None, liger), "Liger CuTe": Method(liger_cute), "Cut Cross-Entropy": Method(cce)}
    return {
        **{f"align_kernels, {impl}": ours(impl) for impl in own},
        "align_kernels, triton through tiles": Method(tiles),
        "eager": Method(eager),
        "TRL": Method(trl),
        **({} if dry else triton_peers),  # not for a CPU
        "QuACK": Method(None, quack),
        "torch.nn.functional.linear_cross_entropy": Method(None, torch_own),
    }


def step(method: Method, b: Batch, mode: str) -> Tensor:
    """One call as `mode` asks for it: "forward", "frozen", "trained" (the mean's gradient) or "late" (b.g's)."""
    b.hidden.grad = b.weight.grad = None
    if mode == "late":
        if method.tokens is None:
            raise ValueError("it gives no loss per token")
        out = method.tokens(b)
        out.backward(b.g.to(out.dtype))
    elif mode == "forward":
        run = method.tokens or method.mean
        assert run is not None
        with torch.no_grad():
            out = run(b)
    else:
        if method.mean is None:
            assert method.tokens is not None
            out = method.tokens(b).mean()
        else:
            out = method.mean(b)
        out.backward()
    return out.detach()
