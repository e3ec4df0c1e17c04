"""Log-probs of the reference model, one way or another: a function that fills `batch.ref_logps`.

none          a uniform reference: zeros.
frozen        a second copy of the model, evaluated at every step: one more model in memory, one more forward per step.
cpu-offload   the same with its decoder in CPU memory, brought over layer by layer (the LM head stays): slow, small.
adapter-off   the policy itself with its LoRA adapters turned off: no memory, one more forward per step.
adapter-copy  the policy with a frozen copy of its adapters as they were: a few MiB, one more forward per step.
ema           frozen, or adapter-copy, that follows the policy every ref_model_sync_steps steps (TR-DPO).
precomputed   one pass over the rows that the run will see, before the first step, kept on disk beside the run: no
              memory while training, one forward per row however many epochs. The default where there is no adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align_engine import policy
from align_engine import recipe as recipes
from align_engine.checkpoint import RunFolder
from align_engine.data.batches import Batch
from align_engine.errors import BadInput
from align_engine.integrations import hook
from align_engine.integrations.hook import fused_head
from align_engine.source import Source, rows_seen
from align_kernels import linear_logprobs, sequence_logprobs

if TYPE_CHECKING:
    from align_engine.engine import Engine
    from align_engine.recipe import Recipe

SPOT_ROWS = 4
SPOT_TOLERANCE = 1e-2  # of a summed log-prob, relative: far above what batch shapes change, far below another model
COPY = "reference"  # name of the adapter that an adapter-copy lives in
COLUMNS = ({"chosen_ids": "ref_chosen_logps", "rejected_ids": "ref_rejected_logps"},
           {"completion_ids": "ref_logps", "kl_completion_ids": "ref_KL_logps"})  # fmt: skip


def of(recipe: Recipe) -> tuple[str, str]:
    """The kind of reference of a recipe, and the sentence that says why: what `auto` takes."""
    values, path = recipes.flat(recipe), recipe.model.model_name_or_path
    if values["reference"] != "auto":
        return values["reference"], "as the recipe says"
    if recipe.model.use_peft and values["ref_model_name_or_path"] is None:
        if policy.adapter_base(path) is not None:
            return "adapter-copy", "the model with its adapters as they were saved is the reference"
        return "adapter-off", "the model without its adapters is the reference, at no memory"
    if isinstance(recipe, recipes.OnlineRecipe):
        return "frozen", "a second copy of the model, which the rollouts are measured under"
    return "precomputed", "one pass before the first step instead of a second model in memory"


def attach(engine: Engine) -> nn.Module | None:
    """Give batches their `ref_logps`, in the way the recipe names.

    Returns:
        the model that `precompute_all` is to ask once the run's folder is there, prepared by accelerate; None for every
        other kind of reference.
    Raises:
        BadInput: the reference cannot be loaded.
    """
    recipe, accelerator, values = engine.recipe, engine.accelerator, recipes.flat(engine.recipe)
    own, peft, inner = values["ref_model_name_or_path"], recipe.model.use_peft, accelerator.unwrap_model(engine.model)
    per_token, options = engine.algorithm.credit is not None, engine.head_options
    kind, why = of(recipe)
    accelerator.print(f"reference {kind}: {why}")
    if kind == "none":
        engine.reference = lambda batch: torch.zeros(len(batch.targets), device=batch.targets.device)
        return None
    model, how = engine.model, contextlib.nullcontext
    if kind == "adapter-off":
        check_bias(inner, kind)
        how = inner.disable_adapter
    elif kind == "adapter-copy" or (kind == "ema" and peft):
        how = partial(adapter, inner, COPY)
    elif own or kind != "precomputed":
        model: Any = policy.load_model(own or recipe.model.model_name_or_path, recipe.model).requires_grad_(False)
        if kind == "cpu-offload":
            model = offload(model, accelerator.device)
        else:
            model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
        hook.check_head(model.eval())
        hook.check_causal(model)
    if kind == "ema":
        if peft and accelerator.is_fsdp2:
            raise BadInput("reference = 'ema' does not follow adapters that FSDP2 has cut: take 'adapter-copy', or DDP")

        def pairs() -> list[tuple[Tensor, Tensor]]:  # asked anew each time: FSDP2 puts others in place around a forward
            own = engine.model.parameters()
            return pairs_of_adapters(inner, inner.active_adapter) if peft else list(zip(model.parameters(), own))

        alpha, every = values["ref_model_mixup_alpha"], values["ref_model_sync_steps"]
        engine.kept["reference"] = nn.ParameterList([reference for reference, _ in pairs()])
        engine.after_step = partial(follow, pairs, alpha, every)
    if kind == "precomputed":
        return model

    def live(batch: Batch) -> Tensor:
        with how():
            return reference_logps(model, batch, options, per_token)

    engine.reference = live
    return None


def precompute_all(
    engine: Engine, model: nn.Module, source: Source, evaluation: Source | None, steps: int, folder: RunFolder
) -> None:
    """Add the reference's columns to the rows that a run of so many steps sees, and to those of its evaluation."""
    accelerator, training = engine.accelerator, model.training
    model.eval()
    for name, part in (("train", source), ("eval", evaluation)):
        if part is not None:
            rows = rows_seen(part, steps) if part is source else list(range(len(part)))
            how_come = "read again" if precompute(engine, model, part, rows, name, folder) else "computed"
            accelerator.print(f"reference log-probs of {len(rows)} {name} rows {how_come}")
    model.train(training)


@torch.no_grad()
def token_logps(
    model: nn.Module, batch: Batch, head_options: dict[str, Any], critic: Callable[..., Tensor] | None = None
) -> Tensor:
    """Log-probs of the targets under `model`, 0 where there is none, and what a critic says of each position:
    [1, B, T] or [2, B, T] float32."""

    def fn(hidden: Tensor, head: dict[str, Any]) -> Tensor:
        logps = linear_logprobs(hidden, targets=batch.targets, **head, **head_options).logp
        return torch.stack([logps] if critic is None else [logps, critic(hidden, batch).to(logps.dtype)])

    with fused_head(model, fn):
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits.float()


def reference_logps(model: nn.Module, batch: Batch, head_options: dict[str, Any], per_token: bool = False) -> Tensor:
    """Log-probs of the completions under `model`: summed, [B] float32, or `per_token` [B, T]."""
    (logps,) = token_logps(model, batch, head_options)
    return logps if per_token else sequence_logprobs(logps, batch.targets)


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


def unsharded(tensor: Any) -> Tensor:
    """The tensor, put together from all ranks where FSDP2 has cut it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of every tensor's name, shape, sum and first values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = unsharded(tensor.detach()).flatten()
        part = [values.double().sum().item(), *values[:8].double().tolist()]
        digest.update(f"{name}{tuple(tensor.shape)}{part}".encode())
    return digest.hexdigest()[:16]


def precompute(engine: Engine, model: nn.Module, source: Source, rows: list[int], name: str, folder: RunFolder) -> bool:
    """Add the reference's columns (TRL's names) to the source, from the folder's file where it fits.

    Args:
        engine: its device, processes and settings of the head.
        model: the reference, prepared by accelerate, in eval mode.
        source: rows of preference data or of marks.
        rows: which of them are needed; the others read NaN.
        name: of the file in the run folder, "reference-<name>.safetensors".
    Returns:
        whether an earlier file served.
    Raises:
        BadInput: the file bears the right fingerprint but its values are not this model's.
    """
    accelerator, head_options = engine.accelerator, engine.head_options
    stamp = f"{weights_fingerprint(accelerator.unwrap_model(model))}-{source.fingerprint()}-{len(rows)}"
    path = folder.path / f"reference-{name}.safetensors"
    stored = _read(path, stamp)
    asked = rows if stored is None else rows[:SPOT_ROWS]
    position = {int(index): row for row, index in enumerate(source.rows["index"])}
    table = torch.zeros(len(source), 2, dtype=torch.float64, device=accelerator.device)
    for batch, real in source.share(asked):
        parts = [part.to(accelerator.device) for part in (batch, batch.other) if part is not None]
        logps = torch.cat([reference_logps(model, part, head_options) for part in parts]).double()
        if real:
            table[[position[int(index)] for index in batch.index]] = logps.view(2, -1).T
    summed: Any = accelerator.reduce(table, "sum")
    found = torch.full(table.shape, torch.nan, dtype=torch.float64)
    found[asked] = summed.cpu()[asked]
    if stored is None and accelerator.is_main_process:
        with folder.written(path.name) as side:
            save_file({"logps": found}, side, metadata={"fingerprint": stamp})
    elif stored is not None:
        if not torch.allclose(stored[asked], found[asked], rtol=SPOT_TOLERANCE, atol=SPOT_TOLERANCE):
            raise BadInput(f"{path} does not hold this model's log-probs (rows {asked} differ); delete it")
        found = stored
    names = next(names for names in COLUMNS if names.keys() <= set(source.rows.column_names))
    for i, column in enumerate(names.values()):
        source.rows = source.rows.add_column(column, found[:, i].numpy())
    return stored is not None


def _read(path: Path, stamp: str) -> Tensor | None:
    if path.exists():
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("logps") if file.metadata().get("fingerprint") == stamp else None
