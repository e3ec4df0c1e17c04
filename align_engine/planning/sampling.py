"""Sampling on tensors without numbers: the prompts read, and the last token of the longest completions with all keys
and values, as `rollouts.decode` goes through them, or transformers' `generate` where that loop does not serve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from align_engine.integrations.hook import causal_model, hooked_head
from align_engine.planning.ledger import Ledger
from align_engine.recipe import RolloutSection
from align_engine.rollouts import decode
from align_engine.rollouts.generate import PAGE


class Sampling:
    """Of one model.

    Args:
        model: in eval mode.
        settings: how it samples.
        ledger: counts.
    """

    def __init__(self, model: Any, settings: RolloutSection, ledger: Ledger) -> None:
        self.causal, self.settings, self.ledger = causal_model(model), settings, ledger
        self.paged = settings.use_transformers_continuous_batching
        self.loop = not self.paged and decode.why_not(self.causal, settings) is None

    def play(self, rows: int, prompts: int, prompt: int, completion: int) -> None:
        """Two phases of `rows` completions at a time.

        Args:
            prompts: different ones among them.
            prompt, completion: tokens of each.
        """
        many, whole = prompts if self.loop else rows, prompt + completion
        if self.paged:
            whole = -(-whole // PAGE) * PAGE
        drawn = decode.Draw(torch.zeros(1, rows, dtype=torch.float64), self.settings.temperature)
        with self._drawing(drawn):
            with self.ledger.phase("prompts read"):
                owners = torch.zeros(rows, dtype=torch.int64)
                drawn.move(0, owners, owners if self.loop else None)
                cache = self._read(many, prompt, None)
                if self.loop:
                    self._hold(decode.selected({"past_key_values": cache}, owners)["past_key_values"])
            grow(cache, whole - 1 - prompt)
            self._hold(cache)
            with self.ledger.phase("sampling"):
                drawn.move(0, owners)
                self._read(rows, 1, cache)

    @contextlib.contextmanager
    def _drawing(self, drawn: decode.Draw) -> Iterator[None]:
        with hooked_head(self.causal, drawn) if self.loop else contextlib.nullcontext():
            yield

    def _read(self, rows: int, tokens: int, cache: Any) -> Any:
        """Tokens behind what a cache holds; the next one is drawn."""
        before = 0 if cache is None else cache.get_seq_length()
        ids, mask = torch.zeros(rows, tokens, dtype=torch.int64), torch.ones(rows, before + tokens, dtype=torch.int64)
        options = {"logits_to_keep": 1} if self.causal._supports_logits_to_keep() else {}
        out = self.causal(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        self._hold(out.past_key_values)
        if not self.loop:
            chosen = out.logits[:, -1].to(torch.float32, copy=True)
            shares = (chosen / self.settings.temperature).log_softmax(-1).softmax(-1)
            (shares / torch.empty_like(shares)).argmax(-1)  # what multinomial makes inside
        return out.past_key_values

    def _hold(self, cache: Any) -> None:
        layers = getattr(cache, "layers", ())
        held = (getattr(layer, name, None) for layer in layers for name in ("keys", "values"))
        self.ledger.name((tensor for tensor in held if isinstance(tensor, Tensor)), "keys and values")


def grow(cache: Any, tokens: int) -> None:
    """Put so many tokens more into each layer of a cache that keeps tokens."""
    for layer in getattr(cache, "layers", ()):
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        found = [one for one in held if isinstance(one, Tensor)]
        for more in (tokens - 1, 1) if len(found) == 2 else ():
            if more > 0:  # the last one apart: a window then holds what it keeps
                layer.update(*(one.new_empty(*one.shape[:-2], more, one.shape[-1]) for one in found))
