"""Completions of prompts by the decode loop of `decode`, by transformers' generate, or its continuous batching: token
for token what the policy chose, with its log-probs.

Which completions come out is a function of (weights, prompts, seed) alone: batches are cut from the list of prompts
whatever the number of processes, and each has a seed of its own. So nothing about the sampler needs saving.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, StoppingCriteria, StopStringCriteria

from align_engine.data.batches import collate_prompts, split_order
from align_engine.errors import BadInput, RunFailed
from align_engine.integrations.hook import causal_model
from align_engine.rollouts import decode
from align_engine.rollouts.completion import Completion, Sampler, derived_seed
from align_engine.training import stops
from align_engine.training.ranks import gathered

if TYPE_CHECKING:
    from accelerate import Accelerator

    from align_engine.recipe import RolloutSection


PAGED, PAGE = "use_transformers_continuous_batching", 256  # tokens of a page


class Watch(StoppingCriteria):
    """Sees each token chosen: its log-prob (no more than one step's logits [B, V] are ever held), and whether it ends
    its row, as EOS or as the token that completes a stop string, which never reaches back into the prompt."""

    def __init__(self, width: int, eos: Tensor, stop: StopStringCriteria | None, temperature: float) -> None:
        self.width, self.stop, self.temperature = width, stop, temperature
        self.eos_token_id = eos  # generate pads rows that have ended where a criterion has this attribute
        self.logps: list[Tensor] = []  # [B, 1] of each step
        self.done: list[Tensor] = []  # [B] bool of each step

    def before(self, input_ids: Any, scores: Any) -> Any:
        """Keep the logits that a step chooses by."""
        self.now = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        new = input_ids[:, self.width :]
        done = torch.isin(new[:, -1], self.eos_token_id)
        if self.stop is not None:
            done |= self.stop(new, scores)
        self.logps.append(self.now.gather(1, new[:, -1:]))
        self.done.append(done)
        return done


def transformers_sampler(
    model: Any, tokenizer: Any, settings: RolloutSection, say: Callable[[str], object] | None = None,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Sampler:  # fmt: skip
    """A sampler that runs the policy itself, with its KV cache: by the loop of `decode`, where that serves, else by
    transformers' `generate`, or its continuous batching.

    Args:
        model: a causal LM of transformers, bare or inside accelerate's wrappers; put in eval mode for the call, which
            leaves training's random numbers untouched.
        tokenizer: its tokenizer; the pad token may be the EOS token.
        settings: max_completion_length, temperature, top_p, top_k, stop_strings, use_transformers_continuous_batching.
        say: is told which of the ways it is, and why. Default None: nobody.
        around: makes the context of a call: the autocast that the policy is trained in, as its calls go past the
            wrapper that accelerate has put around its forward pass. Default: none.
    Raises:
        BadInput: a tokenizer in which transformers cannot find stop strings (of whole words, for one); a policy that
            continuous batching cannot run. By the sampler, RunFailed: the policy's logits are not numbers.
    """
    from accelerate.utils import extract_model_from_parallel

    inner: Any = extract_model_from_parallel(model)
    ids = [inner.generation_config.eos_token_id, tokenizer.eos_token_id]
    eos = sorted({i for one in ids if one is not None for i in (one if isinstance(one, list) else [one])})
    config = GenerationConfig(
        max_new_tokens=settings.max_completion_length,
        do_sample=True,
        **{name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")},
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
    )
    try:
        stop = StopStringCriteria(tokenizer, settings.stop_strings) if settings.stop_strings else None
    except ValueError as error:
        raise BadInput(f"stop_strings = {settings.stop_strings}: not to be found in the tokens: {error}") from error
    shards = any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in inner.parameters())
    with prepared(inner, config):
        reason = decode.why_not(inner, settings)
    if settings.use_transformers_continuous_batching:
        check_pages(inner, shards)
        run, way = continuous_batching, "by transformers' continuous batching"
    elif reason is not None:
        run, way = partial(batched_generate, stop=stop), f"by transformers' generate: {reason}"
    else:
        inner, way = causal_model(inner), "in the pass of the LM head, each prompt read once"
        run = partial(decode.decode, stop=stop, in_shards=shards)
    if say is not None:
        say(f"completions are drawn {way}")

    @torch.no_grad()
    def sample(prompts: Sequence[list[int]], seed: int) -> list[Completion]:
        device = next(inner.parameters()).device
        random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with random, prepared(inner, config), around():
            torch.manual_seed(seed)
            return run(inner, prompts, seed)

    return sample


def check_pages(model: Any, shards: bool) -> None:
    """Refuse what continuous batching cannot run."""
    mixed = hasattr(model, "_original_forward") and model.dtype == torch.float32  # by accelerate
    text = model.config.get_text_config()
    capped, kinds = getattr(text, "attn_logit_softcapping", None), set(getattr(text, "layer_types", None) or ())
    for holds, why in ((shards, "is in shards"), (not model._supports_attention_backend, "has attention without pages"),
                       (capped, f"has attn_logit_softcapping = {capped}"),  # pages leave it out
                       (len(kinds) > 1, "has layers of several kinds of attention"),  # its pages are of one kind
                       (mixed, "has float32 weights but bf16 keys (set dtype: bfloat16, or bf16: false)")):  # fmt: skip
        if holds:
            raise BadInput(f"{PAGED}: {type(model).__name__} {why}")


@contextlib.contextmanager
def prepared(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Inside the block the model generates by `config` alone, in eval mode; afterwards it is as it was."""
    training, attention, causal = model.training, model.config._attn_implementation, causal_model(model)
    before = model.generation_config, causal.generation_config  # a plain PeftModel hands `generate` on as it is
    text = model.config.get_text_config()
    routers = getattr(text, "output_router_logits", False)
    try:
        # in place of the model's own, which may hold penalties
        model.eval().generation_config = causal.generation_config = config
        if routers:  # the loss of experts cannot be computed where earlier tokens lie in a cache
            text.output_router_logits = False
        yield
    finally:
        model.train(training).generation_config, causal.generation_config = before
        if routers:
            text.output_router_logits = routers
        if model.config._attn_implementation != attention:  # transformers has failed half-way
            model.set_attn_implementation(attention)


def batched_generate(
    model: Any, prompts: Sequence[list[int]], seed: int, stop: StopStringCriteria | None
) -> list[Completion]:
    """Completions by `generate`: a batch that goes on until its last row has ended."""
    config, device = model.generation_config, next(model.parameters()).device
    input_ids, mask = (x.to(device) for x in collate_prompts(prompts, config.pad_token_id))
    width, eos = input_ids.shape[1], torch.tensor(config.eos_token_id, device=device)
    watch = Watch(width, eos, stop, config.temperature)
    hooks = {"logits_processor": [watch.before], "stopping_criteria": [watch]}
    out = model.generate(input_ids, attention_mask=mask, **hooks)
    new, logps, done = out[:, width:].cpu(), torch.cat(watch.logps, 1).cpu(), torch.stack(watch.done, 1).cpu()
    ended = done.any(1).tolist()
    cuts = torch.where(done.any(1), done.int().argmax(1) + 1, done.shape[1]).tolist()
    return [Completion(new[i, :cut].tolist(), logps[i, :cut].clone(), ended[i]) for i, cut in enumerate(cuts)]


def continuous_batching(model: Any, prompts: Sequence[list[int]], seed: int) -> list[Completion]:
    """Completions by continuous batching: rows that have ended leave the batch. What is drawn depends on the schedule,
    so all requests wait before the thread starts, and pages are counted out, not taken from what memory is free.

    Raises:
        BadInput: transformers refuses the model. RunFailed: a request fails, with what it says.
    """
    from transformers import ContinuousBatchingConfig

    config, attention = model.generation_config, model.config._attn_implementation
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0  # transformers adds it to the seed
    pages = -(-(max(map(len, prompts)) + config.max_new_tokens) // PAGE)
    options = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=pages * len(prompts), max_batch_tokens=max(1024, len(prompts)), safety_margin=0.0,
        seed=seed - rank, return_logprobs=True, auto_switch_to_flash=False,
    )  # fmt: skip
    try:
        manager = model.init_continuous_batching(config, options)
    except ValueError as error:
        raise BadInput(f"{PAGED}: {type(model).__name__}, attn_implementation = {attention!r}: {error}") from error
    try:
        names, found = manager.add_requests(prompts), {}
        manager.start()
        while len(found) < len(names):
            if (one := manager.get_result(timeout=1)) is None and manager.is_running():
                continue
            if one is None or one.error is not None:
                fatal = manager.background_thread_status.fatal_error or "its thread has ended"
                raise RunFailed(f"{PAGED}: {one.error if one else fatal}")
            found[one.request_id] = one
    finally:
        manager.stop(hard_stop=True)
    answers = [(found[name].generated_tokens, torch.tensor(found[name].logprobs)) for name in names]
    return [Completion(ids, logps, ids[-1] in config.eos_token_id) for ids, logps in answers]


def sample_all(
    sampler: Sampler, prompts: Sequence[list[int]], batch_size: int, seeds: Sequence[int], accelerator: Accelerator
) -> list[Completion]:
    """One completion of every prompt, the same list on every rank, whatever their number.

    Args:
        sampler: completes a batch.
        prompts: token ids, those of one prompt side by side.
        batch_size: prompts of one batch; ranks take batches in turn.
        seeds: of the run, the rollout, ...; each batch adds its number.
    """
    batches, world = split_order(range(len(prompts)), batch_size), accelerator.num_processes
    mine = []
    for number in range(accelerator.process_index, -(-len(batches) // world) * world, world):
        stops.pause()
        batch = batches[min(number, len(batches) - 1)]  # equally many for each rank: a sharded policy needs all of them
        answers = sampler([prompts[i] for i in batch], derived_seed(*seeds, number))
        mine += [(number, answers)] if number < len(batches) else []
    found = sorted(gathered(mine, accelerator), key=lambda part: part[0])
    return [completion for _, part in found for completion in part]
