"""What is common to both ways into TRL's trainers: their models, and names in TRL's modules."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

WHOLE_LOGITS = {"GKDTrainer", "GOLDTrainer"}  # their SFT base has the hook, their losses do not use it


def models(trainer: Any) -> Iterator[Any]:
    """The bare models that a trainer asks for log-probs: the policy's, and the reference's where there is one."""
    from accelerate.utils import extract_model_from_parallel

    for part in ("model", "ref_model"):
        model = getattr(trainer, part, None)
        if model is not None:
            model = extract_model_from_parallel(model)
            yield model.get_base_model() if hasattr(model, "get_base_model") else model


def rebind(name: str, old: Any, new: Any, modules: list[types.ModuleType] | None) -> None:
    """In these modules; None: in all of TRL's that are loaded, which may be more when it is undone."""
    for module in modules or [module for path, module in list(sys.modules.items()) if path.startswith("trl.")]:
        if vars(module).get(name) is old:
            setattr(module, name, new)


def named(kind: type, names: set[str]) -> bool:
    """Whether a class or one of its bases has one of these names."""
    return not names.isdisjoint(base.__name__ for base in kind.__mro__)


def autocast(model: Any, accelerator: Any) -> None:
    """Mixed precision around the model's forward, as `Accelerator.prepare_model` puts it there."""
    from accelerate.utils import convert_outputs_to_fp32, get_mixed_precision_context_manager

    model._original_forward = model.forward
    context: Any = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
    model.forward = types.MethodType(convert_outputs_to_fp32(context(model.forward.__func__)), model)
