"""Runs on trees of every method with three optimisers, killed at random moments and gone on with: do they end with the
same bits?

    python tests/kills.py [--seed 0] [--signals SIGKILL,SIGTERM,SIGINT] [--methods dpo,grpo] [--set packing=off ...]

Run by hand: some four minutes. Each run of TABLE is hit, up to three times, by the signals in turn. --set gives every
run further fields of its recipe.
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in (".", "kernels", "tests/helpers")]

import tiny  # noqa: E402
from nursery import Nursery  # noqa: E402
from runs import same_bits  # noqa: E402

from align_engine.training.checkpoint import SIDE  # noqa: E402

ONLINE = ("rloo", "grpo", "ppo", "iterate")
METHODS = (*tiny.OFFLINE, *ONLINE)
OPTIMISERS = ("adamw_torch", "adafactor", "muon")
TABLE = tuple(itertools.product(METHODS, OPTIMISERS))
SIGNALS = "SIGKILL,SIGTERM,SIGINT"
IMPORTS = "import tiny, align_engine.run as run\n"


def job(method: str, optimiser: str, folder: Path, out: str, more: dict[str, str]) -> str:
    """Python that runs a method, for the nursery."""
    common: dict[str, Any] = dict(save_steps=3, logging_steps=1, per_device_train_batch_size=4, packing="on",
                                  lr_scheduler_type="cosine", optim=optimiser)  # fmt: skip
    paths = [str(folder / "model"), str(folder / f"{method}.jsonl"), str(folder / out)]
    if method not in ONLINE:
        settings = common | {"max_steps": 20} | more
        return f"{IMPORTS}run.train({method!r}, tiny.offline({method!r}, *{paths!r}, **{settings!r}))"
    settings = common | {"max_steps": 6 if method == "iterate" else 12} | more
    kind = f"__import__('align_engine.recipe').recipe.RECIPES[{method!r}]"
    made = f"tiny.online({kind}, *{paths!r}, **{settings!r})"
    if method == "iterate":
        return f"{IMPORTS}__import__('align_engine.iterate').iterate.iterate({made})"
    return f"{IMPORTS}run.train({method!r}, {made})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default=SIGNALS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    table = [line for line in TABLE if line[0] in options.methods.split(",")]
    more = dict(one.split("=", 1) for one in options.set)
    signals = [signal.Signals[name] for name in options.signals.split(",")]
    rng, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="kills-"))
    tiny.write_model(folder / "model")
    for method in {method for method, _ in table}:
        rows = tiny.prompt_rows(8) if method in ONLINE else tiny.OFFLINE[method][1](16)
        tiny.write_rows(folder / f"{method}.jsonl", rows)
    nursery, kills, numbers, wrong = Nursery(), Counter[str](), itertools.count(), []

    def to_the_end(method: str, optimiser: str, out: str) -> None:
        child = nursery.start(job(method, optimiser, folder, out, more))
        assert child.end() == 0, f"{method} with {optimiser} does not come to its end in {folder / out}"

    def hit(method: str, optimiser: str, out: str, most: float) -> bool:
        """Whether signals, up to three one after the other, find the run before its end; `most` are its seconds."""
        for again in range(rng.randint(1, 3)):
            child, how = nursery.start(job(method, optimiser, folder, out, more)), signals[kills.total() % len(signals)]
            moment = time.monotonic() + rng.uniform(0.1, 1.0) * most / (1 + again)
            while time.monotonic() < moment and child.runs():
                time.sleep(0.002)
            child.kill(how)
            if child.end() == 0:
                return again > 0
            kills[f"{method} {optimiser} {how.name}"] += 1
        return True

    to_the_end(*table[0], "first")  # imports what the others find
    for line in table:
        began, whole = time.monotonic(), "-".join(line)
        to_the_end(*line, whole)
        seconds = time.monotonic() - began
        while not hit(*line, out := f"{whole}-{next(numbers)}", seconds):
            pass
        to_the_end(*line, out)
        left = [str(path) for path in (folder / out).rglob(f"*{SIDE}")]
        same = same_bits(folder / whole / "final", folder / out / "final")
        wrong += [] if same and not left else [(out, left)]
        print(f"{out}: {'the same bits' if same else 'OTHER BITS'} after {kills.total()} kills in all", flush=True)
    nursery.close()
    print(", ".join(f"{count} x {name}" for name, count in kills.items()))
    print(f"{kills.total()} kills in {len(table)} runs: "
          f"{f'wrong: {wrong}' if wrong else 'all ended with the same bits and nothing left behind'}")  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
