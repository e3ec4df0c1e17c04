"""Coefficients of some losses on the GPU (csrc/cuda/coefficients.h), found by the loss's name and hyper-parameters.

An accelerator: what a loss is stands in `align_kernels.losses` alone. A name or an option that is not known here is not
served, and the loss's own definition is differentiated instead.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels.backends.cuda import arguments
from align_kernels.backends.cuda.arguments import address, check, gradient, guard, logits, queue

TOKEN = {"sft": 0, "ppo_clip": 1, "ppo_clip_entropy": 1, "grpo": 2}
DPO = {"sigmoid": 0, "robust": 1, "hinge": 2, "ipo": 3}
KTO = 4
OPTIONS = {
    "sft": set(),
    "ppo_clip": {"cliprange"},
    "ppo_clip_entropy": {"cliprange", "entropy_coef"},
    "grpo": {"epsilon", "epsilon_high", "delta", "beta", "on_policy"},
    "dpo": {"beta", "loss_type", "label_smoothing"},
    "kto": {"beta", "desirable_weight", "undesirable_weight"},
}
SIDES = {
    "sft": set(),
    "ppo_clip": {"old_logps", "advantages"},
    "ppo_clip_entropy": {"old_logps", "advantages"},
    "grpo": {"old_logps", "advantages", "ref_logps", "weights"},
    "dpo": {"ref_logps"},
    "kto": {"ref_logps", "desirable", "kl"},
}
METRICS = 4


class TokenValues(NamedTuple):
    values: Tensor  # (n,) before the factor
    metrics: Tensor  # (4, n) in the order of the loss's metrics


class UnitValues(NamedTuple):
    values: Tensor  # (units,) before the factor
    metrics: Tensor  # (4, units) in the order of the loss's metrics; of kto (0, units)
    g: Tensor  # (n,) dL/dlogp, with the factor


def serves(name: str, hyper: dict, side: dict) -> bool:
    """Whether the loss `name` with these options and side tensors is known, and known whole."""
    known = set(hyper) == OPTIONS.get(name) and set(side) == SIDES[name]
    return known and (name != "dpo" or hyper["loss_type"] in DPO)


def token_loss(
    name: str,
    hyper: dict,
    z: Tensor,  # (n, V) raw logits, whole rows
    state: Tensor,  # (n, 8) float64, empty; finished on return
    targets: Tensor,  # (n,) int64
    side: dict[str, Tensor],  # (n,) float32
    factor: Tensor,  # () float32, of the sum over tokens
    *,
    clamp: tuple[float, float, str] | None,
    out: Tensor,  # (n, V), may be z
    shared: int = -1,  # bytes of a row that wait on the chip for its coefficient, < 0: all there are
    **transform,
) -> TokenValues:
    """Statistics, coefficient and dL/dz of whole rows in one kernel, for a loss of single tokens.

    Raises:
        ValueError: a loss that is not served, or as in `backward`.
    """
    if name not in TOKEN or not serves(name, hyper, side):
        raise ValueError(f"no fused coefficient of tokens for {name} with {hyper} and {sorted(side)}")
    tile, n = logits(z, targets, **transform), z.shape[0]
    check("state", state, torch.float64, (n, 8))
    check("factor", factor, torch.float32, ())
    for key, x in side.items():
        check(key, x, torch.float32, (n,))
    made = TokenValues(*(torch.empty(shape, device=z.device) for shape in ((n,), (METRICS, n))))
    clip = hyper.get("cliprange", 0.0)
    delta = hyper.get("delta")
    loss = arguments._cuda.TokenLoss(
        kind=TOKEN[name],
        epsilon_low=hyper.get("epsilon", clip),
        epsilon_high=hyper.get("epsilon_high", clip),
        delta=math.inf if delta is None else delta,
        beta=hyper.get("beta", 0.0),
        entropy_coef=hyper.get("entropy_coef", 0.0),
        on_policy=hyper.get("on_policy", False),
        **{key: address(side.get(key)) for key in ("old_logps", "advantages", "ref_logps", "weights")},
        scale=address(factor),
        value=address(made.values),
        metrics=address(made.metrics),
    )
    with guard(z):
        arguments._cuda.token_loss(tile, state.data_ptr(), gradient(z, out, clamp), loss, shared, queue(z))
    return made


def unit_loss(
    name: str,
    hyper: dict,
    state: Tensor,  # (n, 8) float64, finished
    place: Tensor,  # (n,) int64: sequence of each row, of a pair the chosen ones first
    units: int,
    side: dict[str, Tensor],  # (sequences,) float32, desirable bool
    factor: Tensor,  # () float32, of the sum over units
) -> UnitValues:
    """Sums of log-probs over sequences and the coefficient of each row, for a loss of sequences or pairs.

    Raises:
        ValueError: a loss that is not served; a tensor of the wrong device, dtype, shape or layout.
    """
    if name not in ("dpo", "kto") or not serves(name, hyper, side):
        raise ValueError(f"no fused coefficient of sequences for {name} with {hyper} and {sorted(side)}")
    if arguments.MISSING is not None:
        raise RuntimeError(arguments.MISSING)
    n, sequences = len(place), units * (2 if name == "dpo" else 1)
    check("state", state, torch.float64, (n, 8))
    check("place", place, torch.int64, (n,))
    check("factor", factor, torch.float32, ())
    for key, x in side.items():
        check(key, x, torch.bool if key == "desirable" else torch.float32, (sequences,))
    kept = METRICS if name == "dpo" else 0
    made = UnitValues(*(torch.empty(shape, device=state.device) for shape in ((units,), (kept, units), (n,))))
    loss = arguments._cuda.UnitLoss(
        kind=DPO[hyper["loss_type"]] if name == "dpo" else KTO,
        beta=hyper["beta"],
        label_smoothing=hyper.get("label_smoothing", 0.0),
        desirable_weight=hyper.get("desirable_weight", 1.0),
        undesirable_weight=hyper.get("undesirable_weight", 1.0),
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
