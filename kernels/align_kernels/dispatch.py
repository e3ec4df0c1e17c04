"""Which backend serves a call. A request by name is served or refused with the reason, never replaced."""

from __future__ import annotations

from typing import NamedTuple

import torch

from align_kernels.backends import Backend, cpu, cuda, torch_ops, triton

# as `auto` prefers them; triton before cuda until both are measured
BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": triton, "cuda": cuda, "torch": torch_ops}
IMPLS = ("auto", "eager", *BACKENDS)


class BackendStatus(NamedTuple):
    """One line of `backends_report`: whether a backend serves a device and dtype, and else why not."""

    name: str
    device: str
    dtype: str
    available: bool
    why_not: str


def pick(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend for logits of `dtype` on `device`.

    Raises:
        ValueError: an unknown name, or a named backend that cannot serve, with the reason.
    """
    if impl in BACKENDS:
        reason = BACKENDS[impl].why_not(device, dtype)
        if reason is not None:
            raise ValueError(f'impl="{impl}" cannot serve {dtype} on {device}: {reason}')
        return impl
    if impl != "auto":
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    return next(name for name, backend in BACKENDS.items() if backend.why_not(device, dtype) is None)


def backends_report() -> list[BackendStatus]:
    """Every backend on every device of this machine and every dtype; the first available one is what `auto` takes."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    report = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for name, backend in BACKENDS.items():
                reason = backend.why_not(torch.device(device), dtype)
                report.append(
                    BackendStatus(name, device, str(dtype).removeprefix("torch."), reason is None, reason or "")
                )
    return report
