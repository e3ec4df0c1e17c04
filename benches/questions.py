"""The questions that benches ask, each of every method with the same inputs; losses of log-probs; answers in float64.

Shapes: S sequences of T positions, N of them with a target; D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS = {  # D, V
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3-8B": (4096, 128256),
    "Gemma-2-2B": (2304, 256000),
    "TinyLlama-1.1B": (2048, 32000),
    "small": (256, 32000),
    "tiny": (32, 211),
}
IGNORE = -100
BETA, CLIP = 0.1, 0.2
PAIRS = 4
SAMPLES = 64  # rows of dX and of dW that are compared
TILE = 8192  # columns of the vocabulary at a time in float64


@dataclass(frozen=True)
class Question:
    """One group of a benchmark.

    Args:
        what: "forward" (log-probs), "gradient" (log-probs, then the gradient of each arrives), a name of LOSSES, or
            "dpo step" and "grpo step" of a small model (steps.py).
        head: a name of HEADS.
        rows: positions with a target; a preference or policy loss has as many again without.
        trained: the gradient of the head's weight is asked for too.
        softmax: "dense" (random), or "peaked": the target's probability is 0.8 to 0.9.
        clamp: limit of LogitGradClamp, None for none.
    """

    what: str
    head: str
    rows: int
    trained: bool = False
    softmax: str = "dense"
    dtype: str = "float32"
    clamp: float | None = None

    @property
    def name(self) -> str:
        said = [self.what, self.head]
        if self.what != "forward":
            said.append("trained" if self.trained else "frozen")
        said += [self.softmax, self.dtype] + ([f"clamp {self.clamp}"] if self.clamp is not None else [])
        return ", ".join(said)

    @property
    def a_step(self) -> bool:
        return self.what.endswith(" step")

    @property
    def products(self) -> int:
        """Matrix products of N V D that the answer needs."""
        return 1 if self.what == "forward" else 3 if self.trained else 2


class Batch(NamedTuple):
    """Inputs of a question. `ref` is 0: so losses without a given reference (Liger's) are the same loss."""

    hidden: Tensor  # (S, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (S, T) int64, -100 where there is none
    g: Tensor  # (S, T) float32, dL/d(log-prob) where it arrives from outside, 0 where there is no target
    ref: Tensor  # (S,)
    old: Tensor  # (S, T) log-probs of the policy that sampled
    advantages: Tensor  # (S,)
    desirable: Tensor  # (S,) bool
    kl: Tensor  # ()
    clamp: float | None = None

    def to_train(self, question: Question) -> Batch:
        """Leaves that ask for what the question asks."""
        grad = question.what != "forward"
        hidden = self.hidden.detach().requires_grad_(grad)
        return self._replace(hidden=hidden, weight=self.weight.detach().requires_grad_(grad and question.trained))

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None


def weight_of(question: Question, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """The weight of a question's head, (V, D), the same for every question of a head and dtype."""
    d, v = HEADS[question.head]
    drawn = torch.randn(v, d, generator=torch.Generator(device).manual_seed(seed), device=device).mul_(d**-0.5)
    return drawn.to(getattr(torch, question.dtype))


def make(question: Question, device: torch.device | str = "cpu", seed: int = 0, weight: Tensor | None = None) -> Batch:
    """`weight`: one that `weight_of` has drawn before."""
    d, v = HEADS[question.head]
    dtype, weight = getattr(torch, question.dtype), weight_of(question, device, seed) if weight is None else weight
    flat = question.what in ("forward", "gradient", "sft")
    s, t = (1, question.rows) if flat else (2 * PAIRS, question.rows // PAIRS)
    rng = torch.Generator(device).manual_seed(seed + 1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    targets = torch.randint(0, v, (s, t), generator=rng, device=device)
    hidden = normal(s, t, d)
    if question.softmax == "peaked":  # a logit of 14 against v of about 1: p = e^14 / (e^14 + v e^0.5)
        own = weight[targets].float()
        hidden = hidden * 0.5 + 14 * own / own.square().sum(-1, keepdim=True)
    if not flat:
        targets[:, : t // 2] = IGNORE
    kept = targets != IGNORE
    return Batch(
        hidden.to(dtype), weight, targets, normal(s, t) * kept / kept.sum(), torch.zeros(s, device=device),
        (0.5 * normal(s, t) - math.log(v) - 0.5) * kept, normal(s), torch.arange(s, device=device) % 2 == 0,
        torch.tensor(0.3, device=device), question.clamp,
    )  # fmt: skip


# -- losses of log-probs (S, T), 0 where there is no target -------------------------------------------------------
def sft(logps: Tensor, b: Batch) -> Tensor:
    return -logps.sum() / (b.targets != IGNORE).sum()


def dpo(logps: Tensor, b: Batch) -> Tensor:
    """arXiv:2305.18290 eq. 7."""
    chosen, rejected = (logps.sum(1) - b.ref).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def kto(logps: Tensor, b: Batch) -> Tensor:
    """arXiv:2402.01306 eq. 7."""
    gain = BETA * (logps.sum(1) - b.ref - b.kl)
    return (1 - torch.where(b.desirable, gain, -gain).sigmoid()).mean()


def clipped(logps: Tensor, b: Batch) -> Tensor:
    """arXiv:1707.06347 eq. 7, the mean over tokens; GRPO's (dapo) is the same, its advantages one a sequence."""
    mask, a = b.targets != IGNORE, b.advantages[:, None]
    ratio = (logps - b.old).exp()
    return -(torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a) * mask).sum() / mask.sum()


LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "sft": sft, "dpo": dpo, "kto": kto, "ppo-clip": clipped, "grpo": clipped,
}  # fmt: skip


# -- float64 ------------------------------------------------------------------------------------------------------
class Truth(NamedTuple):
    """Log-probs, and some rows of dX and of dW."""

    logps: Tensor  # (S, T)
    rows: Tensor  # numbers of rows of dX, of the S T
    dx: Tensor
    columns: Tensor  # numbers of rows of dW
    dw: Tensor


def tiles(b: Batch) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(b.weight), TILE):
        yield start, b.weight[start : start + TILE].detach().double()


def residual(p: Tensor, own: Tensor, clamp: float | None) -> Tensor:
    """1[column is the target] - p, clipped where the question says so."""
    r = own.double() - p
    return r if clamp is None else r.clamp(-clamp, clamp)


def truth(question: Question, b: Batch) -> Truth:
    kept = (b.targets != IGNORE).flatten().nonzero()[:, 0]
    x, y = b.hidden.detach().flatten(0, 1)[kept].double(), b.targets.flatten()[kept]
    lse = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    for _, w in tiles(b):
        lse = torch.logaddexp(lse, (x @ w.T).logsumexp(1))
    logp = (x * b.weight.detach()[y].double()).sum(1) - lse
    logps = torch.zeros(b.targets.numel(), dtype=torch.float64, device=x.device).index_put((kept,), logp)
    logps = logps.view(b.targets.shape).requires_grad_()
    if question.what in LOSSES:
        exact = b._replace(ref=b.ref.double(), old=b.old.double(), advantages=b.advantages.double(), kl=b.kl.double())
        (g,) = torch.autograd.grad(LOSSES[question.what](logps, exact), logps)
    else:
        g = b.g.double()
    g = g.flatten()[kept]
    some = torch.linspace(0, len(x) - 1, min(SAMPLES, len(x)), device=x.device).long()
    columns = torch.cat(
        (y[:: max(1, 2 * len(y) // SAMPLES)], torch.arange(0, len(b.weight), 2 * TILE, device=x.device))
    )
    columns = columns.unique()
    dx = torch.zeros(len(some), x.shape[1], dtype=torch.float64, device=x.device)
    for start, w in tiles(b):
        p = (x[some] @ w.T - lse[some, None]).exp()
        own = y[some, None] == torch.arange(start, start + len(w), device=x.device)
        dx += residual(p, own, b.clamp) @ w
    p = (x @ b.weight.detach()[columns].double().T - lse[:, None]).exp()
    dw = (g[:, None] * residual(p, y[:, None] == columns, b.clamp)).T @ x
    return Truth(logps.detach(), kept[some], g[some, None] * dx, columns, dw)


def off(found: Tensor | None, true: Tensor) -> float:
    """Largest error over the largest true value."""
    if found is None:
        raise ValueError("it made no gradient")
    return float((found.double() - true).abs().max() / true.abs().max())


def errors(question: Question, b: Batch, out: Tensor, true: Truth) -> dict[str, float]:
    """Of a method's output and of the gradients that it left behind."""
    found = {"log p": off(out, true.logps)} if out.shape == true.logps.shape else {}
    if question.what != "forward":
        grad = b.hidden.grad
        found["dX"] = off(None if grad is None else grad.flatten(0, 1)[true.rows], true.dx)
    if question.trained:
        found["dW"] = off(None if b.weight.grad is None else b.weight.grad[true.columns], true.dw)
    return found
