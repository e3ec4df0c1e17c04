"""`--fit` on several sizes of memory: what a run of each chose and why, as printed, and what its process took.

    python benches/bench_fit.py                 # writes benches/results/fit.json and the part of docs/plan.md
    python benches/bench_fit.py --sizes 3GB --print

A CPU of Linux; the model is made here, with random weights, as benches/bench_plan.py makes it. Some two minutes a size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_plan import ROOT, write_model, write_rows

from align_engine.planning import cards

SIZES = ("3GB", "1.7GB", "1.2GB", "850MB")  # the last one is refused
MODEL, EACH = "42M", (128, 128)
FLAGS = ("--max_length", str(sum(EACH)), "--per_device_train_batch_size", "8", "--gradient_checkpointing", "false",
         "--max_steps", "2")  # fmt: skip
BEGIN, END = "<!-- benches/bench_fit.py writes from here -->", "<!-- to there -->"
PAGE, RESULTS = ROOT / "docs" / "plan.md", ROOT / "benches" / "results" / "fit.json"


def run(size: str, folder: Path) -> dict[str, Any]:
    """One run of the command: what it said of its memory, and the most that its process had resident."""
    model, rows = write_model(folder, MODEL), write_rows(folder / "pairs.jsonl", "dpo", EACH)
    command = [sys.executable, "-m", "align_engine", "dpo", "--model_name_or_path", str(model), "--dataset_name",
               str(rows), "--output_dir", str(folder / size), *FLAGS, "--fit", size]  # fmt: skip
    own = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "ALIGN_CACHE": str(folder / f"{size}-cache")}
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | own)
        _, status, used = os.wait4(child.pid, 0)
        out.seek(0)
        lines = out.read().splitlines()
    if (code := os.waitstatus_to_exitcode(status)) not in (0, 2):
        raise SystemExit("\n".join(lines[-20:]))
    ends = code == 0
    said = [line for line in lines if line.startswith(("fit ", "  --") if ends else "align")]
    return {"size": size, "ends": ends, "said": said, "process": used.ru_maxrss * 1024}


def written(runs: list[dict[str, Any]]) -> str:
    """The part of the page."""
    text = ["```console"]
    for one in runs:
        text += ["$ align dpo --model_name_or_path MODEL --dataset_name pairs.jsonl --output_dir OUT \\",
                 f"    {' '.join(FLAGS)} --fit {one['size']}", *one["said"]]  # fmt: skip
    text += ["```", "", "| asked for, GB | most resident memory of the process, GB |", "|---|---|"]
    for one in runs:
        taken = f"{one['process'] / cards.GB:.2f}" if one["ends"] else "refused before weights were loaded"
        text.append(f"| {cards.card(one['size']).size / cards.GB:g} | {taken} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        runs = [run(size, Path(name)) for size in options.sizes]
    print(written(runs))
    if not options.print:
        said = {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "model": MODEL, "tokens": EACH, "flags": FLAGS, "runs": runs}  # fmt: skip
        RESULTS.write_text(json.dumps(said, indent=1) + "\n")
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{written(runs)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
