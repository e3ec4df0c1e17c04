"""Preferences without a reference: CPO, SimPO and ORPO."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from align_kernels.arguments import public
from align_kernels.compat.liger.preference import score_of
from align_kernels.fused.core import check_positive, check_shape, run_loss
from align_kernels.losses.common import bradley_terry
from align_kernels.losses.cpo import nll, orpo
from align_kernels.losses.registry import register_loss


@register_loss("pair", side={"nll_weight": "batch"}, needs=("lengths",), listed=False)
def liger_cpo(
    logps: Tensor,  # (2P,)
    *,
    nll_weight: Tensor,  # () weight of the chosen completions' summed log-probs
    lengths: Tensor,  # (2P,)
    average: bool,
    beta: float,
    gamma: float,
    label_smoothing: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # (P,)
    score = score_of(logps, lengths, average)
    return bradley_terry(beta * torch.sub(*score.chunk(2)) - gamma, label_smoothing) + nll(logps, nll_weight), {}


class _ReferenceFree(nn.Module):
    """CPO and SimPO: the same loss with other defaults, SimPO's with a margin and means in place of sums."""

    def __init__(
        self, ignore_index: int, beta: float, alpha: float, gamma: float, label_smoothing: float, average: bool,
        compute_nll_loss: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive(beta=beta)
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.options = {"beta": beta, "gamma": gamma, "label_smoothing": label_smoothing, "average": average}

    @public
    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, a mean over pairs, and what Liger reports.

        Args:
            lin_weight: [V, D]; _input: [2P, T, D], chosen half, then rejected; target: [2P, T]; bias: [V].

        Returns:
            (loss, (chosen log-probs [P], rejected log-probs [P], mean logit of the chosen tokens, of the rejected, the
            NLL, chosen rewards [P], rejected rewards [P])); the loss alone is differentiable.
        """
        lengths, pairs = (target != self.ignore_index).sum(1), len(target) // 2
        tokens = lengths[:pairs].sum().clamp(min=1)
        side = {"nll_weight": (self.alpha if self.compute_nll_loss else 0.0) * pairs / tokens}
        head = dict(bias=bias, ignore_index=self.ignore_index)
        out = run_loss("liger_cpo", self.options, _input, lin_weight, target, side, None, head)
        scores = score_of(out.logps.sum(1), lengths, self.options["average"])
        logits = [x.sum() / n.sum().clamp(min=1) for x, n in zip(out.mean_logit.chunk(2), lengths.chunk(2))]
        likelihood = -out.logps[:pairs].sum() / tokens if self.compute_nll_loss else torch.zeros_like(out.loss)
        return out.loss, (*scores.chunk(2), *logits, likelihood, *(self.beta * scores).chunk(2))


class LigerFusedLinearCPOLoss(_ReferenceFree):
    """`liger_kernel.chunked_loss.LigerFusedLinearCPOLoss`.

    Args:
        ignore_index: Default -100. beta: > 0. Default 0.1.
        compute_nll_loss, alpha: add alpha times the mean negative log-prob of the chosen tokens. Defaults True, 1.0.
        label_smoothing: share of wrong labels, in [0, 0.5). Default 0.0.
        compiled, chunk_size: accepted; the planner decides.
        average_log_prob: score sequences by their mean instead of their sum. Default False.
    """

    @public
    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        del compiled, chunk_size
        super().__init__(ignore_index, beta, alpha, 0.0, label_smoothing, average_log_prob, compute_nll_loss)


class LigerFusedLinearSimPOLoss(_ReferenceFree):
    """`liger_kernel.chunked_loss.LigerFusedLinearSimPOLoss`.

    Args:
        ignore_index: Default -100. beta: > 0. Default 0.1.
        compute_nll_loss, alpha: add alpha times the mean negative log-prob of the chosen tokens. Defaults True, 1.0.
        label_smoothing: share of wrong labels, in [0, 0.5). Default 0.0.
        compiled, chunk_size: accepted; the planner decides.
        gamma: margin that the chosen must have. Default 0.5.
    """

    @public
    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        del compiled, chunk_size
        super().__init__(ignore_index, beta, alpha, gamma, label_smoothing, True, compute_nll_loss)


class LigerFusedLinearORPOLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearORPOLoss`.

    Args:
        ignore_index: Default -100. beta: weight of the odds ratio, > 0. Default 0.1.
        compute_nll_loss: add the mean negative log-prob of the chosen tokens. Default True.
        compiled, chunk_size: accepted; the planner decides.
    """

    @public
    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        del compiled, chunk_size
        check_positive(beta=beta)
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss

    @public
    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, a mean over pairs, and what Liger reports.

        Args:
            lin_weight: [V, D]; _input: [2P, T, D], chosen half, then rejected; target: [2P, T]; bias: [V].
            nll_target: [2P, T] or [P, T], what the likelihood of the chosen counts: their completions, and more.
                Default None: the completions. Liger takes targets of other tokens there too.

        Returns:
            (loss, (chosen and rejected mean log-probs [P], mean logit of the chosen tokens, of the rejected, the NLL,
            chosen and rejected rewards [P], mean log-sigmoid of the log odds ratio, mean of that ratio)); the loss
            alone is differentiable.

        Raises:
            ValueError: nll_target holds other tokens than the completions' where these are.
        """
        completion, pairs = target != self.ignore_index, len(target) // 2
        lengths, read = completion.sum(1), target
        if nll_target is not None and self.compute_nll_loss:
            check_shape("nll_target", nll_target, target.shape, target[:pairs].shape)
            chosen = nll_target[:pairs]
            if bool((completion[:pairs] & (chosen != target[:pairs])).any()):
                raise ValueError("nll_target must hold the targets of the chosen completions, and may hold more")
            read = torch.cat((chosen, target[pairs:]))
        tokens = (read[:pairs] != self.ignore_index).sum().clamp(min=1)
        nll_weight = pairs / tokens * self.compute_nll_loss
        side = {"completion": completion.double(), "completion_lengths": lengths.double(), "nll_weight": nll_weight}
        head = dict(bias=bias, ignore_index=self.ignore_index)
        out = run_loss("orpo", {"beta": self.beta}, _input, lin_weight, read, side, None, head)
        scores = score_of((out.logps * completion).sum(1), lengths, True)
        _, odds = orpo(scores, completion=scores, completion_lengths=torch.ones_like(lengths), beta=self.beta)
        kept = out.mean_logit * completion
        logits = [x.sum() / n.sum().clamp(min=1) for x, n in zip(kept.chunk(2), lengths.chunk(2))]
        likelihood = -out.logps[:pairs].sum() / tokens if self.compute_nll_loss else torch.zeros_like(out.loss)
        ratios = [odds[name].mean() for name in ("log_odds_ratio", "log_odds_chosen")]
        return out.loss, (*scores.chunk(2), *logits, likelihood, *(self.beta * scores).chunk(2), *ratios)
