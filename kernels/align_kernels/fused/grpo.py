"""Fused group-relative policy optimisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from align_kernels.arguments import check_call
from align_kernels.fused.core import (
    Items,
    LossOutput,
    check_one_of,
    check_shape,
    kept,
    of_family,
    options_of,
    output,
    run_loss,
    share,
)
from align_kernels.fused.ppo import check_epsilon, per_token
from align_kernels.losses.corrections import IS_MODES
from align_kernels.losses.family import check_unread
from align_kernels.losses.grpo import LOSS_TYPES, TERMS, token_weights
from align_kernels.losses.kl import KL_ESTIMATORS
from align_kernels.losses.registry import Unit

LEVELS = ("token", "sequence")
WITH_DELTA = [name for name, kind in LOSS_TYPES.items() if "delta" in TERMS[kind.term].options]


@of_family(TERMS)
def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    ref_logps: Tensor | None = None,
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = True,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    entropy_coef: float = 0.0,
    top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    sampling_logps: Tensor | None = None,
    vllm_importance_sampling_mode: str = "sequence_mask",
    vllm_importance_sampling_clip_min: float | None = None,
    vllm_importance_sampling_clip_max: float | None = 3.0,
    num_items: Items = None,
    num_tokens: Items = None,
    **head,
) -> LossOutput:
    """Group-relative policy optimisation (arXiv:2402.03300): per token, with r = pi / pi_old,

        l_t = keep_t * sampler_t * term_t + beta r KL_t
        term  clip   -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)
              cispo  -sg(min(r, epsilon_high)) A log pi
              sapo   -(4 / tau) sigma(tau (r - 1)) A
              vespo  -sg(phi(w)) A log pi, phi(w) = e^lambda w^k e^(-lambda w), w the sequence's ratio
              gmpo   -A exp(mean over the sequence of c), c = min(log r, epsilon_high) where A > 0, else
                     max(log r, -epsilon)

    and over the B sequences o of the call, divided by `num_items`, minus entropy_coef * mean entropy:

        loss_type   term   sum of                                            num_items counts   default
        "grpo"      clip   mean of l_t over each sequence                    sequences          B
        "bnpo"      clip   mean of l_t over all tokens of the call           calls              1
        "dr_grpo"   clip   sum of l_t / max_completion_length, 2503.20783    sequences          B
        "dapo"      clip   l_t, arXiv:2503.14476 eq. 8                       tokens             kept tokens of this call
        "luspo"     clip   l_t, arXiv:2602.05261                             sequences          B
        "cispo"     cispo  l_t, arXiv:2506.13585                             tokens             kept tokens of this call
        "sapo"      sapo   mean of l_t over each sequence, arXiv:2511.20347  sequences          B
        "vespo"     vespo  l_t, arXiv:2602.10693                             tokens             kept tokens of this call
        "gmpo"      gmpo   mean of l_t over each sequence, arXiv:2507.20673  sequences          B

    Args:
        hidden: [B, T, D]; weight: [V, D]; targets: [B, T].
        old_logps: [B, T] log-probs under the policy that sampled, or None where that is the present policy.
        advantages: [B] or [B, T].
        loss_type: see above. Default "dapo".
        epsilon, epsilon_high: limits of the ratio below and above 1. Defaults 0.2 and None: epsilon. For "cispo"
            epsilon_high is the ratio's own limit and has no default (ScaleRL: 5.0). For "gmpo" they limit the log-ratio
            below and above 0 (the paper: 0.4).
        delta: the ratio's upper limit before the minimum, for negative advantages: dual clip. Default None.
        beta: weight of the KL term. Default 0.0: ref_logps is not needed.
        ref_logps: [B, T] log-probs under the reference.
        importance_sampling_level: "token", or "sequence": one ratio exp(mean log r) per sequence (GSPO).
        max_completion_length: needed by "dr_grpo".
        kl_estimator: "k3" (default), "k2" or "k1" of `align_kernels.losses.kl`.
        use_bias_correction_kl: multiply the KL by r, which makes its gradient that of the KL (arXiv:2512.02556).
            Default True, as TRL since 1.16.
        sapo_temperature_pos, sapo_temperature_neg: tau where A > 0 and elsewhere. Defaults 1.0 and 1.05.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: k and lambda where A >= 0, and elsewhere.
        entropy_coef: weight of the mean entropy of the tokens. Default 0.0.
        top_entropy_quantile: share of this call's tokens, those of highest entropy, that the term and the bonus act on
            (of "gmpo": that its mean is taken over). Default 1.0: all.
        off_policy_mask_threshold: drop the term of sequences with A < 0 whose mean log mu - log pi exceeds it, mu being
            sampling_logps or else old_logps. Default None: keep all.
        sampling_logps: [B, T] log-probs that a foreign sampler gave, NaN where it gave none: corrects the term by the
            bounded ratio of old_logps (or the present policy) over them. Default None: no correction.
        vllm_importance_sampling_mode: "sequence_mask" (default), "sequence_truncate", "token_mask", "token_truncate":
            a ratio per sequence or token that is 0, or clipped, outside of
        vllm_importance_sampling_clip_min, vllm_importance_sampling_clip_max: defaults None and 3.0.
        num_items: the normaliser, one for all micro-batches of a window. Default None: see above.
        num_tokens: the normaliser of the entropy bonus. Default None: the kept tokens of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi; further options of the
            term.

    Returns:
        LossOutput; logps [B, T]; metrics entropy, mean_token_accuracy, kl (beta > 0), and by term clip_ratio/low_mean,
        clip_ratio/high_mean, clip_ratio/region_mean, cispo_clip_ratio or vespo/phi_seq_mean: means over tokens.

    Raises:
        ValueError: an unknown name, a missing ref_logps, max_completion_length or epsilon_high, an option that the loss
            type does not read, numbers out of range, shapes that do not fit.
    """
    check_call(grpo_loss)
    check_one_of("loss_type", loss_type, LOSS_TYPES)
    term, _, counts = LOSS_TYPES[loss_type]
    check_one_of("importance_sampling_level", importance_sampling_level, LEVELS)
    check_one_of("kl_estimator", kl_estimator, KL_ESTIMATORS)
    check_one_of("vllm_importance_sampling_mode", vllm_importance_sampling_mode, IS_MODES)
    high = check_epsilon(epsilon, epsilon_high)
    options = options_of(TERMS, (term,), head) | dict(
        epsilon=epsilon, epsilon_high=high, delta=delta, sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg, vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg,
    )  # fmt: skip
    TERMS.check_ranges((term,), options)
    check_unread("delta", delta, None, WITH_DELTA, (loss_type,))
    check_combination(loss_type, importance_sampling_level, epsilon_high, sampling_logps, vllm_importance_sampling_mode)
    if not 0 < top_entropy_quantile <= 1:
        raise ValueError(f"top_entropy_quantile must lie in (0, 1], got {top_entropy_quantile}")
    if targets.dim() != 2:
        raise ValueError(f"grpo_loss needs targets [B, T], one row per completion, got shape {tuple(targets.shape)}")
    if beta and ref_logps is None:
        raise ValueError(f"beta={beta} needs ref_logps [B, T]; pass them or beta=0.0")
    side: dict[str, Tensor | None] = {"old_logps": old_logps, "sampling_logps": sampling_logps}
    side["ref_logps"] = ref_logps if beta else None
    for name, x in side.items():
        if x is not None:
            check_shape(name, x, targets.shape)
    mask = kept(targets, head)
    side["advantages"] = per_token("advantages", advantages, targets)
    side["weights"] = token_weights(loss_type, mask, max_completion_length)
    if num_items is None and counts != "tokens":
        num_items = 1 if counts == "calls" else max(len(targets), 1)
    if entropy_coef:
        tokens = mask.sum().clamp(min=1)
        side["entropy_weight"] = share(tokens if num_items is None else num_items, 1, tokens, num_tokens)
    hyper = options | dict(
        term=term, level=importance_sampling_level, beta=beta, kl_estimator=kl_estimator,
        use_bias_correction_kl=bool(use_bias_correction_kl), entropy_coef=entropy_coef,
        top_entropy_quantile=top_entropy_quantile, off_policy_mask_threshold=off_policy_mask_threshold,
    )  # fmt: skip
    if sampling_logps is not None:
        hyper |= dict(
            vllm_importance_sampling_mode=vllm_importance_sampling_mode,
            vllm_importance_sampling_clip_min=vllm_importance_sampling_clip_min,
            vllm_importance_sampling_clip_max=vllm_importance_sampling_clip_max,
        )
    out = run_loss("grpo", hyper, hidden, weight, targets, side, num_items, head, unit=unit_of(hyper))
    unmeasured = {name for other in TERMS.values() for name in other.facts.metrics} - set(TERMS[term].facts.metrics)
    unmeasured |= set() if beta else {"kl"}
    return output(out.loss, {k: v for k, v in out.measured.items() if k not in unmeasured}, out.logps)


def unit_of(hyper: Mapping[str, Any]) -> Unit:
    """The smallest piece of a batch at which a call with these hyper-parameters is closed."""
    if hyper["top_entropy_quantile"] < 1:
        return "batch"
    whole = hyper["level"] == "sequence" or TERMS[hyper["term"]].facts.by_sequence
    whole |= hyper["off_policy_mask_threshold"] is not None
    whole |= hyper.get("vllm_importance_sampling_mode", "token").startswith("sequence")
    return "sequence" if whole else "token"


def check_combination(
    loss_type: str, level: str, epsilon_high: float | None, sampling_logps: Tensor | None, mode: str
) -> None:
    """What single options of the family cannot stand beside."""
    if loss_type == "cispo" and epsilon_high is None:
        raise ValueError("cispo limits the ratio itself to epsilon_high: pass it, ScaleRL takes 5.0")
    if TERMS[LOSS_TYPES[loss_type].term].facts.by_sequence and level == "sequence":
        raise ValueError(f'{loss_type} weighs sequences by itself: pass importance_sampling_level="token"')
    if loss_type == "vespo" and sampling_logps is not None and mode.startswith("sequence"):
        raise ValueError(
            "vespo multiplies the sampler's ratios over a sequence itself: pass vllm_importance_sampling_mode "
            f'"token_truncate" or "token_mask", got {mode!r}'
        )
