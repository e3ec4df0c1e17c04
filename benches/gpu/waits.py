"""How often the CPU waits for the GPU in a call and its backward, by torch's own count of synchronising operations; and
a call that is captured in a CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from common import Lab
from heads import made
from plans import MODES, step
from questions import Batch, Question
from torch import Tensor

from align_kernels import linear_logprobs


def count(lab: Lab, mode: str) -> int:
    impl = "torch" if lab.dry else "triton"
    what, trained = MODES.get(mode, ("forward", False))
    _, b = made(lab, Question(what, "Qwen2.5-0.5B", 2048, trained, dtype="bfloat16"))

    def call() -> None:
        if mode in MODES:
            step(b, mode, None, impl)
        else:
            linear_logprobs(b.hidden.detach(), b.weight.detach(), b.targets, impl=impl)

    call()  # compiles
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not lab.dry:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            if not lab.dry:
                torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def waits(lab: Lab) -> None:
    for mode in ("forward", *MODES):
        found, reason = lab.attempt(mode, lambda mode=mode: count(lab, mode))
        lab.record(mode, found, "waits", note=reason)


def graph(lab: Lab) -> None:
    """A step captured in a CUDA graph, replayed on other numbers, beside the same call without one."""
    impl = "torch" if lab.dry else "triton"
    for rows in (512, 2048):
        for late in (False, True):
            _, b = made(lab, Question("gradient", "Qwen2.5-0.5B", rows, late, dtype="bfloat16"))
            b.targets[:, ::5] = -100
            leaves = [b.hidden] + [b.weight] * late

            def call(b: Batch = b, leaves: list[Tensor] = leaves) -> list[Tensor]:
                logp = linear_logprobs(b.hidden, b.weight, b.targets, impl=impl).logp
                return [logp.detach(), *torch.autograd.grad(logp, leaves, b.g)]

            what = f"{rows} rows, {'trained' if late else 'frozen'}"
            ms, reason = lab.attempt(what, lambda call=call, b=b: captured(lab, call, b))
            lab.record(f"{what}: error of a replay", ms and ms[0], "of the largest", note=reason)
            lab.record(f"{what}: replay", ms and ms[1], "ms")
            lab.record(f"{what}: call", ms and ms[2], "ms")


def captured(lab: Lab, call: Callable[[], list[Tensor]], b: Batch) -> tuple[float, float, float]:
    """The largest error of a replay beside a call, and the milliseconds of both."""
    plain = call()
    replay, made = call, plain
    if not lab.dry:
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            made = call()
        replay = recorded.replay
    with torch.no_grad():
        b.hidden.copy_(b.hidden.flip(1))
    b.targets.copy_(b.targets.flip(1))
    times = lab.once(replay), lab.once(call)
    again = call()
    found = made if not lab.dry else replay()
    error = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, again))
    return error, *times
