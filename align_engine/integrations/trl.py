"""TRL's trainers on the fused LM head of align_kernels. Their own loss code runs untouched.

Since 1.15 most TRL trainers ask their model for log-probs through one hook, `add_fused_lm_head`. `fuse` puts another
function behind that hook, with the same outputs, and refuses the other trainers by name. Before, they read logits:
`trl_logits`. Which it is, the installed TRL is asked; `TESTED` names the releases that were run.

    from align_engine.integrations.trl import fuse

    fuse()                             # before the trainer is built: every trainer from here on
    trainer = DPOTrainer(...)

    trainer = fuse(DPOTrainer(...))    # or after, one trainer

    with fuse():                       # or for a while
        trainer = DPOTrainer(...)
        trainer.train()

What changes: the gradients of the head come from logits that are kept where they fit in the workspace, not made twice
(6NVD FLOPs against 8, with a frozen head 4 against 6); prompt and padding never meet the head, on a CPU too; log-probs
are float32 for any dtype of the model; the head runs inside the model's own forward, so that FSDP2 and hooks on it see
it; and LoRA on the LM head is trained (TRL refuses it: call `fuse()` first; async GRPO goes on refusing it).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import warnings
from typing import Any, TypeVar, overload

from align_engine.errors import BadInput
from align_engine.integrations import trl_older
from align_engine.integrations.trl_hook import FusedForward, add_fused_lm_head, check_head, layers, settings_of
from align_engine.integrations.trl_logits import READERS
from align_engine.integrations.trl_shared import WHOLE_LOGITS, autocast, models, named, rebind

TESTED = ("1.16", "1.15", "1.8")
RUN = ", ".join(TESTED)
HOOK = {"model", "temperature", "cast_lm_head_to_fp32", "outputs"}  # arguments of add_fused_lm_head
OUTPUT = {"loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss"}
TRAINERS = ("dpo", "grpo", "kto", "rloo", "sft")
SERVED = "DPO, KTO, GRPO, RLOO, SFT, async GRPO and what inherits from them (GMPO, BEMA's DPO)"

Trainer = TypeVar("Trainer")


@overload
def fuse() -> contextlib.ExitStack: ...
@overload
def fuse(trainer: Trainer) -> Trainer: ...
def fuse(trainer: Any = None) -> Any:
    """Put align_kernels behind the LM head of TRL's DPO, KTO, GRPO, RLOO, SFT, GMPO and async GRPO trainers.

    Args:
        trainer: one that is built and not yet trained: its model and reference change, and it is returned. Default
            None: every trainer that is built from here on changes, until the `with` block ends or `close()` is called
            on what is returned; without either, for good. A RewardTrainer has no LM head and stays as it is, in both.

    Raises:
        BadInput: a TRL release whose functions are others than those that are replaced; a trainer that does not take
            its log-probs through them, given or built inside the block; a head that cannot be taken exactly (see
            `add_fused_lm_head`). All before training.
    Warns:
        UserWarning: a release that was not run with this, and has these functions.
    """
    hooked = _has_hook()
    if trainer is None:
        return _everywhere() if hooked else trl_older.everywhere()
    return _one(trainer) if hooked else trl_older.one(trainer)


def _has_hook() -> bool:
    """Whether TRL has the hook, with the arguments and the output that are known here; False: its trainers read logits.

    Raises:
        BadInput: neither, or the hook is another.
    """
    import trl
    from trl.trainer import base_trainer, utils

    version, hook = trl.__version__, getattr(utils, "add_fused_lm_head", None)
    missing = [name for name in READERS if not hasattr(utils, name)]
    if not hasattr(base_trainer, "_BaseTrainer"):  # before 1.0 trainers ask more of logits, on transformers 4 alone
        missing.append("_BaseTrainer")
    if hook is None and missing:
        raise BadInput(f"TRL {version} has no {missing[0]}: fuse was run with {RUN}; pip install 'trl>={TESTED[-1]}'")
    if version.rsplit(".", 1)[0] not in TESTED:
        warnings.warn(f"fuse was run with TRL {RUN}, this is {version}: compare a few steps", stacklevel=3)
    if hook is None:
        return False
    if hook is add_fused_lm_head:
        return True
    arguments = {*inspect.signature(hook).parameters} - HOOK
    fields = OUTPUT ^ {*getattr(getattr(utils, "FusedCausalLMOutput", None), "__dataclass_fields__", ())}
    if strange := sorted(arguments | fields):
        what = f"add_fused_lm_head is another than fuse knows ({', '.join(strange)})"
        raise BadInput(f"TRL {version}: {what}; it was run with {RUN}")
    return True


def _everywhere() -> contextlib.ExitStack:
    from trl.trainer import base_trainer, utils

    undo = contextlib.ExitStack()
    if utils.add_fused_lm_head is add_fused_lm_head:
        return undo
    trainers = [importlib.import_module(f"trl.trainer.{name}_trainer") for name in TRAINERS]
    for name, old, new, modules in (
        ("add_fused_lm_head", utils.add_fused_lm_head, add_fused_lm_head, None),
        ("BaseTunerLayer", trainers[0].BaseTunerLayer, _NoRefusal, trainers),
    ):
        rebind(name, old, new, modules)
        undo.callback(rebind, name, new, old, modules)
    init = base_trainer._BaseTrainer.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        why = None if named(type(self), {"RewardTrainer"}) else _why_not(type(self))
        if why:
            raise BadInput(f"{why}; build it outside of the `with fuse()` block, or after its close()")
        init(self, *args, **kwargs)

    base_trainer._BaseTrainer.__init__ = checked
    undo.callback(setattr, base_trainer._BaseTrainer, "__init__", init)
    return undo


def _why_not(kind: type) -> str | None:
    """What keeps the trainers of a class from being fused, told from where it and its bases are defined."""
    name = kind.__name__
    if named(kind, WHOLE_LOGITS):
        return f"{name} takes its loss from whole logits of student and teacher: there is nothing to fuse"
    if any(hasattr(sys.modules.get(base.__module__), "add_fused_lm_head") for base in kind.__mro__):
        return None
    return f"{name} does not take its log-probs through TRL's add_fused_lm_head: fuse serves {SERVED}"


class _Never(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return False


class _NoRefusal(metaclass=_Never):
    """Stands for peft's BaseTunerLayer where a trainer refuses an adapter on the LM head: `head_weights` judges it."""


def _one(trainer: Any) -> Any:
    if named(type(trainer), {"RewardTrainer"}):
        return trainer
    why = _why_not(type(trainer))
    if why:
        raise BadInput(why)
    found = []
    for model in models(trainer):
        stacked = list(layers(model.forward))
        if any(isinstance(layer, FusedForward) for layer in stacked):
            continue
        settings = next(filter(None, map(settings_of, stacked)), None)
        if settings is None:
            raise BadInput(
                f"{type(trainer).__name__} did not put TRL's add_fused_lm_head on its {type(model).__name__}"
            )
        found.append((model, settings))
    for model, settings in found:
        check_head(model, settings["cast_lm_head_to_fp32"])
    for model, settings in found:
        mixed = vars(model).pop("_original_forward", None)
        if mixed is not None:  # the trainer has been prepared: accelerate's wrapper goes around ours
            model.forward = mixed
        add_fused_lm_head(model, **settings)
        if mixed is not None:
            autocast(model, trainer.accelerator)
    return trainer
