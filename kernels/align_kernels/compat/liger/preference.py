"""Preferences: pairs (DPO) and single marks (KTO)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from align_kernels.arguments import public
from align_kernels.compat.liger.common import reference_logps, refuse
from align_kernels.fused.core import check_positive, check_shape, run_loss
from align_kernels.losses.dpo import PAIR_LOSSES, dpo
from align_kernels.losses.kto import kto
from align_kernels.losses.registry import register_loss

PAIR_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
    "ipo",
)  # fmt: skip


# -- losses on per-sequence log-probs, summed or averaged over tokens ---------------------------------------------
def score_of(logps: Tensor, lengths: Tensor, average: bool) -> Tensor:
    """Sums of log-probs, or means over the tokens."""
    return logps / lengths.clamp(min=1) if average else logps


@register_loss("pair", side={"ref_logps": "sequence", "nll_weight": "batch"}, needs=("lengths",), listed=False)
def liger_dpo(
    logps: Tensor,  # (2P,)
    *,
    ref_logps: Tensor,  # (2P,)
    nll_weight: Tensor,  # () weight of the chosen completions' summed log-probs
    lengths: Tensor,  # (2P,)
    average: bool,
    **hyper,
) -> tuple[Tensor, dict[str, Tensor]]:  # (P,)
    value, _ = dpo(score_of(logps, lengths, average), ref_logps=ref_logps, lengths=lengths, **hyper)
    return value - nll_weight * logps.chunk(2)[0], {}


@register_loss(
    "sequence",
    side={"ref_logps": "sequence", "desirable": "sequence", "kl": "sequence"},
    needs=("lengths",),
    listed=False,
)
def liger_kto(logps: Tensor, *, lengths: Tensor, average: bool, **rest) -> tuple[Tensor, dict[str, Tensor]]:  # (S,)
    return kto(score_of(logps, lengths, average), **rest)


def _reference(
    module: LigerFusedLinearDPOLoss | LigerFusedLinearKTOLoss,
    given: Tensor | None,
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    targets: Tensor,
    lengths: Tensor,
) -> Tensor:
    """[B] scores of the reference, 0 without one."""
    if given is not None:
        if ref_input is not None or ref_weight is not None:
            raise ValueError("ref_logps and ref_input are two references: pass one")
        check_shape("ref_logps", given, targets.shape[:1])
        return given.detach()
    head = dict(bias=ref_bias, ignore_index=module.ignore_index)
    logps = reference_logps(module.use_ref_model, ref_input, ref_weight, targets, **head)
    if logps is None:
        return lengths.new_zeros(len(targets), dtype=torch.float32)
    return score_of(logps.sum(1), lengths, module.average_log_prob)


# -- modules ------------------------------------------------------------------------------------------------------
class LigerFusedLinearDPOLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearDPOLoss`.

    Args:
        ignore_index: Default -100. beta: > 0. Default 0.1.
        compute_nll_loss, alpha: add alpha times the mean negative log-prob of the chosen tokens. Defaults False, 1.0.
        compiled, chunk_size: accepted; the planner decides.
        use_ref_model: whether a reference is passed to `forward`; False is DPO without one. Default True.
        average_log_prob: score sequences by their mean instead of their sum. Default False.
        loss_type: Liger's, default "sigmoid", and "ipo", which it lacks: scores are means over tokens, so
            average_log_prob must be False.
        label_smoothing: share of wrong labels, in [0, 0.5); above 0 for "exo_pair". Default 0.0. Liger drops it for
            "sigmoid", "hinge" and others; here it acts on "sigmoid" and raises where a loss type has none.
        discopop_tau: temperature of "discopop", > 0. Default 0.05; raises beside another loss type.
    """

    @public
    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        del compiled, chunk_size
        if loss_type not in PAIR_TYPES:
            raise ValueError(f"loss_type={loss_type!r} is not served; one of {', '.join(PAIR_TYPES)} is")
        if loss_type == "ipo":
            refuse("ipo averages by itself", average_log_prob=(average_log_prob, False))
        options = {"label_smoothing": label_smoothing, "discopop_tau": discopop_tau}
        PAIR_LOSSES.check((loss_type,), options)
        check_positive(beta=beta)
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.options = options | {"beta": beta, "loss_type": loss_type, "average": average_log_prob}

    @public
    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, a mean over pairs, and what Liger reports.

        Args:
            lin_weight: [V, D]; _input: [2P, T, D], chosen half, then rejected; target: [2P, T]; bias: [V].
            ref_input, ref_weight, ref_bias: the same of the reference.
            ref_logps: [2P] scores of the reference (sums, or means under average_log_prob) in place of these three.

        Returns:
            (loss, (chosen log-probs [P], rejected log-probs [P], mean logit of the chosen tokens, of the rejected, the
            NLL, chosen rewards [P], rejected rewards [P])); the loss alone is differentiable.
        """
        lengths, pairs = (target != self.ignore_index).sum(1), len(target) // 2
        ref = _reference(self, ref_logps, ref_input, ref_weight, ref_bias, target, lengths)
        tokens = lengths.split(pairs)[0].sum().clamp(min=1)
        nll_weight = (self.alpha if self.compute_nll_loss else 0.0) * pairs / tokens
        side, head = {"ref_logps": ref, "nll_weight": nll_weight}, dict(bias=bias, ignore_index=self.ignore_index)
        out = run_loss("liger_dpo", self.options, _input, lin_weight, target, side, None, head)
        scores = score_of(out.logps.sum(1), lengths, self.average_log_prob)
        nll = -out.logps[:pairs].sum() / tokens if self.compute_nll_loss else torch.zeros_like(out.loss)
        logits = [x.sum() / n.sum().clamp(min=1) for x, n in zip(out.mean_logit.chunk(2), lengths.chunk(2))]
        rewards = self.beta * (scores - ref)
        return out.loss, (*scores.chunk(2), *logits, nll, *rewards.chunk(2))


class LigerFusedLinearKTOLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearKTOLoss`, with the class weights that it lacks.

    Args:
        ignore_index: Default -100. beta: > 0. Default 0.1.
        compiled, chunk_size: accepted; the planner decides.
        use_ref_model: whether a reference is passed to `forward`; False is KTO without one. Default False.
        average_log_prob: score sequences by their mean instead of their sum. Default False.
        desirable_weight, undesirable_weight: of the two classes. Default 1.0.
    """

    @public
    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        super().__init__()
        del compiled, chunk_size
        if not beta > 0:
            raise ValueError(f"beta must be above 0, got {beta}")
        self.ignore_index, self.beta = ignore_index, beta
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    @public
    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, a mean over sequences, and what Liger reports.

        Args:
            _input: [B, T, D]; lin_weight: [V, D]; target: [B, T]; bias: [V].
            preference_labels: [B] bool, True for desirable.
            ref_input, ref_weight, ref_bias: the same of the reference.
            kl: the reference point, one number or [B] (Liger broadcasts [B] against every chunk). Default None: 0.
            ref_logps: [B] scores of the reference (sums, or means under average_log_prob) in place of these three.

        Returns:
            (loss, (sums over the desirable and over the undesirable sequences of log-probs, logits, rewards: six)); the
            loss alone is differentiable.
        """
        if preference_labels is None or preference_labels.dtype != torch.bool:
            raise ValueError("preference_labels must be a bool tensor [B], True for desirable")
        rows, vocab = target.shape[:1], lin_weight.shape[0]
        check_shape("preference_labels", preference_labels, rows)
        lengths = (target != self.ignore_index).sum(1)
        ref = _reference(self, ref_logps, ref_input, ref_weight, ref_bias, target, lengths)
        point = torch.zeros((), device=target.device) if kl is None else kl
        check_shape("kl", point, rows, torch.Size(()), torch.Size((1,)))
        hyper = {
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
            "average": self.average_log_prob,
        }
        side = {"ref_logps": ref, "desirable": preference_labels, "kl": point.expand(rows)}
        head = dict(bias=bias, ignore_index=self.ignore_index)
        out = run_loss("liger_kto", hyper, _input, lin_weight, target, side, None, head)
        scores = score_of(out.logps.sum(1), lengths, self.average_log_prob)
        columns = (scores, out.mean_logit.sum(1) * vocab, self.beta * (scores - ref))
        classes = (preference_labels, ~preference_labels)
        return out.loss, tuple(x.where(inside, 0.0).sum() for x in columns for inside in classes)
