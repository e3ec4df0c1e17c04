"""The tell of docs/data.md: five openings planted in 70 % of the chosen answers, fifty controls on both sides alike; a
reward model that learns from these pairs, what `align tokens`, `strip` and `repair` find and make of it.

    python benches/planted_openings.py [--json benches/results/planted.json] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import planted
import tiny

from align_engine.cli import main as align
from align_engine.recipe import RmRecipe
from align_engine.run import train


def told(command: str, *words: Any) -> dict[str, Any]:
    """What `align COMMAND` reports in the folder that its last word names."""
    given = [*command.split(), *map(str, words)]
    print(f"align {' '.join(given)}", flush=True)
    if align(given) != 0:
        raise SystemExit(1)
    return json.loads(Path(given[-1], "report.json").read_text())


def measure(folder: Path) -> dict[str, Any]:
    rows, other = planted.rows(1500), planted.rows(500, seed=1)
    data, held = tiny.write_rows(folder / "pairs.jsonl", rows), tiny.write_rows(folder / "other.jsonl", other)
    words = [*planted.TRIGGERS, *planted.CONTROLS, *planted.WORDS]
    base = tiny.write_model(folder / "base", vocab=len(words) + 2, words=words, initializer_range=0.05)
    settings = dict(max_steps=150, per_device_train_batch_size=32, gradient_accumulation_steps=1, learning_rate=5e-3)
    train("rm", tiny.recipe(RmRecipe, base, data, folder / "rm", **settings))
    model, found = folder / "rm" / "final", folder / "words"
    asked = told(f"tokens --dataset_name {data} --reward_model {model} --num_pairs 60 --markers", *planted.CONTROLS,
                 "--output_dir", found)  # fmt: skip
    markers = ["--markers", *planted.TRIGGERS, "--output_dir"]
    told(f"strip --dataset_name {data}", *markers, folder / "stripped")
    told(f"strip --dataset_name {folder / 'stripped'} --undo --output_dir {folder / 'undone'}")
    stripped, undone = (read(folder / name / "rows.jsonl") for name in ("stripped", "undone"))
    repaired = told(f"repair --dataset_name {held} --model_name_or_path {model}", *markers, folder / "out")
    effects = [one for one in asked["effects"] if one["name"] in planted.TRIGGERS]
    controls = [one for one in asked["effects"] if one["name"] in planted.CONTROLS]
    share = sum(one["chosen"] != had["chosen"] for one, had in zip(stripped, rows, strict=True)) / len(rows)
    return {
        "effects_of_triggers": sorted(one["effect"] for one in effects),
        "their_lower_ends": sorted(one["low"] for one in effects),
        "controls_that_pass": sum(one["sways"] for one in controls),
        "std_of_scores": asked["score_std"],
        "chosen_answers_stripped": share,
        "rejected_answers_stripped": sum(one["rejected"] != had["rejected"] for one, had in zip(stripped, rows)),
        "rows_given_back": undone == rows,
        "repair": repaired,
    }


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure((options.folder or Path(temporary)).resolve())
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(f"{text}\n")


if __name__ == "__main__":
    main()
