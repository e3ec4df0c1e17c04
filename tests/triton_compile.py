"""Ahead-of-time compilation of the Triton backend for GPUs that are not here, in a process without TRITON_INTERPRET.

The backend's own functions run on CPU tensors whose launches are recorded, and each recorded kernel goes through its
`warmup` under a driver that only names a target: the same specialisation of arguments as at run time.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from align_kernels.backends import triton as backend
from align_kernels.backends.triton import linear, rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes that a program may take
# what is counted in the assembly
MATMUL = r"wgmma\.mma_async|\bmma\.sync|tcgen05\.mma|v_mfma"
ASYNCHRONOUS = r"cp\.async\.bulk\.tensor|cp\.async\.c[ag]"


class Driver:
    """Stands where Triton looks for a GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return hash(self.target) & 0xFFFF  # compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Report(NamedTuple):
    kernel: str
    target: str
    registers: int
    spilled: int  # bytes, AMD: registers
    shared: int  # bytes
    warps: int
    matmul: int  # instructions
    asynchronous: int  # copies from global to shared memory
    assembly: str


reports: dict[str, Report] = {}


class Recorder:
    """Stands for the module of kernels: a launch is written down, not made."""

    def __init__(self, module, launches: list[tuple]) -> None:
        self.module, self.launches = module, launches

    def __getattr__(self, name: str):
        kernel = getattr(self.module, name)
        record = lambda grid: lambda *args, **options: self.launches.append((kernel, grid, args, options))  # noqa: E731
        return type("Launcher", (), {"__getitem__": lambda _, grid: record(grid)})()


def compile_for(target: str, call: Callable[[], object]) -> list[Report]:
    """The kernels that `call`, some calls of the backend, would launch on a GPU of this kind."""
    gpu, launches = TARGETS[target], []
    of_rows, of_linear = Recorder(rows, launches), Recorder(linear, launches)
    with patched(backend, _rows=lambda: of_rows, _linear=lambda: of_linear, architecture=lambda device: gpu.arch):
        call()
    driver.set_active(Driver(gpu))
    return [compile_one(target, *launch) for launch in launches]


def compile_one(target: str, kernel, grid: tuple, args: tuple, options: dict) -> Report:
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        made = kernel.warmup(*args, grid=grid, **options)
    if made.hash in reports:  # the same specialisation once more
        return reports[made.hash]
    if TARGETS[target].backend == "cuda":
        text = log.getvalue()
        assembly = made.asm["ptx"]
        registers = int(re.findall(r"Used (\d+) registers", text)[-1])
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
    else:
        assembly = made.asm["amdgcn"]
        registers, spilled = (
            sum(int(x) for x in re.findall(rf"\.vgpr_{name}:\s+(\d+)", assembly)) for name in ("count", "spill_count")
        )
    found = SimpleNamespace(**made.metadata._asdict())
    reports[made.hash] = Report(
        kernel.__name__,
        target,
        registers,
        spilled,
        found.shared,
        found.num_warps,
        len(re.findall(MATMUL, assembly)),
        len(re.findall(ASYNCHRONOUS, assembly)),
        assembly,
    )
    return reports[made.hash]


@contextlib.contextmanager
def patched(module, **replacements):
    before = {name: getattr(module, name) for name in replacements}
    vars(module).update(replacements)
    try:
        yield
    finally:
        vars(module).update(before)
