"""accelerate's FSDP2 on the CPU, as `accelerate launch --use_fsdp --fsdp_version 2` switches it on.

accelerate shards over accelerators alone and takes DDP on CPUs (which is refused): the ranks here say that theirs are
no CPUs.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from align_engine.training import ranks

# what the launcher sets
LAUNCHED = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
                FSDP_CPU_RAM_EFFICIENT_LOADING="true", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
                ACCELERATE_USE_CPU="true")  # fmt: skip
CHOOSE = ranks.choose_device
PLAIN = {name: vars(PartialState)[name] for name in ("_prepare_backend", "set_device")}


def on() -> None:
    """Runs of this rank are sharded."""
    os.environ.update(LAUNCHED)
    on_no_cpus()


def on_no_cpus() -> None:
    """Accelerate takes the CPU for an accelerator."""
    os.environ["ACCELERATE_USE_CPU"] = "false"
    ranks.choose_device = lambda: None  # it would take the CPU for one
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def off() -> None:
    """They are DDP's again."""
    os.environ.update(ACCELERATE_USE_FSDP="false", ACCELERATE_USE_CPU="true")
    ranks.choose_device = CHOOSE
    for name, method in PLAIN.items():
        setattr(PartialState, name, method)
    AcceleratorState._reset_state(reset_partial_state=True)
