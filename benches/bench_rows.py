"""What the row kernels of the CPU extension gain over torch, per instruction set.

    pytest benches/bench_rows.py --benchmark-only

How long do the primitives take on a tile that is hot in cache, and on whole rows from memory? The ratios stand in the
table; nanoseconds per logit and GB/s of z (and of dz in the backward) in `extra_info`. torch's own lines compute less:
`logsumexp` only lse, `softmax` only p.
"""

from __future__ import annotations

import pytest
import torch

from align_kernels.backends import cpu, torch_ops

SHAPES = {"tile 256x2048": (256, 2048), "rows 64x151936": (64, 151936)}
ISAS = cpu.arguments._C.available_isas()


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def tile(request):
    n, c = request.param
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(n, c, generator=rng)
    state = torch.tensor([-torch.inf, 0, 0, 0, 0, 0, -1, 0], dtype=torch.float64).repeat(n, 1)
    targets = torch.randint(0, c, (n,), generator=rng)
    return z, state, targets, dict(offset=0, vocab=c, bias=None, scale=1.0, softcap=None, temperature=1.0)


@pytest.fixture
def measure(request, benchmark, tile):
    z = tile[0]
    shape = request.node.callspec.id.rsplit("-", 1)[0]

    def run(name: str, streams: int, call) -> None:
        benchmark.group = f"{name}, {shape}"
        benchmark.pedantic(call, rounds=20, warmup_rounds=3)
        seconds = benchmark.stats["median"]
        benchmark.extra_info |= {
            "ns_per_logit": round(seconds * 1e9 / z.numel(), 3),
            "GB_per_s": round(streams * z.nbytes / seconds / 1e9, 2),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    yield run
    cpu.arguments._C.set_isa(ISAS[-1])


def use(impl: str):
    if impl in ISAS:
        cpu.arguments._C.set_isa(impl)
        return cpu
    return torch_ops


@pytest.mark.parametrize("impl", [*ISAS, "torch_ops", "logsumexp"])
def test_forward(measure, tile, impl):
    z, state, targets, options = tile
    backend = use(impl)
    if impl == "logsumexp":
        measure("forward", 1, lambda: torch.logsumexp(z, 1))
    else:
        measure("forward", 1, lambda: backend.forward(z, state, targets, **options))


@pytest.mark.parametrize("impl", [*ISAS, "torch_ops", "softmax"])
def test_backward(measure, tile, impl):
    z, state, targets, options = tile
    backend, g, out = use(impl), torch.ones(len(z)), torch.empty_like(z)
    cpu.forward(z, state, targets, **options)
    if impl == "softmax":
        measure("backward", 2, lambda: torch.softmax(z, 1, out=out))
    else:
        measure("backward", 2, lambda: backend.backward(z, state, targets, g, None, clamp=None, out=out, **options))
