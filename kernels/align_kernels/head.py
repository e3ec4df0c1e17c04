"""An LM head: its tensors and settings, read from a call and checked once.

Shape letters: N rows (positions), V vocabulary, D hidden size, R rank of a LoRA.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from align_kernels.dtensor import local, local_head
from align_kernels.sums import capturing


class LogitGradClamp(NamedTuple):
    """Limit on the gradient that one logit receives from the log-prob term.

    With the residual r[t, v] = 1[v = y_t] - p[t, v], every entry with p[t, v] > `prob_above` has r clipped to
    [-limit, +limit] before it is multiplied by g_t = dL/dlogp_t (`units="residual"`: independent of the batch size and
    of beta), or has g_t * r clipped (`units="gradient"`). It acts after temperature and before softcap's and scale's
    chain factors. The forward value is unchanged and an entropy term is not clamped. It is the gradient of no scalar.

    Args:
        limit: largest absolute value, > 0.
        prob_above: only entries whose probability exceeds this are clipped, in [0, 1). Default 0.0: all entries.
        units: "residual" (default) or "gradient".
    """

    limit: float
    prob_above: float = 0.0
    units: Literal["residual", "gradient"] = "residual"

    def check(self) -> LogitGradClamp:
        if not (self.limit > 0 and math.isfinite(self.limit)):
            raise ValueError(f"grad_clamp.limit must be a finite number above 0, got {self.limit}")
        if not 0 <= self.prob_above < 1:
            raise ValueError(f"grad_clamp.prob_above must lie in [0, 1), got {self.prob_above}")
        if self.units not in ("residual", "gradient"):
            raise ValueError(f'grad_clamp.units must be "residual" or "gradient", got {self.units!r}')
        return self


class LoRA(NamedTuple):
    """A low-rank update of the head: logits += scaling * (hidden @ A.T) @ B.T. The weight stays frozen."""

    A: Tensor  # (R, D)
    B: Tensor  # (V, R)
    scaling: float


@dataclasses.dataclass(frozen=True)
class Transform:
    """What stands between the GEMM and the softmax: logits = softcap(logit_scale * (z + bias)) / temperature."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0  # a per-row temperature travels as a tensor beside it

    def check(self) -> Transform:
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0):
            raise ValueError(f"logit_scale must be finite and not 0, got {self.logit_scale}")
        if self.softcap is not None and not (self.softcap > 0 and math.isfinite(self.softcap)):
            raise ValueError(f"softcap must be a finite number above 0 or None, got {self.softcap}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a finite number above 0, got {self.temperature}")
        return self


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything about a call that is not a tensor. Travels through torch.library as its `repr`."""

    # a factory: the torch.compile of torch 2.11 takes no object of ours as a default
    transform: Transform = dataclasses.field(default_factory=Transform)
    clamp: LogitGradClamp | None = None
    lora_scaling: float = 1.0
    drop_mass: float = 0.0
    ignore_index: int = -100
    impl: str = "auto"
    workspace: int | None = None
    tp_group: str | None = None
    every_row: bool = False  # a row for each position, with a target or not: their number is not looked at

    def check(self) -> Settings:
        self.transform.check()
        if self.impl == "eager" and self.tp_group is not None:
            raise ValueError('impl="eager" makes whole rows of logits and cannot serve a tp_group: pass impl="auto"')
        if not math.isfinite(self.lora_scaling):
            raise ValueError(f"lora's scaling must be finite, got {self.lora_scaling}")
        if self.clamp is not None:
            self.clamp.check()
        if not 0.0 <= self.drop_mass < 1.0:
            raise ValueError(f"drop_mass must lie in [0, 1), got {self.drop_mass}")
        if self.every_row and (self.impl == "eager" or self.drop_mass or self.tp_group is not None):
            raise ValueError(
                'a CUDA graph can capture neither impl="eager" nor drop_mass nor a tp_group, which look at numbers of '
                f"the device, got {self.impl!r}, {self.drop_mass} and {self.tp_group}"
            )
        if self.workspace is not None and self.workspace <= 0:
            raise ValueError(f"workspace is a limit in bytes and must be above 0, got {self.workspace}")
        return self


class Head(NamedTuple):
    """The tensors of one call, flattened: what the schedules work on."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,) int64
    bias: Tensor | None  # (V,)
    temperature: Tensor | None  # (N,) float32 (float64 for float64 hidden), replaces Transform.temperature
    lora_A: Tensor | None  # (R, D)
    lora_B: Tensor | None  # (V, R)


class Needs(NamedTuple):
    """Which tensors of the head need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_A: bool
    lora_B: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias or self.lora_A or self.lora_B

    @staticmethod
    def of(head: Head) -> Needs:
        tensors, grad = (head.hidden, head.weight, head.bias, head.lora_A, head.lora_B), torch.is_grad_enabled()
        return Needs(*(grad and x is not None and x.requires_grad for x in tensors))


class HeadOptions(NamedTuple):
    """The keywords of `linear_logprobs`, where they are explained."""

    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    ignore_index: int = -100
    grad_clamp: LogitGradClamp | None = None
    drop_mass: float = 0.0
    lora: tuple[Tensor, Tensor, float] | None = None
    tp_group: torch.distributed.ProcessGroup | None = None
    impl: str = "auto"
    workspace: int | None = None


def read_head(hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any) -> tuple[Head, Settings, Needs]:
    """A call of `linear_logprobs`, checked. **head: `HeadOptions`."""
    given = HeadOptions(**head)
    hidden, targets = local("hidden", hidden), local("targets", targets)
    weight, bias, lora, tp_group = local_head(weight, given.bias, given.lora, given.tp_group)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    temperature = local("temperature", given.temperature)
    tensors, scalar = flatten(hidden, weight, targets, bias, temperature, lora, given.ignore_index)
    settings = Settings(
        Transform(float(given.logit_scale), None if given.softcap is None else float(given.softcap), scalar),
        None if given.grad_clamp is None else LogitGradClamp(*given.grad_clamp),
        1.0 if lora is None else float(lora[2]),
        float(given.drop_mass),
        int(given.ignore_index),
        given.impl,
        None if given.workspace is None else int(given.workspace),
        None if tp_group is None else tp_group.group_name,
        capturing(hidden.device),
    )
    return tensors, settings.check(), Needs.of(tensors)


def flatten(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    lora: tuple[Tensor, Tensor, float] | None,
    ignore_index: int,
) -> tuple[Head, float]:
    """Check shapes and dtypes and flatten the leading dimensions. Where hidden [N, D] has the rows of the N targets
    that are not ignored, the head is of these alone.

    Returns the head and the scalar temperature (1.0 where a tensor took its place).
    """
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden [..., D] and weight [V, D] do not fit: {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    flat, kept = targets.reshape(-1), None
    if targets.shape != hidden.shape[:-1] and is_fake(hidden) and hidden.dim() == 2:
        flat = flat[: len(hidden)]  # which of them are ignored cannot be read
    elif targets.shape != hidden.shape[:-1]:
        if capturing(hidden.device):
            raise ValueError(
                "a CUDA graph is being captured, in which hidden needs a row for every target, "
                f"got {tuple(hidden.shape)} and {tuple(targets.shape)}"
            )
        kept = (flat != ignore_index).nonzero()[:, 0]
        if hidden.dim() != 2 or len(kept) != len(hidden):
            raise ValueError(
                f"targets must have hidden's leading shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}"
                + f", {len(kept)} of them not ignored" * (hidden.dim() == 2)
            )
        flat = flat[kept]
    lora_A, lora_B = (None, None) if lora is None else lora[:2]
    floats = {"hidden": hidden, "weight": weight, "bias": bias, "lora's A": lora_A, "lora's B": lora_B}
    for name, x in floats.items():
        if x is None:
            continue
        if not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x.device != targets.device:
            raise ValueError(f"{name} is on {x.device}, targets on {targets.device}: move them to one device")
    vocab = weight.shape[0]
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias must have shape ({vocab},), got {tuple(bias.shape)}")
    rows = None
    scalar = 1.0
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError("temperature carries no gradient: pass temperature.detach()")
        if temperature.shape != targets.shape:
            raise ValueError(
                f"temperature must be a float or one per row {tuple(targets.shape)}, got {tuple(temperature.shape)}"
            )
        rows = temperature.reshape(-1).to(torch.promote_types(hidden.dtype, torch.float32))
        rows = rows if kept is None else rows[kept]
    else:
        scalar = float(temperature)
    if lora_A is not None and lora_B is not None:
        if lora_A.dim() != 2 or lora_A.shape[1] != weight.shape[1] or lora_B.shape != (vocab, lora_A.shape[0]):
            raise ValueError(
                f"lora=(A [R, {weight.shape[1]}], B [{vocab}, R], scaling), got A {tuple(lora_A.shape)} and "
                f"B {tuple(lora_B.shape)}"
            )
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, flat, bias, rows, lora_A, lora_B), scalar


def any_wrong(targets: Tensor, t: Tensor | None, vocab: int, settings: Settings) -> Tensor:
    """Whether `check_rows` may name a row, a bool on the device: of targets [N] and the temperature t, of all that the
    head has or, where it has those that are kept alone, of these. With a weight cut over ranks it is looked at in any
    case."""
    if settings.tp_group is not None:
        return torch.ones((), dtype=torch.bool, device=targets.device)
    kept = targets != settings.ignore_index
    wrong = (kept & ((targets < 0) | (targets >= vocab))).any()
    if t is None:
        return wrong
    served = (t > 0) & t.isfinite()
    return wrong | ~(served | ~kept if len(t) == len(kept) else served).all()


def check_rows(targets: Tensor, temperature: Tensor | None, vocab: int) -> None:
    """Name the first kept row whose target [n] or temperature [n] cannot be served."""
    wrong = (targets < 0) | (targets >= vocab)
    if bool(wrong.any()):
        raise ValueError(f"targets must lie in [0, {vocab}) or be ignore_index, got {int(targets[wrong][0])}")
    if temperature is None:
        return
    wrong = ~((temperature > 0) & temperature.isfinite())
    if bool(wrong.any()):
        raise ValueError(f"temperature must be finite and above 0, got {float(temperature[wrong][0])}")
