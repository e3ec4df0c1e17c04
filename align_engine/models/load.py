"""The model and its tokenizer: loaded, quantised, with adapters."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from align_engine.errors import BadInput
from align_engine.integrations.hook import causal_model
from align_engine.models import blank, lora
from align_engine.models.modelfiles import adapter_base, adapter_settings, check_files, check_path, check_report, listed
from align_engine.models.noise import disable_dropout as disable_dropout

if TYPE_CHECKING:
    from align_engine.recipe import ModelSection


def load_tokenizer(
    path: str, distinct_pad: bool = False, trust_remote_code: bool = False, field: str = "model_name_or_path",
    revision: str = "main",
) -> Any:  # fmt: skip
    """The tokenizer saved beside a model.

    Args:
        distinct_pad: a pad token other than EOS, where the vocabulary has a special one to spare: what a saved model
            with a score head needs, for transformers' own forward finds its last token by the pad id. Default False:
            pad falls back to EOS, as attention is by masks only.
        trust_remote_code: run code that lies beside the tokenizer. Default False: refuse it.
        field: of the recipe, that names the path.
        revision: on the hub.
    Raises:
        BadInput: none there that transformers can load; one without pad and EOS tokens.
    """
    from transformers import AutoTokenizer

    check_path(path, field, revision)
    if Path(path).is_dir():
        check_files(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, revision=revision)
        tokenizer("a", padding=False)  # settings that only its use reads
    except Exception as error:
        raise BadInput(f"no tokenizer can be loaded from {path!r}: {_reason(error)}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise BadInput(
            f"the tokenizer of {path!r} has neither an EOS nor a pad token: name the token that ends an answer as "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if distinct_pad and tokenizer.pad_token_id == tokenizer.eos_token_id:
        special = [tokenizer.unk_token, *(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)]
        spare = [token for token in special if token not in (None, tokenizer.eos_token, tokenizer.bos_token)]
        tokenizer.pad_token = (spare or [tokenizer.eos_token])[0]
    return tokenizer


def load_model(path: str, section: ModelSection, kind: Any = None, fresh_head: bool = False, **options: Any) -> Any:
    """A model from a folder or hub name, in the dtype and with the attention that the recipe names, whole: every weight
    of it comes from there, and nothing that lies there is left over.

    Args:
        kind: class of transformers to load it with. Default None: AutoModelForCausalLM.
        fresh_head: make a head of that class where there is none, and say so. Default False: that is refused.
        **options: of its `from_pretrained`.
    Raises:
        BadInput: no model there, damaged files, weights of another model (with the tensors' names), code that would
            have to be run.
    """
    model, fresh = _load(path, section, kind, fresh_head, options)
    if section.use_liger_kernel and not blank.wanted():  # its kernels need numbers
        apply_liger(path, model)
    if fresh:
        PartialState().print(f"{path}: its weights hold no {listed(fresh)}; a fresh head is made")
    check_numbers(path, model)
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            # else an evaluation repacks bitsandbytes' weights for a product that has no gradients, and so they stay
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model


def apply_liger(path: str, model: Any) -> None:
    """Put Liger's kernels into a model's body; its head and its loss stay as they are.

    Raises:
        BadInput: Liger has none for it.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    causal = causal_model(model)
    asked, kind = f"use_liger_kernel = True, model {path!r}", causal.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger would leave it as it is
        raise BadInput(f"{asked}: Liger has no kernels for models of type {kind!r}")
    try:
        _apply_liger_kernel_to_instance(model=causal, cross_entropy=False, fused_linear_cross_entropy=False)
    except Exception as error:
        raise BadInput(f"{asked}: {_reason(error)}") from error


def tensor_parallel_size() -> int:
    """Ranks that cut each layer among themselves: as accelerate's launcher hands on what its configuration says."""
    return int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1"))


@torch.no_grad()
def check_numbers(path: str, model: nn.Module) -> None:
    """Refuse weights that are infinite or not a number, naming tensors."""
    held = [
        (name, weight) for name, weight in model.named_parameters() if weight.is_floating_point() and weight.numel()
    ]
    held = [(name, weight) for name, weight in held if not weight.is_meta and weight.dtype.itemsize > 1]
    held = [(name, weight) for name, weight in held if getattr(weight, "quant_state", None) is None]  # bytes
    held = [(name, weight.to_local() if isinstance(weight, DTensor) else weight) for name, weight in held]
    broken = [name for name, weight in held if not all(map(torch.isfinite, weight.aminmax()))]
    if broken:
        raise BadInput(f"the weights of {path!r} are infinite or not a number in {listed(broken)}")


def _load(
    path: str, section: ModelSection, kind: Any, fresh_head: bool, options: dict[str, Any]
) -> tuple[Any, set[str]]:
    """(model, names of its head's tensors that are fresh), checked as `load_model` says."""
    from transformers import AutoModelForCausalLM

    check_path(path, revision=section.model_revision)
    if section.attn_implementation is not None:
        options = options | {"attn_implementation": section.attn_implementation}
    if blank.wanted():
        return _blank(path, section, kind, options), set()
    if Path(path).is_dir():
        check_files(Path(path))
    if (base := adapter_base(path, section.model_revision)) is not None:
        return _load_adapter(path, base, section, kind, fresh_head, options)
    if section.load_in_4bit or section.load_in_8bit:
        options = options | _quantised(section)
    if (size := tensor_parallel_size()) > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        options = options | {"distributed_config": DistributedConfig(tp_size=size)}
    options = options | {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are refused by name
    options["revision"] = section.model_revision
    try:
        loaded: Any = (kind or AutoModelForCausalLM).from_pretrained(
            path, dtype=section.dtype or "auto", trust_remote_code=section.trust_remote_code, **options
        )
    except Exception as error:
        raise BadInput(f"cannot load the model {path!r}: {_reason(error)}") from error
    model, report = loaded
    return model, check_report(path, model, report, fresh_head)


def _blank(path: str, section: ModelSection, kind: Any, options: dict[str, Any]) -> Any:
    """As `_load`, from the configuration alone."""
    base = adapter_base(path, section.model_revision)
    if base is not None:
        below = adapter_settings(path, section.model_revision).get("revision")
        check_path(base, f"{path}: base_model_name_or_path", below)
    try:
        return blank.build(path, base, section, kind, options)
    except Exception as error:
        raise BadInput(f"cannot build the model {path!r} from its configuration: {_reason(error)}") from error


def _load_adapter(
    path: str, base: str, section: ModelSection, kind: Any, fresh_head: bool, options: dict[str, Any]
) -> tuple[Any, set[str]]:
    """As `_load`, of a folder of adapters: its base model, and the adapter in it. It may bring the model's head."""
    from peft import PeftConfig, PeftModel

    own: dict[str, Any] = {"revision": section.model_revision}
    try:
        saved: Any = PeftConfig.from_pretrained(path, **own)
        brought = set(getattr(saved, "modules_to_save", None) or ())
    except Exception as error:
        raise BadInput(f"cannot load the adapter {path!r}: {_reason(error)}") from error
    below = dataclasses.replace(section, model_revision=saved.revision or "main")
    check_path(base, f"{path}: base_model_name_or_path", saved.revision)
    model, fresh = _load(base, below, kind, fresh_head or bool(brought), options)
    fresh = {name for name in fresh if name.partition(".")[0] not in brought}
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of what is missing: it is refused below
            adapted: Any = PeftModel.from_pretrained(model, path, is_trainable=section.use_peft, **own)
            report = adapted.load_adapter(path, adapted.active_adapter, is_trainable=section.use_peft, **own)
    except Exception as error:
        said = " ".join(str(error).split()) if "size mismatch" in str(error) else _reason(error)
        raise BadInput(f"the adapter {path!r} does not fit its base model {base!r}: {said:.400}") from error
    parts = {
        "lacks": [*report.missing_keys, *(fresh if not fresh_head else ())],
        "has besides": report.unexpected_keys,
    }
    if wrong := [f"{what} {listed(names)}" for what, names in parts.items() if names]:
        raise BadInput(f"the adapter {path!r} does not fit its base model {base!r}: it {' and '.join(wrong)}")
    lora.fuse(adapted)
    return adapted, fresh


def _reason(error: Exception) -> str:
    """What an error of loading says, in one line."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it needs code of its own that lies beside it: read that, then give --trust_remote_code"
    if isinstance(error, KeyError):
        return f"it lacks {text}"
    return f"{' '.join(text.partition(chr(10) * 2)[0].split()):.300}" or type(error).__name__


def vocab_size(path: str, trust_remote_code: bool = False, revision: str = "main") -> int:
    """Rows of the embeddings of a model in a folder or of a hub name, without loading it.

    Raises:
        BadInput: its configuration cannot be read, or needs code of its own, which is not trusted.
    """
    from transformers import AutoConfig

    try:
        base = adapter_base(path, revision)
        below: Any = adapter_settings(path, revision).get("revision") if base else revision
        config = AutoConfig.from_pretrained(base or path, trust_remote_code=trust_remote_code, revision=below or "main")
        return int(config.get_text_config().vocab_size)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"cannot load the model {path!r}: {_reason(error)}") from error


def _quantised(section: ModelSection) -> dict[str, Any]:
    """Options of from_pretrained for weights in 4 or 8 bits; raises BadInput where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        bits = 4 if section.load_in_4bit else 8
        raise BadInput(f"load_in_{bits}bit = True: bitsandbytes is not installed (pip install bitsandbytes)")
    from transformers import BitsAndBytesConfig

    compute = getattr(torch, section.dtype or "auto", torch.bfloat16)  # that of `auto`
    # FSDP2 cuts 4-bit weights whose bytes are stored as numbers of a kind that has gradients, and leaves others whole
    stored: dict[str, Any] = {"bnb_4bit_quant_storage": compute} if parse_flag_from_env("ACCELERATE_USE_FSDP") else {}
    config = BitsAndBytesConfig(
        load_in_4bit=section.load_in_4bit,
        load_in_8bit=section.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        **stored,
    )
    return {"quantization_config": config, "device_map": {"": PartialState().device}}


def add_adapters(
    model: Any, section: ModelSection, task_type: str = "CAUSAL_LM", dropout: float | None = None
) -> nn.Module:
    """The model with fresh LoRA adapters, the rest frozen; with task_type "SEQ_CLS" its score head trains too.

    Args:
        dropout: inside the adapters. Default None: the section's lora_dropout.
    Raises:
        BadInput: peft cannot put adapters on these modules, or not with dropout (as on experts).
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout if dropout is None else dropout,
        target_modules=section.lora_target_modules or "all-linear",
        revision=None if section.model_revision == "main" else section.model_revision,
        task_type=task_type,
    )
    asked = f"lora_target_modules = {section.lora_target_modules}"
    try:
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        if "lora_dropout" in str(error):
            raise BadInput(f"lora_dropout = {config.lora_dropout}: {_reason(error)} Set lora_dropout to 0") from error
        raise BadInput(f"{asked}: {_reason(error)}") from error
    reached = [f".{name}" for name in adapted.base_model.targeted_module_names]
    if lost := [one for one in section.lora_target_modules or () if not any(r.endswith(f".{one}") for r in reached)]:
        raise BadInput(f"{asked}: {type(causal_model(adapted)).__name__} has no module {lost[0]!r}")
    lora.fuse(adapted)
    return adapted


def checkpoint_activations(model: Any, selective: bool = False) -> None:
    """Recompute activations in the backward pass.

    Args:
        selective: keep what attention gives. Default False: its inputs alone stay, of each layer.
    Raises:
        BadInput: the architecture cannot.
    """
    causal = causal_model(model)
    if not causal.supports_gradient_checkpointing:
        raise BadInput(f"gradient_checkpointing = True: {type(causal).__name__} does not support it")
    # transformers renamed the method; the old name warns where the new one exists
    enable = getattr(causal, "activation_checkpointing_enable", causal.gradient_checkpointing_enable)
    enable({"use_reentrant": False} | ({"context_fn": keeping_attention} if selective else {}))


def keeping_attention() -> Any:
    """Contexts of a forward pass and its repetition, which takes what attention gave from the first (as TRL)."""
    names = {f"aten::_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")}
    names.add("aten::_scaled_dot_product_flash_attention_for_cpu")

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.name().partition(".")[0]
        # flash-attn and torch's variable-length attention are operators of their own
        keeps = name in names or "flash_attn" in name or "varlen_attn" in name
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def vocabulary(model: Any) -> int:
    """Rows of the model's input embeddings, under whatever adapter lies on them."""
    parts = causal_model(model).get_input_embeddings().modules()
    return next(part.num_embeddings for part in parts if isinstance(part, nn.Embedding))


def check_pad(model: Any, tokenizer: Any) -> None:
    """Refuse a pad token without a row in the model's embeddings.

    Raises:
        BadInput: naming the token, its id and the size of the embeddings.
    """
    held, pad = vocabulary(model), tokenizer.pad_token_id
    if pad >= held:
        raise BadInput(
            f"the pad token {tokenizer.pad_token!r} has the id {pad}, and the model has embeddings of {held} tokens: "
            f"set pad_token to {tokenizer.eos_token!r} in tokenizer_config.json, or resize the model's embeddings"
        )


def check_positions(model: Any, longest: int, called: str = "the model") -> None:
    """Refuse rows that are longer than a table of positions in the model. Rotary and relative positions have no end.

    Args:
        longest: tokens of the longest row.
        called: what the sentence calls the model.
    Raises:
        BadInput: naming both numbers.
    """
    causal = causal_model(model)
    if longest > (most := min(_positions(causal), default=longest)):
        raise BadInput(
            f"the longest row has {longest} tokens, and {called} ({type(causal).__name__}) has a table of {most} "
            f"positions: set max_length = {most} or lower (with max_completion_length, where completions are sampled)"
        )


def _positions(causal: Any) -> Iterator[int]:
    """Places in each table of positions, learnt or computed once."""
    usual = getattr(causal.config.get_text_config(), "max_position_embeddings", None)
    tables = [
        (name, part.num_embeddings, part) for name, part in causal.named_modules() if isinstance(part, nn.Embedding)
    ]
    tables += [(name, len(part), None) for name, part in causal.named_buffers() if part.dim() == 2 and len(part) > 1]
    for path, size, part in tables:
        name = path.rpartition(".")[2]
        if ("pos" in name or name == "wpe") and (usual is None or usual <= size <= usual + 8):  # else it is of images
            padding = getattr(part, "padding_idx", None)  # positions count on from it
            yield size - getattr(part, "offset", 0) - (0 if padding is None else padding + 1)
    yield from (vars(part)["max_seq_length"] for part in causal.modules() if "max_seq_length" in vars(part))


def hold_in_float32(model: Any) -> str | None:
    """Turn a model with trained float16 weights into float32, where AdamW's steps are not lost and its eps is not 0.

    Returns:
        what was done, None where nothing was.
    """
    halves = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.float16]
    if not halves:
        return None
    if len(halves) == sum(p.requires_grad for p in model.parameters()) == sum(1 for _ in model.parameters()):
        model.float()
    for parameter in halves:
        parameter.data = parameter.data.float()
    return f"{len(halves)} trained tensors of the checkpoint are float16: they are held, trained and saved in float32"
