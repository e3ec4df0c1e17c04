"""How often the CPU waits for the GPU in a call and its backward: torch's own count of synchronising operations."""

from __future__ import annotations

import warnings

import torch
from common import Lab
from heads import made
from plans import MODES, step
from questions import Question

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
