"""Seconds of sampling one GRPO rollout: transformers' `generate` beside the loop that draws in the head's pass.

python benches/bench_generate.py [--hidden 256] [--layers 4] [--vocabulary 151936] [--prompts 4] [--group 8]
    [--prompt 128] [--completion 64] [--end 0.01] [--batch 64] [--repeats 3] [--dtype float32]

A Qwen2 of random weights answers `prompts` prompts `group` times each; a token ends its completion with the probability
`end`. The two ways take turns. A line has the median seconds, tokens per second, and the share of the time that each
part takes: the body, the head (`draw`: with the token drawn in it), the noise of `torch.multinomial` with the softmax
before it, and the rest. Seconds are the process's own on a CPU, where other work may run beside.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from align_engine.recipe import RolloutSection
from align_engine.rollouts import decode, generate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Parts:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, part: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            start = clock()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += clock() - start

        return run

    def watch(self, part: str, module: torch.nn.Module) -> None:
        def begin(*_: Any) -> None:
            self.seconds[part] -= clock()

        def end(*_: Any) -> None:
            self.seconds[part] += clock()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    size, heads = options.hidden, max(options.hidden // 64, 1)
    config = Qwen2Config(
        vocab_size=options.vocabulary, hidden_size=size, intermediate_size=4 * size, num_hidden_layers=options.layers,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), tie_word_embeddings=True,
        initializer_range=0.05,
    )  # fmt: skip
    model: Any = Qwen2ForCausalLM(config).eval()
    model.to(DEVICE, getattr(torch, options.dtype))
    model.generation_config.eos_token_id = list(range(int(options.end * options.vocabulary)))
    tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(options.prompt // 2, 3 * options.prompt // 2, (options.prompts,), generator=draw).tolist()
    asked = [torch.randint(0, options.vocabulary, (length,), generator=draw).tolist() for length in lengths]
    rows = [prompt for prompt in asked for _ in range(options.group)]
    settings, parts = RolloutSection(max_completion_length=options.completion), Parts()
    parts.watch("body", model.model)
    parts.watch("head", model.lm_head)
    torch.multinomial = parts.timed("noise", torch.multinomial)
    torch.nn.functional.softmax = parts.timed("noise", torch.nn.functional.softmax)
    generate.Watch.before = parts.timed("log-probs", generate.Watch.before)
    with patch.object(decode, "why_not", lambda *_: "compared"):
        plain = generate.transformers_sampler(model, tokenizer, settings)
    ways = {"generate": plain, "decode": generate.transformers_sampler(model, tokenizer, settings)}
    found: dict[str, list[tuple[float, int, dict[str, float]]]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        for name, sample in ways.items():
            parts.seconds.clear()
            start, tokens = clock(), 0
            for begin in range(0, len(rows), options.batch):
                tokens += sum(
                    len(one.ids) for one in sample(rows[begin : begin + options.batch], repeat * 1000 + begin)
                )
            if repeat:  # the first is for warming up
                found[name].append((clock() - start, tokens, dict(parts.seconds)))
    print(
        f"{DEVICE}, {torch.get_num_threads()} thread(s), {options.dtype}: hidden {size}, {options.layers} layers, "
        f"{options.vocabulary} tokens; {options.prompts} prompts of {min(lengths)}-{max(lengths)} x {options.group}, "
        f"at most {options.completion} tokens"
    )
    for name, runs in found.items():
        seconds = statistics.median(took for took, _, _ in runs)
        rate = statistics.median(tokens / took for took, tokens, _ in runs)
        total = sum(took for took, _, _ in runs)
        spent = {part: sum(of.get(part, 0.0) for _, _, of in runs) / total for part in runs[0][2]}
        spent["rest"] = 1 - sum(spent.values())
        shares = ", ".join(f"{part} {share:.0%}" for part, share in spent.items())
        print(f"{name:9} {seconds:7.2f} s a rollout, {rate:6.1f} tokens/s: {shares}")
    before, after = (statistics.median(took / tokens for took, tokens, _ in found[name]) for name in ways)
    print(f"{before / after:.2f} times as fast, per token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 256), ("layers", 4), ("vocabulary", 151936), ("prompts", 4), ("group", 8),
                          ("prompt", 128), ("completion", 64), ("batch", 64), ("repeats", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--end", type=float, default=0.01)
    parser.add_argument("--dtype", default="float32")
    main(parser.parse_args())
