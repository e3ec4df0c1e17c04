"""Builds align_kernels._C, the CPU kernels, and align_kernels._cuda, and lays recipes and examples into the engine; the
rest is in pyproject.toml.

Both extensions are optional: without a working compiler the package installs and runs on torch operations alone.
The second takes nvcc and, like torchvision's, a GPU in the machine or FORCE_CUDA=1: it is most of the compiler's work.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

# Flags of single files: the instruction sets, chosen at run time; of bindings only the size matters.
FILE_FLAGS = {"bind": ["-Os"]}
ISAS = ["isa_baseline"]
if platform.machine().lower() in ("x86_64", "amd64"):
    FILES = {
        ("-mavx2", "-mfma"): ["isa_avx2", "gemm_avx2"],
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"): [
            "isa_avx512",
            "gemm_avx512_bf16",
            "gemm_amx",
        ],
    }
    ISAS += [name for names in FILES.values() for name in names]
    FILE_FLAGS |= {name: list(flags) for flags, names in FILES.items() for name in names}
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
# What distributions harden their own packages with; the flags of the linker are GNU's and LLVM's.
HARDENED = ["-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2"]
HARDENED_LINK = ["-Wl,-z,relro,-z,now,-z,noexecstack"] if sys.platform == "linux" else []
# No kernel uses what an "a" architecture adds; plain code also runs on later chips of its family (of sm_100 on 10.3).
# PTX of the first serves the rest.
CUDA_ARCHS = ["80", "90", "100"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def wants_cuda() -> bool:
    gpu = shutil.which("nvidia-smi") is not None or os.environ.get("FORCE_CUDA") == "1"
    return gpu and find_nvcc() is not None


class BuildPy(build_py):
    """Of a wheel: with the recipes and examples that `align recipes` shows."""

    def run(self) -> None:
        super().run()
        package = Path(self.build_lib) / "align_engine"
        if package.is_dir() and not self.editable_mode:
            for name in ("recipes", "examples"):
                left_out = shutil.ignore_patterns("__pycache__")
                shutil.copytree(name, package / "shipped" / name, dirs_exist_ok=True, ignore=left_out)


class BuildExt(build_ext):
    """Compiles the files of an extension side by side, with the flags of each, and CUDA files with nvcc."""

    def run(self) -> None:
        # of an earlier build: a wheel takes whatever lies there
        for stale in Path(self.build_lib).glob(f"align_kernels/_cuda*{sysconfig.get_config_var('EXT_SUFFIX')}"):
            stale.unlink()
        super().run()

    def build_extensions(self) -> None:
        one = self.compiler.compile

        def compile_file(source: str, postargs: Sequence[str], named: dict[str, Any]) -> str:
            if source.endswith(".cu"):
                return self.compile_cuda(source)
            return one([source], extra_postargs=[*postargs, *FILE_FLAGS.get(Path(source).stem, [])], **named)[0]

        def compile_all(sources: Sequence[str], extra_postargs: Sequence[str], **named: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(lambda source: compile_file(source, extra_postargs, named), sources))

        self.compiler.compile = compile_all
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "align_kernels._cuda":
            ext.library_dirs.append(self.cuda_libraries())
        super().build_extension(ext)

    def compile_cuda(self, source: str) -> str:
        target = Path(self.build_temp) / Path(source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
        codes.append(f"-gencode=arch=compute_{CUDA_ARCHS[0]},code=compute_{CUDA_ARCHS[0]}")
        self.nvcc("-c", source, "-o", str(target), "--threads", "0", *NVCC_FLAGS, *codes)
        return str(target)

    def cuda_libraries(self) -> str:
        """The folder of libcudart_static.a, beside the nvcc that answers: the one on PATH may be a script."""
        plan = self.nvcc("--dryrun", "-c", "csrc/cuda/kernels.cu", "-o", os.devnull)
        tops = [Path(line.split("TOP=")[1].strip()) for line in plan.splitlines() if "TOP=" in line]
        for top in tops:
            for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
                if (top / folder / "libcudart_static.a").exists():
                    return str((top / folder).resolve())
        raise CompileError(f"libcudart_static.a is not beside nvcc in {', '.join(map(str, tops))}")

    def nvcc(self, *args: str) -> str:
        # `optional` forgives setuptools' own errors alone
        nvcc = find_nvcc()
        if nvcc is None:
            raise CompileError("nvcc is gone")
        try:
            done = subprocess.run([nvcc, *args], capture_output=True, text=True, check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{nvcc} {' '.join(args)}\n{error.stderr[-4000:]}") from error
        except OSError as error:
            raise CompileError(f"{nvcc}: {error}") from error
        return done.stdout + done.stderr


extensions = [
    Extension(
        "align_kernels._C",
        sources=[f"csrc/cpu/{name}.cpp" for name in ("bind", "gemm", "lists", "processor", "tile", *ISAS)],
        depends=["csrc/logits.h", "csrc/require.h", *map(str, sorted(Path("csrc/cpu").glob("*.h")))],
        include_dirs=[pybind11.get_include()],
        # no -ffast-math: NaN and infinity must come through
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-g0",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            "-Wno-psabi",
            *HARDENED,
            *OPENMP,
        ],
        extra_link_args=[*HARDENED_LINK, *OPENMP, "-s"] if OPENMP else [],
        language="c++",
        optional=True,
    )
]
if wants_cuda():
    extensions.append(
        Extension(
            "align_kernels._cuda",
            sources=["csrc/cuda/kernels.cu", "csrc/cuda/bind.cpp", "csrc/cuda/check.cpp"],
            depends=["csrc/logits.h", "csrc/require.h", *map(str, sorted(Path("csrc/cuda").glob("*.h")))],
            include_dirs=[pybind11.get_include()],
            libraries=["cudart_static", "rt", "pthread", "dl"],
            extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", *HARDENED],
            extra_link_args=["-s", "-Wl,--exclude-libs,ALL", *HARDENED_LINK],
            language="c++",
            optional=True,
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
