"""Direct preference optimisation: losses of the summed log-probs of pairs and of their reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels.losses.common import REWARDS, bradley_terry, rewards_of
from align_kernels.losses.divergences import F_DIVERGENCES
from align_kernels.losses.registry import register_loss


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


class Options(NamedTuple):
    """Hyper-parameters that some of them read."""

    beta: float
    label_smoothing: float
    average: bool
    discopop_tau: float
    dpop_lambda: float


# -- the losses, (P,) -> (P,) ---------------------------------------------------------------------------------------
def sigmoid(x: Pairs, o: Options) -> Tensor:
    """Bradley-Terry on log-ratios, arXiv:2305.18290 eq. 7; with label_smoothing cDPO (Mitchell 2023)."""
    return bradley_terry(o.beta * x.delta, o.label_smoothing)


def sigmoid_norm(x: Pairs, o: Options) -> Tensor:
    """Bradley-Terry on log-ratios per token: length-normalised DPO, arXiv:2411.15124 section 5.1 (Tulu 3)."""
    return bradley_terry(o.beta * (x.mean_w - x.mean_l), o.label_smoothing)


def robust(x: Pairs, o: Options) -> Tensor:
    """[-(1 - e) log sigma(beta delta) + e log sigma(-beta delta)] / (1 - 2e), arXiv:2403.00409 section 3.1."""
    z, e = o.beta * x.delta, o.label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def hinge(x: Pairs, o: Options) -> Tensor:
    """max(0, 1 - beta delta): SLiC's hinge (arXiv:2305.10425 section 2) on log-ratios, arXiv:2309.06657."""
    return torch.relu(1 - o.beta * x.delta)


def ipo(x: Pairs, o: Options) -> Tensor:
    """(delta - 1 / (2 beta))^2, arXiv:2310.12036 eq. 17; scores are per token, sums with average=False."""
    delta = x.mean_w - x.mean_l if o.average else x.delta
    return (delta - 1 / (2 * o.beta)) ** 2


def exo_pair(x: Pairs, o: Options) -> Tensor:
    """KL((sigma(z), sigma(-z)) || (1 - e, e)), z = beta delta, e = label_smoothing > 0, arXiv:2402.00856 eq. 16."""
    z, e = o.beta * x.delta, torch.tensor(o.label_smoothing, dtype=x.w.dtype, device=x.w.device)
    return z.sigmoid() * (F.logsigmoid(z) - torch.log1p(-e)) + (-z).sigmoid() * (F.logsigmoid(-z) - e.log())


def nca_pair(x: Pairs, o: Options) -> Tensor:
    """-log sigma(beta D_w) - log sigma(-beta D_w) / 2 - log sigma(-beta D_l) / 2, arXiv:2402.05369 section 4.1."""
    w, l = o.beta * x.w, o.beta * x.l
    return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-l)


def bco_pair(x: Pairs, o: Options) -> Tensor:
    """-log sigma(beta D_w) - log sigma(-beta D_l), arXiv:2404.04656 section 4 without its shift of the rewards."""
    return -F.logsigmoid(o.beta * x.w) - F.logsigmoid(-o.beta * x.l)


def sppo_hard(x: Pairs, o: Options) -> Tensor:
    """(D_w - 1 / (2 beta))^2 + (D_l + 1 / (2 beta))^2, arXiv:2405.00675 eq. 4.7 with hard probabilities."""
    return (x.w - 0.5 / o.beta) ** 2 + (x.l + 0.5 / o.beta) ** 2


def aot(x: Pairs, o: Options) -> Tensor:
    """Bradley-Terry on the quantiles of the policy's margins over the reference's, arXiv:2406.05882 section 3.

    Values belong to ranks, not to pairs, and sort the pairs of one call: a window of micro-batches is not one batch.
    """
    return bradley_terry(o.beta * (x.logps.sort().values - x.ref.sort().values), o.label_smoothing)


def aot_unpaired(x: Pairs, o: Options) -> Tensor:
    """The same on the quantiles of D_w over those of D_l: which completions are paired plays no part."""
    return bradley_terry(o.beta * (x.w.sort().values - x.l.sort().values), o.label_smoothing)


def apo_zero(x: Pairs, o: Options) -> Tensor:
    """1 - sigma(beta D_w) + sigma(beta D_l), arXiv:2408.06266 eq. 7: for answers better than the model's."""
    return (-o.beta * x.w).sigmoid() + (o.beta * x.l).sigmoid()


def apo_down(x: Pairs, o: Options) -> Tensor:
    """sigma(beta D_w) + 1 - sigma(beta (D_w - D_l)), arXiv:2408.06266 eq. 8: for answers worse than the model's."""
    return (o.beta * x.w).sigmoid() + (-o.beta * (x.w - x.l)).sigmoid()


def discopop(x: Pairs, o: Options) -> Tensor:
    """(1 - m)(-log sigma(z)) + m exp(-z) with z = beta delta and m = sigma(z / tau), arXiv:2406.08414 eq. 5.

    m exp(-z) is taken as exp(log m - z): as written it is 0 * inf where z is far below 0.
    """
    z = o.beta * x.delta
    mix = z / o.discopop_tau
    return -(-mix).sigmoid() * F.logsigmoid(z) + (F.logsigmoid(mix) - z).exp()


def dpop(x: Pairs, o: Options) -> Tensor:
    """-log sigma(beta (delta - lambda max(0, -D_w))), arXiv:2402.13228 (Smaug): chosen log-probs must not fall."""
    return bradley_terry(o.beta * (x.delta - o.dpop_lambda * torch.relu(-x.w)), o.label_smoothing)


def sft(x: Pairs, o: Options) -> Tensor:
    """Cross-entropy of the chosen tokens, a mean over tokens. Beside sigmoid: RPO (arXiv:2404.19733)."""
    assert x.nll is not None
    return x.nll


Term = Callable[[Pairs, Options], Tensor]
TERMS: tuple[Term, ...] = (
    sigmoid, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down,
    discopop, sft, sigmoid_norm, dpop,
)  # fmt: skip
PAIR_LOSSES: dict[str, Term] = {term.__name__: term for term in TERMS}
LOSS_TYPES = tuple(PAIR_LOSSES)
BATCH_TYPES = {"aot", "aot_unpaired"}  # closed over a whole batch; the others over a pair
# f-DPO leaves a term beta log Z(x), which cancels in the difference of two scores alone
DIVERGENCE_TYPES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "dpop"}
READERS = {  # who reads what, and the value that leaves it alone
    "label_smoothing": ({"sigmoid", "sigmoid_norm", "robust", "exo_pair", "dpop", *BATCH_TYPES}, 0.0),
    "average": ({"ipo"}, True),
    "discopop_tau": ({"discopop"}, 0.05),
    "dpop_lambda": ({"dpop"}, 50.0),
}


@register_loss(
    "pair",
    side={"ref_logps": "sequence", "tail": "sum", "nll_weight": "batch"},
    metrics=REWARDS,
    needs=("lengths", "log_sum_sq_probs"),
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
    label_smoothing: float = 0.0,
    average: bool = True,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    discopop_tau: float = 0.05,
    dpop_lambda: float = 50.0,
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
    options = Options(beta, label_smoothing, average, discopop_tau, dpop_lambda)
    names = (loss_type,) if isinstance(loss_type, str) else loss_type
    weights = loss_weights or (1.0,) * len(names)
    value = sum(w * PAIR_LOSSES[name](pairs, options) for name, w in zip(names, weights, strict=True))
    assert isinstance(value, Tensor)
    if use_weighting:
        assert log_sum_sq_probs is not None
        value = value * torch.add(*((logps.detach() - log_sum_sq_probs) / length).chunk(2)).exp()
    return value, rewards_of(beta * ratio)
