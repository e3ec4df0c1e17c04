"""What a training step of TRL's trainers spends in the LM head, with `fuse` and without.

    python benches/trl_steps.py            # about four and a half minutes on two cores

V = 151936, D = 256, one layer, float32, every sequence half prompt, half completion. Each run is a process of its own:
TRL's hook, ours, and one whose log-probs cost nothing; what a run takes above the last is the head's. Seconds are the
median step of three after one; peak memory is the process's high-water mark, reset after the first.
"""

from __future__ import annotations

import argparse
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

V, D, PROMPT, COMPLETION, ROWS = 151936, 256, 96, 96, 2
CASES = (
    ("dpo", True),
    ("sft", True),
    ("kto", True),
    ("grpo", True),
    ("rloo", True),
    ("dpo", False),
)  # trainer, head trained
ONLINE = ("grpo", "rloo")
MODES = ("free", "fused", "trl")
WARM, STEPS = 1, 3


def free_head(model: Any, **_: Any) -> None:
    """TRL's hook without a head: numbers of the hidden states, with a gradient."""
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    call = model.forward

    @functools.wraps(call)
    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return call(*args, **kwargs)
        labels, hidden = labels[:, 1:], model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        mask, zero = labels != -100, torch.zeros(labels.shape)
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
        if kind == "dpo":
            row |= {"chosen": " " + text(i, COMPLETION - 1), "rejected": " " + text(i + 450, COMPLETION - 1)}
        elif not online:
            row["completion"] = " " + text(i, COMPLETION - 1)
        made.append(row | ({"label": i % 2 == 0} if kind == "kto" else {}))
    return made


def measure(kind: str, mode: str, trained: bool) -> dict[str, float]:
    """Seconds of the median step and the peak in MB, in this process."""
    import peft
    import torch
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    from align_engine.integrations.trl import fuse

    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<eos>", *(f"w{i}" for i in range(900))])}))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=D, intermediate_size=D, num_hidden_layers=1, num_attention_heads=4,
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=1)  # fmt: skip
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())
            if state.global_step == WARM:
                Path("/proc/self/clear_refs").write_text("5")

    name = kind.upper()
    with tempfile.TemporaryDirectory() as folder:
        own: dict[str, Any] = dict(per_device_train_batch_size=ROWS // (2 if kind == "dpo" else 1))
        given: dict[str, Any] = {}
        if kind in ONLINE:  # a quarter of the length, four times the sequences
            own = dict(
                per_device_train_batch_size=4 * ROWS, num_generations=2, max_completion_length=COMPLETION // 4, beta=0.0
            )
            given = dict(reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 97) for ids in completion_ids])
        elif kind != "sft":
            own |= dict(precompute_ref_log_probs=True)
        args = getattr(trl, f"{name}Config")(
            folder, max_steps=WARM + STEPS,
            optim="sgd", max_grad_norm=0.0, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
            disable_tqdm=True, logging_steps=1000, gradient_checkpointing=False, **own,
        )  # fmt: skip
        trainer = getattr(trl, f"{name}Trainer")
        if mode == "free":
            sys.modules[trainer.__module__].add_fused_lm_head = free_head
        elif mode == "fused":
            fuse()
        adapter = None if trained else peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = trainer(
            model=LlamaForCausalLM(config), args=args, train_dataset=Dataset.from_list(rows(kind, 8)),
            processing_class=tokenizer, peft_config=adapter, callbacks=[Clock()], **given,
        )  # fmt: skip
        trainer.train()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    steps = [b - a for a, b in zip(times[WARM - 1 :], times[WARM:])]
    return dict(seconds=statistics.median(steps), peak=int(status["VmHWM"].split()[0]) * 1024 / 1e6)


def alone(kind: str, mode: str, trained: bool) -> dict[str, float]:
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--one", kind, mode, str(int(trained))]
    env = os.environ | {"PYTHONPATH": paths, "CI": "1", "OMP_WAIT_POLICY": "passive"}
    out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main() -> None:
    print(
        "| trainer | head | seconds of the head a step: fuse | TRL | ratio | peak MB of the head: fuse | TRL | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind, trained in CASES:
        found = {mode: alone(kind, mode, trained) for mode in MODES}
        line = [kind, "trained" if trained else "frozen"]
        for what, digits in (("seconds", 3), ("peak", 0)):
            ours, theirs = (found[mode][what] - found["free"][what] for mode in ("fused", "trl"))
            line += [f"{ours:.{digits}f}", f"{theirs:.{digits}f}", f"{theirs / ours:.1f}x"]
        print("|", " | ".join(line), "|", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("TRAINER", "MODE", "TRAINED"))
    one = parser.parse_args().one
    if one:
        print(json.dumps(measure(one[0], one[1], one[2] == "1")))
    else:
        main()
