"""Direct preference optimisation: losses of the summed log-probs of pairs and of their reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels.losses.common import REWARDS, bradley_terry, rewards_of
from align_kernels.losses.divergences import F_DIVERGENCES
from align_kernels.losses.family import Family, Limit, NotNegative, Positive, Smoothing
from align_kernels.losses.registry import register_loss
from align_kernels.sums import scalar


class Pairs(NamedTuple):
    """What the losses of the family read, each (P,): of chosen w and rejected l, D = log pi(y|x) - log ref(y|x)."""

    w: Tensor  # D of the chosen
    l: Tensor  # D of the rejected
    score_w: Tensor  # D, or another f-divergence's score of it
    score_l: Tensor
    mean_w: Tensor  # score / length
    mean_l: Tensor
    logps: Tensor  # log pi(y_w) - log pi(y_l)
    ref: Tensor  # log ref(y_w) - log ref(y_l)
    nll: Tensor | None  # the pair's share of the chosen tokens' negative log-likelihood

    @property
    def delta(self) -> Tensor:
        return self.score_w - self.score_l


class Facts(NamedTuple):
    """What is to be known of one of them beside its options."""

    unit: Literal["pair", "batch"] = "pair"  # at which its values are closed
    # it reads the difference of two scores alone, in which f-DPO's term beta log Z(x) cancels
    divergences: bool = False


PAIR_LOSSES = Family(Facts)
EXO = Limit(lambda x: 0 < x < 0.5, "exo_pair needs {name} above 0, its paper takes 1e-3; got {value}")


# -- the losses, (P,) -> (P,) ---------------------------------------------------------------------------------------
@PAIR_LOSSES.add(divergences=True)
def sigmoid(x: Pairs, *, beta: float, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Bradley-Terry on log-ratios, arXiv:2305.18290 eq. 7; with label_smoothing cDPO (Mitchell 2023)."""
    return bradley_terry(beta * x.delta, label_smoothing)


@PAIR_LOSSES.add(divergences=True)
def sigmoid_norm(x: Pairs, *, beta: float, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Bradley-Terry on log-ratios per token: length-normalised DPO, arXiv:2411.15124 section 5.1 (Tulu 3)."""
    return bradley_terry(beta * (x.mean_w - x.mean_l), label_smoothing)


@PAIR_LOSSES.add(divergences=True)
def robust(x: Pairs, *, beta: float, label_smoothing: Smoothing = 0.0) -> Tensor:
    """[-(1 - e) log sigma(beta delta) + e log sigma(-beta delta)] / (1 - 2e), arXiv:2403.00409 section 3.1."""
    z, e = beta * x.delta, label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


@PAIR_LOSSES.add(divergences=True)
def hinge(x: Pairs, *, beta: float) -> Tensor:
    """max(0, 1 - beta delta): SLiC's hinge (arXiv:2305.10425 section 2) on log-ratios, arXiv:2309.06657."""
    return torch.relu(1 - beta * x.delta)


@PAIR_LOSSES.add(divergences=True)
def ipo(x: Pairs, *, beta: float, average: bool = True) -> Tensor:
    """(delta - 1 / (2 beta))^2, arXiv:2310.12036 eq. 17; scores are per token, sums with average=False."""
    delta = x.mean_w - x.mean_l if average else x.delta
    return (delta - 1 / (2 * beta)) ** 2


@PAIR_LOSSES.add(divergences=True)
def exo_pair(x: Pairs, *, beta: float, label_smoothing: Annotated[float, EXO] = 0.0) -> Tensor:
    """KL((sigma(z), sigma(-z)) || (1 - e, e)), z = beta delta, e = label_smoothing > 0, arXiv:2402.00856 eq. 16."""
    z, e = beta * x.delta, scalar(label_smoothing, x.w.device, x.w.dtype)
    return z.sigmoid() * (F.logsigmoid(z) - torch.log1p(-e)) + (-z).sigmoid() * (F.logsigmoid(-z) - e.log())


@PAIR_LOSSES.add()
def nca_pair(x: Pairs, *, beta: float) -> Tensor:
    """-log sigma(beta D_w) - log sigma(-beta D_w) / 2 - log sigma(-beta D_l) / 2, arXiv:2402.05369 section 4.1."""
    w, l = beta * x.w, beta * x.l
    return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-l)


@PAIR_LOSSES.add()
def bco_pair(x: Pairs, *, beta: float) -> Tensor:
    """-log sigma(beta D_w) - log sigma(-beta D_l), arXiv:2404.04656 section 4 without its shift of the rewards."""
    return -F.logsigmoid(beta * x.w) - F.logsigmoid(-beta * x.l)


@PAIR_LOSSES.add()
def sppo_hard(x: Pairs, *, beta: float) -> Tensor:
    """(D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2, arXiv:2405.00675 eq. 4.7 with hard probabilities."""
    return (x.w - 0.5 / beta) ** 2 + (x.l + 0.5 / beta) ** 2


@PAIR_LOSSES.add(unit="batch")
def aot(x: Pairs, *, beta: float, label_smoothing: Smoothing = 0.0) -> Tensor:
    """Bradley-Terry on the quantiles of the policy's margins over the reference's, arXiv:2406.05882 section 3.

    Values belong to ranks, not to pairs, and sort the pairs of one call: a window of micro-batches is not one batch.
    """
    return bradley_terry(beta * (x.logps.sort().values - x.ref.sort().values), label_smoothing)


@PAIR_LOSSES.add(unit="batch")
def aot_unpaired(x: Pairs, *, beta: float, label_smoothing: Smoothing = 0.0) -> Tensor:
    """The same on the quantiles of D_w over those of D_l: which completions are paired plays no part."""
    return bradley_terry(beta * (x.w.sort().values - x.l.sort().values), label_smoothing)


@PAIR_LOSSES.add()
def apo_zero(x: Pairs, *, beta: float) -> Tensor:
    """1 - sigma(beta D_w) + sigma(beta D_l), arXiv:2408.06266 eq. 7: for answers better than the model's."""
    return (-beta * x.w).sigmoid() + (beta * x.l).sigmoid()


@PAIR_LOSSES.add()
def apo_down(x: Pairs, *, beta: float) -> Tensor:
    """sigma(beta D_w) + 1 - sigma(beta (D_w - D_l)), arXiv:2408.06266 eq. 8: for answers worse than the model's."""
    return (beta * x.w).sigmoid() + (-beta * (x.w - x.l)).sigmoid()


@PAIR_LOSSES.add(divergences=True)
def discopop(x: Pairs, *, beta: float, discopop_tau: Positive = 0.05) -> Tensor:
    """(1 - m)(-log sigma(z)) + m exp(-z) with z = beta delta and m = sigma(z / tau), arXiv:2406.08414 eq. 5.

    m exp(-z) is taken as exp(log m - z): as written it is 0 * inf where z is far below 0.
    """
    z = beta * x.delta
    mix = z / discopop_tau
    return -(-mix).sigmoid() * F.logsigmoid(z) + (F.logsigmoid(mix) - z).exp()


@PAIR_LOSSES.add(divergences=True)
def dpop(x: Pairs, *, beta: float, label_smoothing: Smoothing = 0.0, dpop_lambda: NotNegative = 50.0) -> Tensor:
    """-log sigma(beta (delta - lambda max(0, -D_w))), arXiv:2402.13228 (Smaug): chosen log-probs must not fall."""
    return bradley_terry(beta * (x.delta - dpop_lambda * torch.relu(-x.w)), label_smoothing)


@PAIR_LOSSES.add(divergences=True)
def sft(x: Pairs) -> Tensor:
    """Cross-entropy of the chosen tokens, a mean over tokens. Beside sigmoid: RPO (arXiv:2404.19733)."""
    assert x.nll is not None
    return x.nll


# -- the loss ---------------------------------------------------------------------------------------------------------
@register_loss(
    "pair",
    side={"ref_logps": "sequence", "tail": "sum", "nll_weight": "batch"},
    metrics=REWARDS,
    needs=("lengths", "log_sum_sq_probs"),
    family=PAIR_LOSSES,
)
def dpo(
    logps: Tensor,  # (2P,) chosen, then rejected
    *,
    ref_logps: Tensor,  # (2P,)
    lengths: Tensor,  # (2P,) tokens of each completion
    log_sum_sq_probs: Tensor | None = None,  # (2P,) sums over the completions, read by WPO
    tail: Tensor | None = None,  # (2P,) the part of logps that lies beyond the pair's shorter length, read by LD-DPO
    nll_weight: Tensor | None = None,  # () weight of the chosen log-probs in the loss type sft
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    **options,
) -> tuple[Tensor, dict[str, Tensor]]:  # (P,)
    """The weighted sum (MPO, arXiv:2411.10442) of the losses that `loss_type` names, see `PAIR_LOSSES`.

    LD-DPO, arXiv:2409.06411: log pi(y) counts the tokens beyond the pair's shorter length `ld_alpha` times, and
    so must `ref_logps`. WPO, arXiv:2406.11827 eq. 2: a pair is weighted with both its completions'
    exp(mean_t(log p_t - log sum_v p_v^2)), without gradient.
    """
    scored = logps if ld_alpha is None or tail is None else logps - (1 - ld_alpha) * tail
    ratio, length = scored - ref_logps, lengths.clamp(min=1)
    score = F_DIVERGENCES[f_divergence_type](ratio, f_alpha_divergence_coef)
    margin = lambda x: torch.sub(*x.chunk(2))  # noqa: E731
    nll = None if nll_weight is None else -nll_weight * logps.chunk(2)[0]
    (w, l), (score_w, score_l), (mean_w, mean_l) = (x.chunk(2) for x in (ratio, score, score / length))
    pairs = Pairs(w, l, score_w, score_l, mean_w, mean_l, margin(scored), margin(ref_logps), nll)
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    weights = loss_weights or (1.0,) * len(names)
    value = sum(w * PAIR_LOSSES(name, pairs, beta=beta, **options) for name, w in zip(names, weights, strict=True))
    assert isinstance(value, Tensor)
    if use_weighting:
        assert log_sum_sq_probs is not None
        value = value * torch.add(*((logps.detach() - log_sum_sq_probs) / length).chunk(2)).exp()
    return value, rewards_of(beta * ratio)
