"""One-line changes for trainers that people already have.

- TRL: `from align_engine.integrations.trl import fuse`
- transformers: `from align_engine.integrations.transformers import FusedTrainer`
- your own loop, Lightning, accelerate: `from align_engine.integrations import fused_head`
"""

from align_engine.integrations.hook import fused_head

__all__ = ["fused_head"]
