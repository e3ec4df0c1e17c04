"""Trust: the kernels' tests on the GPU, compute-sanitizer over small calls, and a profile of one launch of each kernel.

python -m checks        # the small calls alone, which compute-sanitizer and ncu watch
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from common import Lab

ROOT = Path(__file__).resolve().parents[2]
FILES = ("test_logprobs", "test_losses", "test_from_logits", "test_fuzz")
TESTS = [f"tests/kernels/{name}.py" for name in FILES] + ["tests/gpu/test_real_size.py"]
DRY_TESTS = ["tests/kernels/test_fuzz.py", "tests/gpu/test_real_size.py::test_the_same_bits_twice"]
FLAGS = [
    "-q",
    "-p",
    "no:cacheprovider",
    "--noconftest",
]  # theirs import the engine, which a GPU's machine may not carry
WORKERS = 6
CALLS = 400  # of the fuzz
MEASURES = {
    "gpu__time_duration.sum": "duration",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% of the multiprocessors",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of the memory",
    "launch__registers_per_thread": "registers",
}


def small_calls() -> None:
    """Every kernel of both backends at sizes that end within blocks."""
    import torch

    from align_kernels import grpo_loss, linear_logprobs, sft_loss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for impl in ("triton", "cuda") if device == "cuda" else ("torch",):
        for d in (64, 80):
            made = dict(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
            x, w = torch.randn(2, 35, d, **made).requires_grad_(), torch.randn(2051, d, **made).requires_grad_()
            y = torch.randint(0, 2051, (2, 35), device=device)
            with torch.no_grad():
                old = linear_logprobs(x, w, y, impl=impl).logp
            sft_loss(x, w, y, impl=impl).loss.backward()
            out = linear_logprobs(x, w, y, impl=impl, softcap=30.0, temperature=0.7)
            (out.logp + out.entropy).sum().backward()
            grpo_loss(x, w, y, old, torch.randn(2, device=device), impl=impl).loss.backward()
            sft_loss(x, w, y, impl=impl, drop_mass=0.1).loss.backward()
    if device == "cuda":
        torch.cuda.synchronize()


def run(command: list[str], log: Path, seconds: float, **env: str) -> str:
    """What a command says, into a file; it is stopped in time."""
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            file.write(f"\nstopped after {seconds:.0f} s\n")
    return log.read_text(errors="replace")


# -- tests --------------------------------------------------------------------------------------------------------
def start_tests(lab: Lab, impl: str, log: Path, seed: int) -> subprocess.Popen:
    """The seed differs from run to run; memory that is not initialised reads NaN."""
    env = dict(ALIGN_TEST_IMPL=impl, ALIGN_TEST_SEED=str(seed), ALIGN_TEST_POISON="1", OMP_NUM_THREADS="1")
    env |= dict(ALIGN_TEST_DEVICE="cpu:0" if lab.dry else "cuda", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    env |= dict(ALIGN_TEST_CALLS="12" if lab.dry else str(CALLS), TRITON_INTERPRET="0")
    command = [sys.executable, "-m", "pytest", *FLAGS, *(DRY_TESTS if lab.dry else TESTS)]
    command += [
        "-W",
        "ignore:.*does not have a deterministic implementation",
        *([] if lab.dry else ["-n", str(WORKERS), "--dist", "loadgroup"]),
    ]
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | env, stdout=file, stderr=subprocess.STDOUT)


def tests(lab: Lab) -> None:
    lab.free()
    seed = time.time_ns() % 2**31
    lab.announce("pytest")
    running = {}
    for impl in ("torch",) if lab.dry else ("triton", "cuda"):
        log = lab.out / f"tests-{impl}.log"
        running[impl] = start_tests(lab, impl, log, seed), log
    for impl, (process, log) in running.items():
        try:
            process.wait(max(lab.until - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.terminate()
        text = log.read_text(errors="replace")
        counts = outcome(text)
        note = "" if counts else f"no summary: {' '.join(text[-200:].split())}"
        lab.record(f"{impl}, failed", counts.get("failed", 0) + counts.get("error", 0) if counts else None, "tests",
                   passed=counts.get("passed"), seed=seed, note=note)  # fmt: skip
        for line in re.findall(r"^(?:FAILED|ERROR) (.*)$", text, re.MULTILINE)[:30]:
            lab.record(f"{impl}: {line.split(' - ')[0]}", None, "", note=line.partition(" - ")[2][:160])


def outcome(text: str) -> dict[str, int]:
    """pytest's counts by word; none where it did not come to its end."""
    last = re.findall(r"^=* ?(\d+ (?:passed|failed|errors?|warnings?)[^=\n]*) in [\d.]+s", text, re.MULTILINE)
    return {word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) (\w+)", last[-1])} if last else {}


# -- tools --------------------------------------------------------------------------------------------------------
def sanitizer(lab: Lab) -> None:
    """Out-of-bounds and misaligned accesses, by compute-sanitizer's memcheck."""
    tool, program = shutil.which("compute-sanitizer"), [sys.executable, "-m", "checks"]
    if tool is None:
        lab.record("errors", None, "", note="compute-sanitizer is not on PATH; the calls ran without it")
    lab.free()
    lab.announce("memcheck")
    command = program if tool is None else [tool, "--tool", "memcheck", "--error-exitcode", "1", *program]
    text = run(command, lab.out / "sanitizer.log", lab.until - time.monotonic(), TRITON_INTERPRET="0")
    found = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if tool is not None:
        note = "" if found else f"no summary: {' '.join(text[-160:].split())}"
        lab.record("errors", int(found[1]) if found else None, "", note=note)
    elif text.strip():
        lab.record("calls", None, "", note=f"FAILED: {text.strip().splitlines()[-1][:160]}")


def profile(lab: Lab) -> None:
    """Time, throughput and registers of each kernel's first launch, by ncu."""
    tool = shutil.which("ncu")
    if tool is None:
        lab.record("ncu", None, "", note="ncu is not on PATH")
        return
    lab.free()
    lab.announce("ncu")
    command = [tool, "--clock-control", "none", "--csv", "--metrics", ",".join(MEASURES)]
    command += ["--kernel-name", "regex:(forward|backward|statistics|merge|peaks|loss)"]
    command += ["--launch-count", "60", sys.executable, "-m", "checks"]
    text = run(command, lab.out / "ncu.log", lab.until - time.monotonic(), TRITON_INTERPRET="0")
    launches = profiled(text)
    for kernel, measures in launches.items():
        lab.record(kernel, measures.pop("duration", None), "ns", **measures)
    if not launches:
        lab.record("ncu", None, "", note=f"no table: {' '.join(text[-160:].split())}")


def profiled(text: str) -> dict[str, dict[str, float]]:
    """Measures of each kernel's first launch from ncu's CSV."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, float]] = {}
    first: dict[str, str] = {}
    for row in csv.DictReader(lines[begin:]):
        kernel = (row.get("Kernel Name") or "").split("(")[0][:60]
        if row.get("Metric Name") in MEASURES and first.setdefault(kernel, row["ID"]) == row["ID"]:
            value = float(row["Metric Value"].replace(",", ""))
            found.setdefault(kernel, {})[MEASURES[row["Metric Name"]]] = value
    return found


if __name__ == "__main__":
    small_calls()
