"""Adapters in the weights that they lie on: a whole model, without peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import align_special_tokens

from align_engine.models import load
from align_engine.models.modelfiles import adapter_settings
from align_engine.models.score_head import load_scalar_model

if TYPE_CHECKING:
    from align_engine.recipe import ModelSection


def merged(path: str, section: ModelSection, tokenizer: Any) -> Any:
    """The model of saved adapters with the adapters in its weights; a reward model's head goes along.

    Args:
        path: folder or hub name of adapters.
        section: how the weights are loaded; 4 and 8 bits cannot be merged into.
        tokenizer: whose special tokens the model's configuration then names.
    Raises:
        BadInput: there are no adapters, or not those of their base model.
    """
    if adapter_settings(path).get("task_type") == "SEQ_CLS":
        adapted: Any = load_scalar_model(path, section, tokenizer.pad_token_id)
    else:
        adapted = load.load_model(path, section)
    untie(adapted.get_base_model())
    whole = adapted.merge_and_unload()
    align_special_tokens(whole, tokenizer)
    return whole


def untie(causal: Any) -> None:
    """Give an LM head weights of its own where it shares them with the embeddings and an adapter lies on one of the
    two: merged into what both share, it would change the other too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    head: Any = causal.get_output_embeddings()
    embeddings: Any = causal.get_input_embeddings()
    if head is None or not any(
        isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper) for part in (head, embeddings)
    ):
        return
    inner: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else getattr(head, "original_module", head)
    inner.weight = torch.nn.Parameter(inner.weight.detach().clone(), requires_grad=False)
    for config in {id(one): one for one in (causal.config, causal.config.get_text_config())}.values():
        config.tie_word_embeddings = False
