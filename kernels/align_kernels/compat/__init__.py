"""The call signatures that other projects use today, over this package's operators.

`compat.trl` (TRL 1.16), `compat.liger` (Liger Kernel 0.8.5), `compat.cce` (Cut Cross-Entropy 25.1.1) and `compat.verl`
(verl 0.8): the same arguments and results, computed by `align_kernels`. None of these packages is imported. Arguments
that steer a peer's own implementation (chunk sizes, compilation) are accepted and left to the planner. What
cannot be served raises ValueError, and so does what the peer would drop without a word. `cce` and `verl` both name
their function `linear_cross_entropy`: take it from its module.
"""

from align_kernels.compat import cce, liger, trl, verl
from align_kernels.compat.liger import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from align_kernels.compat.trl import ChunkedLogProbFunction, entropy_from_logits, selective_log_softmax

__all__ = [
    "ChunkedLogProbFunction",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearGRPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "cce",
    "entropy_from_logits",
    "liger",
    "selective_log_softmax",
    "trl",
    "verl",
]
