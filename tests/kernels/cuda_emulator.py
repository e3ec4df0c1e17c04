"""Backend `cuda` on the CPU: the kernels' own source under csrc/cuda/emulate.cpp, compiled by the C++ compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from align_kernels.backends.cuda import arguments

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def build(folder: Path) -> ModuleType:
    """The extension, made of emulated kernels."""
    if COMPILER is None:
        pytest.skip("no C++ compiler to emulate the CUDA kernels with")
    library = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [str(SOURCES / name) for name in ("bind.cpp", "check.cpp", "emulate.cpp")]
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = "-std=c++17 -O1 -shared -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas".split()
    command = [COMPILER, *flags, "-DALIGN_MODULE=_cuda_emulated", *include, *sources, "-o", str(library)]
    subprocess.run(command, check=True, timeout=300)
    spec = importlib.util.spec_from_file_location("_cuda_emulated", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plant_device_error(module: ModuleType, code: int) -> None:
    """Make the emulated driver answer `code` when it is asked for devices; 0 mends it."""
    assert module.__file__ is not None
    ctypes.CDLL(module.__file__).align_plant_device_error(code)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> ModuleType:
    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def emulator(emulated: ModuleType, monkeypatch) -> ModuleType:
    """Backend `cuda` serves CPU tensors, by its kernels' source."""
    monkeypatch.setattr(arguments, "_cuda", emulated, raising=False)
    monkeypatch.setattr(arguments, "MISSING", None)
    monkeypatch.setattr(arguments, "DEVICE", "cpu")
    return emulated
