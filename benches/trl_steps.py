"""What a training step of TRL's trainers spends in the LM head, with `fuse` and without.

    python benches/trl_steps.py                            # about twelve minutes on two cores
    python benches/trl_steps.py dpo sft --vocabulary 9000  # some of them, smaller

V = 151936, D = 256, one layer, float32, every sequence half prompt, half completion; the head trained, and frozen under
an adapter. Each run is a process of its own: TRL's hook, ours, and one whose log-probs cost nothing; what a run takes
above the last is the head's. Seconds are the median step of three after one; peak memory is the process's high-water
mark, reset after the first; FLOPs are those of the matrix products of a fifth step, in units of N V D, N being the
rows that carry a gradient: the last column is what they may cost, 6 a row, 4 where the head is frozen, 2 a row without
gradient.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

D, PROMPT, COMPLETION, ROWS = 256, 96, 96, 2
TRAINERS = ("dpo", "sft", "kto", "grpo", "rloo", "gmpo", "bema", "async_grpo")
ONLINE = ("grpo", "rloo", "gmpo", "async_grpo")
ADAPTED = tuple(kind for kind in TRAINERS if kind != "bema")  # TRL's callback cannot copy an adapted model
MODES = ("free", "fused", "trl")
WARM, STEPS = 1, 3


def free_head(model: Any, **_: Any) -> None:
    """TRL's hook without a head: numbers of the hidden states, with a gradient."""
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    call = model.forward

    @functools.wraps(call)
    def forward(
        *args: Any, fused_lm_head: bool = False, labels: Any = None, shift_labels: Any = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            return call(*args, **kwargs)
        hidden = model.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            shift_labels, hidden = labels[:, 1:], hidden[:, :-1]
        mask, zero = shift_labels != -100, torch.zeros(shift_labels.shape)
        logp = (hidden.sum(-1) * 1e-3).masked_fill(~mask, 0)
        return FusedCausalLMOutput(log_probs=logp, entropy=zero, log_sum_sq_probs=zero, mean_logits=zero,
                                   is_top1=mask, label_mask=mask)  # fmt: skip

    model.forward = forward


def rows(kind: str, count: int) -> list[dict[str, Any]]:
    """Texts of fixed length in a vocabulary of which they use little."""
    text = lambda start, n: " ".join(f"w{(start + i) % 900}" for i in range(n))  # noqa: E731
    made, online = [], kind in ONLINE
    for i in range(count):
        row: dict[str, Any] = {"prompt": text(7 * i, PROMPT // 4 if online else PROMPT)}
        if kind in ("dpo", "bema"):
            row |= {"chosen": " " + text(i, COMPLETION - 1), "rejected": " " + text(i + 450, COMPLETION - 1)}
        elif not online:
            row["completion"] = " " + text(i, COMPLETION - 1)
        made.append(row | ({"label": i % 2 == 0} if kind == "kto" else {}))
    return made


def measure(kind: str, mode: str, trained: bool, vocabulary: int) -> dict[str, float]:
    """Of the median step: seconds, peak in MB; of one more: FLOPs, the rows that carry a gradient and what they may
    cost, in V D. In this process."""
    import numpy as np
    import peft
    import torch
    import trl_async
    import trl_runs
    from datasets import Dataset
    from products import Products
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl.trainer.utils import FusedCausalLMOutput

    from align_engine.integrations.trl import fuse

    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<eos>", *(f"w{i}" for i in range(900))])}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=D, intermediate_size=D, num_hidden_layers=1,
                         num_attention_heads=4, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
                         pad_token_id=1)  # fmt: skip
    times: list[float] = []
    peak: list[float] = []
    found: list[tuple[int, bool]] = []
    counter = Products()

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM + STEPS:
                found.clear()
                counter.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())
            if state.global_step == WARM:
                ctypes.CDLL(None).malloc_trim(0)  # else the head fits into what others have freed
                Path("/proc/self/clear_refs").write_text("5")
            elif state.global_step == WARM + STEPS:
                status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
                peak.append(int(status["VmHWM"].split()[0]) * 1024 / 1e6)
            elif state.global_step == WARM + STEPS + 1:
                counter.__exit__(None, None, None)

    def record(model: Any, args: Any, out: Any) -> None:
        if isinstance(out, FusedCausalLMOutput):
            found.append((int(out.label_mask.sum()), out.log_probs.requires_grad))

    kinds = trl_runs.KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        own: dict[str, Any] = dict(per_device_train_batch_size=ROWS)
        given: dict[str, Any] = dict(callbacks=[Clock()])
        if kind in ONLINE:  # a quarter of the length, four times the sequences
            own = dict(per_device_train_batch_size=4 * ROWS, num_generations=2, max_completion_length=COMPLETION // 4)
        if kind == "async_grpo":
            own |= dict(token_budget=0, max_staleness=100)
            samples = 4 * ROWS * (WARM + STEPS + 3)
            ids = np.random.default_rng(0).integers(2, 900, (samples, COMPLETION // 4))
            given |= trl_async.without_server((np.arange(2, 2 + PROMPT // 4) + i // 4, ids[i]) for i in range(samples))
        elif kind in ONLINE:
            own |= dict(beta=0.0)
            given["reward_funcs"] = lambda completion_ids, **_: [float(sum(ids) % 97) for ids in completion_ids]
        elif kind != "sft":
            own |= dict(precompute_ref_log_probs=kind != "bema")
        if kind in ("dpo", "bema"):  # pairs
            own["per_device_train_batch_size"] //= 2
        if kind == "bema":
            given["callbacks"].append(trl_runs.bema())
        args = kinds.find("Config")(
            folder, max_steps=WARM + STEPS + 1,
            optim="sgd", max_grad_norm=0.0, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
            disable_tqdm=True, logging_steps=1000, gradient_checkpointing=False, **own,
        )  # fmt: skip
        trainer = kinds.find("Trainer")
        if mode == "free":
            for name in {base.__module__ for base in trainer.__mro__ if base.__module__.startswith("trl.")}:
                vars(sys.modules[name]).update(add_fused_lm_head=free_head)
        elif mode == "fused":
            fuse()
        model: Any = LlamaForCausalLM(config)
        if kind in ("bema", "async_grpo"):  # they load one themselves, the reference or the policy
            model.save_pretrained(folder)
            model = folder if kind == "async_grpo" else LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        trainer = trainer(
            model=model, args=args, processing_class=tokenizer,
            train_dataset=Dataset.from_list(rows(kind, 8)), **given,
            peft_config=None if trained else peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )  # fmt: skip
        for scored in {trainer.model, getattr(trainer, "ref_model", None)} - {None}:
            (scored.get_base_model() if hasattr(scored, "get_base_model") else scored).register_forward_hook(record)
        trainer.train()
    steps = [b - a for a, b in zip(times[WARM - 1 :], times[WARM : WARM + STEPS])]
    price = {True: 6 if trained else 4, False: 2}
    return dict(
        seconds=statistics.median(steps), peak=peak[0], flops=counter.total() / vocabulary / D,
        rows=sum(count for count, grad in found if grad), bound=sum(price[grad] * count for count, grad in found),
    )  # fmt: skip


def alone(kind: str, mode: str, trained: bool, vocabulary: int) -> dict[str, float]:
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(
        [*map(str, (root, root / "kernels", root / "tests/helpers")), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, __file__, "--one", kind, mode, str(int(trained)), "--vocabulary", str(vocabulary)]
    env = os.environ | {"PYTHONPATH": paths, "CI": "1", "OMP_WAIT_POLICY": "passive", "TRL_EXPERIMENTAL_SILENCE": "1"}
    out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main(trainers: list[str], vocabulary: int) -> None:
    print("| trainer | head | seconds of the head a step: fuse | TRL | ratio | peak MB of the head: fuse | TRL | ratio "
          "| FLOPs of the head, N V D: fuse | TRL | may |")  # fmt: skip
    print("|---" * 11 + "|")
    for trained in (True, False):
        for kind in trainers:
            if not trained and kind not in ADAPTED:
                continue
            found = {mode: alone(kind, mode, trained, vocabulary) for mode in MODES}
            line = [kind, "trained" if trained else "frozen"]
            for what, digits in (("seconds", 3), ("peak", 0)):
                ours, theirs = (found[mode][what] - found["free"][what] for mode in ("fused", "trl"))
                ratio = f"{theirs / ours:.1f}x" if ours > 0 else "-"  # ours is lost in the noise
                line += [f"{ours:.{digits}f}", f"{theirs:.{digits}f}", ratio]
            n = found["fused"]["rows"]
            flops = [(found[mode]["flops"] - found["free"]["flops"]) / n for mode in ("fused", "trl")]
            line += [f"{x:.2f}" for x in (*flops, found["fused"]["bound"] / n)]
            print("|", " | ".join(line), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="*", default=list(TRAINERS), help=f"of {', '.join(TRAINERS)}; default all")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--one", nargs=3, metavar=("TRAINER", "MODE", "TRAINED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        kind, mode, trained = given.one
        print(json.dumps(measure(kind, mode, trained == "1", given.vocabulary)))
    else:
        main(given.trainers, given.vocabulary)
