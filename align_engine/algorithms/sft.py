"""Supervised fine-tuning."""

from align_engine.algorithms.common import tokens
from align_engine.data.batches import collate_sft
from align_engine.training.algorithm import Algorithm
from align_kernels import sft_loss

SFT = Algorithm("sft", "sft", collate_sft, tokens, sft_loss, dropout=True)
