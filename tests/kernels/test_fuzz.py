"""Thousands of random calls against float64: odd and extreme sizes, every option at once, logits up to 1e4.

A failure names its seed: `draw(seed)` gives the call back.
"""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from devices import CALLS, PROFILE, SEED
from torch import Tensor

from align_kernels import LogitGradClamp
from align_kernels.schedules.request import profiled

from .oracle import LEAVES, Case, judge, near_ties, raw_logits, run, transform, truth
from .twins import dpo, sft, verify

PARTS = 6  # that may run side by side
ROWS = (0, 1, 2, 3, 7, 31, 63, 64, 65, 123, 200)
COLUMNS = (1, 2, 3, 5, 63, 64, 65, 127, 507, 1000, 2049)
WIDTHS = (1, 2, 7, 16, 33, 64)
DTYPES = (
    [(torch.float32,) * 2] * 14
    + [(torch.bfloat16,) * 2] * 4
    + [(torch.float64,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
)


class Call(NamedTuple):
    seed: int
    kind: str  # logprobs, sft, dpo
    case: Case
    which: str  # logp, entropy, both
    options: dict[str, Any]  # impl, workspace
    profile: dict[str, int]
    exact: bool  # whole-number logits, without rounding in float32

    def __str__(self) -> str:
        t = {name: f"{tuple(x.shape)} {x.dtype}" for name, x in self.case.tensors.items()}
        c = self.case
        temperature = "per row" if isinstance(c.temperature, Tensor) else c.temperature
        head = dict(scale=c.logit_scale, softcap=c.softcap, temperature=temperature, clamp=c.grad_clamp)
        rows = f"{int(c.mask.sum())} of {c.targets.numel()} rows"
        return (
            f"seed {self.seed}: {self.kind}, {self.which}, {rows}, {t}, {head}, ignore {c.ignore_index}, "
            f"train {sorted(c.train)}, {self.options}, {self.profile}, exact {self.exact}"
        )


def draw(seed: int) -> Call:
    pick = random.Random(seed)
    rng = torch.Generator().manual_seed(seed)
    exact = pick.random() < 0.25
    kind = pick.choice(["logprobs", "logprobs", "logprobs", "sft"] if exact else ["logprobs", "logprobs", "sft", "dpo"])
    n, V, D = pick.choice(ROWS), pick.choice(COLUMNS), pick.choice(WIDTHS)
    if kind == "dpo":
        shape: tuple[int, ...] = (2 * pick.choice((0, 1, 2, 3, 5)), pick.choice((1, 2, 9, 40)))
    else:
        shape = pick.choice([(n,), (n,), (1, n), (max(n // 3, 1), 3), (2, 1, max(n // 2, 0))])
    ignore = pick.choice([-100, -100, -100, -1, 0, V - 1, V, 1 << 40])
    targets = torch.randint(0, V, shape, generator=rng)
    if pick.random() < 0.3:
        targets[torch.rand(shape, generator=rng) < 0.5] = V - 1
    targets[torch.rand(shape, generator=rng) < pick.choice([0.0, 0.3, 0.9, 1.0])] = ignore
    dtype, weight_dtype = pick.choice(DTYPES)
    rank = pick.choice([0, 0, 0, 1, 3, 8])
    sizes = dict(hidden=(*shape, D), weight=(V, D), bias=(V,), lora_A=(rank, D), lora_B=(V, rank))
    given = {"hidden", "weight"} | ({"bias"} if pick.random() < 0.4 else set())
    given |= {"lora_A", "lora_B"} if rank else set()
    narrow = pick.choice([dtype, torch.float32])
    scale, softcap, scaling = 1.0, None, pick.choice([0.25, 1.0, 2.0])
    tensors = {}
    if exact:  # small whole numbers in the tensors, a power of two as scale: logits up to 1e4 without any rounding
        for name in sorted(given):
            tensors[name] = torch.randint(-2, 3, sizes[name], generator=rng).float()
        z = raw_logits(Case(tensors, targets, scaling=scaling, ignore_index=ignore), tensors)
        top = max(float(z.abs().max()) if z.numel() else 0.0, 1.0)
        scale = 2.0 ** int(torch.tensor(pick.choice([10.0, 1e3, 1e4]) / top).log2().floor())
        temperature: float | Tensor = pick.choice([1.0, 1.0, 0.5, 2.0])
        if pick.random() < 0.3:
            temperature = 2.0 ** torch.randint(-1, 2, shape, generator=rng)
        softcap = pick.choice([None, None, 2.0, 32.0]) if kind == "logprobs" else None
    else:
        spread = pick.choice([0.1, 1.0, 3.0, 8.0])
        for name in sorted(given):
            tensors[name] = torch.randn(sizes[name], generator=rng)
        tensors["weight"] *= spread / D**0.5
        if rank:
            tensors["lora_A"] *= 1 / D**0.5
        scale = pick.choice([1.0, 1.0, 0.0625, -1.0, 1.7])
        softcap = pick.choice([None, None, 1.5, 30.0])
        temperature = pick.choice([1.0, 1.0, 0.7, 1.3])
        if pick.random() < 0.3:
            temperature = torch.rand(shape, generator=rng) + 0.5
    dtypes = dict(hidden=dtype, weight=weight_dtype, bias=narrow, lora_A=narrow, lora_B=narrow)
    tensors = {name: x.to(dtypes[name]) for name, x in tensors.items()}
    train = set(LEAVES) if pick.random() < 0.5 else {name for name in LEAVES if pick.random() < 0.5}
    if pick.random() < 0.2:
        train = {"hidden"}
    case = Case(tensors, targets, scale, softcap, temperature, ignore, None, scaling, frozenset(train))
    if pick.random() < 0.3:
        case.grad_clamp = clamp(case, pick)
    impl = pick.choice(["cpu", "cpu", "cpu", "torch", "torch", "eager"])
    if impl == "cpu" and torch.float64 in (dtype, weight_dtype):
        impl = "torch"
    workspace = pick.choice([None, None, int(10 ** pick.uniform(2, 7))])
    profile = dict(max_rows=pick.choice([1, 3, 16, 1024]), min_rows=pick.choice([1, 96]))
    profile["tile_bytes"] = pick.choice([256, 4096, 4 << 20])
    which = pick.choice(["logp", "logp", "entropy", "both"])
    return Call(seed, kind, case, which, dict(impl=impl, workspace=workspace), profile, exact)


def clamp(case: Case, pick: random.Random) -> LogitGradClamp:
    """A clamp whose threshold no probability comes near: which side of it a rounded one falls is no error."""
    p = transform(case, raw_logits(case, case.leaves(torch.float64))).detach().softmax(1)
    above = pick.choice([0.0, 10 ** pick.uniform(-4, -0.5)])
    if above and p.numel() and float((p / above - 1).abs().min()) < 1e-3:
        above = 0.0
    return LogitGradClamp(10 ** pick.uniform(-3, 0), above, pick.choice(["residual", "gradient"]))


def carry_out(call: Call) -> dict[str, float]:
    case = call.case
    if call.kind == "sft":
        return verify(case, sft(case), call.options)
    if call.kind == "dpo":
        return verify(case, dpo(case, loss_type=random.Random(call.seed).choice(["sigmoid", "ipo"])), call.options)
    rng = torch.Generator().manual_seed(call.seed + 1)
    g, h = (torch.randn(case.targets.shape, generator=rng) for _ in range(2))
    g = torch.zeros_like(g) if call.which == "entropy" else torch.where(g.abs() < 0.3, 0.0, g)
    h = None if call.which == "logp" else torch.where(h.abs() < 0.3, 0.0, h)
    got, true = run(case, None if call.which == "entropy" else g, h, **call.options), truth(case, g, h)
    wrong = got.fields["correct"] != true.fields["correct"]
    if call.exact and case.softcap is None and not (case.narrow and call.options["impl"] == "eager"):
        assert not wrong.any(), "correct"
    elif not case.narrow:
        assert not (wrong & ~near_ties(case)).any(), "correct"
    rounded = case.narrow or call.options["impl"] == "eager"
    return judge(case, got, true, truth(case, g, h, None) if rounded else None)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part: int, capsys):
    worst: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    failures = []
    for seed in range(SEED + part, SEED + CALLS, PARTS):
        call = draw(seed)
        try:
            with profiled(PROFILE, **call.profile):
                ratios = carry_out(call)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}\n    {call}")
            continue
        kind = "eager" if call.options["impl"] == "eager" else "16-bit" if call.case.narrow else "wide"
        for name, ratio in ratios.items():
            worst[kind][name] = max(worst[kind][name], ratio)
    with capsys.disabled():
        print(f"\n{CALLS // PARTS} calls, worst error over what is allowed")
        for kind, ratios in worst.items():
            print(f"  {kind:6}", *(f"{name} {ratio:.2f}" for name, ratio in sorted(ratios.items())))
    assert not failures, f"{len(failures)} of {CALLS // PARTS} calls\n" + "\n".join(failures[:10])
