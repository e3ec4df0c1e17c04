"""Alignment losses straight from hidden states: the public operators, a file per family.

Where one takes hidden [B, T, D], it takes [N, D] too: the rows of the N targets that are not ignored, in their order.
"""

from align_kernels.fused.core import LossOutput, check_shape, run_loss
from align_kernels.fused.dpo import dpo_loss
from align_kernels.fused.grpo import grpo_loss
from align_kernels.fused.ppo import ppo_clip_loss, reinforce_loss, rloo_loss, value_loss
from align_kernels.fused.reference_free import cpo_loss, orpo_loss, simpo_loss, slic_loss
from align_kernels.fused.registered import fused_loss
from align_kernels.fused.reward import reward_loss
from align_kernels.fused.sft import sft_loss
from align_kernels.fused.unpaired import bco_loss, kto_loss

__all__ = [
    "LossOutput", "bco_loss", "check_shape", "cpo_loss", "dpo_loss", "fused_loss", "grpo_loss", "kto_loss", "orpo_loss",
    "ppo_clip_loss", "reinforce_loss", "reward_loss", "rloo_loss", "run_loss", "sft_loss", "simpo_loss", "slic_loss",
    "value_loss",
]  # fmt: skip
