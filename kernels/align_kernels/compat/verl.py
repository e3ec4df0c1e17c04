"""verl 0.8."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from align_kernels.api import linear_logprobs
from align_kernels.arguments import public


@public
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy, as `verl.utils.kernel.linear_cross_entropy.linear_cross_entropy`.

    Args:
        hidden: [..., D], any D (verl's kernel asserts a multiple of 128), on any device; N positions in all.
        weight: [V, D], or this rank's shard of it.
        labels: [...]; -100 reads 0 and costs nothing (verl leaves such positions uninitialised).
        temperature: the logits are divided by it. Default 1.0.
        reduction: of the log-probs alone: "none" (default), "sum", "mean" over the labels that are not -100.
        dist_process_group: group over which weight is sharded along V, in shards of any size. The gradient of hidden is
            this rank's share, to be summed over the group by the caller, as Megatron's layers do. Default None.

    Returns:
        (log-probs [N] or [], entropy [N]), flat and float32 at least, both differentiable.

    Raises:
        ValueError: an unknown reduction; see `linear_logprobs`.
    """
    how = reduction.lower()
    if how not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean, got {reduction!r}")
    if dist_process_group is not None and hidden.requires_grad:
        # linear_logprobs hands every rank the whole gradient; the caller's sum over the group must give it once
        ranks = dist.get_world_size(dist_process_group)
        hidden = hidden.view_as(hidden)
        hidden.register_hook(lambda grad: grad / ranks)
    targets = labels.long()
    out = linear_logprobs(hidden, weight, targets, temperature=temperature, tp_group=dist_process_group)
    logps, entropy = out.logp.reshape(-1), out.entropy.reshape(-1)
    if how == "none":
        return logps, entropy
    total = logps.sum()
    return total if how == "sum" else total / (targets != -100).sum().clamp(min=1), entropy
