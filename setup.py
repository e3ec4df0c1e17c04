"""Builds align_kernels._C, the CPU kernels; everything else is in pyproject.toml.

The extension is optional: without a working compiler the package installs and runs on torch operations alone.
"""

import platform
import sys

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# One file per instruction set, chosen at run time; each compiles the same header.
ISA_FLAGS: dict[str, list[str]] = {"isa_baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["isa_avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["isa_avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildExt(build_ext):
    """Compiles the files of ISA_FLAGS with flags of their own and links them into the extension."""

    def build_extension(self, ext: Extension) -> None:
        for name, flags in ISA_FLAGS.items():
            ext.extra_objects += self.compiler.compile(
                [f"csrc/cpu/{name}.cpp"], output_dir=self.build_temp, extra_postargs=[*ext.extra_compile_args, *flags]
            )
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "align_kernels._C",
            sources=["csrc/cpu/bind.cpp", "csrc/cpu/tile.cpp"],
            depends=["csrc/cpu/tile.h", "csrc/cpu/tile_kernels.h", *(f"csrc/cpu/{name}.cpp" for name in ISA_FLAGS)],
            include_dirs=[pybind11.get_include()],
            # no -ffast-math: NaN and infinity must come through
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-Wno-psabi",
                *OPENMP,
            ],
            extra_link_args=[*OPENMP, "-s"] if OPENMP else [],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
