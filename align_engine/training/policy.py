"""The model to train: with its adapters, critic and checkpointing, and no dropout where the algorithm wants none."""

from __future__ import annotations

from typing import Any

from align_engine.errors import BadInput
from align_engine.models import load
from align_engine.models.modelfiles import adapter_base
from align_engine.models.noise import disable_dropout
from align_engine.models.score_head import load_scalar_model
from align_engine.recipe import Recipe
from align_engine.training import reference as references
from align_engine.training.algorithm import Algorithm


def make_policy(recipe: Recipe, algorithm: Algorithm, pad_id: int) -> tuple[Any, str | None]:
    """(model, what is to be said of it). Also inside `models.blank.blank`."""
    path, section = recipe.model.model_name_or_path, recipe.model
    saved_adapters = adapter_base(path, section.model_revision) is not None
    if saved_adapters and not section.use_peft:
        raise BadInput(f"model_name_or_path = {path!r} holds adapters: add --use_peft to train them further")
    if algorithm.scalar:
        model = load_scalar_model(path, section, pad_id, fresh_head=True)
    else:
        model = load.load_model(path, section)
    if section.use_peft and not saved_adapters:
        task = "SEQ_CLS" if algorithm.scalar else "CAUSAL_LM"
        model = load.add_adapters(model, section, task, section.lora_dropout if algorithm.dropout else 0.0)
    if algorithm.refers(recipe):
        references.extend_model(model, recipe)
    algorithm.extend_model(model, recipe, pad_id)
    if recipe.train.gradient_checkpointing:
        load.checkpoint_activations(model, selective=recipe.train.gradient_checkpointing_kwargs is not None)
    if not algorithm.dropout:
        disable_dropout(model)
    return model, load.hold_in_float32(model)
