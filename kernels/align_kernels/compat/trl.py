"""TRL 1.16: what `add_fused_lm_head` calls in every trainer, and the two functions of logits.

To run TRL's trainers on it: `trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbFunction`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align_kernels.api import linear_logprobs
from align_kernels.arguments import public
from align_kernels.from_logits import logprobs_from_logits

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class ChunkedLogProbFunction:
    """`trl.kernels.ChunkedLogProbFunction`: an `apply`, as on an autograd Function."""

    @staticmethod
    @public
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs of the targets, and what `outputs` names of the softmax.

        Args:
            hidden: [N, D]; weight: [V, D]; bias: [V] or None; targets: [N] int64.
            temperature: a float > 0, or one per row [N].
            chunk_size: accepted; the planner decides.
            final_logit_softcapping: > 0 or None. TRL reads 0.0 as a cap of 1.0; here it raises.
            logit_scale: factor on the logits before the softcap.
            outputs: of "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"; "log_probs" is always there.

        Returns:
            (log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N], or None where not asked for; the
            first two are differentiable. Targets of -100 read 0 and cost nothing (TRL: minus the logsumexp).

        Raises:
            ValueError: a name in `outputs` that is none of these (TRL returns None for it); see `linear_logprobs`.
        """
        del chunk_size
        unknown = set(outputs) - {"log_probs", *OUTPUTS}
        if unknown:
            raise ValueError(f"outputs may name log_probs, {', '.join(OUTPUTS)}; got {', '.join(sorted(unknown))}")
        out = linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
        )
        named = dict(zip(OUTPUTS, (out.entropy, out.log_sum_sq_probs, out.mean_logit, out.correct)))
        entropy, log_sum_sq_probs, mean_logits, is_top1 = (named[x] if x in outputs else None for x in OUTPUTS)
        return out.logp, entropy, log_sum_sq_probs, mean_logits, is_top1


@public
def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """`trl.trainer.utils.selective_log_softmax`: log_softmax of logits [..., V] at index [...] or [..., K].

    Args:
        temperature: the logits are divided by it. Default 1.0.
        row_mask: of index's shape; rows where it is 0 read 0. Default None.

    Returns:
        float32 at least, in index's shape (TRL rounds to bfloat16 what comes in as bfloat16, off CUDA).
    """
    if index.dim() == logits.dim() - 1:
        targets = index.long() if row_mask is None else index.long().masked_fill(row_mask == 0, -100)
        return logprobs_from_logits(logits, targets, temperature=temperature).logp
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logps = scaled.gather(-1, index) - scaled.logsumexp(-1, keepdim=True)
    return logps if row_mask is None else logps.masked_fill(row_mask == 0, 0.0)


@public
def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """`trl.trainer.utils.entropy_from_logits`: entropy in nats of logits [..., V], float32 at least, [...].

    A logit of -inf is a probability of 0 (TRL returns NaN off CUDA). `chunk_size` is accepted; tiles are chosen here.
    """
    del chunk_size
    return logprobs_from_logits(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)).entropy
