"""Every shipped Triton kernel compiles for every target, fits it, spills nothing and uses what the target has."""

from __future__ import annotations

import json
import re

import pytest
import torch
import triton
from cuda_compile import FIGURES as OF_CUDA
from triton_compile import (
    FIGURES,
    PLAIN,
    SHARED,
    TABLE,
    TARGETS,
    Report,
    compile_all,
    compile_for,
    figures,
    linear_calls,
    page,
    row_calls,
)

made: dict[str, list[tuple[str, Report]]] = {}


@pytest.mark.parametrize("target", TARGETS)
def test_target(target: str):
    made[target] = compile_all(target)
    for name, report in made[target]:
        what = f"{report.kernel} for {name} on {target}"
        assert report.spilled == 0, f"{what} spills {report.spilled}"
        assert report.shared <= SHARED[target], f"{what} takes {report.shared} bytes of {SHARED[target]}"
        assert 0 < report.registers <= (512 if target == "gfx942" else 255), what
        if report.kernel == "statistics_kernel":
            assert report.matmul, f"{what} has no matrix instruction"
            assert report.asynchronous or target == "gfx942", f"{what} copies to shared memory synchronously"
        elif report.kernel in ("forward_kernel", "backward_kernel") and "50257" not in name:
            assert report.wide_loads, f"{what} loads less than 16 bytes a thread"
        elif report.kernel == "exponentials_kernel":  # whatever the number of columns: rows are padded
            assert report.wide_loads, f"{what} loads less than 16 bytes a thread"
        if report.kernel == "statistics_kernel" and target == "sm_90":
            waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", report.assembly)
            assert "1" in waits, f"{what} waits for every product before it begins the next"
    kernels = {report.kernel for _, report in made[target]}
    rows = {"forward_kernel", "exponentials_kernel", "backward_kernel", "peaks_kernel", "multiply_kernel"}
    rows |= {"survey_kernel", "add_rows_kernel", "finish_rows_kernel"}
    assert kernels == rows | {"statistics_kernel", "merge_kernel"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("n", "V", "offset"), [(1, 1, 1), (5, 70, 1 << 33)])
def test_an_argument_of_one_is_a_constant_to_the_compiler(n: int, V: int, offset: int, target: str):
    for call in (
        row_calls(torch.float32, torch.float32, V, False, n, offset),
        linear_calls(torch.bfloat16, 16, PLAIN, V, n, offset),
    ):
        assert compile_for(target, call)


def test_the_committed_page():
    """docs/gpu_registers.md says what the compiler says, of the releases that it names; `make gpu-registers` writes it
    anew. Another release has other registers, but not other kernels."""
    known, found = json.loads(FIGURES.read_text()), figures(made)
    assert TABLE.read_text() == page(known, json.loads(OF_CUDA.read_text()))
    for release, of in known.items():
        assert {target: list(rows) for target, rows in of["now"].items()} == {t: list(r) for t, r in found.items()}
        assert release != triton.__version__ or of["now"] == found
