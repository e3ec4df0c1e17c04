"""Liger Kernel 0.8.5: fused linear DPO, KTO, GRPO, CPO, SimPO and ORPO losses.

Prompt, padding and ignored positions never meet the head, so the logits that the modules of preferences report beside
the loss are those of the completions (Liger counts every position). `compiled` and `chunk_size` are accepted and leave
the choice to the planner. A reference that `use_ref_model=False` would drop raises; `ref_logps` takes one that was made
before, or with a LoRA switched off.
"""

from align_kernels.compat.liger.grpo import LigerFusedLinearGRPOLoss
from align_kernels.compat.liger.preference import LigerFusedLinearDPOLoss, LigerFusedLinearKTOLoss
from align_kernels.compat.liger.reference_free import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
