"""Fused operators from hidden states to log-probs and alignment losses, never holding the logits."""

from align_kernels.api import LogProbs, linear_logprobs, sequence_logprobs
from align_kernels.dispatch import backends_report
from align_kernels.explain import explain
from align_kernels.from_logits import logprobs_from_logits
from align_kernels.fused import LossOutput, dpo_loss, grpo_loss, kto_loss, ppo_clip_loss, sft_loss
from align_kernels.head import LogitGradClamp

__all__ = [
    "LogProbs",
    "LogitGradClamp",
    "LossOutput",
    "backends_report",
    "dpo_loss",
    "explain",
    "grpo_loss",
    "kto_loss",
    "linear_logprobs",
    "logprobs_from_logits",
    "ppo_clip_loss",
    "sequence_logprobs",
    "sft_loss",
]
