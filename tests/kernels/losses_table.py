"""Calls of every fused loss on one small batch, each beside its formula in float64 (formulas.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import align_kernels as ak

from . import formulas
from .formulas import Batch

B, T, V, D = 8, 9, 61, 12
LENGTHS = (9, 4, 1, 6, 3, 7, 0, 5)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
TARGETS[torch.arange(T) >= torch.tensor(LENGTHS)[:, None]] = -100
MASK = TARGETS != -100
TOKENS = int(MASK.sum())


def tensors() -> dict[str, Tensor]:
    return {"hidden": normal(B, T, D, seed=0), "weight": normal(V, D, seed=1) * 0.6}


def batch(leaves: dict[str, Tensor]) -> Batch:
    return batch_of(leaves["hidden"] @ leaves["weight"].T + leaves.get("bias", 0.0))


def batch_of(logits: Tensor) -> Batch:
    """What is known of the targets, from whole logits."""
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, TARGETS.clamp(min=0)[..., None])[..., 0] * MASK
    entropy, lssp = -(log_p.exp() * log_p).sum(-1) * MASK, (2 * log_p).logsumexp(-1) * MASK
    return Batch(logp, entropy, MASK, lssp, logits.mean(-1) * MASK, logits.argmax(-1) == TARGETS)


NEAR = batch(tensors()).logp  # float32, of the very policy
REF = NEAR + 0.4 * normal(B, T, seed=4) * MASK
REF_SUMS = REF.double().sum(1)
OLD = NEAR + 0.3 * normal(B, T, seed=5) * MASK
SAMPLED = OLD + 0.3 * normal(B, T, seed=6) * MASK
SAMPLED[0, 2] = torch.nan  # a token that the sampler did not score
ADV = normal(B, seed=7)
ADV_T = normal(B, T, seed=8)
MARKS = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()


class Row(NamedTuple):
    call: Callable[..., ak.LossOutput]  # (hidden, weight, targets, **head)
    formula: Callable[[Batch], Tensor]
    metrics: Callable[[Batch], dict[str, Tensor]] | None


ROWS: dict[str, Row] = {}


def row(loss: str, *sides: Any, name: str = "", measured: bool = True, **options: Any) -> None:
    """One call: tensors of the batch, and options. Its name shows the options, and `name`."""
    given = {key: x for key, x in options.items() if not isinstance(x, Tensor) and key not in CONSTANT}
    shown = " ".join([loss.removesuffix("_loss"), *filter(None, [name]), *(f"{k}={v}" for k, v in given.items())])
    assert shown not in ROWS, shown
    ROWS[shown] = Row(
        lambda h, w, t, **head: getattr(ak, loss)(h, w, t, *sides, **options, **head),
        lambda x: getattr(formulas, loss)(x, *sides, **options),
        (lambda x: formulas.METRICS[loss](x, *sides, **options)) if measured and loss in formulas.METRICS else None,
    )


CONSTANT = ("max_completion_length", "use_bias_correction_kl")

# -- pairs with a reference -----------------------------------------------------------------------------------------
for given in (
    dict(),
    dict(beta=0.7, label_smoothing=0.2),
    dict(loss_type="hinge", beta=0.5),
    dict(loss_type="robust", label_smoothing=0.3),
    dict(loss_type="ipo"),
    dict(loss_type="ipo", average=False, beta=0.3),
    dict(loss_type="exo_pair", label_smoothing=1e-3),
    dict(loss_type="nca_pair"),
    dict(loss_type="bco_pair"),
    dict(loss_type="sppo_hard", beta=0.4),
    dict(loss_type="aot", label_smoothing=0.1, beta=0.6),
    dict(loss_type="aot_unpaired"),
    dict(loss_type="apo_zero"),
    dict(loss_type="apo_down"),
    dict(loss_type="discopop", beta=0.4),
    dict(loss_type="discopop", discopop_tau=0.5),
    dict(loss_type="sigmoid_norm", beta=2.0),
    dict(loss_type="dpop", dpop_lambda=5.0),
    dict(loss_type="sft"),
    dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    dict(loss_type=["sigmoid", "sft"]),
    dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
    dict(use_weighting=True),
    dict(use_weighting=True, loss_type=["hinge", "sft"]),
    dict(loss_type=["hinge", "sft"], num_items=10, num_tokens=70),
):
    row("dpo_loss", REF_SUMS, **given)
for kind in ("forward_kl", "js_divergence", "alpha_divergence"):
    for loss_type in ("sigmoid", "ipo", "sigmoid_norm"):
        row("dpo_loss", REF_SUMS, loss_type=loss_type, f_divergence_type=kind, f_alpha_divergence_coef=0.3)
row("dpo_loss", REF, loss_type=["sigmoid", "sft"], ld_alpha=0.3, measured=False)

# -- pairs without a reference --------------------------------------------------------------------------------------
row("cpo_loss")
row("cpo_loss", beta=0.3, label_smoothing=0.1, cpo_alpha=0.5)
row("cpo_loss", loss_type="hinge", cpo_alpha=0.0)
row("cpo_loss", loss_type="ipo")
row("cpo_loss", loss_type="simpo", beta=2.0)
row("simpo_loss", beta=2.0, simpo_gamma=1.2)
row("simpo_loss", beta=1.0, alpha=0.25, label_smoothing=0.2)
row("orpo_loss", beta=0.3)
row("slic_loss")
row("slic_loss", delta=30.0, nll_coef=0.2)

# -- marks ----------------------------------------------------------------------------------------------------------
WEIGHED = dict(beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
ALL_GOOD = torch.ones(B, dtype=torch.bool)
for word, marks in (("both", MARKS), ("desirable alone", ALL_GOOD), ("undesirable alone", ~ALL_GOOD)):
    for point, kl in (("0", 0.0), ("a number", torch.tensor(0.7)), ("each its own", normal(B, seed=10).abs())):
        row("kto_loss", REF_SUMS, marks, kl, name=f"{word}, kl {point}", **WEIGHED)
row("kto_loss", REF_SUMS, MARKS, 3.0, loss_type="apo_zero_unpaired")
row("bco_loss", REF_SUMS, MARKS, 0.4, beta=0.3, weights=normal(B, seed=9).abs())

# -- tokens ---------------------------------------------------------------------------------------------------------
row("sft_loss")
row("sft_loss", loss_type="dft")
row("reinforce_loss", ADV)
row("ppo_clip_loss", OLD, ADV_T, cliprange=0.15)
row("ppo_clip_loss", OLD, ADV_T, cliprange=0.1, dual_clip=1.2)
row("ppo_clip_loss", OLD, ADV_T, cliprange=0.1, entropy_coef=0.2)
for name, old in (("tokens", OLD), ("sums", OLD.double().sum(1)), ("none", None)):
    row("rloo_loss", old, ADV, epsilon_high=0.3, name=name)


# -- groups ---------------------------------------------------------------------------------------------------------
def group(old: Tensor | None = OLD, advantages: Tensor = ADV, name: str = "", **options: Any) -> None:
    """A call of grpo_loss."""
    clipped = options.get("loss_type", "dapo") in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
    own: dict[str, Any] = dict(max_completion_length=11, ref_logps=REF, use_bias_correction_kl=False)
    name = " ".join(filter(None, [name, "" if old is not None else "on policy"]))
    row("grpo_loss", old, advantages, name=name, measured=clipped, **own | options)


for kind, level, given in itertools.product(
    ("grpo", "bnpo", "dr_grpo", "dapo"),
    ("token", "sequence"),
    (dict(), dict(epsilon=0.1, epsilon_high=0.28, delta=1.5, beta=0.04), dict(delta=1.05), dict(beta=0.5)),
):
    group(loss_type=kind, importance_sampling_level=level, **given)
for level in ("token", "sequence"):
    group(loss_type="luspo", importance_sampling_level=level)
    for name, advantages in (("", ADV), ("an advantage per token", ADV_T)):
        group(None, advantages, name, loss_type="grpo", importance_sampling_level=level)
    group(loss_type="cispo", epsilon_high=1.1, importance_sampling_level=level)
    group(loss_type="sapo", sapo_temperature_neg=2.0, importance_sampling_level=level)
group(None)
group(epsilon=0.1, epsilon_high=0.3, delta=1.2, beta=0.3)
group(beta=0.3, kl_estimator="k1")
group(beta=0.3, kl_estimator="k2")
group(beta=0.3, use_bias_correction_kl=True, name="unbiased")
group(loss_type="vespo")
group(loss_type="gmpo", epsilon=0.1, beta=0.3)
group(loss_type="gmpo", epsilon_high=0.4)
group(None, loss_type="gmpo")
for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
    prefix = "vllm_importance_sampling_"
    bounds = {f"{prefix}mode": mode, f"{prefix}clip_min": 0.7, f"{prefix}clip_max": 1.3, "sampling_logps": SAMPLED}
    group(beta=0.2, **bounds)
    group(None, **bounds)
    if mode.startswith("token"):
        group(loss_type="vespo", **bounds)
group(off_policy_mask_threshold=0.02, beta=0.2)
group(off_policy_mask_threshold=0.02, sampling_logps=SAMPLED, vllm_importance_sampling_mode="token_truncate")
group(top_entropy_quantile=0.4, beta=0.2)
group(loss_type="gmpo", top_entropy_quantile=0.4, epsilon=0.1)
group(entropy_coef=0.3)
group(entropy_coef=0.3, loss_type="grpo")
group(entropy_coef=0.3, top_entropy_quantile=0.4)
