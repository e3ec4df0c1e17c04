"""The decode loop in which a token is drawn inside the pass of the LM head (`align_kernels.linear_sample`).

The model is transformers', with its cache; the loop stands in for `generate`'s own. Three things make it faster: no
softmax and no noise over the vocabulary, a prompt is read once for all its completions, and rows that have ended leave
the batch. A row's token at step t is a function of its logits and of one number that depends on (seed, t, row) alone,
so that neither of the last two changes what is drawn (but as products of other shapes round).

Letters: B completions, P distinct prompts, T most tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Cache, StopStringCriteria

from align_engine.data.batches import collate_prompts
from align_engine.errors import BadInput, RunFailed
from align_engine.integrations.hook import causal_model, head_module, head_weights, hooked_head, logit_transform
from align_engine.rollouts.completion import Completion, truncated
from align_kernels import linear_sample

if TYPE_CHECKING:
    from align_engine.recipe import RolloutSection

PER_ROW = ("attention_mask", "position_ids", "token_type_ids")  # [..., rows, positions] of what a model is given


def why_not(model: Any, settings: RolloutSection) -> str | None:
    """None where the loop serves this model (in eval mode) and these settings, else the reason."""
    if truncated(settings):
        return f"top_p = {settings.top_p}, top_k = {settings.top_k}"
    try:
        causal = causal_model(model)
        logit_transform(causal)
        head_weights(head_module(causal))
    except BadInput as error:
        return str(error)
    if not causal._supports_default_dynamic_cache():
        return f"{type(causal).__name__} keeps another cache than transformers' own"
    return None


class Draw:
    """In place of the LM head: one token of each row of the running batch."""

    def __init__(self, uniforms: Tensor, temperature: float) -> None:
        self.uniforms, self.temperature = uniforms, temperature  # [T, B]
        self.held: dict[str, Tensor] = {}  # of the head, made once: what tensor parallelism has cut, or autocast rounds

    def move(self, step: int, rows: Tensor, of: Tensor | None = None) -> None:
        """The next call draws the tokens `step` of the completions `rows`, from the hidden rows `of` (None: each)."""
        self.step, self.rows, self.of = step, rows, of

    def __call__(self, hidden: Tensor, head: dict[str, Any]) -> Tensor:
        last = hidden[:, -1] if self.of is None else hidden[self.of, -1]
        uniforms = self.uniforms[self.step, self.rows].to(hidden.device)
        self.held = self.held or held(head)
        settings = {"uniforms": uniforms, "temperature": self.temperature, **head, **self.held}
        self.tokens, logps, _ = linear_sample(last, **settings)
        self.logps = logps.float()
        return logps


def held(head: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a head that each step would make again."""
    found = {name: x.full_tensor() for name, x in head.items() if isinstance(x, DTensor)}
    weight: Any = found.get("weight", head["weight"])
    if torch.is_autocast_enabled(kind := weight.device.type) and weight.dtype != torch.get_autocast_dtype(kind):
        found["weight"] = weight.to(torch.get_autocast_dtype(kind))
    return found


def decode(
    model: Any, prompts: Sequence[list[int]], seed: int, stop: StopStringCriteria | None, in_shards: bool
) -> list[Completion]:
    """A completion of each prompt.

    Args:
        model: a bare causal LM in eval mode, `generation_config` set for the call: max_new_tokens, temperature, EOS
            and pad ids.
        stop: what finds stop strings in a completion's ids.
        in_shards: the weights are spread over the ranks, which must then all run until the last one's rows have ended.
    Raises:
        RunFailed: the model's logits are not numbers.
    """
    config, device = model.generation_config, next(model.parameters()).device
    shares = not model._is_stateful  # else states that no cache holds belong to the rows as they stand
    places: dict[Any, int] = {}
    owners = [places.setdefault(tuple(prompt) if shares else i, len(places)) for i, prompt in enumerate(prompts)]
    read = [prompts[owners.index(place)] for place in range(len(places))]
    input_ids, mask = (x.to(device) for x in collate_prompts(read, config.pad_token_id))
    size = (config.max_new_tokens, len(prompts))
    numbers = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draw = Draw(numbers.to(device), config.temperature)
    eos = torch.tensor(config.eos_token_id, device=device)
    loop = Loop(draw, torch.tensor(owners, device=device), eos, stop, shares, in_shards)
    with hooked_head(model, draw):
        model.generate(input_ids, attention_mask=mask, custom_generate=loop.run)
    ids, logps, lengths = loop.ids.cpu(), loop.logps.cpu(), loop.lengths.tolist()
    found = [
        Completion(ids[i, :length].tolist(), logps[i, :length].clone(), bool(ended))
        for i, (length, ended) in enumerate(zip(lengths, loop.ended.tolist()))
    ]
    if any(bool(one.logps.isnan().any()) for one in found):
        raise RunFailed("the policy gives a token that it drew the log-prob NaN: its logits are not numbers")
    return found


class Loop:
    """What `generate` runs in place of its own loop."""

    def __init__(
        self, draw: Draw, owners: Tensor, eos: Tensor, stop: StopStringCriteria | None, shrinks: bool, in_shards: bool
    ) -> None:
        self.draw, self.owners, self.eos, self.stop = draw, owners, eos, stop  # owners: [B] the prompt of each
        self.shrinks, self.in_shards = shrinks, in_shards
        most, count = draw.uniforms.shape
        self.ids = owners.new_zeros(count, most)
        self.logps = torch.zeros(count, most, device=owners.device)
        self.lengths = owners.new_full((count,), most)
        self.ended = torch.zeros(count, dtype=torch.bool, device=owners.device)

    def run(self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, **given: Any) -> Tensor:
        """Read the prompts [P, W], then go on until every completion has ended or is full."""
        del given["generation_config"]
        live = torch.arange(len(self.owners), device=self.owners.device)
        self.draw.move(0, live, self.owners)
        given = forward(model, input_ids, given, is_first_iteration=True)
        input_ids, given = input_ids[self.owners], selected(given, self.owners)
        with model._optimize_model_for_decode():
            for step in range(self.ids.shape[1]):
                if step:
                    self.draw.move(step, live)
                    given = forward(model, input_ids, given, next_sequence_length=1)
                running = self.take(step, live)
                left = int(running.sum())
                if not self.anywhere(left):
                    break
                input_ids = torch.cat((input_ids, self.draw.tokens[:, None]), 1)
                if self.shrinks and 8 * left <= 7 * len(live):  # to copy the cache costs about as much as a step
                    stay = running.nonzero()[:, 0] if left else torch.zeros_like(live[:1])
                    live, input_ids, given = live[stay], input_ids[stay], selected(given, stay)
        return self.ids

    def take(self, step: int, live: Tensor) -> Tensor:
        """Write down the tokens of a step; which rows of the batch go on, bool."""
        tokens = self.draw.tokens
        self.ids[live, step], self.logps[live, step] = tokens, self.draw.logps
        done = torch.isin(tokens, self.eos)
        if self.stop is not None:  # it sees the completion alone: no prompt completes a stop string
            done |= self.stop(self.ids[live, : step + 1], None)  # type: ignore[arg-type]
        before = self.ended[live]
        self.lengths[live] = self.lengths[live].where(before | ~done, step + 1)
        self.ended[live] = before | done
        return ~(before | done)

    def anywhere(self, left: int) -> bool:
        """Whether a completion goes on, of this rank or of those that hold a part of the weights."""
        if not self.in_shards or not torch.distributed.is_initialized():
            return left > 0
        flag = torch.tensor(left, device=self.ids.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)


def forward(model: Any, input_ids: Tensor, given: dict[str, Any], **how: Any) -> dict[str, Any]:
    """One call of the model; what its next one is given."""
    outputs = model(**model.prepare_inputs_for_generation(input_ids, **how, **given), return_dict=True)
    return model._update_model_kwargs_for_generation(outputs, given)


def selected(given: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The same for some rows of the batch, each as often as it is named. A cache is changed in place."""
    for value in given.values():
        if isinstance(value, Cache):
            value.reorder_cache(rows)  # type: ignore[arg-type]
    kept = {name: given[name].index_select(-2, rows) for name in PER_ROW if given.get(name) is not None}
    return given | kept
