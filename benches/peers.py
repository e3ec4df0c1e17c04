"""DPO from hidden states, forward and backward: align_kernels beside its peers, on this machine's CPU.

One process runs all methods in turn, round after round, a step of align_kernels between every two: a method's ratio is
its time over the mean of the two steps around it, median over the rounds, so that a machine whose speed drifts moves
both alike. The table gives medians in seconds, those ratios, our share of the GEMM ceiling (torch.mm over the kept
rows: three with the head trained, two frozen, one forward only), and, with the head trained, peak memory above inputs
and gradients, measured in a process of its own. All of it takes some 80 minutes on two cores.

    python benches/peers.py [--shapes 0 1 2 3] [--heads trained frozen] [--seconds 40] [--json results.json]
    ONEDNN_MAX_CPU_ISA=AVX512_CORE python benches/peers.py --bf16    # bfloat16 storage without bfloat16 units
    ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 python benches/peers.py    # as without AVX-512
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels import dpo_loss, explain, linear_logprobs

SHAPES = ((1024, 896, 151936), (2048, 1024, 32000), (4096, 576, 49152), (512, 2048, 128256))  # (N, D, V)
PAIRS = 4
BETA = 0.1
LOW_MEMORY = 24 << 20
FEW_ROWS = 64
ROUNDS = 3  # of each method at least


class Case:
    """A preference batch of N positions, half of them prompt and padding."""

    def __init__(self, shape: tuple[int, int, int], trained: bool, dtype: torch.dtype = torch.float32) -> None:
        n, d, v = shape
        torch.manual_seed(0)
        t = n // (2 * PAIRS)
        self.hidden = torch.randn(2 * PAIRS, t, d).to(dtype).requires_grad_()
        self.weight = (torch.randn(v, d) * 0.02).to(dtype).requires_grad_(trained)
        self.targets = torch.randint(0, v, (2 * PAIRS, t))
        self.targets[:, : t // 2] = -100
        self.ref = torch.randn(2 * PAIRS) - 10.0 * (t // 2)

    def reset(self) -> None:
        self.hidden.grad = self.weight.grad = None


def dpo(logps: Tensor, ref: Tensor) -> Tensor:
    chosen, rejected = (logps - ref).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def per_sequence(logp: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=logp.dtype).masked_scatter(mask, logp).sum(-1)


def eager(c: Case) -> Tensor:
    logp = F.linear(c.hidden, c.weight).float().log_softmax(-1)
    mask = c.targets != -100
    return dpo((logp.gather(-1, c.targets.clamp(min=0)[..., None])[..., 0] * mask).sum(-1), c.ref)


def trl(c: Case, compacted: bool = False) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    mask = c.targets != -100
    hidden = c.hidden[mask] if compacted else c.hidden.flatten(0, 1)
    labels = c.targets[mask] if compacted else c.targets.clamp(min=0).flatten()
    outputs = ("entropy", "mean_logits", "is_top1")
    logp = ChunkedLogProbFunction.apply(hidden, c.weight, None, labels, 1.0, 32768, None, 1.0, outputs)[0]
    if compacted:
        return dpo(per_sequence(logp, mask), c.ref)
    return dpo(logp.view(mask.shape).masked_fill(~mask, 0).sum(-1), c.ref)


def liger(c: Case, compiled: bool) -> Tensor:
    """Without its reference pass, which here is given: Liger has no precomputed reference, so its loss differs."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, compiled=compiled)
    return loss(c.weight, c.hidden, c.targets)[0]


@torch.compile(dynamic=False)
def _compiled_logp(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.linear(x, weight).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def compiled(c: Case) -> Tensor:
    mask = c.targets != -100
    return dpo(per_sequence(_compiled_logp(c.hidden[mask], c.weight, c.targets[mask]), mask), c.ref)


def cce(c: Case) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(c.hidden, c.weight, c.targets, reduction="none", impl="torch_compile")
    return dpo(-nll.view(c.targets.shape).sum(-1), c.ref)


def ours(c: Case, workspace: int | None = None) -> Tensor:
    return dpo_loss(c.hidden, c.weight, c.targets, c.ref, beta=BETA, workspace=workspace).loss


OURS = "align_kernels"
PEERS: dict[str, Callable[[Case], Tensor]] = {
    "align_kernels, low memory": lambda c: ours(c, LOW_MEMORY),
    "eager, all rows": eager,
    "TRL 1.16 as called": trl,
    "TRL 1.16, rows compacted": lambda c: trl(c, compacted=True),
    "Liger": lambda c: liger(c, compiled=False),
    "Liger, compiled": lambda c: liger(c, compiled=True),
    "torch.compile, rows compacted": compiled,
    "Cut Cross-Entropy, torch path": cce,
}
METHODS = {OURS: ours, **PEERS}


def step(case: Case, method: str) -> None:
    case.reset()
    METHODS[method](case).backward()


def ceiling(case: Case, products: int) -> None:
    x = case.hidden.detach()[case.targets != -100]
    w = case.weight.detach()
    z = torch.mm(x, w.T)
    if products > 1:
        torch.mm(z, w)
    if products > 2:
        torch.mm(z.T, x)


def check(case: Case, skip: tuple[str, ...]) -> None:
    """Every method that computes this loss gives the same gradients."""
    step(case, "eager, all rows")
    want = [g.clone() for g in (case.hidden.grad, case.weight.grad) if g is not None]
    for method in METHODS:
        if method in skip or method.startswith("Liger"):
            continue
        step(case, method)
        for a, b in zip((g for g in (case.hidden.grad, case.weight.grad) if g is not None), want):
            error = float((a - b).abs().max() / b.abs().max())
            if error > 1e-3:
                raise AssertionError(f"{method} differs from eager by {error:.1e}")


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def memory(shape: tuple[int, int, int], method: str) -> float:
    """Peak MB above inputs and gradients of one step with the head trained; to be run in a fresh process.

    A small case warms up first.
    """
    step(Case((128, 64, 512), trained=True), method)
    case = Case(shape, trained=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib()
    step(case, method)
    grads = sum(x.grad.nbytes for x in (case.hidden, case.weight) if x.grad is not None)
    return (peak_kib() - before) * 1024 / 1e6 - grads / 1e6


def measure_memory(shape: int, method: str) -> float:
    args = [sys.executable, __file__, "--memory", method, "--shapes", str(shape)]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def beside(base: Callable[[], object], others: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict]:
    """Times, ratios and medians of each of `others`, all in turn, with a run of `base` between every two.

    Each gets ROUNDS rounds and then more, until it and the runs of `base` after it have taken `seconds`.
    """
    figures: dict[str, dict] = {name: {"times": [], "around": []} for name in others}
    spent = dict.fromkeys(others, 0.0)
    before = timed(base)
    while left := [n for n in others if len(figures[n]["times"]) < ROUNDS or spent[n] < seconds]:
        for name in left:
            took, after = timed(others[name]), timed(base)
            figures[name]["times"].append(took)
            figures[name]["around"].append((before + after) / 2)
            spent[name] += took + after
            before = after
    for figure in figures.values():
        figure["ratio"] = statistics.median(t / b for t, b in zip(figure["times"], figure["around"]))
        figure["seconds"], figure["base"] = statistics.median(figure["times"]), statistics.median(figure["around"])
    return figures


def narrow(shape: int, seconds: float) -> None:
    """Hidden states and weight in bfloat16, beside float32; beside eager bfloat16 on few rows: it takes minutes."""
    few = (FEW_ROWS, *SHAPES[shape][1:])
    for trained in (True, False):
        head = "trained" if trained else "frozen"
        wide, half = Case(SHAPES[shape], trained), Case(SHAPES[shape], trained, torch.bfloat16)
        short = Case(few, trained, torch.bfloat16)
        pairs = {
            f"{SHAPES[shape]}, bfloat16 over float32": (partial(step, wide, OURS), partial(step, half, OURS)),
            f"{few}, eager bfloat16 over ours": (partial(step, short, OURS), partial(step, short, "eager, all rows")),
        }
        for name, (base, other) in pairs.items():
            base()
            other()
            f = beside(base, {name: other}, seconds)[name]
            print(f"{name}, head {head}: {f['ratio']:.2f} ({f['seconds']:.3f} s, {f['base']:.3f} s)", flush=True)


def table(shape: int, trained: bool, seconds: float, skip: tuple[str, ...]) -> dict:
    case = Case(SHAPES[shape], trained)
    check(case, skip)
    others: dict[str, Callable[[], object]] = {m: partial(step, case, m) for m in PEERS if m not in skip}
    others["ceiling"] = partial(ceiling, case, 3 if trained else 2)
    figures = beside(partial(step, case, OURS), others, seconds)
    if not trained:

        def forward() -> None:
            with torch.no_grad():
                linear_logprobs(case.hidden, case.weight, case.targets)

        figures |= beside(forward, {"forward only, ceiling": partial(ceiling, case, 1)}, seconds)
    return {
        "shape": SHAPES[shape],
        "trained": trained,
        "figures": figures,
        "plan": str(explain(case.hidden, case.weight, case.targets, loss="dpo")),
        "memory_mb": {m: measure_memory(shape, m) for m in METHODS if m not in skip} if trained else {},
    }


def show(result: dict) -> None:
    n, d, v = result["shape"]
    figures, peaks = result["figures"], result["memory_mb"]
    print(f"\nN={n} (half kept) D={d} V={v}, head {'trained' if result['trained'] else 'frozen'}")
    print(result["plan"])
    print(f"  {'':32s} {'seconds':>8s} {'ours':>8s} {'/ ours':>7s} {'rounds':>7s} {'peak MB':>8s}")
    for name, figure in figures.items():
        line = f"  {name:32s} {figure['seconds']:8.3f} {figure['base']:8.3f} {figure['ratio']:7.2f}"
        print(line, f"{len(figure['times']):7d}", f"{peaks[name]:8.0f}" if name in peaks else "")
    print(f"  share of the GEMM ceiling: {figures['ceiling']['ratio']:.1%}", end="")
    if peaks:
        print(f", peak {peaks[OURS]:.0f} MB", end="")
    else:
        print(f", forward only {figures['forward only, ceiling']['ratio']:.1%}", end="")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--heads", nargs="+", default=["trained", "frozen"], choices=["trained", "frozen"])
    parser.add_argument("--seconds", type=float, default=40, help="a method's rounds go on for so long (default: 40)")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(PEERS), help="methods to leave out")
    parser.add_argument("--json", type=Path, help="write the figures here, with versions")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 beside float32 instead of the table")
    parser.add_argument("--memory", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(memory(SHAPES[args.shapes[0]], args.memory))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    results = []
    for shape in args.shapes:
        if args.bf16:
            narrow(shape, args.seconds)
            continue
        for head in args.heads:
            results.append(table(shape, head == "trained", args.seconds, tuple(args.skip)))
            show(results[-1])
    if args.json:
        machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
