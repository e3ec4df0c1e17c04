"""LoRA's linear layers as one product onto another.

peft computes base(x), then B(A(x)), scales that and adds the two: four arrays of the output's size. Here the adapter's
product comes first and the base's is added to it inside the GEMM. So it is the last operation that saves anything for
the backward pass, and where activations are recomputed torch stops in front of it: at the end of a block, the product
of its widest layer is not made again.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def fuse(model: nn.Module) -> None:
    """Have every LoRA on a plain linear layer compute so, whenever it is called in the plain way."""
    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) is nn.Linear:
            vars(module)["forward"] = MethodType(_forward, module)


def _forward(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, names = module.base_layer, [name for name in module.active_adapters if name in module.lora_A]
    plain = not (module.disable_adapters or module.merged or args or kwargs or module.lora_variant) and len(names) == 1
    if not plain or not x.dtype == base.weight.dtype == module.lora_A[names[0]].weight.dtype:
        return Linear.forward(module, x, *args, **kwargs)
    (name,), rows = names, x.flatten(0, -2)
    narrow = module.lora_A[name](module.lora_dropout[name](rows)) * module.scaling[name]  # [N, r]
    added = module.lora_B[name](narrow)  # [N, out]
    if base.bias is not None:
        added = added + base.bias
    return torch.addmm(added, rows, base.weight.T).unflatten(0, x.shape[:-1])
