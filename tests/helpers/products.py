"""Matrix products counted."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import align_kernels  # noqa: F401


class Products(FlopCounterMode):
    """FLOPs of the matrix products inside the block; given V, of those that have it as one of their sizes."""

    OPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm,
           torch.ops.align_kernels.product_)  # fmt: skip

    def __init__(self, vocab: int | None = None) -> None:
        def product(*shapes: Any, **_: Any) -> int:
            a, b = [shape for shape in shapes if isinstance(shape, torch.Size)][-2:]
            return 2 * math.prod(a) * b[-1] if vocab is None or vocab in (*a, *b) else 0

        super().__init__(display=False, custom_mapping=dict.fromkeys(self.OPS, product))

    def total(self) -> int:
        found = self.get_flop_counts().get("Global", {})
        return sum(found.get(op, 0) for op in self.OPS)
