"""The ceilings of this device: copies, and GEMMs of the 7B head's very shapes, by which the planner's constants go."""

from __future__ import annotations

import torch
from common import Lab

from align_kernels.gemm import product

ROWS = (1024, 1152, 2048, 4096, 8192)


def copy(lab: Lab) -> None:
    source = torch.empty(2**20 if lab.dry else 2**31, dtype=torch.uint8, device=lab.device)
    target = torch.empty_like(source)
    lab.rate("copy", lambda: target.copy_(source), 2e-6 * len(source), "GB/s")


def gemms(lab: Lab) -> None:
    copy(lab)
    d, v = lab.head("Qwen2.5-7B")
    made = dict(device=lab.device, dtype=lab.dtype)
    w, most = torch.randn(v, d, **made) * d**-0.5, lab.rows(max(ROWS))
    x, dz = torch.randn(most, d, **made), torch.randn(most, v, **made)
    for n in ROWS:
        rows = slice(0, lab.rows(n))
        work = 2e-9 * (rows.stop - rows.start) * v * d
        out = torch.empty(rows.stop, v, **made)
        lab.rate(f"logits bf16, {n} rows", lambda rows=rows, out=out: torch.mm(x[rows], w.T, out=out), work, "TFLOP/s")
        out = torch.empty(rows.stop, v, dtype=torch.float32, device=lab.device)
        lab.rate(
            f"logits fp32, {n} rows", lambda rows=rows, out=out: product(out, x[rows], w.T, add=False), work, "TFLOP/s"
        )
        del out
        dx = torch.empty(rows.stop, d, **made)
        lab.rate(f"dX bf16, {n} rows", lambda rows=rows, dx=dx: torch.mm(dz[rows], w, out=dx), work, "TFLOP/s")
    n = lab.rows(4096)
    dw, work = torch.zeros(v, d, dtype=torch.float32, device=lab.device), 2e-9 * n * v * d
    lab.rate("dW fp32 written, 4096 rows", lambda: product(dw, dz[:n].T, x[:n], add=False), work, "TFLOP/s")
    lab.rate("dW fp32 added to, 4096 rows", lambda: product(dw, dz[:n].T, x[:n], add=True), work, "TFLOP/s")
