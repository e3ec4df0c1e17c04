"""Does it run, and is it right, at the width of a real head? Every backend against float64 on the same device.

A value is the largest error over what tests/helpers/accuracy.py allows: 1.5 times the error of eager torch in the same
dtypes, plus one rounding. Meanwhile other processes compile what the later parts need (warm.py).
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import torch
from accuracy import check
from common import Lab
from torch import Tensor

from align_kernels import backends_report, linear_logprobs, sft_loss

ROWS = 300
WARMERS = 8
MODES = ("forward", "frozen", "trained", "late")


class Call:
    """A head of some rows with some options, and what float64 and eager torch make of it."""

    def __init__(self, lab: Lab, options: bool, rows: int = ROWS) -> None:
        d, v = lab.head("Qwen2.5-7B")
        n = lab.rows(rows)
        made = dict(device=lab.device, dtype=lab.dtype)
        self.hidden, self.weight = torch.randn(n, d, **made), torch.randn(v, d, **made) * (3 * d**-0.5)
        self.targets = torch.randint(0, v, (n,), device=lab.device)
        self.g, self.h = (torch.randn(n, device=lab.device) for _ in range(2))
        self.head: dict[str, Any] = {}
        if options:
            self.head = dict(
                bias=torch.randn(v, device=lab.device),
                logit_scale=0.9,
                softcap=30.0,
                temperature=torch.rand(n, device=lab.device) + 0.5,
            )

    def truth(self, mode: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """`dtype=None`: eager, in the storage dtype."""
        x, w = (y.detach() if dtype is None else y.to(dtype) for y in (self.hidden, self.weight))
        x.requires_grad_(mode != "forward"), w.requires_grad_(mode in ("trained", "late"))
        z = x @ w.T
        z = z if dtype else z.float()
        if self.head:
            z = (z + self.head["bias"]) * self.head["logit_scale"]
            z = self.head["softcap"] * torch.tanh(z / self.head["softcap"]) / self.head["temperature"][:, None]
        log_p = z.log_softmax(1)
        logp = log_p.gather(1, self.targets[:, None])[:, 0]
        entropy = -(log_p.exp() * log_p).sum(1)
        if mode == "forward":
            return dict(logp=logp, entropy=entropy)
        total = (self.g * logp + self.h * entropy).sum() if mode == "late" else -logp.mean()
        total.backward()
        return {name: y.grad for name, y in (("dX", x), ("dW", w)) if y.grad is not None}

    def run(self, mode: str, impl: str) -> dict[str, Tensor]:
        x, w = self.hidden.detach(), self.weight.detach()
        x.requires_grad_(mode != "forward"), w.requires_grad_(mode in ("trained", "late"))
        if mode in ("frozen", "trained"):
            sft_loss(x, w, self.targets, impl=impl, **self.head).loss.backward()
        else:
            out = linear_logprobs(x, w, self.targets, impl=impl, **self.head)
            if mode == "forward":
                return dict(logp=out.logp, entropy=out.entropy)
            (self.g * out.logp + self.h * out.entropy).sum().backward()
        return {name: y.grad for name, y in (("dX", x), ("dW", w)) if y.grad is not None}


def calls(lab: Lab) -> None:
    warmers = [] if lab.dry else [warm(i) for i in range(WARMERS)]
    for status in backends_report():
        lab.record(f"{status.name}, {status.dtype} on {status.device}", None, "", note=status.why_not or "serves")
    for options in (False, True):
        call = Call(lab, options)
        for mode in MODES:
            true, reason = lab.attempt("float64", lambda call=call, mode=mode: call.truth(mode, torch.float64))
            twin = call.truth(mode, None)
            for impl in ("triton", "torch", "cpu") if lab.dry else ("triton", "cuda", "torch"):
                what = f"{impl}, {mode}, {'all options' if options else 'plain'}"
                got, reason = lab.attempt(what, lambda call=call, mode=mode, impl=impl: call.run(mode, impl))
                for name in got or ():
                    try:
                        ratio = check(
                            name, got[name], true[name].detach(), twin[name].detach(), scale=1.0 * (name[0] != "d")
                        )
                        lab.record(f"{what}: {name}", ratio, "of the allowed error")
                    except AssertionError as error:
                        lab.record(f"{what}: {name}", None, "", note=f"WRONG: {error}")
                if reason:
                    lab.record(what, None, "", note=f"FAILED: {reason}")
            del true, twin
            lab.free()
    for warmer in warmers:
        try:
            warmer.wait(max(lab.until - time.monotonic() - 10, 1))
        except subprocess.TimeoutExpired:
            warmer.kill()


def warm(i: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "warm", str(i), str(WARMERS)])
