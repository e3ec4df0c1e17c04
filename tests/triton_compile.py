"""Ahead-of-time compilation of the Triton backend for GPUs that are not here, in a process without TRITON_INTERPRET.

The backend's own functions run on CPU tensors whose launches are recorded, and each recorded kernel goes through its
`warmup` under a driver that only names a target: the same specialisation of arguments as at run time.

    python tests/triton_compile.py [--before]    # writes docs/gpu_registers.md, with kernels and tests on PYTHONPATH

Another release of Triton is one more folder in front of PYTHONPATH, its figures stand beside those of others; other
kernels in front of it, with --before, become those "before".
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from cuda_compile import Figures, written
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton_instructions import disassembled, on_the_way

from align_kernels.backends import triton as backend
from align_kernels.backends.arguments import looked_at
from align_kernels.backends.triton import linear, rows
from align_kernels.schedules.aliasing import pitch
from align_kernels.schedules.request import row_step
from align_kernels.schedules.support import EVERY, LEVELS, STEPS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes that a program may take
MATMUL = {"sm_80": r"\bmma\.sync", "sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma", "gfx942": r"v_mfma"}
ASYNCHRONOUS = r"cp\.async\.bulk\.tensor|cp\.async\.c[ag]"  # copies from global to shared memory
WIDE_LOAD = r"ld\.global\S*\.v4\.b32|(?:global|buffer)_load_dwordx4"  # 16 bytes
TABLE = Path(__file__).parents[1] / "docs" / "gpu_registers.md"
FIGURES = (
    Path(__file__).parent / "triton_registers.json"
)  # of that page: release, before | now, target, kernel and what
# logits that a thread takes on the way that is counted: of a block or a tile of those constants
LOGITS = {
    "forward_kernel": ("BLOCK",), "exponentials_kernel": ("BLOCK", "U"), "backward_kernel": ("BLOCK",),
    "peaks_kernel": ("ROWS", "BLOCK"), "survey_kernel": ("BLOCK",), "statistics_kernel": ("BN", "BV"),
    "multiply_kernel": ("BLOCK",),
}  # fmt: skip


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
    matmul: int  # instructions, as the two that follow
    asynchronous: int
    wide_loads: int
    instructions: float  # a logit, triton_instructions.py; 0 where it has none of them
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
    chip = dict(_linear=lambda: of_linear, architecture=lambda device: gpu.arch)
    kernels = dict(_rows=lambda: of_rows)
    with patched(backend, **kernels), patched(backend.row_sums, **kernels), patched(backend.on_chip, **chip):
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
        *(len(re.findall(pattern, assembly)) for pattern in (MATMUL[target], ASYNCHRONOUS, WIDE_LOAD)),
        a_logit(target, kernel.__name__, made, found.num_warps, options),
        assembly,
    )
    return reports[made.hash]


def a_logit(target: str, kernel: str, made, warps: int, options: dict) -> float:
    sizes = LOGITS.get(kernel)
    if sizes is None:
        return 0.0
    of_a_thread = math.prod(options[size] for size in sizes) / (warps * TARGETS[target].warp_size)
    text = made.asm["amdgcn"] if target == "gfx942" else disassembled(made.asm["cubin"])
    return round(on_the_way(text) / of_a_thread, 1)


# -- what is shipped ----------------------------------------------------------------------------------------------
ROWS, VOCAB = 64, 151936
HIDDEN = {"": 4096, ", D = 80": 80}  # whole blocks of columns, or a piece of one


def everything(n: int, V: int) -> dict:
    return dict(bias=torch.empty(V), scale=0.5, softcap=30.0, temperature=torch.empty(n))


PLAIN = dict(bias=None, scale=1.0, softcap=None, temperature=1.0)


def row_calls(
    dtype: torch.dtype, out: torch.dtype, V: int, full: bool, n: int = ROWS, offset: int = 0
) -> Callable[[], None]:
    def call() -> None:
        wide = pitch(V, row_step("cuda"))
        z, state = torch.empty(n, wide, dtype=dtype)[:, :V], torch.empty(n, 8, dtype=torch.float64)
        targets, g = torch.empty(n, dtype=torch.int64), torch.empty(n)
        common = dict(offset=offset, vocab=V + offset, **(everything(n, V) if full else PLAIN))
        clamp, h = ((0.1, 0.5, "residual"), g) if full else (None, None)
        backend.forward(z, state, targets, **common)
        dz = z if out == dtype else torch.empty(n, wide, dtype=out)[:, :V]
        backend.backward(z, state, targets, g, h, clamp=clamp, out=dz, **common)
        backend.peaks(z, state, targets, targets, out=torch.empty(V), **common)
        sums, sample = torch.empty(n, LEVELS + 2, 3, dtype=torch.float64), torch.empty(n, looked_at(V, EVERY))
        backend.survey(
            z, state, targets, targets, sums, first=0, every=EVERY, drop_mass=2**-8, steps=STEPS,
            sample=sample.to(torch.uint8), **common,
        )  # fmt: skip
        if out != torch.float16:
            del common["softcap"]
            backend.exponentials(z, state, targets, g, out=dz, **common)

    return call


def multiplied() -> None:
    backend.multiply(torch.empty(VOCAB, 64, dtype=torch.bfloat16), torch.empty(()))


def summed_by_rows(dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        sums, reached = torch.empty(VOCAB, 64), torch.empty(VOCAB, dtype=torch.bool)
        rows = torch.empty(ROWS, dtype=torch.int64)
        backend.row_sums.add(sums, reached, rows, torch.empty(ROWS, 64))
        backend.row_sums.finish(sums, reached, sums if dtype == sums.dtype else sums.to(dtype))

    return call


def linear_calls(
    dtype: torch.dtype, D: int, options: dict, V: int = VOCAB, n: int = ROWS, offset: int = 0
) -> Callable[[], None]:
    def call() -> None:
        x, w = torch.empty(n, D, dtype=dtype), torch.empty(V, D, dtype=dtype)
        state, targets = torch.empty(n, 8, dtype=torch.float64), torch.empty(n, dtype=torch.int64)
        backend.on_chip.forward(x, w, state, targets, offset=offset, vocab=V + offset, **options)

    return call


def shipped(target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a kernel is compiled for, and the calls that make it."""
    single, half, short = torch.float32, torch.bfloat16, torch.float16
    for full in (False, True):
        head = "all options" if full else "plain"
        for dtype, out in ((single, single), (single, half), (half, half), (short, short)):
            names = [str(x).removeprefix("torch.") for x in (dtype, out)]
            name = names[0] if dtype == out else f"{names[0]} to {names[1]}"
            yield f"{name}, {head}", row_calls(dtype, out, VOCAB, full)
        for dtype in (half, short):
            for suffix, D in HIDDEN.items():
                if not suffix or target in ("sm_80", "gfx942"):  # a tensor descriptor knows one kind of D
                    name = str(dtype).removeprefix("torch.")
                    options = everything(ROWS, VOCAB) if full else PLAIN
                    yield f"{name}, {head}{suffix}", linear_calls(dtype, D, options)
                    if full and not suffix:
                        yield f"{name}, {head} but softcap", linear_calls(dtype, D, options | dict(softcap=None))
    yield "float32, plain, V = 50257", row_calls(single, single, 50257, False)
    yield "bfloat16", multiplied
    for dtype in (single, half, short):
        yield str(dtype).removeprefix("torch."), summed_by_rows(dtype)


def compile_all(target: str) -> list[tuple[str, Report]]:
    """Every kernel once, by the first name under which it was made."""
    seen: dict[int, tuple[str, Report]] = {}
    for name, call in shipped(target):
        for report in compile_for(target, call):
            seen.setdefault(id(report), (name, report))
    return list(seen.values())


def figures(made: dict[str, list[tuple[str, Report]]]) -> Figures:
    return {
        target: {
            f"{r.kernel.removesuffix('_kernel')} | {name}": f"{r.warps} {r.registers} {r.spilled} {r.shared} "
            f"{r.instructions:g}"
            for name, r in of_target
        }
        for target, of_target in made.items()
    }


COLUMNS = [
    "| target | kernel | for | warps | registers | spilled | shared bytes | instructions a logit |",
    "|---|---|---|---|---|---|---|---|",
]


def page(known: dict[str, dict[str, Figures]], of_cuda: dict[str, dict[str, Figures]]) -> str:
    releases = sorted(known, reverse=True)
    lines = [
        "# Registers, shared memory and instructions of the GPU kernels",
        "",
        f"Written by `make gpu-registers`, on a machine without a GPU: what Triton {' and '.join(releases)} make",
        "of every shipped kernel. Each figure stands for these releases in turn, one figure where they agree; a line",
        '"before" has those of the kernels before the last change to them. Times on a GPU are not yet measured.',
        "",
        "Instructions are those of the machine, a logit, on the way that nearly every logit takes: around the loop",
        "over a row, after the last matrix product, or through the whole (`tests/triton_instructions.py`).",
        "",
        *COLUMNS,
        *table(known, releases),
        "",
        "## CUDA",
        "",
        f"What nvcc {' and '.join(sorted(of_cuda, reverse=True))} makes of the kernels of `csrc/cuda`, those of",
        "float16 left out; shared memory is that of fixed size. A plain head has no bias, no softcap and a positive",
        "scale, any other may have each; all options are such a head with a clamp and a gradient of the entropy.",
        "Instructions: of forward and backward of a plain head, around the loop over a row, on the shortest way on",
        "which each of its logits has its exponential (`tests/cuda_compile.py`); 0 where none are counted.",
        "",
        *COLUMNS,
        *table(of_cuda, sorted(of_cuda, reverse=True)),
    ]
    return "\n".join(lines) + "\n"


def table(known: dict[str, dict[str, Figures]], releases: list[str]) -> list[str]:
    lines = []
    for target, of in known[releases[0]]["now"].items():
        for what in of:
            rows = {when: cells([known[r][when][target].get(what) for r in releases]) for when in ("now", "before")}
            lines.append(f"| {target} | {what} | {' | '.join(rows['now'])} |")
            if rows["before"] not in (rows["now"], []):
                lines.append(f"| {target} | {what}, before | {' | '.join(rows['before'])} |")
    return lines


def cells(of_releases: list[str | None]) -> list[str]:
    """A cell for each column, of all releases."""
    columns = zip(*(line.split() for line in of_releases if line is not None))
    return [column[0] if len(set(column)) == 1 else " / ".join(column) for column in columns]


@contextlib.contextmanager
def patched(module, **replacements):
    before = {name: getattr(module, name) for name in replacements}
    vars(module).update(replacements)
    try:
        yield
    finally:
        vars(module).update(before)


if __name__ == "__main__":
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    now = figures({target: compile_all(target) for target in TARGETS})
    before = now if "--before" in sys.argv else known.get(triton.__version__, {}).get("before", now)
    known[triton.__version__] = {"before": before, "now": now}
    FIGURES.write_text(json.dumps(known, indent=1) + "\n")
    TABLE.write_text(page(known, written("--before" in sys.argv)))
