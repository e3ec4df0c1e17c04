"""Cross-entropy of LM heads: time, share of the GEMM ceiling, peak memory and error, beside eager torch and peers.

    python benches/gpu/heads.py [forward | frozen | full] [--dry]

forward: log-probs alone; frozen: the gradient of hidden; full: of the weight too. The softmax is dense (random) or
peaked (the target's probability about 0.9). The ceiling is the time of one, two or three GEMMs of the same shape, 4096
rows at a time. Errors are taken on sampled rows and columns against float64, over the largest true value.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import Options, interleaved, once, read_options, why, write
from methods import Batch, Method, methods
from torch import Tensor

HEADS = {  # D, V, softcap
    "Qwen2.5-0.5B": (896, 151936, None),
    "Qwen2.5-7B": (3584, 152064, None),
    "Llama-3-8B": (4096, 128256, None),
    "Gemma-2-2B": (2304, 256000, 30.0),
}
TINY = {"tiny": (32, 211, None), "tiny, capped": (32, 211, 30.0)}
ROWS = (8192, 2048, 32768)  # the middle first: a budget may end before the last
KINDS = ("dense", "peaked")
SAMPLES = 64
CHUNK = 4096


def make(head: tuple[int, int, float | None], n: int, kind: str, mode: str, options: Options) -> Batch:
    d, v, softcap = head
    made = dict(device=options.device, dtype=options.dtype)
    weight = torch.randn(v, d, **made) * d**-0.5
    targets = torch.randint(0, v, (n,), device=options.device)
    hidden = torch.randn(n, d, **made)
    if kind == "peaked":  # a logit of 14 against v of about 1: p = e^14 / (e^14 + v e^0.5), about 0.8 to 0.9
        hidden = hidden * 0.5 + 14 * weight[targets] / weight[targets].square().sum(1, keepdim=True)
    return Batch(
        hidden.detach().requires_grad_(mode != "forward"),
        weight.detach().requires_grad_(mode == "full"),
        targets,
        softcap,
    )


def step(method: Method, b: Batch, mode: str) -> Tensor:
    b.hidden.grad = b.weight.grad = None
    with torch.set_grad_enabled(mode != "forward"):
        out = method(b)
    if mode != "forward":
        out.backward()
    return out.detach()


def ceiling(b: Batch, mode: str, options: Options) -> float:
    """Milliseconds of the GEMMs alone."""
    x, w = b.hidden.detach(), b.weight.detach()
    z = torch.empty(min(CHUNK, len(x)), len(w), device=w.device, dtype=w.dtype)

    def run() -> None:
        for rows in x.split(CHUNK):
            part = z[: len(rows)]
            torch.mm(rows, w.T, out=part)
            if mode != "forward":
                torch.mm(part, w)
            if mode == "full":
                torch.mm(part.T, rows)

    run()
    return min(once(run, options.device) for _ in range(3))


# -- errors -------------------------------------------------------------------------------------------------------
def logits(b: Batch, rows: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Logits in float64 and the slope of their softcap."""
    z = b.hidden.detach()[rows].double() @ b.weight.detach()[columns].double().T
    if b.softcap is None:
        return z, torch.ones_like(z)
    t = torch.tanh(z / b.softcap)
    return b.softcap * t, 1 - t * t


def errors(method: Method, b: Batch, mode: str) -> dict[str, float]:
    """Largest errors of the loss, dX and dW over the largest true value, on samples."""
    out, n, v = step(method, b, mode), len(b.hidden), len(b.weight)
    device = b.weight.device
    rows = torch.randperm(n, device=device)[:SAMPLES]
    z, slope = logits(b, rows, slice(None))
    log_p = z.log_softmax(1)
    here = torch.arange(len(rows), device=device)
    picked = log_p[here, b.targets[rows]]
    if mode == "forward":
        return {"error of log p": float((-out[rows] - picked).abs().max())} if out.dim() else {}
    p = log_p.exp()
    p[here, b.targets[rows]] -= 1
    dx = (p * slope) @ b.weight.detach().double() / n
    assert b.hidden.grad is not None
    found = {"error of dX": float((b.hidden.grad[rows] - dx).abs().max() / dx.abs().max())}
    if mode == "full":
        assert b.weight.grad is not None
        columns = torch.cat((b.targets[: SAMPLES // 2], torch.randperm(v, device=device)[: SAMPLES // 2])).unique()
        dw = torch.zeros(len(columns), b.weight.shape[1], dtype=torch.float64, device=device)
        for part in torch.arange(n, device=device).split(1024):
            lse = torch.cat([logits(b, some, slice(None))[0].logsumexp(1) for some in part.split(SAMPLES)])
            z, slope = logits(b, part, columns)
            r = (z - lse[:, None]).exp() - (columns == b.targets[part, None]).double()
            dw += (r * slope / n).T @ b.hidden.detach()[part].double()
        found["error of dW"] = float((b.weight.grad[columns] - dw).abs().max() / dw.abs().max())
    return found


def table(mode: str, options: Options) -> list[dict[str, Any]]:
    began, out = time.monotonic(), []
    for n in (96,) if options.dry else ROWS:
        for kind in KINDS:
            for name, head in (TINY if options.dry else HEADS).items():
                about = {"head": name, "rows": n, "softmax": kind}
                if time.monotonic() - began > options.budget:
                    out.append({**about, "method": "not reached"})
                    continue
                torch.manual_seed(time.time_ns() % 2**31)
                b = make(head, n, kind, mode, options)
                known = methods(options.dry)
                best = ceiling(b, mode, options)
                took = interleaved({key: lambda m=m, b=b: step(m, b, mode) for key, m in known.items()}, options)
                for key, measured in took.items():
                    row = {**about, "method": key, "ms": measured.milliseconds, "peak MiB": measured.peak_mib}
                    if measured.milliseconds is None:
                        row["note"] = measured.note
                    else:
                        row["share of ceiling"] = best / measured.milliseconds
                        row |= judged(known[key], b, mode) if n <= 2048 else {}
                    out.append(row)
    return out


def judged(method: Method, b: Batch, mode: str) -> dict[str, Any]:
    try:
        return errors(method, b, mode)
    except Exception as error:
        return {"note": why(error)}


def main() -> None:
    modes = ("forward", "frozen", "full")
    options = read_options(__doc__, modes)
    for mode in modes if options.choice is None else (options.choice,):
        write(options, mode, table(mode, options))


if __name__ == "__main__":
    main()
