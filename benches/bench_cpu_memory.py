"""Memory and time of a training step on a CPU: glibc's malloc as it is, tuned (`--tune_malloc`), and in huge pages.

python benches/bench_cpu_memory.py [--hidden 256] [--layers 6] [--vocabulary 32000] [--steps 6] [--rounds 2]
    [--modes plain malloc pages both] [--packing off on] [--threads 1] [--dtype float32]

LoRA DPO through the engine, four pairs of long-tailed lengths a step; each run in a process of its own, the modes by
turns; the first step is warm-up. GB are what the process's own memory grew by at its peak after the model was there.
Files that are mapped into it (weights) are apart: the system drops and reads those as it likes.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODES = {"plain": (False, "0"), "malloc": (True, "0"), "pages": (False, "1"), "both": (True, "1")}
PAIRS = 4
TYPICAL, LONGEST = 62, 400  # tokens of an answer: about 2,500 in a padded step, 980 in a packed one


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """A Llama with random weights, and pairs of which the longest of each step sets the width of a padded batch."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(1000)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *words])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    heads = options.hidden // 64
    config = LlamaConfig(vocab_size=options.vocabulary, hidden_size=options.hidden, num_hidden_layers=options.layers,
                         intermediate_size=options.intermediate or 4 * options.hidden, num_attention_heads=heads,
                         num_key_value_heads=max(heads // 7, 1), tie_word_embeddings=True, bos_token_id=None,
                         eos_token_id=1, pad_token_id=1)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    draw = random.Random(0)

    def text(length: float) -> str:
        return " ".join(draw.choices(words, k=max(round(length), 1)))

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(PAIRS * options.steps):
            answers = [min(draw.lognormvariate(0, 1) * TYPICAL, LONGEST) for _ in range(2)]
            row = {"prompt": text(24 + 48 * draw.random()), "chosen": text(answers[0]), "rejected": text(answers[1])}
            file.write(json.dumps(row) + "\n")


def clock(record: list[tuple[float, float]], memory: list[int]) -> Any:
    """A callback that notes time at each step, and from the first on memory every 10 ms."""
    from transformers import TrainerCallback

    ended = threading.Event()

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            threading.Thread(target=watch, args=(memory, ended), daemon=True).start()
            record.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            record.append((time.perf_counter(), time.process_time()))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended.set()

    return Clock()


def watch(memory: list[int], ended: threading.Event) -> None:
    while not ended.is_set():
        memory.append(status("RssAnon"))
        time.sleep(0.01)


def status(name: str) -> int:
    """KiB of this process, by the name of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measure(mode: str, packing: str, folder: Path, options: argparse.Namespace) -> None:
    """One run; prints its numbers as JSON."""
    import torch

    from align_engine.recipe import DpoRecipe
    from align_engine.run import quiet_libraries, train

    quiet_libraries()
    torch.set_num_threads(options.threads)
    recipe = DpoRecipe()
    given = dict(model_name_or_path=str(folder / "model"), dataset_name=str(folder / "pairs.jsonl"),
                 bf16=False, dtype=options.dtype,
                 output_dir=str(folder / f"run-{os.getpid()}"), max_steps=options.steps, use_peft=True,
                 per_device_train_batch_size=PAIRS, save_steps=10**6, packing=packing, overwrite=True,
                 tune_malloc=MODES[mode][0], gradient_checkpointing=not options.no_checkpointing,
                 reference=options.reference)  # fmt: skip
    for section in vars(recipe).values():
        for name in set(vars(section)) & set(given):
            setattr(section, name, given[name])
    record, memory = list[tuple[float, float]](), list[int]()
    faults = page_faults()
    train("dpo", recipe, [clock(record, memory)])
    walls, works = zip(*[(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(record)][1:])
    more = (max(memory) - memory[0]) * 1024 / 1e9
    found = {"wall": statistics.median(walls), "work": statistics.median(works), "gb": more,
             "faults": page_faults() - faults}  # fmt: skip
    print("\nRESULT " + json.dumps(found))


def page_faults() -> int:
    """Page faults of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (("hidden", 256), ("layers", 6), ("vocabulary", 32000), ("intermediate", 0), ("steps", 6), ("rounds", 2),
             ("threads", 1))  # fmt: skip
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--packing", nargs="+", default=["off", "on"], choices=["off", "on"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--reference", default="auto")
    parser.add_argument("--only", nargs=3, metavar=("MODE", "PACKING", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure(options.only[0], options.only[1], Path(options.only[2]), options)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, options)
        print(
            f"{options}\n{'packing':9}{'mode':9}{'s a step':>10}{'of work':>10}{'GB more':>10}{'faults':>12}",
            flush=True,
        )
        for packing, mode in [*itertools.product(options.packing, options.modes)] * options.rounds:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", mode, packing, str(folder)]
            paths = {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
            around = os.environ | paths | {"THP_MEM_ALLOC_ENABLE": MODES[mode][1]}
            done = subprocess.run(command, capture_output=True, text=True, env=around)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            found = json.loads(done.stdout.rpartition("RESULT ")[2])
            numbers = f"{found['wall']:10.2f}{found['work']:10.2f}{found['gb']:10.3f}{found['faults']:12,}"
            print(f"{packing:9}{mode:9}{numbers}", flush=True)


if __name__ == "__main__":
    main()
