"""`compat`'s CPO, SimPO and ORPO of Liger, and what Cut Cross-Entropy has had since 25.1.1, against the peers' own code
or eager logits; float32 on the CPU."""

from __future__ import annotations

from typing import Any

import cut_cross_entropy
import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearCPOLoss, LigerFusedLinearORPOLoss, LigerFusedLinearSimPOLoss
from torch import Tensor
from torch.nn.functional import cross_entropy

from align_kernels import compat

from .test_compat import FULL, LIGER, RAGGED, B, T, labels, leaves, normal, same, same_gradients

HEADS = [dict(), dict(bias=False), dict(train=("hidden",)), dict(train=("weight", "bias"))]
cce = compat.cce.linear_cross_entropy


def call(module: type, x: dict, targets: Tensor, *more: Tensor, **options) -> tuple:
    return module(**LIGER, **options)(x["weight"], x["hidden"], targets, x["bias"], *more)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize(
    ("module", "peer", "options"),
    [
        (compat.LigerFusedLinearCPOLoss, LigerFusedLinearCPOLoss, dict()),
        (compat.LigerFusedLinearCPOLoss, LigerFusedLinearCPOLoss, dict(beta=0.7, label_smoothing=0.2, alpha=0.3)),
        (compat.LigerFusedLinearCPOLoss, LigerFusedLinearCPOLoss, dict(average_log_prob=True, chunk_size=2)),
        (compat.LigerFusedLinearCPOLoss, LigerFusedLinearCPOLoss, dict(compute_nll_loss=False)),
        (compat.LigerFusedLinearSimPOLoss, LigerFusedLinearSimPOLoss, dict()),
        (compat.LigerFusedLinearSimPOLoss, LigerFusedLinearSimPOLoss, dict(beta=2.0, gamma=1.5, alpha=0.5)),
        (compat.LigerFusedLinearSimPOLoss, LigerFusedLinearSimPOLoss, dict(compute_nll_loss=False, chunk_size=3)),
        (compat.LigerFusedLinearORPOLoss, LigerFusedLinearORPOLoss, dict()),
        (compat.LigerFusedLinearORPOLoss, LigerFusedLinearORPOLoss, dict(beta=0.6, compute_nll_loss=False)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else getattr(value, "__name__", "")[17:],
)
def test_liger(module: type, peer: type, options: dict[str, Any], head: dict[str, Any]):
    x = leaves(**head)
    ours, theirs = call(module, x, RAGGED, **options), call(peer, x, RAGGED, **options)
    same("loss", ours[0], theirs[0])
    assert len(ours[1]) == len(theirs[1])
    for i in {*range(len(ours[1]))} - {2, 3}:
        wanted = torch.as_tensor(theirs[1][i])
        same(f"outputs[{i}]", ours[1][i].to(wanted.dtype), wanted, scale=1.0)
    same_gradients(ours[0], theirs[0], x)
    whole = [call(one, x, FULL, **options)[1] for one in (module, peer)]
    for i in (2, 3):  # where no position is ignored the mean logits are Liger's too
        same(f"outputs[{i}]", whole[0][i], whole[1][i], scale=1.0)


def test_liger_orpo_s_likelihood_counts_the_prompt():
    """More targets than the completions', as TRL's ORPO counts them, of the whole batch or of the chosen half."""
    x = leaves()
    prompts = RAGGED.masked_fill(RAGGED != -100, 0)
    wider = torch.where(RAGGED == -100, FULL, RAGGED)
    assert bool((prompts != wider).any())
    theirs = call(LigerFusedLinearORPOLoss, x, RAGGED, wider)
    for given in (wider, wider[: B // 2]):
        ours = call(compat.LigerFusedLinearORPOLoss, x, RAGGED, given)
        same("loss", ours[0], theirs[0])
        for i in (0, 1, 4, 5, 6, 7, 8):
            same(f"outputs[{i}]", ours[1][i], theirs[1][i], scale=1.0)
        same_gradients(ours[0], theirs[0], x)
    with pytest.raises(ValueError, match="nll_target must hold the targets of the chosen completions"):
        call(compat.LigerFusedLinearORPOLoss, x, RAGGED, (wider + 1) % 7)


def test_liger_done_right():
    """An empty completion, which is 0 / 0 in Liger; a strength of 0, which teaches nothing."""
    x, empty = leaves(), labels(7, 0, 1, 5, 6, 2)
    for module, peer in (
        (compat.LigerFusedLinearSimPOLoss, LigerFusedLinearSimPOLoss),
        (compat.LigerFusedLinearORPOLoss, LigerFusedLinearORPOLoss),
    ):
        assert call(peer, x, empty)[0].isnan() and call(module, x, empty)[0].isfinite()
        with pytest.raises(ValueError, match="beta must be above 0"):
            module(beta=0.0)
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        compat.LigerFusedLinearCPOLoss(label_smoothing=0.5)


# -- Cut Cross-Entropy --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("targets", [FULL, RAGGED], ids=["full", "ragged"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_cce_log_sum_exp(softcap: float | None, shift: int, reduction: str, targets: Tensor):
    """Differentiable, as a z-loss needs it: eager logits are the oracle."""
    x = leaves()
    options: dict[str, Any] = dict(reduction=reduction, shift=shift, softcap=softcap)
    loss, lse = cce(x["hidden"], x["weight"], targets, bias=x["bias"], return_lse=True, **options)
    hidden, read = x["hidden"][:, : T - shift], targets[:, shift:]
    logits = hidden @ x["weight"].T + x["bias"]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = read != -100
    wanted = logits.logsumexp(-1).where(kept, 0.0)
    eager = cross_entropy(logits.flatten(0, 1), read.flatten(), reduction=reduction)
    same("lse", lse.detach(), wanted.detach())
    same("loss", loss.detach(), eager.view(loss.shape).detach(), scale=1.0)
    g = normal(*wanted.shape, seed=11)
    same_gradients(loss.sum() + (g * lse**2).sum(), eager.sum() + (g * wanted**2).sum(), x)
    plain = cce(x["hidden"], x["weight"], targets, bias=x["bias"], **options)
    same("without it", plain.detach(), loss.detach(), scale=1.0)


def test_cce_module():
    x = leaves(bias=False)
    settings: dict[str, Any] = dict(softcap=9.0, reduction="sum", shift=True, filter_eps=None)
    ours = compat.cce.LinearCrossEntropy(**settings, impl="cce")
    peer = cut_cross_entropy.LinearCrossEntropy(**settings, impl="torch_compile")
    ours = ours(x["hidden"], x["weight"], RAGGED)
    with torch.compiler.set_stance("force_eager"):
        peer = peer(x["hidden"], x["weight"], RAGGED)
    same("loss", ours, peer)
    same_gradients(ours, peer, x)
    biased = leaves()
    loss, lse = compat.cce.LinearCrossEntropy(return_lse=True, accum_e_fp32=True, filter_c_grad=False)(
        biased["hidden"], biased["weight"], FULL, biased["bias"]
    )
    fourth = cce(biased["hidden"], biased["weight"], FULL, biased["bias"])
    same("the bias where later releases have it", fourth.detach(), loss.detach())
    assert lse.shape == FULL.shape


def test_cce_refuses_a_head_in_shards():
    x = leaves()
    with pytest.raises(ValueError, match="vocab_parallel_options are not served"):
        cce(x["hidden"], x["weight"], FULL, vocab_parallel_options=object())
