"""The model and its tokenizer: loaded, quantised, with adapters."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from align_engine.errors import BadInput
from align_engine.integrations.hook import causal_model

if TYPE_CHECKING:
    from align_engine.recipe import ModelSection


def check_path(path: str) -> None:
    """Refuse a path that is no folder here and cannot be a hub name, without asking the hub."""
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise BadInput(f"no model at {path!r}: no such folder")


def load_tokenizer(path: str, distinct_pad: bool = False) -> Any:
    """The tokenizer saved beside a model.

    Args:
        distinct_pad: a pad token other than EOS, where the vocabulary has a special one to spare: what a saved model
            with a score head needs, for transformers' own forward finds its last token by the pad id. Default False:
            pad falls back to EOS, as attention is by masks only.
    """
    from transformers import AutoTokenizer

    check_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"model_name_or_path = {path!r}: no tokenizer there: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if distinct_pad and tokenizer.pad_token_id == tokenizer.eos_token_id:
        special = [tokenizer.unk_token, *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)]
        spare = [token for token in special if token not in (None, tokenizer.eos_token, tokenizer.bos_token)]
        tokenizer.pad_token = (spare or [tokenizer.eos_token])[0]
    return tokenizer


def load_model(path: str, section: ModelSection, kind: Any = None, **options: Any) -> nn.Module:
    """A model from a folder or hub name, in the dtype and with the attention that the recipe names.

    Args:
        kind: class of transformers to load it with. Default None: AutoModelForCausalLM.
        **options: of its `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    check_path(path)
    if (base := adapter_base(path)) is not None:
        from peft import PeftModel

        model: Any = load_model(base, section, kind, **options)
        return PeftModel.from_pretrained(model, path, is_trainable=section.use_peft)
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    if section.load_in_4bit or section.load_in_8bit:
        options |= _quantised(section)
    try:
        model = (kind or AutoModelForCausalLM).from_pretrained(path, dtype=section.dtype, **options)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot load the model {path!r}: {_first_line(error)}") from error
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            # else an evaluation repacks bitsandbytes' weights for a product that has no gradients, and so they stay
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model


def adapter_base(path: str) -> str | None:
    """The base model that a folder of saved adapters names, or None for a folder or hub name of a whole model."""
    config = Path(path) / "adapter_config.json"
    return json.loads(config.read_text())["base_model_name_or_path"] if config.exists() else None


def _quantised(section: ModelSection) -> dict[str, Any]:
    """Options of from_pretrained for weights in 4 or 8 bits; raises BadInput where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        bits = 4 if section.load_in_4bit else 8
        raise BadInput(f"load_in_{bits}bit = True: bitsandbytes is not installed (pip install bitsandbytes)")
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=section.load_in_4bit,
        load_in_8bit=section.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, section.dtype, torch.bfloat16),  # that of `auto`
    )
    return {"quantization_config": config, "device_map": {"": PartialState().device}}


def add_adapters(model: Any, section: ModelSection, task_type: str = "CAUSAL_LM") -> nn.Module:
    """The model with fresh LoRA adapters, the rest frozen; with task_type "SEQ_CLS" its score head trains too."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=section.lora_target_modules or "all-linear",
        task_type=task_type,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise BadInput(f"lora_target_modules = {section.lora_target_modules}: {_first_line(error)}") from error


def checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass.

    Raises:
        BadInput: the architecture cannot.
    """
    causal = causal_model(model)
    if not causal.supports_gradient_checkpointing:
        raise BadInput(f"gradient_checkpointing = True: {type(causal).__name__} does not support it")
    # transformers renamed the method; the old name warns where the new one exists
    enable = getattr(causal, "activation_checkpointing_enable", causal.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def disable_dropout(model: nn.Module) -> None:
    """Dropout off in training mode too (a preference loss compares two forward passes of one model)."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
