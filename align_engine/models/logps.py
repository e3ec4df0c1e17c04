"""Log-probs of a batch under a model: the policy, its reference, or either with a critic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from align_engine.data.batches import Batch
from align_engine.integrations.hook import fused_head
from align_engine.models.tree_attention import reading
from align_kernels import linear_logprobs, sequence_logprobs


@torch.no_grad()
def token_logps(
    model: nn.Module, batch: Batch, head_options: dict[str, Any], critic: Callable[..., Tensor] | None = None
) -> Tensor:
    """Log-probs of the targets under `model`, 0 where there is none, and what a critic says of each position:
    [1, B, T] or [2, B, T] float32."""

    def fn(hidden: Tensor, head: dict[str, Any]) -> Tensor:
        hidden = batch.predicting(hidden)
        logps = linear_logprobs(hidden, targets=batch.targets, **head, **head_options).logp
        return torch.stack([logps] if critic is None else [logps, critic(hidden, batch).to(logps.dtype)])

    with fused_head(model, fn), reading(model, batch) as inputs:
        return model(**inputs, use_cache=False).logits.float()


def reference_logps(model: nn.Module, batch: Batch, head_options: dict[str, Any], per_token: bool = False) -> Tensor:
    """Log-probs of the completions under `model`: summed, [B] float32, or `per_token` [B, T]."""
    (logps,) = token_logps(model, batch, head_options)
    return logps if per_token else sequence_logprobs(logps, batch.targets)
