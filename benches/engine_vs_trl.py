"""This engine beside TRL's trainers: tokens per second and peak memory on one model, data, order and settings.

python benches/engine_vs_trl.py [--methods sft rm dpo kto grpo ppo] [--vocabulary 151936] [--rounds 3] [--json FILE]

Rows are half prompt and half answer, their lengths drawn from a long-tailed (lognormal) distribution. Three sides take
turns, round after round, each run in a process of its own: TRL with what serves it best on these rows, this engine with
`packing: on`, and with `packing: off`. TRL's best: rows grouped by length, the reference's log-probs computed before
(dpo, kto), no gradient checkpointing. The seconds are those of all steps of one epoch and of the pass that computes the
reference; tokens are those of the rows, prompts counted with each answer, padding never. TRL 1.16 has no PPO, so there
the engine stands alone. Memory is what the process grew by, at its peak, after model and data were there, less AdamW's
two moments of each weight. A ratio is one of medians over the rounds.

KTO's losses part after some steps: TRL pairs the first prompt of a batch with its last completion, the engine with the
completion before it in the permutation of all rows. GRPO's and PPO's are those of each side's own samples.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
METHODS = ("sft", "rm", "dpo", "kto", "grpo", "ppo")
SIDES = ("trl", "packed", "padded")
PAIRS, ONLINE = ("rm", "dpo"), ("grpo", "ppo")
GROUP = 8  # completions of a prompt, in grpo
Record = list[tuple[float, float]]


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """A small Llama with a large vocabulary, and rows of words."""
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
                         bos_token_id=None, pad_token_id=2, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(0)

    def text() -> str:
        """Half a row: a lognormal number of words, from an eighth of the median to half of the longest row."""
        drawn = int(draw.lognormvariate(0, 0.8) * options.median / 2)
        return " ".join(draw.choices(words[3:], k=min(max(drawn, options.median // 8), options.longest // 2 - 1)))

    for method in METHODS:
        with (folder / f"{method}.jsonl").open("w") as file:
            for i in range(options.batch * options.steps):
                row: dict[str, Any] = {"prompt": text()}
                if method in PAIRS:
                    row |= {"chosen": " " + text(), "rejected": " " + text()}
                elif method not in ONLINE:
                    row |= {"completion": " " + text()} | ({"label": i % 2 == 0} if method == "kto" else {})
                answers = [answer for name, answer in row.items() if name not in ("prompt", "label")]
                row["length"] = max((len(f"{row['prompt']}{answer}".split()) for answer in answers), default=0)
                file.write(json.dumps(row) + "\n")


def tokens(folder: Path, method: str, options: argparse.Namespace) -> int:
    """Of all rows of a method, each prompt with every answer of its own, and an EOS token."""
    rows = [json.loads(line) for line in (folder / f"{method}.jsonl").read_text().splitlines()]
    if method in ONLINE:
        count = GROUP if method == "grpo" else 1
        return sum(count * (len(row["prompt"].split()) + options.completion) for row in rows)
    names = ("chosen", "rejected", "completion")
    return sum(len(f"{row['prompt']}{row[name]}".split()) + 1 for row in rows for name in names if name in row)


def settings(options: argparse.Namespace, method: str, folder: Path, out: str) -> dict[str, Any]:
    """What both sides share, under the names that both have."""
    rows = options.batch * (GROUP if method == "grpo" else 1)
    shared = {"output_dir": str(folder / f"{method}-{out}"), "max_steps": options.steps, "learning_rate": 1e-5,
              "per_device_train_batch_size": rows, "logging_steps": 1, "bf16": False, "report_to": [],
              "gradient_checkpointing": False}  # fmt: skip
    if method == "grpo":
        shared |= {"num_generations": GROUP, "beta": 0.0}
    return shared | ({"max_completion_length": options.completion} if method in ONLINE else {"max_length": None})


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Share of a completion's words with an even number."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(len(text.split()), 1) for text in completions]


def clock(record: Record) -> Any:
    """A callback that notes time and peak memory at each step."""
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


def timed(owner: Any, name: str, spent: list[float]) -> None:
    """Have the calls of a function add up their seconds."""
    inner: Callable[..., Any] = getattr(owner, name)

    def around(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    setattr(owner, name, around)


def engine(
    method: str, folder: Path, shared: dict[str, Any], record: Record, passes: list[float], packing: str
) -> list[float]:
    from align_engine.recipe import RECIPES
    from align_engine.run import precomputed, quiet_libraries, train
    from align_engine.training.metrics import read

    quiet_libraries()
    timed(precomputed, "precompute_all", passes)
    recipe = RECIPES[method]()
    given = shared | {"model_name_or_path": str(folder / "model"), "dataset_name": str(folder / f"{method}.jsonl"),
                      "save_steps": 10**6, "packing": packing, "reward_funcs": [f"{__file__}:reward"]}  # fmt: skip
    for section in vars(recipe).values():
        for name in set(vars(section)) & set(given):
            setattr(section, name, given[name])
    return [line["loss"] for line in read(train(method, recipe, [clock(record)]).metrics) if "loss" in line]


def trl(method: str, folder: Path, shared: dict[str, Any], record: Record, passes: list[float]) -> list[float]:
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    name = {"rm": "Reward"}.get(method, method.upper())
    kind, trainer_type = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    best: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    best = {} if method in ONLINE else best
    if method in ("dpo", "kto"):
        best["precompute_ref_log_probs"] = True
        timed(trainer_type, "_precompute_ref_logps", passes)
    if method == "kto":  # takes its rows in order, since the mismatched completions are made before
        best["train_sampling_strategy"] = "sequential"
    auto, more = (
        (AutoModelForSequenceClassification, {"num_labels": 1}) if method == "rm" else (AutoModelForCausalLM, {})
    )
    rows = load_dataset("json", data_files=str(folder / f"{method}.jsonl"), split="train")
    trainer = trainer_type(
        model=auto.from_pretrained(folder / "model", **more),
        args=kind(**shared, **best, save_strategy="no", disable_tqdm=True),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock(record)],
        **({"reward_funcs": reward} if method in ONLINE else {}),
    )
    if best.get("train_sampling_strategy") == "group_by_length" and "length" not in trainer.train_dataset.column_names:
        trainer.train_dataset = trainer.train_dataset.add_column("length", rows["length"])
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def measure(side: str, method: str, folder: Path, options: argparse.Namespace) -> None:
    """One run; prints its numbers as JSON."""
    import torch
    from safetensors import safe_open

    record, passes = [], []
    shared = settings(options, method, folder, f"{side}-{time.time_ns()}")
    if side == "trl":
        losses = trl(method, folder, shared, record, passes)
    else:
        losses = engine(method, folder, shared, record, passes, {"packed": "on", "padded": "off"}[side])
    times, peaks = zip(*record)
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        weights = sum(file.get_tensor(name).numel() for name in file.keys())
    moments = 2 * 4 * weights / 2**20
    found = {"seconds": times[-1] - times[0], "pass": sum(passes), "memory": peaks[-1] - peaks[0] - moments,
             "losses": losses, "torch": torch.__version__}  # fmt: skip
    print("\nRESULT " + json.dumps(found))


def run(side: str, method: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", side, method, str(folder)]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    around = {"PYTHONPATH": paths, "HF_HOME": str(folder / "cache" / str(time.time_ns()))}  # nothing computed before
    if side != "trl":
        around["THP_MEM_ALLOC_ENABLE"] = "1"  # as `align` has it
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | around)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    for name, default in (("vocabulary", 151936), ("hidden", 256), ("median", 96), ("longest", 768), ("batch", 4),
                          ("completion", 64), ("steps", 8), ("rounds", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=3, metavar=("SIDE", "METHOD", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options.only[0], options.only[1], Path(options.only[2]), options)
        return
    results: dict[str, Any] = {"command": sys.argv, "settings": {k: v for k, v in vars(options).items() if k != "json"}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options)
        print(f"{results['settings']}\n{'method':7}{'side':8}{'tokens/s':>9}{'s':>8}{'pass s':>8}{'MiB more':>10}"
              "   first and last loss")  # fmt: skip
        for method in options.methods:
            sides = SIDES[1:] if method == "ppo" else SIDES
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for _ in range(options.rounds):
                for side in sides:
                    runs[side].append(run(side, method, folder))
            read, medians = tokens(folder, method, options), {}
            for side, found in runs.items():
                seconds, before = (statistics.median(one[key] for one in found) for key in ("seconds", "pass"))
                memory = statistics.median(one["memory"] for one in found)
                medians[side] = (statistics.median(one["seconds"] + one["pass"] for one in found), memory)
                ends = f"{found[0]['losses'][0]:.5f} {found[0]['losses'][-1]:.5f}"
                rate = read / medians[side][0]
                print(f"{method:7}{side:8}{rate:9.0f}{seconds:8.2f}{before:8.2f}{memory:10.0f}   {ends}", flush=True)
            took, room = medians["packed"]
            for side in sides:
                if side != "packed":
                    slower, larger = medians[side][0] / took, medians[side][1] / room
                    print(f"{method:7}packed: {slower:.2f} x the tokens/s of {side}, whose memory is {larger:.2f} x")
            results[method] = {"tokens": read, "runs": runs}
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
