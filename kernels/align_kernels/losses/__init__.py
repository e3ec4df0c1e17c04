"""Losses: pure functions of log-probs, one small file per family. They know no model, device, mask or kernel.

A loss says its *unit*, the smallest piece of a batch at which its value is closed: a token, a sequence, a pair (chosen
half, rejected half) or the batch, and the *side* tensors it takes. Normalisers are applied outside. How they hang
together:

    dpo      Bradley-Terry on log-ratios; cpo the same on log-probs, the reward model on scores
    kto      marks in place of pairs; apo_zero_unpaired is kto with z0 = 0; bco a logistic regression of the mark
    grpo     ppo_clip with a group's baseline; gspo, rloo: the same with one ratio per sequence
    reinforce  the gradient of ppo_clip on fresh samples
"""

from align_kernels.losses.cpo import cpo, orpo, slic
from align_kernels.losses.dpo import dpo
from align_kernels.losses.gate import ProbGate
from align_kernels.losses.grpo import grpo
from align_kernels.losses.kto import bco, kto
from align_kernels.losses.ppo import ppo_clip
from align_kernels.losses.registry import LOSSES, Loss, register_loss
from align_kernels.losses.reinforce import reinforce, rloo
from align_kernels.losses.reward import reward
from align_kernels.losses.sft import sft

__all__ = [
    "LOSSES", "Loss", "ProbGate", "bco", "cpo", "dpo", "grpo", "kto", "orpo", "ppo_clip", "register_loss", "reinforce",
    "reward", "rloo", "sft", "slic",
]  # fmt: skip
