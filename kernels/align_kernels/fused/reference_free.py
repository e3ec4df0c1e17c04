"""Fused preference losses that need no reference."""

from __future__ import annotations

import torch
from torch import Tensor

from align_kernels.arguments import check_call
from align_kernels.fused.core import (
    Items,
    LossOutput,
    check_one_of,
    check_pairs,
    check_positive,
    check_shape,
    ends_of,
    kept,
    of_family,
    of_head,
    options_of,
    pair_output,
    run_loss,
    share,
)
from align_kernels.losses.cpo import CPO_LOSSES
from align_kernels.losses.registry import PAIRED


@of_family(CPO_LOSSES)
def cpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    pairs: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
    num_items: Items = None,
    num_tokens: Items = None,
    **head,
) -> LossOutput:
    """Contrastive preference optimisation (arXiv:2401.08417 eq. 3) and its family: formulas in `losses.cpo`.

    Args:
        hidden: [2P, T, D], the first half chosen, the second rejected; weight: [V, D]; targets: [2P, T].
        pairs: [2, P] int64, numbers of the chosen and of the rejected sequence of each pair, where hidden and targets
            have B sequences in any order. One that is in several pairs meets the head once. Default None: halves.
        beta: temperature of the preference, > 0. Default 0.1.
        loss_type: "sigmoid" (default), "hinge", "ipo", "simpo". The last two score by the mean over tokens.
        label_smoothing: share of wrong labels assumed, in [0, 0.5), of "sigmoid" and "simpo". Default 0.0.
        cpo_alpha: weight of the negative log-likelihood of the chosen tokens. Default 1.0.
        simpo_gamma: the margin of "simpo". Default 0.5.
        alpha: shape of AlphaPO's reward; TRL's loss_type "alphapo" is "simpo" with it and cpo_alpha=0. Default 0.0.
        num_items: the normaliser. Default None: the P pairs of this call.
        num_tokens: the normaliser of the likelihood. Default None: the chosen tokens of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi; further options of the
            loss type.

    Returns:
        LossOutput; logps [2P] sums; metrics as `dpo_loss`, and nll_loss.

    Raises:
        ValueError: an odd number of sequences, an unknown loss_type, a number out of range, an option that the loss
            type does not read.
    """
    check_call(cpo_loss)
    check_pairs("cpo_loss", targets, pairs)
    check_one_of("loss_type", loss_type, CPO_LOSSES)
    check_positive(beta=beta)
    hyper = options_of(CPO_LOSSES, (loss_type,), head, label_smoothing=label_smoothing, simpo_gamma=simpo_gamma)
    hyper |= {"beta": beta, "loss_type": loss_type, "alpha": alpha}
    return with_nll("cpo", hyper, hidden, weight, targets, {PAIRED: pairs}, cpo_alpha, num_items, num_tokens, head)


@of_head
def simpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    pairs: Tensor | None = None,
    beta: float = 0.1,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
    alpha: float = 0.0,
    num_items: Items = None,
    **head,
) -> LossOutput:
    """SimPO (arXiv:2405.14734 eq. 6): `cpo_loss` of type "simpo" without its likelihood term.

    Args:
        beta: > 0. Default 0.1, as TRL's and Liger's; the paper takes 2.0 to 10.
        simpo_gamma: the margin. Default 0.5.
        Everything else as in `cpo_loss`.
    """
    check_call(simpo_loss)
    return cpo_loss(
        hidden, weight, targets, pairs=pairs, beta=beta, loss_type="simpo", label_smoothing=label_smoothing,
        cpo_alpha=0.0, simpo_gamma=simpo_gamma, alpha=alpha, num_items=num_items, **head,
    )  # fmt: skip


@of_head
def orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    pairs: Tensor | None = None,
    beta: float = 0.1,
    nll_targets: Tensor | None = None,
    num_items: Items = None,
    num_tokens: Items = None,
    **head,
) -> LossOutput:
    """Odds-ratio preference optimisation (arXiv:2403.07691 eq. 6 and 7).

    Args:
        hidden: [2P, T, D], the first half chosen, the second rejected; weight: [V, D]; targets: [2P, T].
        pairs: as in `cpo_loss`; not with nll_targets.
        beta: weight of the odds ratio (the paper's lambda), > 0. Default 0.1.
        nll_targets: [P, T] what the likelihood of the chosen counts, if more than their completions: TRL takes prompt
            and completion. Must hold the completions. Default None: the completions.
        num_items: the normaliser. Default None: the P pairs of this call.
        num_tokens: the normaliser of the likelihood. Default None: its tokens in this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi.

    Returns:
        LossOutput; logps [2P] sums over completions; metrics as `dpo_loss`, and log_odds_ratio, log_odds_chosen,
        nll_loss.

    Raises:
        ValueError: an odd number of sequences, beta not above 0, nll_targets that differ from a completion.
    """
    check_call(orpo_loss)
    check_pairs("orpo_loss", targets, pairs)
    check_positive(beta=beta)
    completion, half = kept(targets, head), len(targets) // 2
    side: dict[str, Tensor | None] = {
        "completion": completion.double(), "completion_lengths": completion.sum(1).double(), PAIRED: pairs,
    }  # fmt: skip
    if nll_targets is not None:
        if pairs is not None:
            raise ValueError("nll_targets are of the chosen half: pass halves, not pairs")
        check_shape("nll_targets", nll_targets, targets[:half].shape)
        if bool((completion[:half] & (nll_targets != targets[:half])).any()):
            raise ValueError("nll_targets must hold the targets of the chosen completions, and may hold more")
        targets = torch.cat((nll_targets, targets[half:]))
    return with_nll(
        "orpo", {"beta": beta}, hidden, weight, targets, side, 1.0, num_items, num_tokens, head, completion
    )  # fmt: skip


@of_head
def slic_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    pairs: Tensor | None = None,
    delta: float = 1.0,
    nll_coef: float = 1.0,
    num_items: Items = None,
    num_tokens: Items = None,
    **head,
) -> LossOutput:
    """Sequence likelihood calibration, SLiC-HF (arXiv:2305.10425 section 2): max(0, delta - log pi(y_w) +
    log pi(y_l)) plus nll_coef times the negative log-likelihood of the chosen tokens.

    Args:
        hidden: [2P, T, D], the first half chosen, the second rejected; weight: [V, D]; targets: [2P, T].
        pairs: as in `cpo_loss`.
        delta: the margin, > 0. Default 1.0.
        nll_coef: the paper's lambda. Default 1.0.
        num_items, num_tokens, **head: as in `cpo_loss`.

    Returns:
        LossOutput as `cpo_loss`; rewards are log-probs.

    Raises:
        ValueError: an odd number of sequences, delta not above 0.
    """
    check_call(slic_loss)
    check_pairs("slic_loss", targets, pairs)
    check_positive(delta=delta)
    side: dict[str, Tensor | None] = {PAIRED: pairs}
    return with_nll("slic", {"delta": delta}, hidden, weight, targets, side, nll_coef, num_items, num_tokens, head)


def with_nll(
    name: str,
    hyper: dict,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    side: dict[str, Tensor | None],
    coef: float,
    num_items: Items,
    num_tokens: Items,
    head: dict,
    completion: Tensor | None = None,
) -> LossOutput:
    """A loss of pairs plus `coef` times the mean negative log-likelihood of their chosen completions."""
    if not coef >= 0:
        raise ValueError(f"the weight of the likelihood must not be negative, got {coef}")
    pairs = side.get(PAIRED)
    chosen, _ = ends_of(targets, pairs)
    tokens = kept(targets, head).sum(1)[chosen].sum()
    if coef:
        side = side | {"nll_weight": coef * share(num_items, max(len(chosen), 1), tokens, num_tokens)}
    out = run_loss(name, hyper, hidden, weight, targets, side, num_items, head)
    nll = -out.logps.sum(1)[chosen].sum() / tokens.clamp(min=1)
    if completion is not None:
        out = out._replace(logps=out.logps.where(completion, 0.0), mask=completion)
    return pair_output(out, pairs, nll_loss=(nll, tokens))
