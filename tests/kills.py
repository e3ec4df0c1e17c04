"""Runs of every method, killed at random moments and gone on with: do they end with the same bits?

    python tests/kills.py [--kills 30] [--seed 0] [--signals SIGKILL,SIGTERM,SIGINT] [--methods dpo,grpo]
                          [--set packing=on ...]

Run by hand: some ten minutes. The runs are ended by the signals in turn, the methods take turns too. --set gives every
run further fields of its recipe: packing=on for batches in trees, optim=NAME for another optimiser.
"""

from __future__ import annotations

import argparse
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
SIGNALS = "SIGKILL,SIGTERM,SIGINT"
IMPORTS = "import tiny, align_engine.run as run\n"


def job(method: str, model: Path, rows: Path, out: Path, more: dict[str, str]) -> str:
    """Python that runs a method, for the nursery."""
    common: dict[str, Any] = dict(save_steps=3, logging_steps=1, per_device_train_batch_size=4,
                                  lr_scheduler_type="cosine", **more)  # fmt: skip
    paths = [str(model), str(rows), str(out)]
    if method not in ONLINE:
        settings = common | {"max_steps": 20}
        return f"{IMPORTS}run.train({method!r}, tiny.offline({method!r}, *{paths!r}, **{settings!r}))"
    settings = common | {"max_steps": 6 if method == "iterate" else 12}
    kind = f"__import__('align_engine.recipe').recipe.RECIPES[{method!r}]"
    made = f"tiny.online({kind}, *{paths!r}, **{settings!r})"
    if method == "iterate":
        return f"{IMPORTS}__import__('align_engine.iterate').iterate.iterate({made})"
    return f"{IMPORTS}run.train({method!r}, {made})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", default=SIGNALS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    methods = options.methods.split(",")
    more = dict(one.split("=", 1) for one in options.set)
    signals = [signal.Signals[name] for name in options.signals.split(",")]
    rng, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="kills-"))
    model, nursery, kills, ends, wrong = tiny.write_model(folder / "model"), Nursery(), 0, Counter(), []
    seconds = {}
    for method in methods:
        rows = tiny.prompt_rows(8) if method in ONLINE else tiny.OFFLINE[method][1](16)
        tiny.write_rows(folder / f"{method}.jsonl", rows)
        if not seconds:  # the first run of all imports what the others find
            first = nursery.start(job(method, model, folder / f"{method}.jsonl", folder / "first", more))
            assert first.end() == 0, method
        began = time.monotonic()
        whole = nursery.start(job(method, model, folder / f"{method}.jsonl", folder / f"{method}-whole", more))
        assert whole.end() == 0, method
        seconds[method] = time.monotonic() - began
    number = 0
    while kills < options.kills:
        method, out = methods[number % len(methods)], folder / f"{number}"
        number += 1
        for again in range(rng.randint(1, 3)):
            how = signals[kills % len(signals)]
            child = nursery.start(job(method, model, folder / f"{method}.jsonl", out, more))
            moment = time.monotonic() + rng.uniform(0.1, 1.0) * seconds[method] / (1 + again)
            while time.monotonic() < moment and child.runs():
                time.sleep(0.002)
            child.kill(how)
            if child.end() == 0:
                break
            kills += 1
            ends[f"{method} {how.name}"] += 1
        last = nursery.start(job(method, model, folder / f"{method}.jsonl", out, more))
        assert last.end() == 0, f"{method} does not go on in {out}"
        left = [str(path) for path in out.rglob(f"*{SIDE}")]
        same = same_bits(folder / f"{method}-whole" / "final", out / "final")
        wrong += [] if same and not left else [(method, number, left)]
        print(
            f"{method} in {out.name}: {'the same bits' if same else 'OTHER BITS'} after {kills} kills in all",
            flush=True,
        )
    nursery.close()
    print(f"{kills} kills in {number} runs ({', '.join(f'{n} x {name}' for name, n in sorted(ends.items()))}): "
          f"{number - len(wrong)} ended with the same bits and nothing left behind")  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
