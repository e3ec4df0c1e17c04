"""Small models of every class that transformers calls a causal LM, and what each of them makes of the fused head."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, Gemma3nVisionConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from align_engine.data.batches import IGNORE, collate_sft
from align_engine.integrations.hook import fused_head
from align_engine.integrations.logits import read_logits
from align_engine.models.logps import token_logps
from align_engine.models.tree_attention import why_not
from align_kernels import linear_logprobs, logprobs_from_logits

V = 99
# the names under which configurations keep their sizes -> what they are here; those that a class lacks are left out
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"], V),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim",
                     "lru_width", "hidden_dim", "hidden_size_global"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size", "d_inner",
                     "shared_expert_intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "dff",
                     "feed_forward_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size",
                     "dense_intermediate_size", "intermediate_size_mlp", "n_ff"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "n_head_kv", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "kv_channels", "attention_head_dim", "global_head_dim"], 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_experts_per_token"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"], 64),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id"], 1),
    "layer_types": None,
    "sliding_window": 4,
    "use_cache": False,
    # what is done to logits, away from the values at which it does nothing
    **dict.fromkeys(["logit_scale", "lm_head_multiplier", "output_multiplier"], 0.3),
    **dict.fromkeys(["logits_scaling", "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"], 3.0),
}  # fmt: skip
# what single classes need beside
FULL = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
OWN: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": dict(mamba_n_heads=8),
    "BltForCausalLM": dict(encoder_hash_byte_group_vocab=50),
    "CodeGenForCausalLM": dict(rotary_dim=4),
    "CohereCompassForCausalLM": dict(rope_parameters=FULL),
    "DbrxForCausalLM": dict(attn_config=dict(kv_n_heads=2, rope_theta=10000.0, clip_qkv=8.0),
                            ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2)),
    "Dots3NoteForCausalLM": dict(num_key_value_heads=4),
    "GPTJForCausalLM": dict(rotary_dim=4),
    "GPTNeoForCausalLM": dict(attention_types=[[["global", "local"], 1]]),
    "Gemma3nForCausalLM": dict(num_kv_shared_layers=0),
    "Gemma4AssistantForCausalLM": dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
                                       num_kv_shared_layers=2),
    "Gemma4UnifiedAssistantForCausalLM": dict(num_kv_shared_layers=2),
    "GraniteMoeHybridForCausalLM": dict(mamba_n_heads=8),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "full_attention"]),
    "Llama4ForCausalLM": dict(no_rope_layers=[1, 0], attention_chunk_size=4, floor_scale=3),
    "Mamba2ForCausalLM": dict(num_heads=8, head_dim=8),
    "ReformerModelWithLMHead": dict(is_decoder=True, axial_pos_embds=False, attn_layers=["local", "lsh"]),
    "XmodForCausalLM": dict(default_language="en_XX"),
    "ZambaForCausalLM": dict(num_hidden_layers=4, head_dim=16,
                             layers_block_type=["linear_attention", "linear_attention", "hybrid", "hybrid"]),
    "Zamba2ForCausalLM": dict(head_dim=16, layers_block_type=["linear_attention", "hybrid"]),
    "ZayaForCausalLM": dict(num_experts_per_tok=1),
}  # fmt: skip


def classes() -> Iterator[tuple[type[PretrainedConfig], type[PreTrainedModel]]]:
    """(configuration, model) of each class that transformers brings, once; checkpoints with own code add others."""
    seen = set()
    for config in MODEL_FOR_CAUSAL_LM_MAPPING.keys():
        models = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        for model in models if isinstance(models, list | tuple) else [models]:
            if model not in seen and model.__module__.startswith("transformers."):
                seen.add(model)
                yield model.config_class or config, model


def small(config: type[PretrainedConfig], name: str = "") -> PretrainedConfig:
    default = config()
    fields = vars(default)
    known = fields.keys() | set(getattr(config, "attribute_map", {})) - {"layer_types"}
    given = {key: value for key, value in SIZES.items() if key in known}
    given |= {key: small(type(value)) for key, value in fields.items() if isinstance(value, PretrainedConfig)}
    if "kv_lora_rank" in known:
        given["num_key_value_heads"] = given["num_attention_heads"]
    return config(**given | OWN.get(name, {}))


def drafting(config: Any, name: str, **settings: Any) -> PretrainedConfig:
    """Of a model that drafts for another, here with keys and values of its own."""
    text = small(CONFIG_MAPPING[config.sub_configs_defaults["text_config"].model_type], name)
    made = config(text_config=text, backbone_hidden_size=16, **settings)
    made.text_config.num_kv_shared_layers = 0
    return made


class Blind(Gemma3nVisionConfig):
    model_type = "blind"


class BlindTower(PreTrainedModel):
    """In place of a vision tower that is timm's: it sees nothing."""

    config_class = Blind


AutoModel.register(Blind, BlindTower)


def without_timm(config: Any, name: str) -> PretrainedConfig:
    made: Any = small(config, name)
    made.text_config.num_kv_shared_layers = 0
    made.vision_config = Blind(hidden_size=32, vocab_size=V, vocab_offset=V)
    return made


MADE: dict[str, Callable[[Any, str], PretrainedConfig]] = {
    "Gemma3nForConditionalGeneration": without_timm,
    "Gemma4AssistantForCausalLM": drafting,
    "Gemma4UnifiedAssistantForCausalLM": drafting,
}


def inputs(model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
    """What its `forward` takes for these tokens; of a drafting model, what the other one made of them."""
    if MADE.get(type(model).__name__) is not drafting:
        return dict(input_ids=ids)
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(*ids.shape, 2 * model.config.backbone_hidden_size, generator=generator)
    states = torch.randn(2, 2, len(ids), 2, ids.shape[1], 8, generator=generator)  # of 2 heads of 8
    kinds = ("full_attention", "sliding_attention")
    return dict(inputs_embeds=embeds, shared_kv_states={kind: tuple(x) for kind, x in zip(kinds, states)})


class Row(NamedTuple):
    """One line of docs/architectures.md."""

    model: str
    path: str  # "hook", "logits" or "refused"
    read: str  # of "hook": what it does to its logits; else why
    packed: str = ""  # of "hook": "yes", or why it cannot read packed rows

    def __str__(self) -> str:
        return f"| {self.model} | {self.path} | {self.read} | {self.packed} |"


def judge(config: type[PretrainedConfig], kind: type[PreTrainedModel]) -> Row:
    """Instantiate, read, and hold the log-probs of the path taken against the model's own logits.

    Raises:
        AssertionError: they differ by more than 1e-5.
    """
    name = kind.__name__
    torch.manual_seed(0)
    model = kind(MADE.get(name, small)(config, name)).eval()
    found = read_logits(model)
    if found.path == "none":
        return Row(name, "refused", found.why.removeprefix(f"{name} "))
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.normal_(0, 0.7)
        ids = torch.randint(3, V - 3, (2, 9), generator=torch.Generator().manual_seed(1))
        targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        logits = model(**inputs(model, ids)).logits
        want = logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        if found.path == "logits":
            logp = logprobs_from_logits(logits, targets).logp
        else:
            with fused_head(model, lambda hidden, head: linear_logprobs(hidden, targets=targets, **head).logp):
                logp = model(**inputs(model, ids)).logits
    error = (logp - want.where(targets != -100, 0)).abs().max().item() / want.abs().max().item()
    assert error < 1e-5, f"{name}: log-probs differ by {error:.1e}"
    assert want.std() > 0.1, f"{name}: log-probs of {want.std():.1e} prove nothing"
    if found.path == "logits":
        return Row(name, "logits", found.why.removeprefix(f"{name}: "))
    settings = ", ".join(f"{key} {value:g}" for key, value in found.transform.items())
    return Row(name, "hook", settings, "" if MADE.get(name) is drafting else packs(model).removeprefix(f"{name} "))


@torch.no_grad()
def packs(model: PreTrainedModel) -> str:
    """Hold the log-probs of a packed row against those of its sequences alone: "yes", or why the model cannot.

    Raises:
        AssertionError: they differ by more than 1e-5.
    """
    if (why := why_not(model)) is not None:
        return why
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.2)
    draw = torch.Generator().manual_seed(3)
    prompt, *parts = (torch.randint(3, V - 3, (size,), generator=draw).tolist() for size in (5, 6, 3, 9))
    prompts = (prompt, prompt, [])  # two answers of one prompt, and a text; all are longer than a window
    rows = [
        {"index": i, "prompt_ids": own, "completion_ids": part} for i, (own, part) in enumerate(zip(prompts, parts))
    ]

    def logps(some: list[dict[str, Any]], pad_id: int | None) -> Tensor:
        batch = collate_sft(some, pad_id)
        return token_logps(model, batch, {})[0][batch.targets != IGNORE]

    got, want = logps(rows, None), torch.cat([logps([row], 0) for row in rows])
    error = (got - want).abs().max().item() / want.abs().max().item()
    assert error < 1e-5, f"{type(model).__name__}: packed, log-probs differ by {error:.1e}"
    return "yes"


HEAD = """# Which of transformers' causal LMs take the fused head

Every class that transformers {version} lists for causal language modelling, in a small configuration whose settings of
the logits are away from neutral.

- `hook`: `fused_head`, `fuse` and `FusedTrainer` make no logits. The column `logits` says what the model does to
  them, which the operators take over.
- `logits`: the model does something to its logits that the operators do not know. `fuse` takes log-probs from its whole
  logits, with a warning; elsewhere `logprobs_from_logits(model(...).logits, targets)` gives the same.
- `refused`: there is no one LM head.

The path is decided by reading the source of each `forward` (`integrations/logits.py`). Under `hook` and `logits` the
log-probs equal those of the model's own logits within 1e-5. Three classes do not stand here as they are sold: Gemma 3n
for images and sound lacks its vision tower, which is timm's; the two that draft for another Gemma 4 have keys and
values of their own and random inputs (with `use_ordered_embeddings` they take the second path).

The column `packed` says whether the engine's `packing` can put a batch into one row for it, and why not
(`models/tree_attention.py`): the log-probs of two answers to one prompt and of a text in one row, longer than a sliding
window, equal those of each alone within 1e-5.

{hook} hook, {logits} logits, {refused} refused; {packed} packed. Made by `make architectures`.

| class | path | logits | packed |
|---|---|---|---|
"""


def table(rows: list[Row]) -> str:
    counts = {path: sum(row.path == path for row in rows) for path in ("hook", "logits", "refused")}
    counts["packed"] = sum(row.packed == "yes" for row in rows)
    return HEAD.format(version=transformers.__version__, **counts) + "".join(f"{row}\n" for row in rows)


if __name__ == "__main__":
    rows = [judge(*pair) for pair in sorted(classes(), key=lambda pair: pair[1].__name__)]
    Path(sys.argv[1]).write_text(table(rows))
