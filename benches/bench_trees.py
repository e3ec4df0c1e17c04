"""Training steps on packed rows of trees beside the same steps on padded batches.

python benches/bench_trees.py [--hidden 256] [--layers 4] [--vocabulary 2048] [--repeats 5] [--dtype float32]
    [--shape PROMPTS COMPLETIONS TOKENS TOKENS]    # of a prompt and a completion: that one alone

DPO on pairs and GRPO on groups of samples, through the fused losses: forward and backward of one batch, the two layouts
by turns. A line has the tokens that the model reads, those of all sequences per second (each with its prompt, so that
layouts compare) and the ratio of the medians. Then DPO on three chosen and three rejected answers of each prompt: a
row of all, beside one of each of the nine pairs, which an epoch's order puts into nine batches. Seconds are the
process's own on a CPU, where other work may run beside.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from align_engine.data.batches import Batch, collate_pairs, collate_rollouts
from align_engine.integrations.hook import fused_head
from align_engine.models.load import checkpoint_activations
from align_engine.models.tree_attention import reading
from align_kernels import dpo_loss, grpo_loss

# prompts, completions of each, their mean lengths
SHAPES = ((8, 2, 256, 128), (8, 2, 128, 256), (2, 8, 256, 128), (2, 8, 512, 64))
ANSWERS = 3  # on each side
SEVERAL = ((4, 128, 128), (4, 256, 128), (4, 512, 128))  # prompts, mean lengths of prompts and answers
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Loss = Callable[[Tensor, dict[str, Any], Any], Tensor]


def pairs(hidden: Tensor, head: dict[str, Any], batch: Batch) -> Tensor:
    ref = torch.zeros(len(batch.targets), device=hidden.device)
    return dpo_loss(hidden, targets=batch.targets, ref_logps=ref, pairs=batch.pairs, **head).loss


def samples(hidden: Tensor, head: dict[str, Any], batch: Any) -> Tensor:
    return grpo_loss(hidden, targets=batch.targets, old_logps=None, advantages=batch.advantages, **head).loss


def drawn(options: argparse.Namespace) -> Callable[[int], list[int]]:
    """Gives ids of half to one and a half times a length."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        size = int(torch.randint(length // 2, 3 * length // 2, (), generator=draw))
        return torch.randint(0, options.vocabulary, (size,), generator=draw).tolist()

    return ids


def rows(options: argparse.Namespace, count: int, group: int, prompt: int, completion: int) -> list[dict[str, Any]]:
    """Prompts and completions."""
    ids = drawn(options)
    found: list[dict[str, Any]] = []
    for _ in range(count):
        asked = ids(prompt)
        answers = [ids(completion) for _ in range(group)]
        if group == 2:
            found.append({"prompt_ids": asked, "chosen_ids": answers[0], "rejected_ids": answers[1]})
        else:
            found += [
                {"prompt_ids": asked, "completion_ids": one, "advantages": torch.randn(len(one))} for one in answers
            ]
    return [row | {"index": i} for i, row in enumerate(found)]


def step(model: Any, batch: Batch, loss: Loss) -> float:
    """Seconds of a forward and a backward pass."""
    model.zero_grad()
    clock = time.process_time if DEVICE.type == "cpu" else time.perf_counter
    start = clock()
    with reading(model, batch) as inputs:
        with fused_head(model, lambda hidden, head: loss(batch.predicting(hidden), head, batch)):
            value = model(**inputs, use_cache=False).logits
        value.backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def several(options: argparse.Namespace, count: int, prompt: int, answer: int) -> list[list[dict[str, Any]]]:
    """A batch of rows with all their answers, and the batches of single pairs that are the same."""
    ids = drawn(options)
    whole = [
        {"index": i, "prompt_ids": ids(prompt)}
        | {f"{side}_ids": [ids(answer) for _ in range(ANSWERS)] for side in ("chosen", "rejected")}
        for i in range(count)
    ]
    places = [(i, j) for i in range(ANSWERS) for j in range(ANSWERS)]
    single = [
        [row | {"chosen_ids": row["chosen_ids"][i], "rejected_ids": row["rejected_ids"][j]} for row in whole]
        for i, j in places
    ]
    return [whole, *single]


def of_several(model: Any, options: argparse.Namespace) -> None:
    for shape in SEVERAL:
        whole, *single = several(options, *shape)
        print("{} prompts x {} x {} answers, about {} + {} tokens".format(shape[0], ANSWERS, ANSWERS, *shape[1:]))
        for name, pad in (("padded", 0), ("packed", None)):
            ways = {"pairs": single, "rows": [whole]}
            batches = {way: [collate_pairs(made, pad_id=pad).to(DEVICE) for made in ways[way]] for way in ways}
            times: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(options.repeats + 1):
                for way in ways:
                    seconds = sum(step(model, batch, pairs) for batch in batches[way])
                    if turn:
                        times[way].append(seconds)
            medians = {way: statistics.median(found) for way, found in times.items()}
            for way, median in medians.items():
                read, rate = sum(batch.input_ids.numel() for batch in batches[way]), ANSWERS**2 * shape[0] / median
                said = f"{rate:9.1f} pairs/s  x{medians['pairs'] / median:.2f}"
                print(f"  {name}, {len(batches[way])} batches of {way}  reads {read:6d}  {said}")


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=options.layers,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=options.vocabulary,
    )  # fmt: skip
    model: Any = Qwen2ForCausalLM(config)
    model = model.to(DEVICE, getattr(torch, options.dtype)).train()
    if options.checkpointing:
        checkpoint_activations(model)
    print(f"{DEVICE}, {options.dtype}, D {options.hidden}, {options.layers} layers, V {options.vocabulary}")
    for shape in (options.shape,) if options.shape else SHAPES:
        made, (collate, loss) = (
            rows(options, *shape),
            ((collate_pairs, pairs) if shape[1] == 2 else (collate_rollouts, samples)),
        )
        batches = {name: collate(made, pad_id=pad).to(DEVICE) for name, pad in (("padded", 0), ("packed", None))}
        times: dict[str, list[float]] = {name: [] for name in batches}
        for turn in range(options.repeats + 1):
            for name, batch in batches.items():
                seconds = step(model, batch, loss)
                if turn:  # the first one warms up
                    times[name].append(seconds)
        print("{} prompts x {} completions, about {} + {} tokens".format(*shape))
        slow = statistics.median(times["padded"])
        for name, batch in batches.items():
            median = statistics.median(times[name])
            rate, read = batches["padded"].num_read / median, batch.input_ids.numel()
            print(f"  {name}  reads {read:6d}  {rate:9.0f} tokens/s  x{slow / median:.2f}")
    if not options.shape:
        of_several(model, options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 4), ("vocabulary", 2048), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shape", type=int, nargs=4)
    parser.add_argument("--checkpointing", action="store_true")
    main(parser.parse_args())
