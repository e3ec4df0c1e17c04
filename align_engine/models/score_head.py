"""Models with one number per position where others have logits: reward models and value models.

They are transformers' `AutoModelForSequenceClassification` with `num_labels=1`, so that a saved one loads anywhere. As
`fused_head` does with the LM head, the score head is swapped inside the model's own forward (DDP, FSDP,
adapters and checkpointing run as ever): the last token is found by the attention mask. transformers looks for the last
id that is not the pad id, and so reads the token before the EOS wherever pad and EOS are one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align_engine.data.batches import Batch
from align_engine.data.trees import rows_at
from align_engine.errors import BadInput
from align_engine.integrations import hook
from align_engine.models import load
from align_engine.models.tree_attention import reading

if TYPE_CHECKING:
    from align_engine.recipe import ModelSection


def load_scalar_model(path: str, section: ModelSection, pad_token_id: int, fresh_head: bool = False) -> nn.Module:
    """A model with a score head from a folder or hub name.

    Args:
        fresh_head: whether a causal LM's body may be given a new head (which is said), to be trained. Default False.
    Raises:
        BadInput: nothing there that transformers can load, no score head there, or one of several numbers.
    """
    from transformers import AutoModelForSequenceClassification

    model: Any = load.load_model(path, section, AutoModelForSequenceClassification, fresh_head, num_labels=1)
    model.config.get_text_config().pad_token_id = pad_token_id
    score = score_module(model)
    score.to(torch.promote_types(next(score.parameters()).dtype, torch.float32))  # a bfloat16 score has three digits
    return model


def score_module(model: Any) -> nn.Module:
    """The head that reads hidden states; raises BadInput where the architecture has none."""
    module = getattr(hook.causal_model(model), "score", None)
    if module is None:
        raise BadInput(f"{type(model).__name__} has no `score` head on its hidden states; take a causal architecture")
    return module


def scores(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """One number per sequence, read at its last token: [B] float32 (float64 from a float64 model).

    Args:
        input_ids, attention_mask: [B, T], padded on either side.
    """
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (places * attention_mask).argmax(1)
    rows = torch.arange(len(last), device=last.device)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return _through(model, inputs, lambda hidden: hidden[rows, last][:, None])[:, 0]


def batch_scores(model: nn.Module, batch: Batch) -> Tensor:
    """The same of a batch, padded or packed."""
    if (trees := batch.trees) is None:
        return scores(model, batch.input_ids, batch.attention_mask)
    with reading(model, batch) as inputs:
        return _through(model, inputs, lambda hidden: rows_at(hidden, trees.last[None]))[0]


def values(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """One number per position: [B, T] float32 (float64 from a float64 model). Position i has read tokens 0 .. i."""
    return _through(model, {"input_ids": input_ids, "attention_mask": attention_mask}, lambda hidden: hidden)


def batch_values(model: nn.Module, batch: Batch) -> Tensor:
    """One number per position that predicts a target: [B, T] float32 (float64 from a float64 model)."""
    if batch.trees is None:
        return values(model, batch.input_ids, batch.attention_mask)
    with reading(model, batch) as inputs:
        return batch.spread(_through(model, inputs, lambda hidden: batch.predicting(hidden)[None])[0])


def _through(model: nn.Module, inputs: dict[str, Any], select: Callable[[Tensor], Tensor]) -> Tensor:
    module = score_module(model)
    head, dtype = module.forward, next(module.parameters()).dtype

    def forward(hidden: Tensor) -> Tensor:  # [B, T, D]
        with torch.autocast(hidden.device.type, enabled=False):
            found = head(select(hidden).to(dtype)).squeeze(-1)  # [B, K]
            found = found.to(torch.promote_types(dtype, torch.float32))
        # transformers picks one position of what comes back: each of them holds all
        return found[:, None].expand(-1, hidden.shape[1], -1)

    with hook.head_forward(module, forward):
        return model(**inputs, use_cache=False).logits


class ValueHead(nn.Module):
    """The critic: one number per position, from the policy's own hidden states or from a model of its own.

    Args:
        hidden_size: of the policy.
        model: an AutoModelForSequenceClassification with one label, e.g. the reward model; None: a linear layer on the
            policy's last hidden states, zero at first.
        learning_rate: the highest of its own.
    """

    def __init__(self, hidden_size: int, model: nn.Module | None = None, *, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate
        if model is None:
            self.score = nn.Linear(hidden_size, 1)
            nn.init.zeros_(self.score.weight)
            nn.init.zeros_(self.score.bias)

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What `batch.predicting` gives -> [B, T] float32: what position i is worth before its target is chosen."""
        if self.model is not None:
            return batch_values(self.model, batch)
        with torch.autocast(hidden.device.type, enabled=False):
            found = self.score(hidden.float()).squeeze(-1)
        return found if batch.trees is None else batch.spread(found)
