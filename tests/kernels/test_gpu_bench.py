"""benches/gpu.sh end to end on the CPU: every kind of part in dry mode, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | dict(PYTHON=sys.executable, OMP_NUM_THREADS="1") | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def rows(folder: Path, part: str) -> list[dict]:
    found = json.loads((folder / f"dry-{part}.json").read_text())
    assert found["machine"]["device"].startswith("CPU, dry run") and found["machine"]["versions"]["torch"]
    assert (folder / f"dry-{part}.md").read_text().count("\n|") == len(found["rows"]) + 2
    return found["rows"]


@pytest.mark.parametrize("part", ["build", "tests-cuda", "ceilings", "step-7B"])
def test_parts(part: str, tmp_path: Path):
    done = run("benches/gpu.sh", part, "--dry", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if part == "ceilings":
        assert all(row["ms"] > 0 for row in rows(tmp_path, part))
    elif part == "step-7B":
        made = rows(tmp_path, part)
        assert len(made) == 2 * 2 * 4 and all(row["ms"] > 0 for row in made), made
    elif part == "tests-cuda":
        assert " passed" in done.stdout and "on cpu:0, seed " in done.stdout
    assert (tmp_path / f"dry-{part}.log").read_text()


def test_tables_of_heads(tmp_path: Path):
    done = run(sys.executable, "benches/gpu/heads.py", "--dry", "--out", str(tmp_path), PYTHONPATH=".:kernels")
    assert done.returncode == 0, done.stderr[-3000:]
    for mode, kinds in (
        ("forward", {"error of log p"}),
        ("frozen", {"error of dX"}),
        ("full", {"error of dX", "error of dW"}),
    ):
        ours = [row for row in rows(tmp_path, mode) if row["method"].startswith("align_kernels")]
        assert len(ours) == 2 * 2 * 2
        for row in ours:
            assert row["ms"] > 0 and 0 < row["share of ceiling"] and all(row[kind] < 1e-5 for kind in kinds), row
        peers = {row["method"] for row in rows(tmp_path, mode) if row["ms"] is not None}
        assert {"eager", "TRL", "torch.nn.functional.linear_cross_entropy"} <= peers


def test_a_wrong_part_is_named():
    done = run("benches/gpu.sh", "everything")
    assert done.returncode == 2 and "name a part: all build tests-triton" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path):
    done = run(sys.executable, "benches/gpu/ceilings.py", "--out", str(tmp_path), PYTHONPATH=".:kernels")
    assert done.returncode == 2 and "no GPU that torch can use: pass --dry" in done.stderr
    assert not list(tmp_path.iterdir())
