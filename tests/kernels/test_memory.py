"""Peak memory of a call at the vocabulary of Qwen: workspace + 4VD where the head is trained + 2ND bytes, no logits.

One process of its own measures all calls: the kernel's high-water mark of resident memory, reset before each. And what
happens where there is none left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align_kernels import dpo_loss, linear_logprobs, sft_loss
from align_kernels.backends import cpu

MIB = 1 << 20
TALL, WIDE, FULL = (152_064, 64, 64), (4096, 2048, 512), (40_000, 512, 125)  # V, D, T
FEW = (152_064, 256, 4)  # a tile of logits would hold the whole vocabulary, and with it a float32 copy of the weight
B = 4
SLACK = 6 * MIB  # packing buffers of the GEMM, softmax states, the interpreter
CASES = [  # shape, loss, trained tensors, storage, workspace in MiB
    (TALL, "sft", "hidden weight", "float32", 48),
    (TALL, "dpo", "hidden weight", "float32", 100),
    (TALL, "dpo", "hidden weight", "float32", 8),
    (TALL, "dpo", "hidden", "float32", 48),
    (TALL, "sft", "hidden", "bfloat16", 48),
    (TALL, "sft", "hidden weight", "bfloat16", 48),
    (TALL, "logprobs", "hidden weight", "float32", 176),
    (TALL, "logprobs", "hidden", "float32", 48),
    (TALL, "logprobs", "", "float32", 16),
    (TALL, "logprobs", "hidden weight", "bfloat16", 8),
    (FEW, "sft", "hidden", "bfloat16", 16),
    (FEW, "logprobs", "", "bfloat16", 16),
    (FEW, "dpo", "hidden weight", "bfloat16", 16),
    (WIDE, "sft", "hidden", "float32", 8),
    (WIDE, "logprobs", "hidden", "float32", 8),
    (WIDE, "logprobs", "hidden weight", "float32", 8),
    (FULL, "dpo", "hidden weight", "float32", 8),  # 76 MiB of logits, in one chunk, in memory of dW
    (FULL, "sft", "hidden weight", "float32", 40),
]


def high_water() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def call(shape: tuple[int, int, int], loss: str, train: str, storage: str, workspace: int) -> int:
    """Bytes that forward and backward take beside the inputs at their peak; gradients count."""
    V, D, rows = shape
    dtype, rng = getattr(torch, storage), torch.Generator().manual_seed(0)
    hidden = torch.randn(B, rows, D, generator=rng).to(dtype).requires_grad_("hidden" in train)
    weight = (torch.randn(V, D, generator=rng) * 0.2).to(dtype).requires_grad_("weight" in train)
    targets = torch.randint(0, V, (B, rows), generator=rng)
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    if loss == "sft":
        y = sft_loss(hidden, weight, targets, workspace=workspace).loss
    elif loss == "dpo":
        y = dpo_loss(hidden, weight, targets, torch.zeros(B), workspace=workspace).loss
    else:
        y = linear_logprobs(hidden, weight, targets, workspace=workspace).logp.sum() * 0.5
    if train:
        y.backward()
    return high_water() - before


def measure() -> None:
    for loss in ("sft", "logprobs"):  # threads, GEMM buffers, lazy imports
        call((TALL[0], TALL[1], 4), loss, "hidden weight", "bfloat16", MIB)
    print(json.dumps([call(*case[:4], case[4] * MIB) for case in CASES]))


@pytest.fixture(scope="module")
def peaks() -> dict[tuple, int]:
    paths = [str(Path(__file__).parents[2] / "kernels"), *sys.path]
    # every block of 64 KiB goes back to the system when freed, so that none is there before a call
    env = os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", PYTHONPATH=":".join(paths))
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout)))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the mark can be reset on Linux alone")
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, (*case[1:], *case[0]))))
def test_peak(case: tuple, peaks: dict[tuple, int]):
    (V, D, rows), _, train, storage, workspace = case
    N = B * rows
    size = getattr(torch, storage).itemsize
    allowed = workspace * MIB + 2 * N * D * size + SLACK
    if "weight" in train:
        allowed += 4 * V * D  # the float32 sum, in whose memory a narrower gradient lies
    assert peaks[case] <= allowed, f"{peaks[case] / MIB:.1f} MiB, allowed {allowed / MIB:.1f} MiB"


RUNS_OUT = """
import resource, torch
from align_kernels.backends import cpu
from align_kernels.backends.arguments import Lists
torch.set_num_threads(2)
m, D = 1 << {log_rows}, {width}
x, out, state, ones = torch.zeros(m, D), torch.zeros(9, D), torch.ones(m, 8, dtype=torch.float64), torch.ones(m)
targets, begins, ends = torch.zeros(3, m, dtype=torch.int64)
ends += 1
plain = dict(offset=0, vocab=9, bias=None, scale=1.0, softcap=None, temperature=1.0)
def call(m):
    lists = Lists(begins[:m], ends[:m], torch.zeros(1, dtype=torch.int32), torch.zeros(1))
    s, t, g = state[:m], targets[:m], ones[:m]
    cpu.lists.{call}
call(2)  # wakes the threads
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ({left} << 20),) * 2)
try:
    call(m)
except MemoryError:
    print("MemoryError")
"""
WANTS = {  # log2 of rows, floats of each, MiB that are left
    "push": (17, 224, 32, "push(out, lists, lists.z, x[:m], False)"),  # wants 112 MiB for each thread
    "forward": (21, 1, 12, "forward(lists, 9, s, t, **plain)"),  # 16 MiB
    "backward": (21, 1, 12, "backward(lists, 9, s, t, g, None, clamp=None, out=lists.z, **plain)"),
}


@pytest.mark.skipif(cpu.why_not(torch.device("cpu"), torch.float32) is not None, reason="the extension is not built")
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("name", WANTS)
def test_memory_that_runs_out_is_an_error(name: str):
    """Of lists: a call wants more than is left: MemoryError, and not the end of the process."""
    log_rows, width, left, call = WANTS[name]
    code = RUNS_OUT.format(log_rows=log_rows, width=width, left=left, call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "MemoryError\n", done.stderr


if __name__ == "__main__":
    measure()
