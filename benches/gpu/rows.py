"""The kernels between the GEMMs alone, on logits that do not fit in any cache, and the forward that writes none.

Bandwidth counts every logit read and every one written once. Variants are blocks and warps beside those shipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from common import Lab
from torch import Tensor

from align_kernels.backends import cuda, torch_ops, triton
from align_kernels.backends.state import empty

Run = Callable[[], object]


class Tile:
    """Logits of 4096 rows of the 7B head in float32, and in bfloat16."""

    def __init__(self, lab: Lab, n: int) -> None:
        self.n, (self.d, self.v) = n, lab.head("Qwen2.5-7B")
        device = lab.device
        self.z = torch.randn(n, self.v, device=device) * 2
        self.narrow = self.z.to(torch.bfloat16)
        self.out = torch.empty_like(self.narrow)
        self.targets = torch.randint(0, self.v, (n,), device=device)
        self.state = empty(n, device)
        self.reference = torch.empty(n, device=device)
        self.g = torch.full((n,), 1 / n, device=device)
        self.common: dict[str, Any] = dict(offset=0, vocab=self.v, bias=None, scale=1.0, softcap=None, temperature=1.0)
        self.finished = self.state.clone()
        torch_ops.forward(self.z, self.finished, self.targets, **self.common)
        self.x = torch.randn(n, self.d, device=device).to(torch.bfloat16)
        self.w = (torch.randn(self.v, self.d, device=device) * self.d**-0.5).to(torch.bfloat16)

    def forward(self, backend, z: Tensor) -> None:
        backend.forward(z, self.state, self.targets, **self.common)

    def backward(self, backend, z: Tensor, out: Tensor) -> None:
        backend.backward(z, self.finished, self.targets, self.g, None, clamp=None, out=out, **self.common)

    def exponentials(self, z: Tensor, out: Tensor) -> None:
        linear = {key: value for key, value in self.common.items() if key != "softcap"}
        self.reference.fill_(-torch.inf)
        triton.exponentials(z, self.state, self.targets, self.reference, out=out, **linear)

    def linear(self) -> None:
        triton.on_chip.forward(self.x, self.w, self.state, self.targets, **self.common)


@contextmanager
def changed(options: dict, other: Mapping) -> Iterator[None]:
    """A table of launch options with other entries."""
    before = dict(options)
    options.update(other)
    try:
        yield
    finally:
        options.clear()
        options.update(before)


def under(options: dict, other: Mapping, run: Run) -> None:
    with changed(options, other):
        run()


def shipped(t: Tile) -> list[tuple[str, Run, int]]:
    """Name, call and bytes that it moves per logit."""
    made = []
    for name, backend in (("triton", triton), ("cuda", cuda)):
        made += [
            (f"{name} forward, fp32", partial(t.forward, backend, t.z), 4),
            (f"{name} forward, bf16", partial(t.forward, backend, t.narrow), 2),
            (f"{name} backward, fp32 to bf16", partial(t.backward, backend, t.z, t.out), 6),
            (f"{name} backward, bf16", partial(t.backward, backend, t.narrow, t.out), 4),
        ]
    made.append(("triton exponentials, fp32 to bf16", partial(t.exponentials, t.z, t.out), 6))
    made.append(("triton exponentials, bf16", partial(t.exponentials, t.out, t.out), 4))  # in place: z is read twice
    return made


def variants(t: Tile) -> list[tuple[str, Run]]:
    """Blocks and warps of the Triton row kernels, tiles and merge of the forward without logits."""
    made: list[tuple[str, Run]] = []
    for block, warps in itertools.product((512, 1024, 2048), (4, 8)):
        other = dict(BLOCK=block, num_warps=warps)
        call = partial(t.forward, triton, t.z)
        made.append(
            (f"triton forward, fp32, BLOCK {block}, {warps} warps", partial(under, triton.FORWARD, other, call))
        )
    for block, warps in itertools.product((1024, 2048, 4096), (4, 8)):
        other = dict(BLOCK=block, num_warps=warps)
        call = partial(t.backward, triton, t.z, t.out)
        made.append(
            (
                f"triton backward, fp32 to bf16, BLOCK {block}, {warps} warps",
                partial(under, triton.BACKWARD, other, call),
            )
        )
    for u, warps in itertools.product((8, 16, 32), (4, 8)):
        other = dict(BLOCK=32 * warps, U=u, num_warps=warps)
        call = partial(t.exponentials, t.z, t.out)
        what = f"triton exponentials, fp32 to bf16, U {u}, {warps} warps"
        made.append((what, partial(under, triton.EXPONENTIALS, other, call)))
    return made


def on_chip(t: Tile) -> list[tuple[str, Run]]:
    made: list[tuple[str, Run]] = [("forward without logits", t.linear)]
    for columns in (8, 16, 32):
        run = partial(under, triton.on_chip.MERGE, dict(BN=columns), t.linear)
        made.append((f"forward without logits, merge BN {columns}", run))
    for name, tile in (("DEEP", triton.on_chip.DEEP), ("SMALL", triton.on_chip.SMALL)):
        made.append(
            (f"forward without logits, {name} tiles", partial(under, triton.on_chip.TILES, {90: tile}, t.linear))
        )
    return made


def rows(lab: Lab) -> None:
    t = Tile(lab, lab.rows(4096))
    bytes_of = {"forward, fp32, B": 4, "backward, fp32 t": 6, "exponentials, fp32 t": 6}
    for what, run, moved in shipped(t):
        lab.rate(what, run, 1e-6 * moved * t.z.numel(), "GB/s")
    for what, run in variants(t)[:: 11 if lab.dry else 1]:
        moved = next(size for key, size in bytes_of.items() if key in what)
        lab.rate(what, run, 1e-6 * moved * t.z.numel(), "GB/s")
    for what, run in on_chip(t)[:: 5 if lab.dry else 1]:
        lab.rate(what, run, 2e-9 * t.n * t.v * t.d, "TFLOP/s")
