"""Tensor parallelism: ranks that cut each layer and the vocabulary among themselves, and so are one process of the run.

accelerate's `parallelism_config` asks for it, transformers cuts the model as it loads it, and the fused losses take the
LM head as it is then, cut along the vocabulary: no rank holds a whole row of logits. All ranks read the same rows, draw
the same random numbers and take the same steps.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from align_engine.errors import BadInput
from align_engine.models.load import tensor_parallel_size
from align_engine.recipe import LossReference, Recipe
from align_engine.training.ranks import launched

OTHERS = ("dp_replicate", "dp_shard", "cp", "sp")  # sizes of accelerate's parallelism_config that are not served


class OneProcess(Accelerator):
    """Ranks that do the same, counted as the one process that they are."""

    together = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.together = True  # accelerate's own setting up has counted ranks

    @property
    def num_processes(self) -> int:
        return 1 if self.together else self.state.num_processes

    @property
    def process_index(self) -> int:
        return 0 if self.together else self.state.process_index

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """What one of them holds, the same on all."""
        return super().reduce(tensor, "sum") / self.state.num_processes


def kind_of_accelerator() -> type[Accelerator]:
    """Which one the launcher asks for.

    Raises:
        BadInput: a layout that is not served.
    """
    if other := [name for name in OTHERS if int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "1")) > 1]:
        raise BadInput(f"parallelism_config: {other[0]}_size above 1 is not served: use tp_size, or FSDP2 without it")
    if (size := tensor_parallel_size()) == 1:
        return Accelerator
    if size != launched():
        raise BadInput(f"parallelism_config: tp_size = {size} of {launched()} processes: all must cut the model")
    return OneProcess


@contextlib.contextmanager
def saved_whole(model: Any) -> Iterator[None]:
    """Inside the block transformers saves the state that it is given, and says nothing of how the model is cut."""
    held = vars(model.config).pop("distributed_config", None)
    try:
        yield
    finally:
        if held is not None:
            model.config.distributed_config = held


def check(recipe: Recipe, scalar: bool) -> None:
    """Refuse what ranks that cut the model cannot do together.

    Raises:
        BadInput: naming it.
    """
    section = recipe.section(LossReference)
    refused = {
        "use_peft = True": recipe.model.use_peft,
        "load_in_4bit or load_in_8bit": recipe.model.load_in_4bit or recipe.model.load_in_8bit,
        "reference = 'ema'": section is not None and section.reference == "ema",
        "a score head": scalar,
        f"optim = {recipe.train.optim!r}": recipe.train.optim not in ("adamw_torch", "adamw_torch_fused"),
    }
    if tensor_parallel_size() > 1 and (found := [what for what, asked in refused.items() if asked]):
        raise BadInput(f"parallelism_config: tp_size = {tensor_parallel_size()} does not go with {found[0]}: use FSDP2")
