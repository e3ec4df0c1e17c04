"""Whether a run packs its batches into rows of trees: read from its models, and proved before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from align_engine.data.batches import IGNORE, Batch
from align_engine.data.windows import Source
from align_engine.errors import BadInput, RunFailed
from align_engine.integrations.hook import causal_model
from align_engine.models.logps import token_logps
from align_engine.models.score_head import batch_scores
from align_engine.models.tree_attention import balancing_loss, why_not

if TYPE_CHECKING:
    from align_engine.training.engine import Engine

SAME, SAME_IN_HALVES = 1e-4, 3e-2  # of the norm: far above what the order of sums changes, far below another mask


def settle(engine: Engine, *sources: Source) -> None:
    """Have the sources pack their batches where the recipe asks for it and the models can, and say which it is.

    Args:
        sources: what the run learns from, then what it is evaluated on. Every rank must call this.
    Raises:
        BadInput: packing = 'on', and a model cannot, or says something else of a packed batch than of a padded one.
    """
    asked = engine.recipe.train.packing
    if asked == "off":
        return
    why, said = why_not_here(engine), ""
    if why is None:
        why, said = prove(engine, sources[0])
    if why is not None and asked == "on":
        raise BadInput(f"packing = 'on': {why}; set it to 'off'")
    for source in sources if why is None else ():
        source.packed, source.tokens_per_batch = True, engine.recipe.train.tokens_per_batch
    engine.accelerator.print(f"packing on: {said}" if why is None else f"packing off: {why}")


def why_not_here(engine: Engine) -> str | None:
    """Why this run's batches cannot be packed, as far as its settings and models tell."""
    if engine.aux_coef and balancing_loss(causal_model(engine.model)) is None:
        return (
            f"the model's load-balancing loss of experts (router_aux_loss_coef = {engine.aux_coef}) takes no weights "
            "of tokens, and a shared prompt's would count once"
        )
    own = getattr(engine.critic, "model", None)
    models = [engine.model, *engine.readers, *([] if own is None else [own])]
    return next(filter(None, map(why_not, models)), None)


def prove(engine: Engine, source: Source) -> tuple[str | None, str]:
    """Try both layouts on the rows that the run begins with: (why packing is wrong, what is to be said of it)."""
    rows, training = source.trial(), engine.model.training
    padded, packed = (source.collate(rows, pad_id=pad_id) for pad_id in (source.pad_id, None))
    engine.model.eval()
    try:
        want, found = (_read(engine, batch.to(engine.accelerator.device)) for batch in (padded, packed))
    except RunFailed as error:
        return str(error), ""
    finally:
        engine.model.train(training)
    off = float((found - want).norm() / want.norm())
    halves = next(engine.model.parameters()).dtype.itemsize == 2 or engine.accelerator.mixed_precision == "bf16"
    same = SAME_IN_HALVES if halves else SAME
    tokens = f"{packed.input_ids.numel()} tokens in place of {padded.input_ids.numel()} in {len(rows)} rows"
    if not off <= same:
        return f"what the model says of a packed batch is {off:.1e} off, and {same:g} is allowed", ""
    return None, f"{tokens}, and what the model says of them is the same to {off:.0e}"


@torch.no_grad()
def _read(engine: Engine, batch: Batch) -> Tensor:
    """Log-probs of the targets, or scores of the sequences."""
    if engine.algorithm.scalar:
        return batch_scores(engine.model, batch).double()
    return token_logps(engine.model, batch, engine.head_options)[0][batch.targets != IGNORE].double()
