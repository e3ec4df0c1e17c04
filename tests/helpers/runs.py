"""Runs that are cut off, and runs that must end alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from align_engine.recipe import Recipe
from align_engine.run import train
from align_engine.training import loop
from align_engine.training.stops import Stopped


def cut_off(name: str, recipe: Recipe, step: int | None = None) -> None:
    """Train, and stop as Ctrl-C would once the checkpoint at `step` (the first one, if None) is written."""
    save = loop.Engine.save

    def save_then_stop(engine, folder):
        save(engine, folder)
        if step in (None, engine.progress.step):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop.Engine, "save", save_then_stop)
        train(name, recipe)


def in_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model and its optimiser in a checkpoint that one process wrote."""
    files = sorted((folder / "tensors").iterdir())
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_bits(a: Path, b: Path, file: str = "model.safetensors") -> bool:
    """Whether two folders hold the same weights."""
    a, b = load_file(a / file), load_file(b / file)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
