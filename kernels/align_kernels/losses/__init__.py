"""Losses: pure functions of log-probs, one small file per family. They know no model, device, mask or kernel.

A loss says its *unit*, the smallest piece of a batch at which its value is closed:

    token      logps [n] of tokens                     -> [n]
    sequence   logps [S] summed over each sequence     -> [S]
    pair       logps [2P], chosen half, rejected half  -> [P]
    batch      logps [S] of all sequences of the call  -> [S]

and the *side* tensors it takes, each at a level: token, sequence, unit or batch. Normalisers are applied outside.
"""

from align_kernels.losses.dpo import dpo
from align_kernels.losses.grpo import grpo, gspo
from align_kernels.losses.kto import kto
from align_kernels.losses.ppo import ppo_clip, ppo_clip_entropy
from align_kernels.losses.registry import LOSSES, Loss
from align_kernels.losses.sft import sft

__all__ = ["LOSSES", "Loss", "dpo", "grpo", "gspo", "kto", "ppo_clip", "ppo_clip_entropy", "sft"]
