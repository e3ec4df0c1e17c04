"""What column compaction gains over the dense schedules on a peaked softmax.

    pytest benches/bench_compaction.py --benchmark-only -s

Synthetic rows of V = 151936 columns with 24 significant ones each, p falling as k^-1.5, drawn from a popular eighth of
the vocabulary; 512 rows, D = 896, sum of the targets' log-probs, forward and backward. Dense and compacted calls take
turns in one run, medians are compared: the ratio and the share of GEMM FLOPs stand in `extra_info` and are printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from align_kernels import linear_logprobs, sft_loss
from align_kernels.backends.arguments import Lists
from align_kernels.schedules import compaction
from align_kernels.schedules.lists import RowLists

N, D, V = 512, 896, 151936
SIGNIFICANT, POPULAR = 24, V // 8
ROUNDS = 5


@pytest.fixture(scope="module")
def peaked():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=rng) / D**0.5
    weight[POPULAR:] *= 0.4
    likely = torch.arange(1, POPULAR + 1).float() ** -0.5  # Zipf-like: rows share some of their columns
    columns = torch.multinomial(likely.expand(N, -1), SIGNIFICANT, generator=rng)
    logits = 30 - 1.5 * torch.arange(1, SIGNIFICANT + 1).log()
    w = weight[columns]  # the smallest hidden state with these logits
    hidden = (w.mT @ torch.linalg.solve(w @ w.mT, logits.expand(N, -1)[..., None]))[..., 0]
    choice = torch.multinomial(logits.softmax(0), N, replacement=True, generator=rng)
    return hidden, weight, columns[torch.arange(N), choice]


def call(peaked, schedule: str, train: bool, drop_mass: float) -> Callable[[], None]:
    hidden, weight, targets = (x.detach() for x in peaked)
    hidden.requires_grad_()
    weight.requires_grad_(train)

    def run() -> None:
        if schedule == "one pass":
            sft_loss(hidden, weight, targets, drop_mass=drop_mass).loss.backward()
        else:
            linear_logprobs(hidden, weight, targets, drop_mass=drop_mass).logp.sum().backward()
        hidden.grad = weight.grad = None

    return run


@pytest.mark.parametrize("train", [True, False], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("schedule", ["one pass", "late"])
def test_compaction(benchmark, peaked, schedule, train):
    calls = {tau: call(peaked, schedule, train, tau) for tau in (0.0, 2**-8, 2**-10, 2**-12)}
    flops, seconds = {}, {tau: [] for tau in calls}
    for tau, run in calls.items():
        with FlopCounterMode(display=False) as counter:
            run()
        flops[tau] = counter.get_total_flops()
    for _ in range(ROUNDS):
        for tau, run in calls.items():
            start = time.process_time()  # of all threads: unlike the wall clock, little disturbed by other processes
            run()
            seconds[tau].append(time.process_time() - start)
    median = {tau: statistics.median(s) for tau, s in seconds.items()}
    for tau in calls:
        if tau:
            speedup, share = median[0.0] / median[tau], flops[tau] / flops[0.0]
            benchmark.extra_info[f"drop_mass {tau}"] = {"speedup": round(speedup, 2), "flops": round(share, 3)}
            print(
                f"{schedule}, {'trained' if train else 'frozen'}, drop_mass {tau:.1e}: {speedup:.2f}x, {share:.0%} FLOP"
            )
    benchmark.group = f"{schedule}, {'head trained' if train else 'head frozen'}"
    benchmark.pedantic(calls[2**-10], rounds=2)


@pytest.mark.parametrize("train", [True, False], ids=["head trained", "head frozen"])
def test_break_even(benchmark, peaked, train, monkeypatch):
    """The speedup where every row keeps a given share of the columns, needed or not: 256 rows, one pass."""

    def spread(tiled, chunk, state, store, rows, dense, room, *, entropy):
        K = int(share * V)
        columns = [((torch.arange(K) * V // K + 7 * t) % V).sort().values for t in range(len(rows))]
        ends = torch.arange(1, len(rows) + 1) * K
        yield RowLists(rows, Lists(ends - K, ends, torch.cat(columns).int(), torch.zeros(len(rows) * K)))

    monkeypatch.setattr(compaction, "choose", spread)
    half = [x[:256] if len(x) == N else x for x in peaked]
    dense, compacted = call(half, "one pass", train, 0.0), call(half, "one pass", train, 2**-10)
    seconds: dict[float, list[float]] = {}
    for _ in range(3):
        for share in (0.0, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8):
            start = time.process_time()
            (compacted if share else dense)()
            seconds.setdefault(share, []).append(time.process_time() - start)
    median = {share: statistics.median(s) for share, s in seconds.items()}
    speedup = {share: round(median[0.0] / s, 2) for share, s in median.items()}
    benchmark.extra_info["speedup by share of columns"] = speedup
    print(f"{'trained' if train else 'frozen'}, speedup by share of columns: {speedup}")
    share = 0.02
    benchmark.group = "break even"
    benchmark.pedantic(compacted, rounds=1)


@pytest.mark.parametrize("vocab", [20011, 151936])
def test_few_wide_rows(benchmark, vocab, monkeypatch):
    """CPU seconds of a step, and of the choice of columns, on rows with a median of one significant column and a tail
    that needs thousands: those of tests/kernels/test_compaction.py, turned into D dimensions."""
    torch.manual_seed(0)
    w = torch.randn(vocab, 64) / 8
    targets = torch.multinomial(1.0 / torch.arange(1, vocab + 1).float(), N, replacement=True)
    x = w[targets] * 24 + torch.randn(N, 64) * 0.3
    turn = torch.linalg.qr(torch.randn(D, 64))[0].T
    rows = x @ turn, w @ turn, targets
    choose, chosen = compaction.choose, [0.0]

    def timed(*args, **options):
        found = iter(choose(*args, **options))
        while True:
            start = time.process_time()
            block = next(found, None)
            chosen[0] += time.process_time() - start
            if block is None:
                return
            yield block

    monkeypatch.setattr(compaction, "choose", timed)
    calls = {tau: call(rows, "one pass", True, tau) for tau in (0.0, 2**-8, 2**-12)}
    seconds = {tau: [] for tau in calls}
    for _ in range(ROUNDS):
        for tau, run in calls.items():
            chosen[0], start = 0.0, time.process_time()
            run()
            seconds[tau].append((time.process_time() - start, chosen[0]))
    for tau, found in seconds.items():
        step, choice = (statistics.median(x) for x in zip(*found))
        benchmark.extra_info[f"drop_mass {tau}"] = {"seconds": round(step, 3), "choice": round(choice / step, 3)}
        print(f"V = {vocab}, drop_mass {tau:.1e}: {step:.3f} s, of which the choice is {choice / step:.1%}")
    benchmark.group = "few wide rows"
    benchmark.pedantic(calls[2**-8], rounds=1)
