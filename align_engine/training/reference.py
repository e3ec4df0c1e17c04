"""Log-probs of the reference model, one way or another: a function that fills `batch.ref_logps`.

none          a uniform reference: zeros.
frozen        a second copy of the model, evaluated at every step: one more model in memory, one more forward per step.
cpu-offload   the same with its decoder in CPU memory, brought over layer by layer (the LM head stays): slow, small.
adapter-off   the policy itself with its LoRA adapters turned off: no memory, one more forward per step.
adapter-copy  the policy with a frozen copy of its adapters as they were: a few MiB, one more forward per step.
ema           frozen, or adapter-copy, that follows the policy every ref_model_sync_steps steps (TR-DPO).
precomputed   one pass over the rows that the run will see, before the first step, kept on disk for this run and others:
              no memory while training, one forward per row however many epochs and runs. The default without adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from align_engine.data.batches import Batch
from align_engine.errors import BadInput
from align_engine.integrations import hook
from align_engine.models import load
from align_engine.models.logps import reference_logps
from align_engine.models.modelfiles import adapter_base
from align_engine.recipe import LossReference, Recipe, ReferenceFields, RolloutSection
from align_engine.training.precomputed import unsharded

if TYPE_CHECKING:
    from align_engine.training.engine import Engine

COPY = "reference"  # name of the adapter that an adapter-copy lives in


def of(recipe: Recipe) -> tuple[str, str]:
    """The kind of reference of a recipe, and the sentence that says why: what `auto` takes."""
    section = fields_of(recipe)
    if section.reference != "auto":
        return section.reference, "as the recipe says"
    if recipe.model.use_peft and section.ref_model_name_or_path is None:
        if adapter_base(recipe.model.model_name_or_path, recipe.model.model_revision) is not None:
            return "adapter-copy", "the model with its adapters as they were saved is the reference"
        return "adapter-off", "the model without its adapters is the reference, at no memory"
    if recipe.section(RolloutSection) is not None:
        return "frozen", "a second copy of the model, which the rollouts are measured under"
    return "precomputed", "one pass before the first step instead of a second model in memory"


def fields_of(recipe: Recipe) -> ReferenceFields:
    """The section that says what the reference is."""
    section = recipe.section(ReferenceFields)
    assert section is not None, "an algorithm that refers to a model has a recipe that says which"
    return section


def extend_model(model: Any, recipe: Recipe) -> None:
    """Give a policy what its reference needs of it before there is an optimiser."""
    if recipe.model.use_peft and of(recipe)[0] in ("adapter-copy", "ema"):
        copy_adapter(model)


def attach(engine: Engine) -> nn.Module | None:
    """Give batches their `ref_logps`, in the way the recipe names.

    Returns:
        the model that `precomputed.precompute_all` is to ask once the run's folder is there, prepared by accelerate;
        None for every other kind of reference.
    Raises:
        BadInput: the reference cannot be loaded.
    """
    kind, why = of(engine.recipe)
    engine.accelerator.print(f"reference {kind}: {why}")
    made = KINDS[kind](engine)
    engine.reference = made.live
    if made.pairs is not None:
        section = engine.recipe.section(LossReference)
        assert section is not None, "rollouts have no reference that follows"
        engine.kept["reference"] = nn.ParameterList([reference for reference, _ in made.pairs()])
        alpha, every = section.ref_model_mixup_alpha, section.ref_model_sync_steps
        engine.after_step = partial(follow, made.pairs, alpha, every)
    return made.asked_before


# -- kinds ----------------------------------------------------------------------------------------------------------
# (reference, policy) of each tensor that follows; asked anew each time, as FSDP2 puts others in place around a forward
Pairs = Callable[[], list[tuple[Tensor, Tensor]]]


class Reference(NamedTuple):
    """A reference that is there: asked for each batch, or for all rows before the first step."""

    live: Callable[[Batch], Tensor] | None
    asked_before: nn.Module | None = None
    pairs: Pairs | None = None


def uniform(engine: Engine) -> Reference:
    return Reference(lambda batch: torch.zeros(len(batch.targets), device=batch.targets.device))


def frozen(engine: Engine) -> Reference:
    return Reference(asking(engine, copy_of_model(engine)))


def cpu_offload(engine: Engine) -> Reference:
    return Reference(asking(engine, checked(engine, offload(loaded(engine), engine.accelerator.device))))


def adapter_off(engine: Engine) -> Reference:
    inner: Any = engine.accelerator.unwrap_model(engine.model)
    check_bias(inner, "adapter-off")
    return Reference(asking(engine, engine.model, inner.disable_adapter))


def adapter_copy(engine: Engine) -> Reference:
    inner = engine.accelerator.unwrap_model(engine.model)
    return Reference(asking(engine, engine.model, partial(adapter, inner, COPY)))


def precomputed(engine: Engine) -> Reference:
    own = fields_of(engine.recipe).ref_model_name_or_path
    return Reference(None, copy_of_model(engine) if own else engine.model)


def ema(engine: Engine) -> Reference:
    if not engine.recipe.model.use_peft:
        model = copy_of_model(engine)
        return Reference(asking(engine, model), pairs=lambda: list(zip(model.parameters(), engine.model.parameters())))
    if engine.accelerator.is_fsdp2:
        raise BadInput("reference = 'ema' does not follow adapters that FSDP2 has cut: take 'adapter-copy', or DDP")
    inner: Any = engine.accelerator.unwrap_model(engine.model)
    return adapter_copy(engine)._replace(pairs=lambda: pairs_of_adapters(inner, inner.active_adapter))


KINDS: dict[str, Callable[[Engine], Reference]] = {
    "none": uniform, "frozen": frozen, "cpu-offload": cpu_offload, "adapter-off": adapter_off,
    "adapter-copy": adapter_copy, "precomputed": precomputed, "ema": ema,
}  # fmt: skip


def asking(
    engine: Engine, model: Any, inside: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
) -> Callable[[Batch], Tensor]:
    """A function that asks a model, `inside` a context, for a batch's log-probs: of each token where the policy's
    rollouts are measured, else summed."""
    per_token = engine.algorithm.advantages is not None

    def live(batch: Batch) -> Tensor:
        with inside():
            return reference_logps(model, batch, engine.head_options, per_token)

    return live


def loaded(engine: Engine) -> Any:
    """The model that the recipe names as the reference, else the policy as it is before the first step."""
    path = fields_of(engine.recipe).ref_model_name_or_path or engine.recipe.model.model_name_or_path
    model = load.load_model(path, engine.recipe.model).requires_grad_(False)
    load.check_positions(model, engine.longest, "the reference")
    return model


def copy_of_model(engine: Engine) -> Any:
    """The same, prepared by accelerate."""
    model = engine.accelerator.prepare_model(loaded(engine), device_placement=True, evaluation_mode=True)
    return checked(engine, model)


def checked(engine: Engine, model: Any) -> Any:
    """The model in evaluation mode, if the fused head fits it."""
    hook.check_head(model.eval())
    hook.check_causal(model)
    engine.readers.append(model)
    return model


def check_bias(model: Any, kind: str) -> None:
    """Refuse adapters that train biases of the base model: these are neither turned off with them nor kept twice."""
    if (bias := getattr(model.active_peft_config, "bias", "none")) != "none":
        raise BadInput(f"reference = {kind!r}: the adapters train biases of the base model too (bias = {bias!r}): take "
                       "--reference precomputed, or frozen")  # fmt: skip


def copy_adapter(model: Any) -> None:
    """Give a peft model a second, frozen adapter named `COPY` with the weights of its active one."""
    active = model.active_adapter
    check_bias(model, "adapter-copy")
    model.add_adapter(COPY, model.peft_config[active])
    with torch.no_grad():
        for copy, own in pairs_of_adapters(model, active):
            copy.copy_(own)
    model.set_adapter(active)


def pairs_of_adapters(model: Any, active: str) -> list[tuple[Tensor, Tensor]]:
    """(copy, own) of each tensor of the adapter `COPY` and of the active one."""
    named = dict(model.named_parameters())
    return [
        (tensor, named[f"{name}.".replace(f".{COPY}.", f".{active}.")[:-1]])
        for name, tensor in named.items()
        if f".{COPY}." in f"{name}."
    ]


@contextlib.contextmanager
def adapter(model: Any, name: str) -> Iterator[None]:
    """Inside the block the model's adapter of this name is the active one."""
    before = model.active_adapter
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)


def offload(model: Any, device: torch.device) -> nn.Module:
    """The model with its decoder's weights in CPU memory, each layer on `device` for its turn; the LM head stays."""
    from accelerate import cpu_offload

    head = hook.head_module(model).to(device)
    cpu_offload(model.base_model, device, offload_buffers=True)
    assert not head.weight.is_meta
    return model


@torch.no_grad()
def follow(pairs: Callable[[], list[tuple[Tensor, Tensor]]], alpha: float, every: int, step: int) -> None:
    """After each `every` steps of the optimiser, move a reference towards the policy.

    Args:
        pairs: gives (reference, policy) of each tensor that is trained.
        alpha: share of the policy in the new reference.
    """
    if step % every == 0:
        for reference, own in pairs():
            reference.lerp_(unsharded(own).to(reference.dtype), alpha)
