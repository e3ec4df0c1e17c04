"""Fused operators from hidden states to log-probs and alignment losses, never holding the logits."""

from align_kernels.api import LogProbs, linear_logprobs, sequence_logprobs
from align_kernels.dispatch import backends_report, register_backend
from align_kernels.explain import explain
from align_kernels.from_logits import logprobs_from_logits
from align_kernels.fused import (
    LossOutput,
    bco_loss,
    cpo_loss,
    dpo_loss,
    fused_loss,
    grpo_loss,
    kto_loss,
    orpo_loss,
    ppo_clip_loss,
    reinforce_loss,
    reward_loss,
    rloo_loss,
    sft_loss,
    simpo_loss,
    slic_loss,
    value_loss,
)
from align_kernels.head import LogitGradClamp
from align_kernels.losses.gate import ProbGate
from align_kernels.losses.registry import register_loss
from align_kernels.sample import Samples, linear_sample

__version__ = "0.1.0"
__all__ = [
    "LogProbs",
    "LogitGradClamp",
    "LossOutput",
    "ProbGate",
    "Samples",
    "backends_report",
    "bco_loss",
    "cpo_loss",
    "dpo_loss",
    "explain",
    "fused_loss",
    "grpo_loss",
    "kto_loss",
    "linear_logprobs",
    "linear_sample",
    "logprobs_from_logits",
    "orpo_loss",
    "ppo_clip_loss",
    "register_backend",
    "register_loss",
    "reinforce_loss",
    "reward_loss",
    "rloo_loss",
    "sequence_logprobs",
    "sft_loss",
    "simpo_loss",
    "slic_loss",
    "value_loss",
]
