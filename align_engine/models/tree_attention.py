"""Attention over a packed row of trees (`align_engine.data.trees`), through transformers' attention interface.

    with reading(model, batch) as inputs:
        model(**inputs, use_cache=False)

A segment attends to its ancestors' keys and, causally, to its own: as the keys of a path lie one behind the other, this
is causal attention aligned at the lower right, of as many queries as the segment has tokens. All else in a model is per
token. The layout is an argument of the model's forward, which hands it down to every layer: so recomputed activations
and adapters need nothing of their own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from align_engine.data.batches import Batch
from align_engine.data.trees import Trees
from align_engine.errors import RunFailed
from align_engine.integrations.hook import causal_model

NAME = "align_trees"  # among transformers' attention implementations
BALANCING = "load_balancing_loss_func"  # in transformers' modules of models with experts
SERVED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
REFUSED = {  # keywords of attention with a meaning of their own
    "sinks": "attention sinks of its own kind",
    "position_bias": "a bias over positions",
    "indices": "attention to chosen keys",
    "block_indices": "attention to chosen keys",
}
SERVED_TENSORS = {"position_ids", "cache_position"}  # among what a model hands to its attention beside q, k and v


class Rule(NamedTuple):
    """What a layer asks of its attention."""

    scale: float
    window: int | None  # a token sees itself and the window - 1 tokens before it
    softcap: float | None
    dropout: float
    chunk: int | None = None  # a token sees the tokens of its own chunk of so many positions
    sinks: Tensor | None = None  # [H] of each head, a logit beside those of the keys, which has no value

    @property
    def by_hand(self) -> bool:
        """Whether torch's attention has no such rule."""
        return self.softcap is not None or self.sinks is not None


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, trees: Trees | None = None, **other: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As transformers calls it: query [1, H, S, d], key [1, G, S, d], value [1, G, S, e] -> [1, S, H, e].

    Raises:
        RunFailed: a model that asks for something else beside, or has lost `trees` on the way.
    """
    name = type(module).__name__
    unknown = [word for word, part in other.items() if isinstance(part, Tensor) and word not in SERVED_TENSORS]
    if trees is None or attention_mask is not None or unknown:
        lost = "without the layout of its row" if trees is None else f"with {', '.join(unknown) or 'a mask of its own'}"
        raise RunFailed(f"{name} calls attention {lost}: it cannot read packed rows")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    chunk = _chunk(module)
    if chunk is not None and chunk >= trees.longest[1]:
        chunk = None
    rule = Rule(scale, sliding_window, softcap, dropout, chunk, s_aux)
    attention = in_one_call if _takes_one_call(query, value, rule) else by_segment
    return attention(_tempered(module, query, trees), key, value, trees, rule), None


def _chunk(module: nn.Module) -> int | None:
    """Positions of a chunk, where a layer's attention is of that kind: transformers says so in its mask alone."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    return config.attention_chunk_size if kinds and kinds[module.layer_idx] == "chunked_attention" else None


def _tempered(module: Any, query: Tensor, trees: Trees) -> Tensor:
    """Llama 4 scales its queries by their place in the row, where it has no rotary positions: here by their place in
    the sequence (arXiv:2501.19399)."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    places = torch.stack([torch.arange(query.shape[2], device=query.device), trees.position_ids[0]])
    row, sequence = torch.log1p(((places + 1.0) / module.floor_scale).floor()) * module.attn_scale + 1.0
    return (query * (sequence / row)[:, None]).to(query.dtype)


def by_segment(query: Tensor, key: Tensor, value: Tensor, trees: Trees, rule: Rule) -> Tensor:
    """A call for each segment, on any device."""
    group = query.shape[1] // key.shape[1]
    if group > 1 and (query.is_cuda or rule.by_hand):  # a GPU's masked calls take shared keys but slowly
        key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    queries, keys, values = (x.split(trees.lengths, 2) for x in (query, key, value))
    found = []
    for own, path in enumerate(trees.paths):
        k, v = (torch.cat([parts[i] for i in path], 2) if len(path) > 1 else parts[own] for parts in (keys, values))
        found.append(_attend(queries[own], k, v, rule).transpose(1, 2))
    return torch.cat(found, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    n, m, shared = query.shape[2], key.shape[2], query.shape[1] != key.shape[1]
    whole = all(limit is None or limit >= m for limit in (rule.window, rule.chunk))
    if n == m and whole and not rule.by_hand:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=rule.dropout, is_causal=True, scale=rule.scale, enable_gqa=shared
        )
    seen = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    if rule.window is not None:
        seen = seen.triu(m - n - rule.window + 1)
    if rule.chunk is not None:
        chunks = torch.arange(m, device=query.device) // rule.chunk
        seen &= chunks[m - n :, None] == chunks
    if not rule.by_hand:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=rule.dropout, scale=rule.scale, enable_gqa=shared
        )
    scores = query @ key.mT * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    scores = scores.masked_fill(~seen, -torch.inf)
    if rule.sinks is not None:
        scores = torch.cat([scores, rule.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32))[..., :m]
    return F.dropout(weights.to(query.dtype), rule.dropout) @ value


def in_one_call(query: Tensor, key: Tensor, value: Tensor, trees: Trees, rule: Rule) -> Tensor:
    """One call for all segments, each with the keys of its path. No GPU has measured it yet."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, d]
    window = (-1 if rule.window is None else rule.window - 1, 0)  # tokens before and behind
    found: Any = varlen_attn(
        queries.contiguous(), keys[trees.keys], values[trees.keys], trees.cu_queries, trees.cu_keys, *trees.longest,
        scale=rule.scale, window_size=window, enable_gqa=True,
    )  # fmt: skip
    return found[None]


def _takes_one_call(query: Tensor, value: Tensor, rule: Rule) -> bool:
    halves = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    known = not rule.by_hand and rule.chunk is None and not rule.dropout
    return halves and known and query.shape[-1] == value.shape[-1] <= 256


@contextlib.contextmanager
def reading(model: nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    """Gives what the model is called with to read a batch. Inside the block its attention is that of packed rows, where
    the batch is packed; the backward pass belongs there too, for activations that are computed again."""
    from transformers import AttentionInterface, PreTrainedModel

    if batch.trees is None:
        yield {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return
    AttentionInterface.register(NAME, attend)
    parts = [part for part in causal_model(model).modules() if isinstance(part, PreTrainedModel)]
    before = [(part.config, part.config._attn_implementation) for part in parts]
    for config, _ in before:
        config._attn_implementation = NAME
    try:
        with _balancing(causal_model(model), batch.trees):
            yield {"input_ids": batch.input_ids, "position_ids": batch.trees.position_ids, "trees": batch.trees}
    finally:
        for config, name in before:
            config._attn_implementation = name


@contextlib.contextmanager
def _balancing(causal: nn.Module, trees: Trees) -> Iterator[None]:
    """Inside the block the load-balancing loss of experts counts a token as often as sequences read it, so that it is
    that of the padded batch."""
    module, own = sys.modules[type(causal).__module__], balancing_loss(causal)
    if own is None:
        yield
        return
    before = getattr(module, BALANCING)

    @functools.wraps(own)
    def weighed(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(own).bind(*args, **kwargs)
        call.arguments["attention_mask"] = trees.reads
        return own(*call.args, **call.kwargs)

    setattr(module, BALANCING, weighed)
    try:
        yield
    finally:
        setattr(module, BALANCING, before)


def balancing_loss(causal: nn.Module) -> Callable[..., Any] | None:
    """The function of a mixture of experts that takes a mask, or weights, of the tokens; None where there is none."""
    held = getattr(sys.modules[type(causal).__module__], BALANCING, None)
    own = held if held is None else inspect.unwrap(held)
    return own if own is not None and "attention_mask" in inspect.signature(own).parameters else None


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot read packed rows, in a sentence, as far as its classes and its configuration tell; None where
    nothing speaks against it (a proof on a batch says the rest)."""
    causal = causal_model(model)
    decoder, config, name = causal.get_decoder(), causal.config.get_text_config(), type(causal).__name__
    if getattr(causal.config, "is_encoder_decoder", False):
        return f"{name} has an encoder"
    kinds = set(getattr(config, "layer_types", None) or ()) - SERVED_LAYERS
    convolved = any(isinstance(part, nn.Conv1d) for part in decoder.modules())
    if kinds or convolved or getattr(causal, "_is_stateful", False):
        other = f"{', '.join(sorted(kinds))} layers" if kinds else "convolutions" if convolved else "a running state"
        return f"{name} mixes tokens in other ways than attention: {other}"
    if "position_ids" not in inspect.signature(causal.forward).parameters:
        return f"{name} takes no position_ids"
    kinds_of_parts = dict.fromkeys(type(part) for part in decoder.modules())
    sources = {kind: _source(kind.forward) for kind in kinds_of_parts}
    callers = {kind: source for kind, source in sources.items() if "attention_interface(" in source}
    own = [kind.__name__ for kind, source in sources.items() if _attends_itself(kind, source)]
    if own or not callers:
        return f"{' and '.join(own) or name} does not call transformers' attention interface"
    if any(type(part) in callers and not getattr(part, "is_causal", True) for part in decoder.modules()):
        return f"{name} sees the tokens that it is asked for"
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if chunked and not all(hasattr(part, "layer_idx") for part in decoder.modules() if type(part) in callers):
        return f"{name} knows its chunks from a mask alone"
    for part in decoder.modules():
        for child, held in part.named_children():
            handed = re.search(rf"self\.{child}\(.*\*\*kwargs", sources[type(part)], re.DOTALL)
            if type(held) in callers and not (handed or child.isdigit()):
                return f"{type(part).__name__} keeps the layout of a row from its attention"
    for kind, source in callers.items():
        if found := [what for word, what in REFUSED.items() if f"{word}=" in source]:
            return f"{kind.__name__} has {found[0]}"
        masked = "create_sliding_window_causal_mask" in _source(sys.modules[kind.forward.__module__])
        if getattr(config, "sliding_window", None) and masked and "sliding_window=" not in source:
            return f"{kind.__name__} knows its sliding window from a mask alone"
    return None


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # made at run time, or not in Python
        return ""


def _attends_itself(kind: type[nn.Module], source: str) -> bool:
    mixes = "attention" in kind.__name__.lower() and re.search(r"softmax|scaled_dot_product", source)
    return bool(mixes) and "attention_interface(" not in source
