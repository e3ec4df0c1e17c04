"""`align plan` beside whole runs: the peak that is computed from the configuration, and the resident memory of a
process that trains (above what the same process held before, libraries loaded and warm).

    python benches/bench_plan.py                # writes benches/results/plan.json and the table of docs/plan.md
    python benches/bench_plan.py --cases "dpo, trees" --print

Models are made here, with random weights. A CPU of Linux; each run in a process of its own.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODELS = {  # layers, hidden, intermediate, vocabulary
    "12M": (6, 256, 688, 32000),
    "42M": (8, 512, 1408, 32000),
    "65M": (4, 384, 1024, 151936),
    "110M": (12, 768, 2048, 32000),
}
LORA = {"use_peft": True, "lora_r": 16}
KEPT = {"gradient_checkpointing": False}
GENERATION = {"per_device_generation_batch_size": 32, "steps_per_generation": 8}
ROUND = {"rounds": 1, "prompts_per_round": 16}
FOUR, TWO = {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2}
ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
CASES: dict[str, tuple[str, str, tuple[int, int], dict[str, Any]]] = {  # method, model, (prompt, completion), settings
    "sft": ("sft", "12M", (64, 192), KEPT),
    "sft, large vocabulary, recomputed": ("sft", "65M", (64, 192), FOUR),
    "sft, LoRA": ("sft", "110M", (64, 192), LORA | KEPT | FOUR),
    "dpo": ("dpo", "42M", (64, 64), KEPT | FOUR),
    "dpo, trees": ("dpo", "42M", (96, 32), {"packing": "on"} | KEPT),
    "dpo, passes of one pair": ("dpo", "42M", (128, 128), KEPT | ONE),
    "dpo, LoRA, large vocabulary": ("dpo", "65M", (64, 64), LORA | KEPT | FOUR),
    "dpo, second model, recomputed": ("dpo", "110M", (64, 64), {"reference": "frozen"} | TWO),
    "kto": ("kto", "42M", (64, 128), FOUR),
    "kto, LoRA, large vocabulary": ("kto", "65M", (64, 128), LORA | KEPT | FOUR),
    "rm, recomputed": ("rm", "110M", (64, 64), TWO),
    "grpo, trees": ("grpo", "42M", (64, 32), {"packing": "on"} | KEPT),
    "grpo, large vocabulary, generation alone": ("grpo", "65M", (96, 32), LORA | FOUR | GENERATION | {"beta": 0.0}),
    "rloo, LoRA": ("rloo", "42M", (64, 64), LORA | FOUR | GENERATION),
    "ppo, recomputed": ("ppo", "42M", (64, 32), {"num_ppo_epochs": 1} | FOUR),
    "iterate": ("iterate", "42M", (64, 32), {"rounds": 1, "prompts_per_round": 16} | KEPT | TWO),
    "iterate, LoRA, large vocabulary": (
        "iterate",
        "65M",
        (64, 32),
        {"rounds": 1, "prompts_per_round": 16} | LORA | TWO,
    ),
}
ONLINE = ("grpo", "ppo", "rloo", "iterate")
WORDS = 60


def write_model(folder: Path, name: str) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = folder / name
    if path.exists():
        return path
    layers, hidden, intermediate, vocabulary = MODELS[name]
    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(WORDS))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"unk_token": "<unk>", "eos_token": "<eos>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **tokens).save_pretrained(path)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
                         num_hidden_layers=layers, num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128,
                         eos_token_id=1, pad_token_id=0, bos_token_id=None, tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def write_rows(path: Path, method: str, each: tuple[int, int], count: int = 64) -> Path:
    """Rows of so many tokens, every other one shorter by a token."""
    words = lambda first, many: " ".join(f"w{(first * 7 + i * i) % WORDS}" for i in range(many))  # noqa: E731
    prompt, completion = each
    rows = []
    for i in range(count):
        short = i % 2
        if method in ONLINE:
            rows.append({"prompt": words(i, prompt - short)})
        elif method in ("sft", "kto"):
            answer = words(i + 1, completion - 1 - short)
            rows.append({"prompt": words(i, prompt), "completion": answer, "label": i % 2 == 0})
        else:
            chosen, rejected = words(i + 1, completion - 1), words(i + 2, completion - 1 - short)
            rows.append({"prompt": words(i, prompt), "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reward(completions: list[str], **_: Any) -> list[float]:
    return [len(set(text.split())) / 10 for text in completions]


def recipe_of(case: str, folder: Path, out: Path) -> tuple[str, Any]:
    from align_engine.recipe import RECIPES

    method, model, each, settings = CASES[case]
    rows = write_rows(folder / f"{method}-{sum(each)}.jsonl", method, each)
    given: dict[str, Any] = {
        "model_name_or_path": str(write_model(folder, model)), "dataset_name": str(rows), "output_dir": str(out),
        "max_length": sum(each), "max_prompt_length": each[0], "max_steps": 2, "bf16": False,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-5,
    }  # fmt: skip
    if method in ONLINE:
        given |= {"reward_funcs": [f"{__file__}:reward"], "num_generations": 4, "max_completion_length": each[1]}
    recipe, given = RECIPES[method](), given | settings
    for section in vars(recipe).values():
        for name in vars(section).keys() & given.keys():
            setattr(section, name, given[name])
    return method, recipe


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at their most."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def load() -> None:
    """What a run loads, late ones too."""
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401

    import align_engine.iterate
    import align_engine.reports.report  # noqa: F401
    from align_engine.run import quiet_libraries

    quiet_libraries()


def run(case: str, folder: Path) -> dict[str, Any]:
    """One run's peak above the process as it was before."""
    from align_engine.iterate import runner

    method, recipe = recipe_of(case, folder, folder / f"out-{os.getpid()}")
    # a small one before, so that pages of libraries, which a process maps as it needs them, are there
    MODELS["warm"], CASES["warm"] = (2, 128, 256, 1000), (method, "warm", (8, 8), CASES[case][3])
    runner(method)(recipe_of("warm", folder, folder / f"warm-{os.getpid()}")[1])
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    began = time.perf_counter()
    runner(method)(recipe)
    return {"before": before, "peak": resident(peak=True) - before, "seconds": time.perf_counter() - began}


def compute(case: str, folder: Path) -> dict[str, Any]:
    from align_engine.iterate import trained_by
    from align_engine.planning import cards
    from align_engine.planning.rehearse import Lengths, rehearse

    method, recipe, sampled = trained_by(*recipe_of(case, folder, folder / "none"))
    found = rehearse(method, recipe, cards.machine(), Lengths(*CASES[case][2]), sampled)
    parts = dict(found.peak.parts)
    return {"peak": found.peak.peak, "phase": found.peak.name, "parts": parts, "parameters": found.parameters}


def measure(case: str, folder: Path) -> dict[str, Any]:
    """What is computed here, and what a run takes in a process of its own."""
    method, model, each, settings = CASES[case]
    computed = compute(case, folder)
    command = [sys.executable, __file__, "--only", case, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    measured = json.loads(done.stdout.rpartition("RESULT ")[2])
    return {
        "case": case, "method": method, "model": model, "vocabulary": MODELS[model][3], "tokens": list(each),
        "settings": settings, "computed": computed, "measured": measured, "ratio": computed["peak"] / measured["peak"],
    }  # fmt: skip


def row(one: dict[str, Any]) -> str:
    mib = [one[kind]["peak"] / 2**20 for kind in ("computed", "measured")]
    return (f"| {one['case']} | {one['model']}, V = {one['vocabulary']} | {mib[0]:,.0f} | {mib[1]:,.0f} | "
            f"{one['ratio']:.2f} |")  # fmt: skip


HEAD = "| run | model | computed MiB | measured MiB | ratio |\n|---|---|---|---|---|"
BEGIN, END = "<!-- benches/bench_plan.py writes the table -->", "<!-- to here -->"


def keep(one: dict[str, Any]) -> None:
    """Put a result among those of other cases, and all of them into the page."""
    import torch
    import transformers

    path, page = ROOT / "benches" / "results" / "plan.json", ROOT / "docs" / "plan.md"
    with page.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several may run side by side
        runs = {run["case"]: run for run in json.loads(path.read_text())["runs"]} if path.exists() else {}
        runs[one["case"]] = one
        ordered = [runs[case] for case in CASES if case in runs]
        said = {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "torch": torch.__version__, "transformers": transformers.__version__, "runs": ordered}  # fmt: skip
        path.write_text(json.dumps(said, indent=1) + "\n")
        before, _, rest = file.read().partition(BEGIN)
        text = "\n".join([f"{before}{BEGIN}\n", HEAD, *map(row, ordered), f"\n{END}{rest.partition(END)[2]}"])
        file.seek(0)
        file.write(text)
        file.truncate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--only", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `align` has it
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    load()
    if options.only:
        print("\nRESULT " + json.dumps(run(options.only[0], Path(options.only[1]))))
        return
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in options.cases:
            one = measure(case, folder)
            print(row(one), flush=True)
            if not options.print:
                keep(one)


if __name__ == "__main__":
    main()
