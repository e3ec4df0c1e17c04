"""The algorithms: one file a family, with its loss call, what it counts, its advantages and its row of the table.

A new one is a file with a row here, and a recipe in `align_engine.recipe`.
"""

from align_engine.algorithms.grpo import GRPO
from align_engine.algorithms.kto import KTO
from align_engine.algorithms.ppo import PPO
from align_engine.algorithms.preference import CPO, DPO, ORPO, SIMPO
from align_engine.algorithms.reward_model import RM
from align_engine.algorithms.rloo import RLOO
from align_engine.algorithms.sft import SFT

ALGORITHMS = {row.name: row for row in (SFT, RM, DPO, SIMPO, ORPO, CPO, KTO, RLOO, GRPO, PPO)}
