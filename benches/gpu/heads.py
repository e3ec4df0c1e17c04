"""Cross-entropy of LM heads: time beside eager torch, peers and bare GEMMs, peak memory and error.

The softmax is dense (random) or peaked (the target's probability 0.8 to 0.9). The GEMMs are one, two or three of the
same shape, 4096 rows at a time. Errors are of samples, against float64, over the largest true value.
"""

from __future__ import annotations

import time

import torch
from common import Lab
from methods import Batch, Method, methods, step
from torch import Tensor

SAMPLES = 64
CHUNK = 4096
GEMMS = "bare GEMMs"
TRAINED = ("trained", "late")


def make(lab: Lab, name: str, n: int, kind: str, mode: str) -> Batch:
    d, v = lab.head(name)
    made = dict(device=lab.device, dtype=lab.dtype)
    weight = torch.randn(v, d, **made) * d**-0.5
    targets = torch.randint(0, v, (n,), device=lab.device)
    hidden = torch.randn(n, d, **made)
    if kind == "peaked":  # a logit of 14 against v of about 1: p = e^14 / (e^14 + v e^0.5), about 0.8 to 0.9
        hidden = hidden * 0.5 + 14 * weight[targets] / weight[targets].square().sum(1, keepdim=True)
    g = torch.randn(n, device=lab.device) / n
    return Batch(
        hidden.detach().requires_grad_(mode != "forward"), weight.detach().requires_grad_(mode in TRAINED), targets, g
    )


def gemms(b: Batch, mode: str) -> None:
    x, w = b.hidden.detach(), b.weight.detach()
    for rows in x.split(CHUNK):
        z = rows @ w.T
        if mode != "forward":
            torch.mm(z, w)
        if mode in TRAINED:
            torch.mm(z.T, rows)


class Truth:
    """Cross-entropy of some rows, and some rows of dX and of dW, in float64."""

    def __init__(self, b: Batch, mode: str) -> None:
        (n, _), v, device = b.hidden.shape, len(b.weight), b.weight.device
        x, w = b.hidden.detach(), b.weight.detach().double()
        g = b.g.double() if mode == "late" else torch.full((n,), 1 / n, dtype=torch.float64, device=device)
        self.rows = torch.randperm(n, device=device)[:SAMPLES]
        self.columns = torch.cat((b.targets[: SAMPLES // 2], torch.randperm(v, device=device)[: SAMPLES // 2])).unique()
        z = x[self.rows].double() @ w.T
        here = torch.arange(len(self.rows), device=device)
        self.nll = z.logsumexp(1) - z[here, b.targets[self.rows]]
        p = z.softmax(1)
        p[here, b.targets[self.rows]] -= 1
        self.dx = g[self.rows, None] * (p @ w)
        self.dw = torch.zeros(len(self.columns), x.shape[1], dtype=torch.float64, device=device)
        for some in torch.arange(n, device=device).split(1024) if mode in TRAINED else ():
            part = x[some].double()
            z = part @ w.T
            r = (z[:, self.columns] - z.logsumexp(1, keepdim=True)).exp()
            r -= (self.columns == b.targets[some, None]).double()
            self.dw += (r * g[some, None]).T @ part

    def errors(self, method: Method, b: Batch, mode: str) -> dict[str, float]:
        out = step(method, b, mode)
        if mode == "forward":
            return {"error of log p": float((out[self.rows] - self.nll).abs().max())} if out.dim() else {}
        found = {"error of dX": relative(b.hidden.grad, self.rows, self.dx)}
        if mode in TRAINED:
            found["error of dW"] = relative(b.weight.grad, self.columns, self.dw)
        return found


def relative(grad: Tensor | None, rows: Tensor, true: Tensor) -> float:
    assert grad is not None
    return float((grad[rows].double() - true).abs().max() / true.abs().max())


def race(lab: Lab, head: str, mode: str, rows: int = 8192, kind: str = "dense") -> None:
    torch.manual_seed(time.time_ns() % 2**31)
    n = lab.rows(rows)
    b = make(lab, head, n, kind, mode)
    known = methods(lab.dry)
    if mode != "forward":
        del known["align_kernels, triton through tiles"]
    runs = {key: lambda m=m: step(m, b, mode) for key, m in known.items()}
    took = lab.race({GEMMS: lambda: gemms(b, mode), **runs})
    bare = took[GEMMS].milliseconds
    b.hidden.grad = b.weight.grad = None
    lab.free()
    truth, _ = lab.attempt("float64", lambda: Truth(b, mode))
    for key, measured in took.items():
        more = {"peak MiB": measured.peak_mib, "note": measured.note}
        if measured.milliseconds and bare:
            more["share of bare GEMMs"] = bare / measured.milliseconds
        if measured.milliseconds and key in known and truth is not None:
            errors, reason = lab.attempt(key, lambda key=key: truth.errors(known[key], b, mode))
            more |= errors or {"note": reason}
        lab.record(key, measured.milliseconds, "ms", rows=n, softmax=kind, **more)
