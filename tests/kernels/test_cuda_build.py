"""The CUDA sources by nvcc for every architecture that ships, the extension's build, and life without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cuda_compile import FIGURES, compiled, constant, figures, nvcc, release

from align_kernels import backends_report, linear_logprobs
from align_kernels.backends import cuda

from .cuda_emulator import plant_device_error

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
# bounds per kernel: registers that leave the intended number of blocks on a multiprocessor
REGISTERS = {"forward": 72, "backward": 72, "token_loss": 96, "peaks": 72, "unit_loss": 72}


NVCC = nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


# -- compilation --------------------------------------------------------------------------------------------------
@needs_nvcc
@pytest.mark.parametrize("arch", constant("CUDA_ARCHS"))
def test_kernels_compile_without_spills(arch: str, tmp_path: Path):
    """And take what docs/gpu_registers.md says; `make gpu-registers` writes it anew."""
    assert NVCC is not None
    cubin, known = tmp_path / "kernels.cubin", json.loads(FIGURES.read_text())
    found = compiled(NVCC, arch, cubin)
    assert len(found) == 6 + 20 + 20 + 6 + 1, sorted(found)
    for name, (registers, spills, shared) in found.items():
        kernel = next(k for k in sorted(REGISTERS, key=len, reverse=True) if f"{k}_kernel" in name)
        assert spills == 0, f"{name} spills {spills} bytes"
        assert registers <= REGISTERS[kernel], f"{name} takes {registers} registers"
        assert shared <= 16384, f"{name} takes {shared} bytes of shared memory"
    made = figures(found, cubin)
    for of, figured in known.items():
        assert list(figured["now"][f"sm_{arch}"]) == list(made)
        assert of != release(NVCC) or figured["now"][f"sm_{arch}"] == made


@needs_nvcc
def test_a_spill_is_seen(tmp_path: Path):
    planted = tmp_path / "planted.cu"
    planted.write_text(
        """
        __global__ void __launch_bounds__(1024, 2) spilling(const float* x, float* y) {
          float v[64];
          for (int i = 0; i < 64; i++) v[i] = x[threadIdx.x * 64 + i];
          __syncthreads();
          for (int i = 0; i < 64; i++) y[threadIdx.x * 64 + i] = v[63 - i] * v[(i * 7) % 64];
        }
        """
    )
    assert NVCC is not None
    ((_, spills, _),) = compiled(NVCC, "90", tmp_path / "planted.cubin", planted).values()
    assert spills > 0


# -- setup.py -----------------------------------------------------------------------------------------------------
BUILD = """
    import sys, setuptools
    caught = {}
    setuptools.setup = lambda **named: caught.update(named)
    source = open("setup.py").read()
    exec(compile(source, "setup.py", "exec"), {"__name__": "setup"})
    wanted = [e for e in caught["ext_modules"] if e.name == "align_kernels._cuda"]
    if not wanted:
        print("no CUDA extension")
    command = caught["cmdclass"]["build_ext"](setuptools.Distribution({"ext_modules": wanted or caught["ext_modules"]}))
    command.build_lib, command.build_temp = sys.argv[1:]
    command.finalize_options()
    if not wanted:
        command.extensions = []
    command.run()
"""


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"} | {"FORCE_CUDA": "1"} | environment
    command = [sys.executable, "-c", textwrap.dedent(BUILD), str(folder / "lib"), str(folder / "temp")]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def plant_stale(folder: Path) -> Path:
    stale = folder / "lib" / "align_kernels" / "_cuda.cpython-311-x86_64-linux-gnu.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier build")
    return stale


def test_a_failing_nvcc_is_a_warning(tmp_path: Path):
    stale = plant_stale(tmp_path)
    fake = tmp_path / "home" / "bin" / "nvcc"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\necho 'nvcc fatal: out of luck' >&2\nexit 3\n")
    fake.chmod(0o755)
    done = build(tmp_path, CUDA_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert 'building extension "align_kernels._cuda" failed' in done.stderr + done.stdout
    assert "out of luck" in done.stderr + done.stdout
    assert not stale.exists()


def test_without_nvcc_nothing_of_cuda_is_built(tmp_path: Path):
    stale = plant_stale(tmp_path)
    (tmp_path / "home" / "bin").mkdir(parents=True)
    done = build(tmp_path, CUDA_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "no CUDA extension" in done.stdout and not stale.exists()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="the machine has a GPU")
def test_without_a_gpu_nothing_of_cuda_is_built(tmp_path: Path):
    done = build(tmp_path, FORCE_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "no CUDA extension" in done.stdout


# -- without a GPU ------------------------------------------------------------------------------------------------
def test_cpu_tensors_are_refused():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r'impl="cuda" cannot serve torch.float32 on cpu: '):
        linear_logprobs(hidden, weight, targets, impl="cuda")
    status = [s for s in backends_report() if s.name == "cuda" and s.device == "cpu"]
    assert status and not any(s.available for s in status) and all(s.why_not for s in status)


@pytest.mark.parametrize("code", [35, 100])
def test_no_driver_and_no_device_are_no_gpu(emulator: ModuleType, code: int):
    """cudaErrorInsufficientDriver and cudaErrorNoDevice."""
    plant_device_error(emulator, code)
    try:
        assert emulator.device_count() == 0
        assert "the machine has no GPU" in (cuda.why_not(torch.device("cpu"), torch.float32) or "")
        with pytest.raises(ValueError, match=r'impl="cuda" cannot serve .* the machine has no GPU'):
            linear_logprobs(torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2]), impl="cuda")
    finally:
        plant_device_error(emulator, 0)
    assert cuda.why_not(torch.device("cpu"), torch.float32) is None


def test_other_errors_of_the_driver_are_not_swallowed(emulator: ModuleType):
    plant_device_error(emulator, 2)
    try:
        with pytest.raises(RuntimeError, match="emulated: an error that the test planted"):
            emulator.device_count()
    finally:
        plant_device_error(emulator, 0)


def test_why_not_says_what_is_missing(emulator: ModuleType):
    assert "float64" in (cuda.why_not(torch.device("cpu"), torch.float64) or "")
    assert "not on meta" in (cuda.why_not(torch.device("meta"), torch.float32) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_the_extension_loads_without_a_driver():
    try:
        from align_kernels import _cuda
    except ImportError:
        pytest.skip("align_kernels._cuda is not built")
    assert _cuda.device_count() == 0
    queue = _cuda.Queue(0, 0)
    x = torch.zeros(2, 8, dtype=torch.float64)
    loss = dict(kind=4, beta=0.1, label_smoothing=0.0, desirable_weight=1.0, undesirable_weight=1.0, rows=0, units=1)
    pointers = dict.fromkeys("state place ref_logps desirable kl scale value metrics g".split(), x.data_ptr())
    with pytest.raises(_cuda.CudaError, match=r"cudaError(InsufficientDriver|NoDevice)"):
        _cuda.unit_loss(_cuda.UnitLoss(**loss, **pointers), queue)
