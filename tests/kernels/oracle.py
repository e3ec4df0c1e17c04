"""Independent truth for the kernel tests: plain logits, log_softmax and autograd, in float64.

The same lines run in the storage dtype give the eager error by which 16-bit results are judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accuracy import check, largest
from devices import there
from torch import Tensor

from align_kernels import LogitGradClamp, linear_logprobs

linear_logprobs = there(linear_logprobs)
FIELDS = ("logp", "entropy", "lse", "log_sum_sq_probs", "mean_logit", "correct")
LEAVES = ("hidden", "weight", "bias", "lora_A", "lora_B")


@dataclasses.dataclass
class Case:
    """The inputs of one call. `tensors` are the leaves that are given; `train` names those that need a gradient."""

    tensors: dict[str, Tensor]
    targets: Tensor
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0
    ignore_index: int = -100
    grad_clamp: LogitGradClamp | None = None
    scaling: float = 0.5
    train: frozenset[str] = frozenset(LEAVES)

    @property
    def mask(self) -> Tensor:
        return self.targets != self.ignore_index

    @property
    def narrow(self) -> bool:
        """Whether anything is stored in 16 bits, so that the eager error is the measure."""
        return any(x.dtype.itemsize == 2 for x in self.tensors.values())

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Fresh leaves with the strides of the case's tensors; `dtype` widens them."""
        made = {}
        for name, x in self.tensors.items():
            x = x.detach() if dtype is None else x.detach().to(dtype)
            made[name] = x.requires_grad_(name in self.train)
        return made

    def keywords(self, leaves: dict[str, Tensor]) -> dict[str, Any]:
        """What `linear_logprobs` takes beside hidden, weight and targets."""
        lora = (leaves["lora_A"], leaves["lora_B"], self.scaling) if "lora_A" in leaves else None
        return dict(
            bias=leaves.get("bias"),
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
            grad_clamp=self.grad_clamp,
            lora=lora,
        )

    def tensors_for_call(self) -> dict[str, Any]:
        """Every argument of `linear_logprobs`, without gradients."""
        t = self.tensors
        return dict(hidden=t["hidden"], weight=t["weight"], targets=self.targets, **self.keywords(t))


class Clamped(torch.autograd.Function):
    """Identity on logits whose backward is the documented clamp of g (1[v = y] - p), g being handed in."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, g: Tensor, clamp: LogitGradClamp):
        ctx.save_for_backward(logits, targets, g)
        ctx.clamp = clamp
        return logits.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, targets, g = ctx.saved_tensors
        limit, prob_above, units = ctx.clamp
        p = logits.softmax(1)
        r = torch.nn.functional.one_hot(targets, logits.shape[1]) - p
        clipped = g[:, None] * r.clamp(-limit, limit) if units == "residual" else (g[:, None] * r).clamp(-limit, limit)
        inside = p > prob_above if prob_above else torch.ones_like(p, dtype=torch.bool)
        return torch.where(inside, clipped, g[:, None] * r), None, None, None


class Tanh(torch.autograd.Function):
    """tanh whose slope 1 / cosh^2 does not cancel."""

    @staticmethod
    def forward(ctx, x: Tensor):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.saved_tensors[0].cosh() ** 2


def raw_logits(case: Case, leaves: dict[str, Tensor]) -> Tensor:
    """What the GEMMs give, [kept rows, V]: rows without a target never take part."""
    keep = case.mask
    weight = leaves["weight"]
    dtype = torch.promote_types(leaves["hidden"].dtype, weight.dtype)
    hidden = leaves["hidden"][keep].to(dtype)
    bias = leaves["bias"].to(dtype) if "bias" in leaves else None
    z = torch.nn.functional.linear(hidden, weight.to(dtype), bias)
    if "lora_A" in leaves:
        z = z + case.scaling * (hidden @ leaves["lora_A"].to(dtype).T) @ leaves["lora_B"].to(dtype).T
    return z


def transform(case: Case, z: Tensor) -> Tensor:
    """From raw logits to those of the softmax."""
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * case.logit_scale
    if case.softcap is not None:
        z = case.softcap * (Tanh.apply if z.dtype == torch.float64 else torch.tanh)(z / case.softcap)
    t = case.temperature
    return z / (t[case.mask][:, None].to(z.dtype) if isinstance(t, Tensor) else t)


def spread(case: Case, values: Tensor) -> Tensor:
    """Values of kept rows to the shape of the targets, zero elsewhere."""
    out = torch.zeros(case.targets.shape, dtype=values.dtype)
    return out.masked_scatter(case.mask, values) if values.numel() else out


def first_argmax(logits: Tensor) -> Tensor:
    columns = torch.arange(logits.shape[1])
    return torch.where(logits == logits.amax(1, keepdim=True), columns, logits.shape[1]).amin(1)


def near_ties(case: Case) -> Tensor:
    """Kept rows, in the shape of the targets, whose two largest logits rounding may turn around."""
    with torch.no_grad():
        z = transform(case, raw_logits(case, case.leaves(torch.float64)))
    top = z.topk(min(2, z.shape[1]), 1).values
    return spread(case, top[:, 0] - top[:, -1] < 1e-5 * (1 + z.abs().amax(1))) & (z.shape[1] > 1)


def statistics(case: Case, logits: Tensor) -> dict[str, Tensor]:
    """The six fields in the shape of the targets, before any clamp."""
    labels = case.targets[case.mask]
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    values = dict(
        logp=log_p.gather(1, labels[:, None])[:, 0],
        entropy=-torch.where(p > 0, p * log_p, 0.0).sum(1),
        lse=logits.logsumexp(1),
        log_sum_sq_probs=(2 * log_p).logsumexp(1),
        mean_logit=logits.mean(1),
        correct=first_argmax(logits) == labels,
    )
    return {name: spread(case, value) for name, value in values.items()}


def objective(case: Case, logits: Tensor, g: Tensor, h: Tensor | None) -> Tensor:
    """sum(g logp) + sum(h entropy), with the clamp where the case has one."""
    labels, keep = case.targets[case.mask], case.mask
    g = g[keep].to(logits.dtype)
    source = logits if case.grad_clamp is None else Clamped.apply(logits, labels, g, case.grad_clamp)
    total = (g * source.log_softmax(1).gather(1, labels[:, None])[:, 0]).sum()
    if h is None:
        return total
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(1)
    return total + (h[keep].to(logits.dtype) * entropy).sum()


def magnitudes(
    case: Case, leaves: dict[str, Tensor], z: Tensor, logits: Tensor, g: Tensor, h: Tensor | None
) -> dict[str, float]:
    """The largest sum of absolute terms behind each gradient: its size if nothing cancelled."""
    keep = case.mask
    slope = torch.autograd.grad(logits.sum(), z, retain_graph=True)[0].abs()
    log_p = logits.detach().log_softmax(1)
    p = log_p.exp()
    dz = slope * g[keep].abs()[:, None] * (p + torch.nn.functional.one_hot(case.targets[keep], p.shape[1]))
    if h is not None:
        log_p = log_p.abs().masked_fill(p == 0, 0.0)
        dz = dz + slope * h[keep].abs()[:, None] * p * (1e-3 + log_p + (p * log_p).sum(1, keepdim=True))
    t = {name: x.detach().abs() for name, x in leaves.items()}
    x, s = t["hidden"][keep], abs(case.scaling)
    sums = dict(hidden=dz @ t["weight"], weight=dz.T @ x, bias=dz.sum(0))
    if "lora_A" in t:
        through = s * dz @ t["lora_B"]
        sums["hidden"] += through @ t["lora_A"]
        sums |= dict(lora_B=s * dz.T @ (x @ t["lora_A"].T), lora_A=through.T @ x)
    return {name: largest(value) for name, value in sums.items()}


class Result(NamedTuple):
    fields: dict[str, Tensor]
    grads: dict[str, Tensor]
    sizes: Mapping[str, float] = MappingProxyType({})  # see `magnitudes`


def truth(case: Case, g: Tensor, h: Tensor | None, dtype: torch.dtype | None = torch.float64) -> Result:
    """Fields, and the gradients of `objective`; `dtype=None` computes in the storage dtype: the eager result."""
    leaves = case.leaves(dtype)
    z = raw_logits(case, leaves)
    logits = transform(case, z)
    fields = statistics(case, logits.detach())
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    if not wanted:
        return Result(fields, {})
    sizes = {} if dtype is None else magnitudes(case, leaves, z, logits, g, h)
    total = objective(case, logits, g, h)
    found = torch.autograd.grad(total, list(wanted.values()), materialize_grads=True)
    return Result(fields, dict(zip(wanted, found)), sizes)


def loss_truth(
    case: Case, formula: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype | None = torch.float64
) -> tuple[Tensor, Result]:
    """The loss `formula(logp, entropy)` of log-probs and entropies in the shape of the targets, and its `Result`."""
    with torch.no_grad():
        fields = statistics(case, transform(case, raw_logits(case, case.leaves(dtype))))
    logp, entropy = fields["logp"].requires_grad_(), fields["entropy"].requires_grad_()
    value = formula(logp, entropy)
    g, h = torch.autograd.grad(value, (logp, entropy), allow_unused=True, materialize_grads=True)
    return value.detach(), truth(case, g, h, dtype)


def run(case: Case, g: Tensor | None, h: Tensor | None, **options: Any) -> Result:
    """The same from `linear_logprobs`."""
    leaves = case.leaves()
    out = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets, **case.keywords(leaves), **options)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    outputs = [(y, grad.to(y.dtype)) for y, grad in ((out.logp, g), (out.entropy, h)) if grad is not None]
    if not wanted:
        assert not out.logp.requires_grad and not out.entropy.requires_grad
        return Result(out._asdict(), {})
    found = torch.autograd.grad([y for y, _ in outputs], list(wanted.values()), [grad for _, grad in outputs])
    return Result(out._asdict(), dict(zip(wanted, found)))


def judge(case: Case, got: Result, true: Result, eager: Result | None = None) -> dict[str, float]:
    """Check every field and gradient; the error over what is allowed, by name.

    A gradient whose terms cancel to less than a tenth is judged by a tenth of them.
    """
    ratios = {}
    compute = torch.promote_types(case.tensors["hidden"].dtype, case.tensors["weight"].dtype)
    size = max(largest(true.fields["lse"]), largest(true.fields["mean_logit"]), 1.0)
    for name in FIELDS[:-1]:
        assert got.fields[name].dtype == torch.promote_types(case.tensors["hidden"].dtype, torch.float32), name
        twin = None if eager is None else eager.fields[name]
        ratios[name] = check(name, got.fields[name], true.fields[name], twin, scale=size)
    assert set(got.grads) == set(true.grads)
    for name, grad in got.grads.items():
        assert grad.dtype == case.tensors[name].dtype, f"gradient of {name} is {grad.dtype}"
        twin = None if eager is None else eager.grads[name]
        grad = grad if compute == torch.float64 or grad.dtype != torch.float64 else grad.float()
        ratios[f"d{name}"] = check(f"gradient of {name}", grad, true.grads[name], twin, scale=0.1 * true.sizes[name])
    return ratios
