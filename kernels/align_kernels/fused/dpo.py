"""Fused direct preference optimisation."""

from __future__ import annotations

from collections.abc import Sequence

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
    options_of,
    pair_output,
    run_loss,
    share,
)
from align_kernels.losses.divergences import F_DIVERGENCES
from align_kernels.losses.dpo import PAIR_LOSSES
from align_kernels.losses.registry import PAIRED


@of_family(PAIR_LOSSES)
def dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor,
    *,
    pairs: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    label_smoothing: float = 0.0,
    loss_weights: Sequence[float] | None = None,
    average: bool = True,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    discopop_tau: float = 0.05,
    dpop_lambda: float = 50.0,
    num_items: Items = None,
    num_tokens: Items = None,
    **head,
) -> LossOutput:
    """Direct preference optimisation (arXiv:2305.18290 eq. 7) and its family: formulas in `align_kernels.losses.dpo`.

    Args:
        hidden: [2P, T, D], the first half chosen, the second rejected; weight: [V, D]; targets: [2P, T].
        ref_logps: [2P] log-probs of the completions under the reference, summed over tokens; with ld_alpha [2P, T].
        pairs: [2, P] int64, numbers of the chosen and of the rejected sequence of each pair, where hidden and targets
            have B sequences in any order. One that is in several pairs meets the head once. Default None: halves.
        beta: strength of the tie to the reference, > 0. Default 0.1.
        loss_type: "sigmoid" (default), "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
            "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "dpop", or several in a
            list, or with commas between (MPO; "sigmoid,sft" is RPO). The aot types sort the pairs of one call.
        label_smoothing: share of wrong labels assumed, in [0, 0.5): cDPO with "sigmoid". Default 0.0.
        loss_weights: one per loss type of a list. Default None: 1.0 each.
        average: whether "ipo" scores a completion by its mean over tokens. Default True.
        f_divergence_type: "reverse_kl" (default), "forward_kl", "js_divergence", "alpha_divergence", for the loss types
            that read the difference of two scores alone.
        f_alpha_divergence_coef: of "alpha_divergence", as TRL's 1 - alpha of arXiv:2309.16240: 0 is "forward_kl",
            towards 1 it becomes "reverse_kl". Default 0.5.
        ld_alpha: LD-DPO's weight of the tokens beyond the pair's shorter completion, in [0, 1]. Not with `pairs`.
            Default None: 1.0.
        use_weighting: WPO's weight of each pair by the policy's own probabilities. Default False; not with aot.
        discopop_tau: temperature of "discopop", > 0. Default 0.05.
        dpop_lambda: weight of "dpop"'s penalty on chosen log-probs below the reference's, >= 0. Default 50.0.
        num_items: the normaliser. Default None: the P pairs of this call.
        num_tokens: the normaliser of "sft". Default None: the chosen tokens of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi; further options of the
            loss types.

    Returns:
        LossOutput; logps [2P]; metrics rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins,
        logps/chosen, logps/rejected, logits/chosen, logits/rejected (of each pair), entropy, mean_token_accuracy.

    Raises:
        ValueError: an odd number of sequences; pairs that are not among them; an unknown name; a number out of range;
            an option that none of the loss types reads, or that one of them cannot take.
    """
    check_call(dpo_loss)
    types = tuple(loss_type.split(",") if isinstance(loss_type, str) else loss_type)
    check_pairs("dpo_loss", targets, pairs)
    for name in types or ("",):
        check_one_of("loss_type", name, PAIR_LOSSES)
    check_one_of("f_divergence_type", f_divergence_type, F_DIVERGENCES)
    check_positive(beta=beta)
    options = options_of(
        PAIR_LOSSES, types, head, label_smoothing=label_smoothing, average=average, discopop_tau=discopop_tau,
        dpop_lambda=dpop_lambda,
    )  # fmt: skip
    by_batch = any(PAIR_LOSSES[name].facts.unit == "batch" for name in types)
    check_mixture(types, loss_weights, f_divergence_type, use_weighting and by_batch)
    if ld_alpha is not None and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must lie in [0, 1], got {ld_alpha}")
    if ld_alpha is not None and pairs is not None:
        raise ValueError("ld_alpha weighs a completion's tokens by the one other of its pair: pass halves, not pairs")
    mask, tail = kept(targets, head), None
    if ld_alpha is None:
        check_shape("ref_logps", ref_logps, targets.shape[:1])
    else:
        check_shape("ref_logps with ld_alpha", ref_logps, targets.shape)
        tail = tail_of(mask)
        ref_logps = (ref_logps.double().where(mask, 0.0) * (1 - (1 - ld_alpha) * tail)).sum(1)
    side: dict[str, Tensor | None] = {"ref_logps": ref_logps, "tail": tail, "nll_weight": None, PAIRED: pairs}
    if "sft" in types:
        chosen, _ = ends_of(targets, pairs)
        side["nll_weight"] = share(num_items, max(len(chosen), 1), mask.sum(1)[chosen].sum(), num_tokens)
    hyper = options | {"beta": beta, "loss_type": types, "loss_weights": loss_weights, "ld_alpha": ld_alpha}
    hyper |= {"f_divergence_type": f_divergence_type, "use_weighting": bool(use_weighting)}
    if f_divergence_type == "alpha_divergence":
        hyper["f_alpha_divergence_coef"] = f_alpha_divergence_coef
    unit = "batch" if by_batch else None
    return pair_output(run_loss("dpo", hyper, hidden, weight, targets, side, num_items, head, unit=unit), pairs)


def check_mixture(
    types: tuple[str, ...], loss_weights: Sequence[float] | None, f_divergence_type: str, weighs_sorted: bool
) -> None:
    """What single options of the family cannot stand beside."""
    if loss_weights is not None and len(loss_weights) != len(types):
        raise ValueError(f"loss_weights needs one per loss type: got {len(loss_weights)} for {', '.join(types)}")
    rest = {name for name in types if not PAIR_LOSSES[name].facts.divergences}
    if f_divergence_type != "reverse_kl" and rest:
        raise ValueError(
            f"f_divergence_type={f_divergence_type!r} has no meaning for {', '.join(sorted(rest))}, which read more "
            "than the difference of two scores: use reverse_kl"
        )
    if weighs_sorted:
        raise ValueError(f"use_weighting weights pairs, which {', '.join(types)} sorts apart: set it to False")


def tail_of(mask: Tensor) -> Tensor:
    """1.0 at the tokens beyond the length of their pair's shorter completion, else 0.0, (2P, T)."""
    shorter = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    return (mask & (mask.cumsum(1) > shorter[:, None])).double()
