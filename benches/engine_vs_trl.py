"""This engine beside TRL's trainers: seconds per step and peak memory on one model, data, order and settings.

python benches/engine_vs_trl.py [--methods dpo kto] [--vocabulary 32000] [--length 128] [--batch 8] [--steps 12]

Each run has a process of its own; the first two steps are warm-up. Memory is what the process grew by after the model
and the data were there: resident on a CPU, allocated on a GPU.
KTO's losses part after some steps: TRL pairs the first prompt of a batch with its last completion, the engine with the
completion before it in the permutation of all rows. GRPO's are those of each side's own samples.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

WARM_UP = 2
ROOT = Path(__file__).parents[1]
METHODS = ("dpo", "kto", "grpo")
GROUP = 4  # completions of a prompt


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """A small Llama with a large vocabulary, and rows of words: a quarter prompt, the rest answer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "<pad>", *(f"w{i}" for i in range(options.vocabulary - 3))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=options.vocabulary, hidden_size=options.hidden, num_hidden_layers=4,
                         intermediate_size=3 * options.hidden, num_attention_heads=4, eos_token_id=1,
                         bos_token_id=None, pad_token_id=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw, quarter = random.Random(0), options.length // 4
    text = lambda count: " " + " ".join(draw.choices(words[3:], k=count))  # noqa: E731
    answer = options.length - quarter - 1
    for method in METHODS:
        with (folder / f"{method}.jsonl").open("w") as file:
            for i in range(options.batch * options.steps):
                row: dict[str, Any] = {"prompt": text(quarter).strip()}
                if method == "dpo":
                    row |= {"chosen": text(answer), "rejected": text(answer)}
                elif method == "kto":
                    row |= {"completion": text(answer), "label": i % 2 == 0}
                file.write(json.dumps(row) + "\n")


def settings(options: argparse.Namespace, method: str, folder: Path, out: str) -> dict[str, Any]:
    """What both sides share, under the names that both have."""
    shared = {"output_dir": str(folder / f"{method}-{out}"), "max_steps": options.steps, "learning_rate": 1e-5,
            "per_device_train_batch_size": options.batch, "logging_steps": 1, "bf16": False, "report_to": [],
            "gradient_checkpointing": False}  # fmt: skip
    if method == "grpo":
        room = options.length - options.length // 4
        return shared | {"num_generations": GROUP, "max_completion_length": room, "beta": 0.0}
    return shared | {"max_length": options.length}


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Share of a completion's words with an even number."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(len(text.split()), 1) for text in completions]


def clock(record: list[tuple[float, float]]) -> Any:
    """A callback that notes time and peak memory at each step."""
    import time

    import torch
    from transformers import TrainerCallback

    from align_engine.training.metrics import peak_memory_mib

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            record.append((time.perf_counter(), peak_memory_mib(device)))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            record.append((time.perf_counter(), peak_memory_mib(device)))

    return Clock()


def engine(method: str, folder: Path, shared: dict[str, Any], record: list[tuple[float, float]]) -> list[float]:
    from align_engine.recipe import RECIPES
    from align_engine.run import quiet_libraries, train
    from align_engine.training.metrics import read

    quiet_libraries()
    recipe = RECIPES[method]()
    given = shared | {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / f"{method}.jsonl"),
                      "save_steps": 10**6, "reference": "frozen", "reward_funcs": [f"{__file__}:reward"]}  # fmt: skip
    for section in vars(recipe).values():
        for name in set(vars(section)) & set(given):
            setattr(section, name, given[name])
    return [line["loss"] for line in read(train(method, recipe, [clock(record)]).metrics)]


def trl(method: str, folder: Path, shared: dict[str, Any], record: list[tuple[float, float]]) -> list[float]:
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align_engine.data.batches import epoch_order

    rows = load_dataset("json", data_files=str(folder / f"{method}.jsonl"), split="train")
    name = method.upper()
    order = {"shuffle_dataset": False} if method == "grpo" else {"train_sampling_strategy": "sequential"}
    config = getattr(trl, f"{name}Config")(**shared, **order, save_strategy="no", disable_tqdm=True)
    trainer = getattr(trl, f"{name}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=config,
        train_dataset=rows.select(epoch_order(len(rows), 42, 0)),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock(record)],
        **({"reward_funcs": reward} if method == "grpo" else {}),
    )
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def measure(side: str, method: str, folder: Path, options: argparse.Namespace) -> None:
    """One run; prints its numbers as JSON."""
    record: list[tuple[float, float]] = []
    losses = {"engine": engine, "trl": trl}[side](method, folder, settings(options, method, folder, side), record)
    times, peaks = zip(*record)
    steps = [after - before for before, after in pairwise(times)][WARM_UP:]
    found = {"seconds": statistics.median(steps), "memory": peaks[-1] - peaks[0], "losses": losses}
    print("\nRESULT " + json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    for name, default in (("vocabulary", 32000), ("hidden", 256), ("length", 128), ("batch", 8), ("steps", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", nargs=3, metavar=("SIDE", "METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options.only[0], options.only[1], Path(options.only[2]), options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options)
        print(f"{options}\n{'method':8}{'side':8}{'s per step':>12}{'MiB more':>10}   first and last loss")
        for method in options.methods:
            for side in ("trl", "engine"):
                command = [sys.executable, __file__, *sys.argv[1:], "--only", side, method, str(folder)]
                paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                found = json.loads(done.stdout.rpartition("RESULT ")[2])
                ends = f"{found['losses'][0]:.5f} {found['losses'][-1]:.5f}"
                print(f"{method:8}{side:8}{found['seconds']:12.3f}{found['memory']:10.0f}   {ends}", flush=True)


if __name__ == "__main__":
    main()
