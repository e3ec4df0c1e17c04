"""The recipe of a run: one tree of dataclasses, read from YAML and overridden by flags.

A field's name is unique over the whole tree, so YAML may hold it at the top level or under its section, and its flag
bears no prefix. Nothing here imports torch: `align --help` is to be quick.
"""

from align_engine.recipe.files import (
    load,
    save,
    typed,
    unknown,
)
from align_engine.recipe.recipes import (
    RECIPES,
    ClippedRecipe,
    CpoRecipe,
    DirectRecipe,
    DpoRecipe,
    GentleRecipe,
    GrpoRecipe,
    IterateRecipe,
    KtoRecipe,
    LanguageRecipe,
    OnlineRecipe,
    OrpoRecipe,
    PpoRecipe,
    Recipe,
    RmRecipe,
    SftRecipe,
    SimpoRecipe,
    fields,
    flat,
)
from align_engine.recipe.rules import (
    REQUIRED,
    check,
    identity,
)
from align_engine.recipe.sections import (
    ClippedRatio,
    CpoLoss,
    DataSection,
    DirectLoss,
    DpoLoss,
    EvalSection,
    GrpoLoss,
    KernelSection,
    KlReference,
    KtoLoss,
    LimitSection,
    LossReference,
    ModelSection,
    OrpoLoss,
    OutputSection,
    PpoLoss,
    ReferenceFields,
    RmLoss,
    RolloutSection,
    RoundsSection,
    SimpoLoss,
    TrainSection,
)

__all__ = [
    "RECIPES", "REQUIRED", "ClippedRatio", "ClippedRecipe", "CpoLoss", "CpoRecipe", "DataSection", "DirectLoss",
    "DirectRecipe", "DpoLoss", "DpoRecipe", "EvalSection", "GentleRecipe", "GrpoLoss", "GrpoRecipe",
    "IterateRecipe", "KernelSection", "KlReference", "KtoLoss", "KtoRecipe", "LanguageRecipe", "LimitSection",
    "LossReference", "ModelSection", "OnlineRecipe", "OrpoLoss", "OrpoRecipe", "OutputSection", "PpoLoss",
    "PpoRecipe", "Recipe", "ReferenceFields", "RmLoss", "RmRecipe", "RolloutSection", "RoundsSection", "SftRecipe",
    "SimpoLoss", "SimpoRecipe", "TrainSection", "check", "fields", "flat", "identity", "load", "save", "typed",
    "unknown",
]  # fmt: skip
