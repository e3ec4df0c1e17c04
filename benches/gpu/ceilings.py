"""The two ceilings of this device: copy bandwidth, and GEMMs of the heads' shapes.

python benches/gpu/ceilings.py [--dry]
"""

from __future__ import annotations

from typing import Any

import torch
from common import Measured, Options, interleaved, read_options, write
from heads import HEADS, TINY


def bandwidth(options: Options) -> list[dict[str, Any]]:
    size = 2**20 if options.dry else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    moved = {"copy": 2 * size, "write": size}
    took = interleaved({"copy": lambda: target.copy_(source), "write": lambda: target.zero_()}, options)
    return [row(name, measured, "GB/s", moved[name] / 1e6) for name, measured in took.items()]


def products(name: str, d: int, v: int, options: Options) -> list[dict[str, Any]]:
    n = 64 if options.dry else 4096
    x, w, z = (torch.randn(s, device=options.device, dtype=options.dtype) for s in ((n, d), (v, d), (n, v)))
    runs = {"x @ w.T": lambda: x @ w.T, "dz @ w": lambda: z @ w, "dz.T @ x": lambda: z.T @ x}
    took = interleaved(runs, options)
    return [row(f"{name}, {n} rows: {key}", measured, "TFLOP/s", 2e-9 * n * d * v) for key, measured in took.items()]


def row(name: str, measured: Measured, unit: str, work: float) -> dict[str, Any]:
    """`work` is what one millisecond would make one `unit`."""
    ms = measured.milliseconds
    return {"ceiling": name, "ms": ms, unit: ms and work / ms} | ({"note": measured.note} if measured.note else {})


def main() -> None:
    options = read_options(__doc__)
    rows = bandwidth(options)
    for name, (d, v, _) in (TINY if options.dry else HEADS).items():
        rows += products(name, d, v, options)
    write(options, "ceilings", rows)


if __name__ == "__main__":
    main()
