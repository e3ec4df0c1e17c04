"""What the modules share: refusals and the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from align_kernels.api import linear_logprobs


def refuse(why: str, **options: tuple[Any, Any]) -> None:
    """Raise for an option (value, default) that is not at its default."""
    for name, (value, default) in options.items():
        if value != default:
            raise ValueError(f"{name}={value!r} is not served: {why}")


def reference_logps(
    use_ref_model: bool, ref_input: Tensor | None, ref_weight: Tensor | None, targets: Tensor, **head
) -> Tensor | None:
    """[B, T] log-probs under the reference, 0 where ignored; None where there is no reference."""
    if not use_ref_model:
        if ref_input is not None or ref_weight is not None:
            raise ValueError(
                "use_ref_model=False would drop ref_input and ref_weight: set it to True or leave them out"
            )
        return None
    if ref_input is None or ref_weight is None:
        raise ValueError("use_ref_model=True needs ref_input and ref_weight, or log-probs of the reference")
    with torch.no_grad():
        return linear_logprobs(ref_input, ref_weight, targets, **head).logp
