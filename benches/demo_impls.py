"""DPO of the demo with whole logits (impl=eager) and with the fused kernels (impl=cpu): losses and peak memory.

align demo --seeds 0 && python benches/demo_impls.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "demo-dpo.yaml"


def run(impl: str, folder: Path) -> list[dict]:
    """The metrics of one run, in a process of its own."""
    flags = ["--output_dir", str(folder), "--logging_steps", "1", "--impl", impl]
    command = [sys.executable, "-m", "align_engine", "dpo", "--recipe", str(RECIPE), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        runs = {impl: run(impl, Path(folder) / impl) for impl in ("eager", "cpu")}
    largest = max(abs(a["loss"] - b["loss"]) for a, b in zip(*runs.values(), strict=True))
    print(f"{len(runs['cpu'])} steps, largest difference between the losses of a step: {largest:.1e}")
    for impl, records in runs.items():
        peak, speed = records[-1]["peak_memory_mib"], sorted(r["tokens_per_second"] for r in records)[len(records) // 2]
        print(f"impl={impl:6} peak process memory {peak:7.1f} MiB, median {speed:,.0f} tokens per second")


if __name__ == "__main__":
    main()
