"""Every loss written again in float64, on whole tensors of log-probs: what the fused losses are measured against.

A row is the fused call and its formula. Formulas read `Batch`: log-probs and entropies [B, T] that are 0 where a target
is ignored, the mask, and the constants of the calls.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import align_kernels as ak

B, T, V, D = 8, 9, 61, 12
LENGTHS = (9, 4, 1, 6, 3, 7, 0, 5)
PAIRS = B // 2


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
TARGETS[torch.arange(T) >= torch.tensor(LENGTHS)[:, None]] = -100
MASK = TARGETS != -100
COUNT = MASK.sum(1)
LEN = COUNT.clamp(min=1)
TOKENS = int(MASK.sum())


def tensors() -> dict[str, Tensor]:
    return {"hidden": normal(B, T, D, seed=0), "weight": normal(V, D, seed=1) * 0.6}


def softmax(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and log sum p^2 [B, T], 0 where ignored."""
    log_p = (leaves["hidden"] @ leaves["weight"].T).log_softmax(-1)
    logp = log_p.gather(-1, TARGETS.clamp(min=0)[..., None])[..., 0]
    return logp * MASK, -(log_p.exp() * log_p).sum(-1) * MASK, (2 * log_p).logsumexp(-1) * MASK


NEAR = softmax(tensors())[0]  # float32, of the very policy
REF = NEAR + 0.4 * normal(B, T, seed=4) * MASK
OLD = NEAR + 0.3 * normal(B, T, seed=5) * MASK
SAMPLED = OLD + 0.3 * normal(B, T, seed=6) * MASK
SAMPLED[0, 2] = torch.nan  # a token that the sampler did not score
ADV = normal(B, seed=7)
ADV_T = normal(B, T, seed=8)
MARKS = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()


@dataclasses.dataclass
class Batch:
    """One batch in float64, from leaves that the formulas are differentiated through."""

    logp: Tensor  # [B, T]
    entropy: Tensor
    lssp: Tensor  # log sum p^2

    @property
    def sums(self) -> Tensor:
        return self.logp.sum(1)

    @property
    def ratio(self) -> tuple[Tensor, Tensor]:
        """D of the chosen and of the rejected."""
        d = (self.logp - REF).sum(1)
        return d[:PAIRS], d[PAIRS:]


def ls(x: Tensor) -> Tensor:
    """log sigma"""
    return -torch.nn.functional.softplus(-x)


sg = torch.Tensor.detach
Row = tuple[Callable[..., ak.LossOutput], Callable[[Batch], Tensor]]
ROWS: dict[str, Row] = {}


def row(name: str, call: Callable[..., ak.LossOutput], formula: Callable[[Batch], Tensor]) -> None:
    assert name not in ROWS
    ROWS[name] = call, formula


# -- pairs with a reference -----------------------------------------------------------------------------------------
REF_SUMS = REF.double().sum(1)


def dpo(options: dict[str, Any], each: Callable[[Batch], Tensor], name: str = "") -> None:
    """A row of dpo_loss: `each` gives (P,) values."""
    call = lambda h, w, t, **head: ak.dpo_loss(h, w, t, REF_SUMS, **options, **head)  # noqa: E731
    row(f"dpo {name or options}", call, lambda x: each(x).sum() / PAIRS)


def score_table(d: Tensor, kind: str, a: float = 0.5) -> Tensor:
    if kind == "forward_kl":
        return 1 - (-d).exp()
    if kind == "js_divergence":
        return (2 * d.exp() / (1 + d.exp())).log()
    return (d.exp() ** (a - 1) - 1) / (a - 1)


def on_delta(f: Callable[[Tensor], Tensor], beta: float = 0.1) -> Callable[[Batch], Tensor]:
    return lambda x: f(beta * (x.ratio[0] - x.ratio[1]))


def mean_delta(x: Batch, kind: str | None = None) -> Tensor:
    w, l = (d if kind is None else score_table(d, kind) for d in x.ratio)
    return w / LEN[:PAIRS] - l / LEN[PAIRS:]


def nll(x: Batch, coef: float = 1.0) -> Tensor:
    """(P,) values whose mean is coef times the mean over the chosen tokens."""
    return -coef * x.sums[:PAIRS] * PAIRS / COUNT[:PAIRS].sum()


def wpo(x: Batch) -> Tensor:
    w = ((x.logp - x.lssp).sum(1) / LEN).exp().detach()
    return w[:PAIRS] * w[PAIRS:]


def exo(z: Tensor, e: float) -> Tensor:
    q = torch.stack((z.sigmoid(), 1 - z.sigmoid()))
    return (q * (q.log() - torch.tensor([[1 - e], [e]], dtype=torch.float64).log())).sum(0)


dpo({}, on_delta(lambda z: -ls(z)))
dpo(dict(beta=0.7, label_smoothing=0.2), on_delta(lambda z: -0.8 * ls(z) - 0.2 * ls(-z), 0.7))
dpo(dict(loss_type="hinge", beta=0.5), on_delta(lambda z: (1 - z).clamp(min=0), 0.5))
dpo(
    dict(loss_type="robust", label_smoothing=0.3), on_delta(lambda z: (-0.7 * ls(z) + 0.3 * ls(-z)) / 0.4)
)  # fmt: skip
dpo(dict(loss_type="ipo"), lambda x: (mean_delta(x) - 5) ** 2)
dpo(dict(loss_type="ipo", average=False, beta=0.3), on_delta(lambda z: (z / 0.3 - 1 / 0.6) ** 2, 0.3))
dpo(dict(loss_type="exo_pair", label_smoothing=1e-3), on_delta(lambda z: exo(z, 1e-3)))
dpo(
    dict(loss_type="nca_pair"),
    lambda x: -ls(0.1 * x.ratio[0]) - 0.5 * ls(-0.1 * x.ratio[0]) - 0.5 * ls(-0.1 * x.ratio[1]),
)
dpo(dict(loss_type="bco_pair"), lambda x: -ls(0.1 * x.ratio[0]) - ls(-0.1 * x.ratio[1]))
dpo(
    dict(loss_type="sppo_hard", beta=0.4),
    lambda x: (x.ratio[0] - 1.25) ** 2 + (x.ratio[1] + 1.25) ** 2,
)
dpo(
    dict(loss_type="aot", label_smoothing=0.1, beta=0.6),
    lambda x: (lambda z: -0.9 * ls(z) - 0.1 * ls(-z))(
        0.6 * ((x.sums[:PAIRS] - x.sums[PAIRS:]).sort().values - (REF_SUMS[:PAIRS] - REF_SUMS[PAIRS:]).sort().values)
    ),
)
dpo(dict(loss_type="aot_unpaired"), lambda x: -ls(0.1 * (x.ratio[0].sort().values - x.ratio[1].sort().values)))
dpo(dict(loss_type="apo_zero"), lambda x: 1 - (0.1 * x.ratio[0]).sigmoid() + (0.1 * x.ratio[1]).sigmoid())
dpo(
    dict(loss_type="apo_down"),
    lambda x: (0.1 * x.ratio[0]).sigmoid() + 1 - (0.1 * (x.ratio[0] - x.ratio[1])).sigmoid(),
)
dpo(
    dict(loss_type="discopop", beta=0.4),
    on_delta(lambda z: (1 - (z / 0.05).sigmoid()) * -ls(z) + (z / 0.05).sigmoid() * (-z).exp(), 0.4),
)
dpo(
    dict(loss_type="discopop", discopop_tau=0.5),
    on_delta(lambda z: (1 - (z / 0.5).sigmoid()) * -ls(z) + (z / 0.5).sigmoid() * (-z).exp()),
)
dpo(dict(loss_type="sigmoid_norm", beta=2.0), lambda x: -ls(2 * mean_delta(x)))
dpo(
    dict(loss_type="dpop", dpop_lambda=5.0),
    lambda x: -ls(0.1 * (x.ratio[0] - x.ratio[1] - 5 * (-x.ratio[0]).clamp(min=0))),
)
dpo(dict(loss_type="sft"), nll)
dpo(
    dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    lambda x: (
        -0.8 * ls(0.1 * (x.ratio[0] - x.ratio[1])) - 0.2 * ls(0.1 * x.ratio[0]) - 0.2 * ls(-0.1 * x.ratio[1]) + nll(x)
    ),
)
dpo(dict(loss_type=["sigmoid", "sft"]), lambda x: -ls(0.1 * (x.ratio[0] - x.ratio[1])) + nll(x))
for kind in ("forward_kl", "js_divergence", "alpha_divergence"):
    for loss_type in ("sigmoid", "ipo", "sigmoid_norm"):

        def divergent(x: Batch, kind: str = kind, loss_type: str = loss_type) -> Tensor:
            delta = torch.sub(*(score_table(d, kind, 0.3) for d in x.ratio))
            mean = torch.sub(*(score_table(d, kind, 0.3) / n for d, n in zip(x.ratio, LEN.split(PAIRS))))
            return {"sigmoid": -ls(0.1 * delta), "ipo": (mean - 5) ** 2, "sigmoid_norm": -ls(0.1 * mean)}[loss_type]

        dpo(dict(loss_type=loss_type, f_divergence_type=kind, f_alpha_divergence_coef=0.3), divergent)
dpo(dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0), on_delta(lambda z: -ls(z)))
dpo(dict(use_weighting=True), lambda x: -ls(0.1 * (x.ratio[0] - x.ratio[1])) * wpo(x))
dpo(
    dict(use_weighting=True, loss_type=["hinge", "sft"]),
    lambda x: wpo(x) * ((1 - 0.1 * (x.ratio[0] - x.ratio[1])).clamp(min=0) + nll(x)),
)
SHORTER = torch.minimum(COUNT[:PAIRS], COUNT[PAIRS:]).repeat(2)
LD = (
    torch.ones(B, T).double().masked_fill(torch.arange(T) >= SHORTER[:, None], 0.3)
)  # the completions begin at position 0


def ld(x: Batch) -> Tensor:
    d = ((x.logp - REF) * LD).sum(1)
    return -ls(0.1 * (d[:PAIRS] - d[PAIRS:])) + nll(x)


row(
    "dpo ld_alpha",
    lambda h, w, t, **head: ak.dpo_loss(h, w, t, REF, ld_alpha=0.3, loss_type=["sigmoid", "sft"], **head),
    lambda x: ld(x).sum() / PAIRS,
)
row(
    "dpo num_items, num_tokens",
    lambda h, w, t, **head: ak.dpo_loss(
        h, w, t, REF_SUMS, loss_type=["hinge", "sft"], num_items=10, num_tokens=70, **head
    ),
    lambda x: (1 - 0.1 * (x.ratio[0] - x.ratio[1])).clamp(min=0).sum() / 10 - x.sums[:PAIRS].sum() / 70,
)


# -- pairs without a reference --------------------------------------------------------------------------------------
def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:PAIRS], x[PAIRS:]


def pairwise(name: str, call: Callable[..., ak.LossOutput], each: Callable[[Batch], Tensor], **options: Any) -> None:
    run = lambda h, w, t, **head: call(h, w, t, **options, **head)  # noqa: E731
    row(f"{name} {options}", run, lambda x: each(x).sum() / PAIRS)


def gap(x: Batch, average: bool = False, alpha: float = 0.0) -> Tensor:
    score = x.sums / LEN if average else x.sums
    score = (1 - score.exp() ** -alpha) / alpha if alpha else score
    return torch.sub(*halves(score))


pairwise("cpo", ak.cpo_loss, lambda x: -ls(0.1 * gap(x)) + nll(x))
pairwise(
    "cpo", ak.cpo_loss, lambda x: -0.9 * ls(0.3 * gap(x)) - 0.1 * ls(-0.3 * gap(x)) + nll(x, 0.5),
    beta=0.3, label_smoothing=0.1, cpo_alpha=0.5,
)  # fmt: skip
pairwise("cpo", ak.cpo_loss, lambda x: (1 - 0.1 * gap(x)).clamp(min=0), loss_type="hinge", cpo_alpha=0.0)
pairwise("cpo", ak.cpo_loss, lambda x: (gap(x, True) - 5) ** 2 + nll(x), loss_type="ipo")
pairwise("cpo", ak.cpo_loss, lambda x: -ls(2 * gap(x, True) - 0.5) + nll(x), loss_type="simpo", beta=2.0)
pairwise("simpo", ak.simpo_loss, lambda x: -ls(2 * gap(x, True) - 1.2), beta=2.0, simpo_gamma=1.2)
pairwise(
    "simpo", ak.simpo_loss, lambda x: -0.8 * ls(gap(x, True, 0.25) - 0.5) - 0.2 * ls(0.5 - gap(x, True, 0.25)),
    beta=1.0, alpha=0.25, label_smoothing=0.2,
)  # fmt: skip


def orpo(x: Batch) -> Tensor:
    mean = (x.sums / LEN).clamp(max=-1e-12)
    odds = mean.exp() / -torch.expm1(mean)
    return -0.3 * ls((odds[:PAIRS] / odds[PAIRS:]).log())


pairwise("orpo", ak.orpo_loss, lambda x: orpo(x) + nll(x), beta=0.3)
pairwise("slic", ak.slic_loss, lambda x: (1 - gap(x)).clamp(min=0) + nll(x))
pairwise("slic", ak.slic_loss, lambda x: (30 - gap(x)).clamp(min=0) + nll(x, 0.2), delta=30.0, nll_coef=0.2)


# -- marks ----------------------------------------------------------------------------------------------------------
def marked(x: Batch, good: Callable[[Tensor], Tensor], bad: Callable[[Tensor], Tensor], beta: float) -> Tensor:
    d = beta * (x.logp - REF).sum(1)
    return torch.where(MARKS, good(d), bad(d)).sum() / B


row(
    "kto",
    lambda h, w, t, **head: ak.kto_loss(
        h, w, t, REF_SUMS, MARKS, 0.7, beta=0.3, desirable_weight=1.3, undesirable_weight=0.6, **head
    ),
    lambda x: marked(x, lambda d: 1.3 * (1 - (d - 0.21).sigmoid()), lambda d: 0.6 * (1 - (0.21 - d).sigmoid()), 0.3),
)
row(
    "apo_zero_unpaired",
    lambda h, w, t, **head: ak.kto_loss(h, w, t, REF_SUMS, MARKS, 3.0, loss_type="apo_zero_unpaired", **head),
    lambda x: marked(x, lambda d: 1 - d.sigmoid(), lambda d: d.sigmoid(), 0.1),
)
WEIGHTS = normal(B, seed=9).abs()
row(
    "bco",
    lambda h, w, t, **head: ak.bco_loss(h, w, t, REF_SUMS, MARKS, 0.4, beta=0.3, weights=WEIGHTS, **head),
    lambda x: marked(x, lambda d: -WEIGHTS * ls(d - 0.4), lambda d: -WEIGHTS * ls(0.4 - d), 0.3),
)

# -- tokens ---------------------------------------------------------------------------------------------------------
row("sft", ak.sft_loss, lambda x: -x.logp.sum() / TOKENS)
row(
    "sft dft",
    lambda h, w, t, **head: ak.sft_loss(h, w, t, loss_type="dft", **head),
    lambda x: -(sg(x.logp.exp()) * x.logp).sum() / TOKENS,
)
row(
    "reinforce",
    lambda h, w, t, **head: ak.reinforce_loss(h, w, t, ADV, **head),
    lambda x: -(ADV[:, None] * x.logp).sum() / TOKENS,
)


def surrogate(r: Tensor, a: Tensor, low: float, high: float, delta: float = math.inf) -> Tensor:
    return torch.maximum(-a * r.clamp(max=delta), -a * r.clamp(1 - low, 1 + high))


def ppo(x: Batch, **options: Any) -> Tensor:
    return surrogate((x.logp - OLD).exp(), ADV_T, 0.1, 0.1, **options) * MASK


row(
    "ppo dual clip",
    lambda h, w, t, **head: ak.ppo_clip_loss(h, w, t, OLD, ADV_T, cliprange=0.1, dual_clip=1.2, **head),
    lambda x: ppo(x, delta=1.2).sum() / TOKENS,
)
row(
    "ppo entropy",
    lambda h, w, t, **head: ak.ppo_clip_loss(h, w, t, OLD, ADV_T, cliprange=0.1, entropy_coef=0.2, **head),
    lambda x: (ppo(x) - 0.2 * x.entropy).sum() / TOKENS,
)
for old, name in ((OLD, "tokens"), (OLD.double().sum(1), "sums"), (None, "none")):
    row(
        f"rloo {name}",
        lambda h, w, t, old=old, **head: ak.rloo_loss(h, w, t, old, ADV, epsilon_high=0.3, **head),
        lambda x, old=old: (
            surrogate((x.sums - (x.sums.detach() if old is None else OLD.double().sum(1))).exp(), ADV, 0.2, 0.3).sum()
            / B
        ),
    )


# -- groups ---------------------------------------------------------------------------------------------------------
def ratio(x: Batch, level: str = "token", old: Tensor | None = OLD) -> Tensor:
    log_ratio = (x.logp - (x.logp.detach() if old is None else old)) * MASK
    return (log_ratio.sum(1, keepdim=True) / LEN[:, None] if level == "sequence" else log_ratio).exp().expand(B, T)


def averaged(kind: str, each: Tensor) -> Tensor:
    each = torch.where(MASK, each, 0.0)
    if kind in ("grpo", "sapo", "gmpo"):
        return (each.sum(1) / LEN).sum() / B
    if kind == "luspo":
        return each.sum() / B
    return each.sum() / {"dr_grpo": 11 * B}.get(kind, TOKENS)


def group(options: dict[str, Any], each: Callable[[Batch], Tensor], extra: Callable[[Batch], Any] = lambda x: 0.0):
    """A row of grpo_loss: `each` gives [B, T] values, averaged as its loss type says."""
    kind = options.get("loss_type", "dapo")
    own = {"max_completion_length": 11, "old_logps": OLD, "ref_logps": REF, "use_bias_correction_kl": False} | options
    call = lambda h, w, t, **head: ak.grpo_loss(h, w, t, own["old_logps"], ADV, **rest, **head)  # noqa: E731
    rest = {k: v for k, v in own.items() if k != "old_logps"}
    shown = {k: "tensor" if isinstance(v, Tensor) else v for k, v in options.items()}
    row(f"group {shown}", call, lambda x: averaged(kind, each(x)) + extra(x))


A = ADV[:, None].expand(B, T)
clip = lambda x, level="token", **o: surrogate(ratio(x, level, **o), A, 0.2, 0.2)  # noqa: E731
k3 = lambda x: (REF - x.logp).exp() - (REF - x.logp) - 1  # noqa: E731
for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo"):
    for level in ("token", "sequence"):
        group(dict(loss_type=kind, importance_sampling_level=level), lambda x, level=level: clip(x, level))
group(dict(old_logps=None), lambda x: clip(x, old=None))
group(
    dict(epsilon=0.1, epsilon_high=0.3, delta=1.2, beta=0.3),
    lambda x: surrogate(ratio(x), A, 0.1, 0.3, 1.2) + 0.3 * k3(x),
)
group(dict(beta=0.3, kl_estimator="k1"), lambda x: clip(x) + 0.3 * (x.logp - REF))
group(dict(beta=0.3, kl_estimator="k2"), lambda x: clip(x) + 0.15 * (x.logp - REF) ** 2)
group(dict(beta=0.3, use_bias_correction_kl=True), lambda x: clip(x) + 0.3 * k3(x) * ratio(x))
for level in ("token", "sequence"):
    group(
        dict(loss_type="cispo", epsilon_high=1.1, importance_sampling_level=level),
        lambda x, level=level: -sg(ratio(x, level).clamp(max=1.1)) * A * x.logp,
    )
    group(
        dict(loss_type="sapo", sapo_temperature_neg=2.0, importance_sampling_level=level),
        lambda x, level=level: (lambda tau: -4 / tau * (tau * (ratio(x, level) - 1)).sigmoid() * A)(
            torch.where(A > 0, 1.0, 2.0)
        ),
    )


def phi(x: Batch, sampler: Tensor | None = None) -> Tensor:
    w = sg(((x.logp - OLD) * MASK).sum(1).exp())
    if sampler is not None:
        w = w * torch.where(MASK, sampler.clamp(min=1e-8), 1.0).prod(1)
    w, k = w.clamp(1e-8, math.exp(20)), torch.where(ADV >= 0, 2.0, 3.0)
    rate = torch.where(ADV >= 0, 3.0, 2.0).double()
    return (rate.exp() * w**k * (-rate * w).exp())[:, None]


group(dict(loss_type="vespo"), lambda x: -phi(x) * A * x.logp)


def geometric(x: Batch, old: Tensor, low: float, high: float, kept: Tensor = MASK) -> Tensor:
    """The geometric mean of a sequence's ratios, each bounded where it speaks for itself, times -A."""
    r = (x.logp - old).exp()
    bounded = torch.where(
        A > 0, torch.minimum(r, r.clamp(max=math.exp(high))), torch.maximum(r, r.clamp(math.exp(-low)))
    )
    kept = kept.double()
    return -A * torch.where(kept > 0, bounded, 1.0).prod(1, keepdim=True) ** (
        1 / kept.sum(1, keepdim=True).clamp(min=1)
    )


group(dict(loss_type="gmpo", epsilon=0.1, beta=0.3), lambda x: geometric(x, OLD, 0.1, 0.1) + 0.3 * k3(x))
group(dict(loss_type="gmpo", epsilon_high=0.4), lambda x: geometric(x, OLD, 0.2, 0.4))
group(dict(loss_type="gmpo", old_logps=None), lambda x: geometric(x, sg(x.logp), 0.2, 0.2))


def sampler_ratio(old: Tensor, mode: str, low: float, high: float) -> Tensor:
    difference = torch.where(MASK, old.double() - SAMPLED, 0.0).nan_to_num(nan=0.0)
    found = (difference.sum(1, keepdim=True) if "sequence" in mode else difference).exp().expand(B, T)
    return found.clamp(low, high) if "truncate" in mode else torch.where((found < low) | (found > high), 0.0, found)


for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"):
    name, high = "vllm_importance_sampling_", 1.3
    bounds = {f"{name}mode": mode, f"{name}clip_min": 0.7, f"{name}clip_max": high, "sampling_logps": SAMPLED}
    group(
        bounds | dict(beta=0.2), lambda x, mode=mode: clip(x) * sampler_ratio(OLD, mode, 0.7, 1.3) + 0.2 * k3(x)
    )  # fmt: skip
    group(
        bounds | dict(old_logps=None),
        lambda x, mode=mode: clip(x, old=None) * sampler_ratio(x.logp.detach(), mode, 0.7, 1.3),
    )
    if mode.startswith("token"):
        group(
            bounds | dict(loss_type="vespo"),
            lambda x, mode=mode: -phi(x, sampler_ratio(OLD, mode, 0.7, 1.3)) * A * x.logp,
        )


def on_policy(x: Batch, sampled: Tensor, threshold: float) -> Tensor:
    kl = torch.where(MASK, sampled - sg(x.logp), 0.0).nan_to_num(nan=0.0).sum(1) / LEN
    return ((ADV >= 0) | (kl <= threshold))[:, None].double()


group(
    dict(off_policy_mask_threshold=0.02, beta=0.2),
    lambda x: clip(x) * on_policy(x, OLD, 0.02) + 0.2 * k3(x),
)
group(
    dict(off_policy_mask_threshold=0.02, sampling_logps=SAMPLED, vllm_importance_sampling_mode="token_truncate"),
    lambda x: clip(x) * on_policy(x, SAMPLED, 0.02) * sampler_ratio(OLD, "token_truncate", 0.0, 3.0),
)


def decisive(x: Batch, share: float) -> Tensor:
    least = torch.quantile(x.entropy[MASK].detach(), 1 - share)
    return ((x.entropy >= least) & MASK).double().detach()


group(dict(top_entropy_quantile=0.4, beta=0.2), lambda x: clip(x) * decisive(x, 0.4) + 0.2 * k3(x))
group(
    dict(loss_type="gmpo", top_entropy_quantile=0.4, epsilon=0.1),
    lambda x: geometric(x, OLD, 0.1, 0.1, decisive(x, 0.4)),
)
group(dict(entropy_coef=0.3), clip, lambda x: -0.3 * x.entropy.sum() / TOKENS)
group(dict(entropy_coef=0.3, loss_type="grpo"), clip, lambda x: -0.3 * x.entropy.sum() / TOKENS)
group(
    dict(entropy_coef=0.3, top_entropy_quantile=0.4),
    lambda x: clip(x) * decisive(x, 0.4),
    lambda x: -0.3 * (x.entropy * decisive(x, 0.4)).sum() / decisive(x, 0.4).sum(),
)
