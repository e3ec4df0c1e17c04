"""Coefficients of some losses on the GPU (csrc/cuda/coefficients.h), found by the loss's name and hyper-parameters.

An accelerator: what a loss is stands in `align_kernels.losses` alone. A name or an option that is not known here is not
served, and the loss's own definition is differentiated instead. Options that a call does not read do not come here
(`Loss.read`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from align_kernels.backends.arguments import Clamp, Transform, address
from align_kernels.backends.cuda import arguments
from align_kernels.backends.cuda.arguments import checks, gradient, guard, logits, queue

DPO = {"sigmoid": 0, "robust": 1, "hinge": 2, "ipo": 3}
METRICS = 4


class Known(NamedTuple):
    """What the kernels know of a loss."""

    code: int
    side: frozenset[str]  # tensors that must be given
    optional: frozenset[str] = frozenset()  # tensors that may be given
    taken: Mapping[str, Any] = {}  # options that the kernel takes, and their defaults
    # options that must be as they are here, which leaves them alone
    neutral: Mapping[str, Any] = {}


TOKEN = {
    "sft": Known(0, frozenset(), neutral=dict(loss_type="nll")),
    "ppo_clip": Known(
        1, frozenset({"old_logps", "advantages"}), taken=dict(cliprange=0.2, dual_clip=None, entropy_coef=0.0)
    ),
    "grpo": Known(
        2,
        frozenset({"advantages", "weights"}),
        frozenset({"old_logps", "ref_logps"}),
        taken=dict(epsilon=0.2, epsilon_high=0.2, delta=None, beta=0.0, use_bias_correction_kl=False),
        neutral=dict(
            term="clip", level="token", kl_estimator="k3", entropy_coef=0.0,
            top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        ),
    ),
}  # fmt: skip
UNIT = {
    "dpo": Known(
        0,
        frozenset({"ref_logps"}),
        taken=dict(beta=0.1, loss_type="sigmoid", label_smoothing=0.0),
        neutral=dict(
            loss_weights=None, average=True, f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False
        ),
    ),
    "kto": Known(
        4,
        frozenset({"ref_logps", "desirable"}),
        frozenset({"kl"}),
        taken=dict(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
    ),
}
LOSSES = TOKEN | UNIT


def serves(name: str, hyper: Mapping[str, Any], given: Iterable[str]) -> bool:
    """Whether the loss `name` with these options and side tensors is known, and known whole."""
    known, given = LOSSES.get(name), set(given)
    if known is None or not known.side <= given <= known.side | known.optional:
        return False
    rest = {key: value for key, value in hyper.items() if key not in known.taken}
    if any(key not in known.neutral or known.neutral[key] != value for key, value in rest.items()):
        return False
    if name == "grpo" and hyper.get("beta") and "ref_logps" not in given:
        return False
    return name != "dpo" or _dpo_type(hyper) in DPO


def _dpo_type(hyper: Mapping[str, Any]) -> str | None:
    names = hyper.get("loss_type", "sigmoid")
    return names if isinstance(names, str) else names[0] if len(names) == 1 else None


class TokenValues(NamedTuple):
    values: Tensor  # (n,) before the factor
    metrics: Tensor  # (4, n) in the order of the loss's metrics


class UnitValues(NamedTuple):
    values: Tensor  # (units,) before the factor
    metrics: Tensor  # (4, units) in the order of the loss's metrics; of kto (0, units)
    g: Tensor  # (n,) dL/dlogp, with the factor


def token_loss(
    name: str,
    hyper: Mapping[str, Any],
    z: Tensor,  # (n, V) raw logits, whole rows
    state: Tensor,  # (n, 8) float64, empty; finished on return
    targets: Tensor,  # (n,) int64
    side: dict[str, Tensor],  # (n,) float32
    factor: Tensor,  # () float64, of the sum over tokens
    *,
    clamp: Clamp | None,
    out: Tensor,  # (n, V), may be z
    shared: int = -1,  # bytes of a row that wait on the chip for its coefficient, < 0: all there are
    **transform: Unpack[Transform],
) -> TokenValues:
    """Statistics, coefficient and dL/dz of whole rows in one kernel, for a loss of single tokens.

    Raises:
        ValueError: a loss that is not served, or as in `backward`.
    """
    if name not in TOKEN or not serves(name, hyper, side):
        raise ValueError(f"no fused coefficient of tokens for {name} with {hyper} and {sorted(side)}")
    on, n = checks("z", z), len(z)
    tile = logits(on, z, targets, **transform)
    on.state(state, n)
    on.tensor("factor", factor, torch.float64, ())
    for key, x in side.items():
        on.tensor(key, x, torch.float32, (n,))
    made = TokenValues(*(torch.empty(shape, device=z.device) for shape in ((n,), (METRICS, n))))
    o = {**TOKEN[name].taken, **hyper}
    delta = o.get("dual_clip" if name == "ppo_clip" else "delta")
    loss = arguments._cuda.TokenLoss(
        kind=TOKEN[name].code,
        epsilon_low=o.get("epsilon", o.get("cliprange", 0.0)),
        epsilon_high=o.get("epsilon_high", o.get("cliprange", 0.0)),
        delta=math.inf if delta is None else delta,
        beta=o.get("beta", 0.0),
        entropy_coef=o.get("entropy_coef", 0.0),
        on_policy="old_logps" not in side,
        kl_by_ratio=o.get("use_bias_correction_kl", False),
        **{key: address(side.get(key)) for key in ("old_logps", "advantages", "ref_logps", "weights")},
        scale=address(factor),
        value=address(made.values),
        metrics=address(made.metrics),
    )
    with guard(z):
        arguments._cuda.token_loss(
            tile, state.data_ptr(), gradient(on, (n, z.shape[1]), out, clamp), loss, shared, queue(z)
        )
    return made


def unit_loss(
    name: str,
    hyper: Mapping[str, Any],
    state: Tensor,  # (n, 8) float64, finished
    place: Tensor,  # (n,) int64: sequence of each row, of a pair the chosen ones first
    units: int,
    side: dict[str, Tensor],  # (sequences,) float32, desirable bool
    factor: Tensor,  # () float64, of the sum over units
) -> UnitValues:
    """Sums of log-probs over sequences and the coefficient of each row, for a loss of sequences or pairs.

    Raises:
        ValueError: a loss that is not served; a tensor of the wrong device, dtype, shape or layout.
    """
    if name not in UNIT or not serves(name, hyper, side):
        raise ValueError(f"no fused coefficient of sequences for {name} with {hyper} and {sorted(side)}")
    on, n, sequences = checks("state", state), len(place), units * (2 if name == "dpo" else 1)
    on.state(state, n)
    on.tensor("place", place, torch.int64, (n,))
    on.tensor("factor", factor, torch.float64, ())
    for key, x in side.items():
        on.tensor(key, x, torch.bool if key == "desirable" else torch.float32, (sequences,))
    kept = METRICS if name == "dpo" else 0
    made = UnitValues(*(torch.empty(shape, device=state.device) for shape in ((units,), (kept, units), (n,))))
    o = {**UNIT[name].taken, **hyper}
    loss = arguments._cuda.UnitLoss(
        kind=DPO[str(_dpo_type(o))] if name == "dpo" else UNIT[name].code,
        beta=o["beta"],
        label_smoothing=o.get("label_smoothing", 0.0),
        desirable_weight=o.get("desirable_weight", 1.0),
        undesirable_weight=o.get("undesirable_weight", 1.0),
        state=address(state),
        place=address(place),
        rows=n,
        units=units,
        **{key: address(side.get(key)) for key in ("ref_logps", "desirable", "kl")},
        scale=address(factor),
        value=address(made.values),
        metrics=address(made.metrics),
        g=address(made.g),
    )
    with guard(state):
        arguments._cuda.unit_loss(loss, queue(state))
    return made
