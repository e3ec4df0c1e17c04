"""The talk's table of what it bought, from a story that has been walked: how far a baseline, SFT, DPO, iterative DPO
and a stronger model behind a server follow instructions, and how much of what they say is right.

    python examples/story/table.py [--story runs/story] [--seed 0] [--output_dir runs/table]

The story's folder is read alone. It may be killed at any time; the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import run

TASKS = Path(__file__).parent / "tasks"
MODELS = {  # name in the table -> folder of the story's seed
    "baseline": "weak/final",  # it has learnt from a writer who errs in two of three answers
    "SFT": "policy/final",
    "iterative DPO": "iterate-strip-clamp/final",
    "server": "strong/final",  # asked by chat alone, as a model behind an API is
}
DPO = dict(beta=0.2, learning_rate=2e-4, num_train_epochs=1)  # as in the rounds of the story


def main() -> int:
    """Train what the story has not, and measure all."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--story", type=Path, default=Path("runs/story"), help="folder of examples/story/run.py")
    own.add_argument("--seed", type=int, default=0, help="which of the story's seeds")
    own.add_argument("--output_dir", type=Path, default=Path("runs/table"), help="folder of everything it makes")
    asked = own.parse_args()
    here, out = asked.story / f"seed-{asked.seed}", asked.output_dir
    models = {name: here / folder for name, folder in MODELS.items()}
    if missing := [path for path in (*models.values(), here / "stripped") if not path.is_dir()]:
        way = f"python examples/story/run.py --seeds {asked.seed} --output_dir {asked.story}"
        print(f"table: error: {missing[0]} is not there yet: {way}", file=sys.stderr)
        return 2
    run.align("dpo", out / "dpo", model_name_or_path=models["SFT"], dataset_name=here / "stripped", seed=asked.seed,
              **run.TRAINING | DPO)  # fmt: skip
    tasks = [written(out, name, here / "data" / "heldout.jsonl") for name in ("instructions", "common_sense")]
    order = {"baseline": models["baseline"], "SFT": models["SFT"], "DPO": out / "dpo" / "final",
             "iterative DPO": models["iterative DPO"]}  # fmt: skip
    with run.serving(out / "server.log") as url:
        named = [f"name={name},path={path}" for name, path in order.items()]
        served = f"name=server,base_url={url},model={models['server']}"
        run.align("eval", out / "eval", models=[*named, served], tasks=tasks, apply_chat_template=True, batch_size=64,
                  server_concurrency=1)  # fmt: skip
    print(f"\n{out / 'eval' / 'report.html'}")
    return 0


def written(out: Path, name: str, rows: Path) -> Path:
    """A task of lm-evaluation-harness over the story's questions that no model has learnt from."""
    path = out / "tasks" / f"{name}.yaml"
    text = f"include: {TASKS.resolve() / name}.yaml\ndataset_kwargs: {{data_files: {{test: {rows.resolve()}}}}}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
