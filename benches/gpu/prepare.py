"""What a machine with a GPU and without a network needs: built extensions, the peers' packages and the experimental
epilogue, in one folder.

    python benches/gpu/prepare.py build/gpu    # the epilogue alone, with what the compiler made of it
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {  # of a compiler for epilogue_kernel.py, without what is not imported
    "quack-kernels": "0.6.5",
    "nvidia-cutlass-dsl": "4.7.0",
    "nvidia-cutlass-dsl-libs-base": "4.7.0",
    "nvidia-cutlass-dsl-libs-core": "4.7.0",
    "nvidia-cutlass-dsl-libs-cu13": "4.7.0",
    "apache-tvm-ffi": "0.1.15.post2",
    "torch-c-dlpack-ext": "0.1.5",
    "einops": "0.8.2",
    "cuda-python": "13.4.4",
    "cuda-bindings": "13.5.0",
    "cuda-pathfinder": "1.9.1",
    "cuda-core": "1.2.2",
    "nvidia-cuda-nvdisasm": "13.5.37",
    "protobuf": "6.33.6",
}
SETTINGS = dict(  # of epilogue_kernel.py: for Hopper, whatever is here
    QUACK_ARCH="90", CUTE_DSL_ARCH="sm_90a", CUDA_VISIBLE_DEVICES="", QUACK_CACHE_ENABLED="0", CUTE_DSL_KEEP_CUBIN="1"
)  # fmt: skip
PEERS = {  # package: what is imported of it
    "liger-kernel": "liger_kernel.transformers.fused_linear_cross_entropy",
    "cut-cross-entropy": "cut_cross_entropy",
    "trl": "trl.kernels.chunked_logprob",
    "apache-tvm-ffi": "tvm_ffi",  # no peer: it loads the epilogue
}
LEFT_OUT = shutil.ignore_patterns("__pycache__", "include", "3rdparty")  # of packages: nothing is built there


def prepare(carry: Path, python: str) -> None:
    shutil.rmtree(carry, ignore_errors=True)
    carry.mkdir(parents=True)
    build(carry, python)
    collect(carry, python)
    epilogue(carry)
    size = sum(file.stat().st_size for file in carry.rglob("*") if file.is_file())
    print(f"{carry}: {size / 2**20:.1f} MiB")


def build(carry: Path, python: str) -> None:
    """CARRY/extensions/align_kernels/*.so for that Python."""
    command = [python, "setup.py", "--quiet", "build_ext", "--build-lib", str(carry / "extensions")]
    command += ["--build-temp", str(carry / "objects")]
    subprocess.run(command, cwd=ROOT, env=os.environ | dict(FORCE_CUDA="1"), check=True)
    shutil.rmtree(carry / "objects")
    for built in sorted((carry / "extensions").rglob("*.so")):
        print(f"built {built.name}")


def epilogue(carry: Path) -> None:
    """CARRY/epilogue: the kernel of epilogue.py, by tools that go into build/cutlass and are not carried."""
    tools = ROOT / "build" / "cutlass"
    if not (tools / "quack").exists():
        asked = [f"{name}=={version}" for name, version in TOOLS.items()]
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tools), *asked]
        if subprocess.run(install).returncode:
            shutil.rmtree(tools, ignore_errors=True)
            print("left out the epilogue: its compiler cannot be installed")
            return
    dump = carry / "dump"  # of the compiler
    dump.mkdir(parents=True, exist_ok=True)
    paths = (tools, tools / "nvidia_cutlass_dsl" / "dsl_packages", ROOT / "kernels", ROOT / "tests")
    command = [sys.executable, str(Path(__file__).with_name("epilogue_kernel.py")), str(carry / "epilogue")]
    env = os.environ | SETTINGS | dict(CUTE_DSL_DUMP_DIR=str(dump))
    env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    if subprocess.run(command, env=env).returncode:
        shutil.rmtree(carry / "epilogue", ignore_errors=True)
        print("left out the epilogue: it does not compile")
    shutil.rmtree(dump)


def collect(carry: Path, python: str) -> None:
    """CARRY/peers: each peer's package, unpacked, where all that it imports is in that Python."""
    folder, wheels = carry / "peers", carry / "wheels"
    pins = TOOLS | dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    for name, module in PEERS.items():
        fetch = [
            python,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(wheels),
            f"{name}=={pins[name]}",
        ]
        if subprocess.run(fetch).returncode:
            print(f"left out {name} {pins[name]}: it cannot be downloaded")
            continue
        wheel = next(wheels.glob(f"{name.replace('-', '_')}-*.whl"))
        trial = carry / "trial"
        zipfile.ZipFile(wheel).extractall(trial)
        test = subprocess.run(
            [python, "-W", "ignore", "-c", f"import {module}"],
            env=os.environ | dict(PYTHONPATH=str(trial)),
            capture_output=True,
            text=True,
        )
        if test.returncode:
            print(f"left out {name} {pins[name]}: {test.stderr.strip().splitlines()[-1]}")
        else:
            shutil.copytree(trial, folder, dirs_exist_ok=True, ignore=LEFT_OUT)
            print(f"unpacked {name} {pins[name]}")
        shutil.rmtree(trial)
    shutil.rmtree(wheels, ignore_errors=True)


if __name__ == "__main__":
    epilogue(Path(sys.argv[1]).resolve())
