"""What a machine with a GPU and without a network needs: built extensions and the peers' packages, in one folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = {  # package: what is imported of it
    "liger-kernel": "liger_kernel.transformers.fused_linear_cross_entropy",
    "cut-cross-entropy": "cut_cross_entropy",
    "trl": "trl.kernels.chunked_logprob",
}


def prepare(carry: Path, python: str) -> None:
    shutil.rmtree(carry, ignore_errors=True)
    carry.mkdir(parents=True)
    build(carry, python)
    collect(carry, python)
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


def collect(carry: Path, python: str) -> None:
    """CARRY/peers: each peer's package, unpacked, where all that it imports is in that Python."""
    folder, wheels = carry / "peers", carry / "wheels"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
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
            shutil.copytree(trial, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            print(f"unpacked {name} {pins[name]}")
        shutil.rmtree(trial)
    shutil.rmtree(wheels, ignore_errors=True)
