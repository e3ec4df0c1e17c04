"""The epilogue of epilogue.py beside the kernels that are shipped: right at the width of a real head, and fast.

Dry, and where the built kernel cannot be loaded, its emulation in torch takes its place to prove this script, and the
first line says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accuracy import check
from common import Lab
from epilogue import TILE, Launch, Sums, emulated, largest, log_probs, peaked, through
from heads import made
from plans import MODES, step
from questions import Batch, Question
from right import Call
from torch import Tensor

from align_kernels import linear_logprobs
from align_kernels.schedules.request import BLOCK_ROWS_GPU

BUILT = Path(os.environ.get("ALIGN_CARRIED", "build/gpu")) / "epilogue"  # set by survey.py
HEAD, ROWS, KEPT = "Qwen2.5-7B", 8192, 0.05  # share of the columns that peaked rows keep
SIZES = (1, 127, 129, 300, 1000)  # rows: less than a tile, more than one, an odd number of clusters


class Built:
    """A launch of the kernel that epilogue_kernel.py built. tvm_ffi loads it: cutlass is not needed.

    Raises:
        ImportError, OSError, RuntimeError: it is not there, or cannot be loaded.
    """

    def __init__(self, folder: Path = BUILT) -> None:
        if not (folder / "epilogue.json").exists():
            raise ImportError(f"{folder} is not there: python benches/gpu/survey.py --prepare builds it")
        import tvm_ffi

        self.arguments = json.loads((folder / "epilogue.json").read_text())["full"]["arguments"]
        self.full, self.alone = (tvm_ffi.load_module(str(folder / f"{name}.so"))[name] for name in ("full", "sums"))
        self.clusters = torch.cuda.get_device_properties(0).multi_processor_count // 2

    def __call__(
        self, x: Tensor, w: Tensor, targets: Tensor, factor: Tensor, shift: Tensor, out: Tensor | None
    ) -> Sums:
        n, tiles = len(x), w.shape[0] // TILE
        if w.shape[0] % TILE or x.shape[1] % 8 or {x.dtype, w.dtype} != {torch.bfloat16}:
            raise ValueError(f"the built kernel takes bfloat16, V a multiple of {TILE} and D of 8, got {w.shape}")
        single = dict(dtype=torch.float32, device=x.device)
        given = dict(
            factor=factor, shift=shift, targets=targets.int(), sums=torch.empty(n, 4 * tiles, **single),
            top=torch.empty(n, tiles, **single), total=torch.empty(n, tiles, **single),
        )  # fmt: skip
        call = self.alone if out is None else self.full
        epilogue = tuple(given.get(name) for name in self.arguments)
        call(x.contiguous(), w, out, None, epilogue, (self.clusters, None, 8, None, None, None), None, None, None)
        if out is not None:
            out.scatter_(1, targets[:, None], 0.0)
        s, a, q, own = given["sums"].view(n, 4, tiles).unbind(1)
        return Sums(s, a, q, given["top"], given["total"], own)


def launch_of(lab: Lab) -> Launch:
    """The built kernel or its emulation, and a line that says which."""
    built, reason = lab.attempt("built kernel", Built)
    what = "epilogue_kernel.py's" if built is not None else "its emulation: no figure below is the kernel's"
    lab.record("launches", None, "", note=f"{what}; {reason}" if reason else what)
    return built or emulated


def race(lab: Lab) -> None:
    launch = launch_of(lab)
    right(lab, launch)
    if launch is emulated and not lab.dry:
        return
    alone(lab, launch)
    fast(lab, launch)
    of_peaked(lab, launch)


# -- right ---------------------------------------------------------------------------------------------------------
def right(lab: Lab, launch: Launch) -> None:
    """The largest error over what is allowed, against float64, of several numbers of rows."""
    for rows in SIZES[: 1 if lab.dry else None]:
        call = Call(lab, False, rows)
        call.h.zero_()  # a late gradient of the entropy is made of logits
        for mode in ("forward", *MODES):
            what = f"{mode}, {rows} rows"
            true, _ = lab.attempt("float64", lambda call=call, mode=mode: call.truth(mode, torch.float64))
            got, reason = lab.attempt(what, lambda call=call, mode=mode: made_by(lab, launch, call, mode))
            twin = call.truth(mode, None) if got else {}
            for name, found in (got or {}).items():
                try:
                    size = 1.0 * (name[0] != "d")
                    ratio = check(name, found, true[name].detach(), twin[name].detach(), scale=size)
                    lab.record(f"{what}: {name}", ratio, "of the allowed error")
                except AssertionError as error:
                    lab.record(f"{what}: {name}", None, "", note=f"WRONG: {error}")
            if reason:
                lab.record(what, None, "", note=f"FAILED: {reason}")
        lab.free()


def made_by(lab: Lab, launch: Launch, call: Call, mode: str) -> dict[str, Tensor]:
    if mode == "forward":
        return dict(logp=log_probs(launch, call.hidden, call.weight, call.targets).float())
    impl = "torch" if lab.dry else "triton"
    with through(launch):
        if mode != "late":
            return call.run(mode, impl)
        x, w = call.hidden.detach().requires_grad_(), call.weight.detach().requires_grad_()
        linear_logprobs(x, w, call.targets, impl=impl).logp.backward(call.g)
        return {name: y.grad for name, y in (("dX", x), ("dW", w)) if y.grad is not None}


# -- fast ----------------------------------------------------------------------------------------------------------
def alone(lab: Lab, launch: Launch) -> None:
    """The launch beside the product whose place it takes."""
    d, v = lab.head(HEAD)
    n, made = lab.rows(ROWS), dict(device=lab.device, dtype=lab.dtype)
    x, w, out = torch.randn(n, d, **made), torch.randn(v, d, **made) * d**-0.5, torch.empty(n, v, **made)
    targets = torch.randint(0, v, (n,), device=lab.device)
    factor, shift = torch.ones(n, device=lab.device), torch.zeros(n, device=lab.device)
    work = 2e-9 * n * v * d
    lab.rate("logits by cuBLAS", lambda: torch.mm(x, w.T, out=out), work, "TFLOP/s")
    lab.rate("exponentials and sums", lambda: launch(x, w, targets, factor, shift, out), work, "TFLOP/s")
    lab.rate("sums alone", lambda: launch(x, w, targets, factor, shift, None), work, "TFLOP/s")


def fast(lab: Lab, launch: Launch) -> None:
    """Log-probs and gradients through the public operators, by turns with what is shipped."""
    impl = "torch" if lab.dry else "triton"
    for mode in ("forward", *MODES):
        what, trained = MODES.get(mode, ("forward", False))
        _, b = made(lab, Question(what, HEAD, ROWS, trained, dtype="bfloat16"))

        def shipped(mode: str = mode, b: Batch = b) -> None:
            if mode in MODES:
                step(b, mode, None, impl)
            else:
                linear_logprobs(b.hidden.detach(), b.weight.detach(), b.targets, impl=impl)

        def ours(mode: str = mode, b: Batch = b) -> None:
            if mode in MODES:
                with through(launch):
                    step(b, mode, None, impl)
            else:
                log_probs(launch, b.hidden.detach()[0], b.weight.detach(), b.targets[0])

        compare(lab, mode, {"epilogue": ours, "row kernel": shipped})
        lab.free()


def of_peaked(lab: Lab, launch: Launch) -> None:
    """A trained head whose rows keep KEPT of their columns, chosen on the device, beside `drop_mass`."""
    _, b = made(lab, Question("sft", HEAD, ROWS, True, softmax="peaked", dtype="bfloat16"))
    x, w, targets, g = b.hidden.detach()[0], b.weight.detach(), b.targets[0], b.g[0]
    columns = max(int(KEPT * len(w)), 1)
    look = largest if lab.dry else torch.compile(largest)  # one pass over what three would read and write

    def shipped() -> None:
        b.forget()
        out = linear_logprobs(b.hidden, b.weight, b.targets, impl="torch" if lab.dry else "triton", drop_mass=2.0**-8)
        out.logp.backward(b.g)

    ours = lambda: peaked(launch, x, w, targets, g, columns, BLOCK_ROWS_GPU, look)  # noqa: E731
    compare(lab, "peaked", {"epilogue": ours, "row kernel": shipped})


def compare(lab: Lab, mode: str, runs: dict[str, Callable[[], Any]]) -> None:
    for name, took in lab.race({f"{mode}, {name}": run for name, run in runs.items()}).items():
        lab.record(name, took.milliseconds, "ms", **{"peak MiB": took.peak_mib, "note": took.note})
