"""Compiles a share of the kernels that the survey will launch, on small tensors: python -m warm I OF.

Triton keeps them by dtype, options and divisibility of sizes, so that few rows and a narrow head stand for many.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import heads
import torch
from common import Lab, Setting
from methods import methods, step
from rows import Tile, variants


def warm(i: int, of: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Setting(False, Path(folder), ""), "warm", float("inf"), frozenset(), lambda what: None)
        lab.head = lambda name: (64, 152064)  # type: ignore[method-assign]
        torch.manual_seed(i)
        todo = []
        for mode in ("forward", "trained", "late"):
            b = heads.make(lab, "", 64, "dense", mode)
            named = methods(False).items()
            todo += [(key, lambda m=m, b=b, mode=mode: step(m, b, mode)) for key, m in named if "CuTe" not in key]
        tile = Tile(lab, 64)
        todo += variants(tile)
        for what, run in todo[i::of]:
            _, reason = lab.attempt(what, run)
            if reason:
                print(f"warming {what}: {reason}", flush=True)


if __name__ == "__main__":
    warm(int(sys.argv[1]), int(sys.argv[2]))
