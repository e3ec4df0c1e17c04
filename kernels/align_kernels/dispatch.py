"""Which backend serves a call. A request by name is served or refused with the reason, never replaced."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from align_kernels.backends import (
    Backend,
    Exponentials,
    ListsOfColumns,
    Losses,
    Multiply,
    OnChip,
    Peaks,
    Products,
    RowSums,
    Survey,
    cpu,
    cuda,
    torch_ops,
    triton,
)

# as `auto` prefers them; triton before cuda until both are measured
BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": triton, "cuda": cuda, "torch": torch_ops}
POWERS = {
    "exponentials": Exponentials,
    "peaks": Peaks,
    "survey": Survey,
    "lists": ListsOfColumns,
    "on_chip": OnChip,
    "products": Products,
    "losses": Losses,
    "multiply": Multiply,
    "row_sums": RowSums,
}


def register_backend(name: str, backend: Backend) -> None:
    """Serve `impl=name` by `backend`. "auto" goes on taking those of the package.

    Args:
        name: a word that no backend has.
        backend: a module or an object with everything that `align_kernels.backends.Backend` names; powers that it does
            not have are None.

    Raises:
        ValueError: a name that is taken.
        TypeError: an attribute that the protocol names is missing, or is no function where it names one; or both
            `peaks` and `lists` are None.
    """
    if name in ("auto", "eager") or BACKENDS.get(name, backend) is not backend:
        raise ValueError(f"the backend name {name!r} is taken: choose another")
    _check_protocol(f"backend {name!r}", backend, Backend)
    for power, protocol in POWERS.items():
        if (found := getattr(backend, power)) is not None:
            _check_protocol(f"{power} of backend {name!r}", found, protocol)
    if backend.peaks is None and backend.lists is None:
        raise TypeError(f"backend {name!r} has neither 'peaks' nor 'lists', one of which drop_mass takes")
    BACKENDS[name] = backend


def _check_protocol(what: str, found: Any, protocol: type) -> None:
    wanted = {name: of for name, of in vars(protocol).items() if name == "__call__" or not name.startswith("_")}
    for name, of in wanted.items():
        absent = " (None where it has no such power)" if name in POWERS else ""
        if not hasattr(found, name):
            raise TypeError(f"{what} has no attribute {name!r}{absent}: see align_kernels.backends")
        if not isinstance(of, property) and not callable(getattr(found, name)):
            raise TypeError(f"{what}: {name!r} must be a function, got {getattr(found, name)!r:.60}")


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
        raise ValueError(f"impl must be one of auto, eager, {', '.join(BACKENDS)}, got {impl!r}")
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
