"""TRL's releases before 1.15: the trainers that read log-probs from whole logits, on `trl_logits`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from typing import Any

from align_engine.errors import BadInput
from align_engine.integrations.trl_hook import Bound, beneath, check_head
from align_engine.integrations.trl_logits import READERS, LogitsForward, reader
from align_engine.integrations.trl_shared import WHOLE_LOGITS, autocast, models, named, rebind

READ = {"DPOTrainer": "dpo", "KTOTrainer": "kto", "GRPOTrainer": "grpo", "RLOOTrainer": "rloo", "SFTTrainer": "sft"}


def everywhere() -> contextlib.ExitStack:
    """Every trainer of `READ` that is built from here on, until what is returned is closed."""
    undo = contextlib.ExitStack()
    _read_by_us(undo)
    for name, module in READ.items():
        kind = getattr(importlib.import_module(f"trl.trainer.{module}_trainer"), name)
        init = kind.__init__
        if getattr(init, "fused", False):
            continue

        @functools.wraps(init)
        def fused(self: Any, *args: Any, init: Any = init, **kwargs: Any) -> None:
            if why := why_not(type(self)):
                raise BadInput(f"{why}; build it outside of the `with fuse()` block, or after its close()")
            init(self, *args, **kwargs)
            one(self)

        fused.fused = True  # type: ignore[attr-defined]
        kind.__init__ = fused
        undo.callback(setattr, kind, "__init__", init)
    return undo


def _read_by_us(undo: contextlib.ExitStack) -> None:
    """TRL's functions of logits take `Logits` too. Others' logits are read by TRL's own as before."""
    from trl.trainer import utils

    for name in READERS:
        theirs = getattr(utils, name)
        if not getattr(theirs, "__wrapped__", None):
            rebind(name, theirs, new := reader(name, theirs), None)
            undo.callback(rebind, name, new, theirs, None)


def why_not(kind: type) -> str | None:
    """What keeps the trainers of a class from being fused."""
    name = kind.__name__
    if named(kind, WHOLE_LOGITS) or not named(kind, {*READ}):
        return f"{name} does not read its log-probs as fuse knows it: fuse serves {', '.join(READ)} of this TRL"
    return None


def one(trainer: Any) -> Any:
    """A trainer that is built and not yet trained; it is returned.

    Raises:
        BadInput: one of another kind, Liger's losses, a head that cannot be taken.
    """
    if named(type(trainer), {"RewardTrainer"}):
        return trainer
    if why := why_not(type(trainer)):
        raise BadInput(why)
    if getattr(trainer.args, "use_liger_kernel", False):
        raise BadInput("use_liger_kernel = True: this release of TRL takes Liger's fused losses then; leave it out")
    _read_by_us(contextlib.ExitStack())
    chunked = None
    if getattr(trainer.args, "loss_type", None) == "chunked_nll":
        chunked = sys.modules["trl.trainer.sft_trainer"]._ChunkedCELMHeadOutput
    for model in models(trainer):
        if isinstance(getattr(model.forward, "__func__", None), LogitsForward):
            continue
        mixed = vars(model).pop("_original_forward", None)
        if mixed is not None:  # the trainer has been prepared: accelerate's wrapper goes around ours
            model.forward = mixed
        own = None if chunked is not None else beneath(model)  # a chunked loss stands in place of the forward
        if chunked is not None:
            vars(model).pop("forward", None)
        if check_head(model, False) == "hook":
            model.forward = Bound(LogitsForward(type(model), own, chunked), model)
        if mixed is not None:
            autocast(model, trainer.accelerator)
    return trainer
