"""A folder as the documents' reader has it: a small model under the names that pages use, and data of every kind."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny

from align_engine.cli import main
from align_engine.demo.make import distinct_questions, make_model, make_tokenizer, message, pair

HUB = "Qwen/Qwen2.5-0.5B-Instruct"  # the model that pages take from the hub
SHORT = {  # settings of a run in a test
    "per_device_train_batch_size": 8, "max_steps": 1, "logging_steps": 1, "max_completion_length": 4, "max_length": 128,
    "num_generations": 2, "rounds": 1, "gradient_checkpointing": "false",
}  # fmt: skip


def make(folder: Path) -> Path:
    """The small model in `hub/`, which stands for the one on the hub, and in `runs/sft/final`; a reward model in
    `runs/rm/final`; data/ with rows of every kind."""
    rng = random.Random(0)
    questions = distinct_questions(16, rng)
    asked = [question.row() for question in questions]
    pairs = [{"prompt": row["prompt"], **pair(question, rng)} for row, question in zip(asked, questions)]
    answers = [{"prompt": row["prompt"], "completion": message(row["answer"])} for row in asked]
    texts = [turn["content"] for row in pairs for name in ("prompt", "chosen", "rejected") for turn in row[name]]
    tokenizer = make_tokenizer(texts + [f"{role}\n" for role in ("user", "assistant", "system")], vocab_size=400)
    model = make_model(tokenizer, hidden=32, layers=1)
    for name in ("hub", "runs/sft/final"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    for name, rows in (("pairs", pairs), ("sft", answers), ("prompts", asked)):
        tiny.write_rows(folder / "data" / f"{name}.jsonl", rows)
    arguments = (
        f"rm --model_name_or_path {folder}/hub --dataset_name {folder}/data/pairs.jsonl --output_dir {folder}/runs/rm"
    )
    assert run(arguments.split()) == 0
    return folder


def run(command: list[str], **more: Any) -> int:
    """A command of the documents in its short form, with further settings that its method has. Its exit code."""
    from align_engine.recipe import ALIASES, RECIPES, flat

    known = flat(RECIPES[ALIASES.get(command[0], command[0])]())
    short = [word for name, value in (SHORT | more).items() if name in known for word in (f"--{name}", str(value))]
    hub = str(next((place / "hub" for place in (Path(), *Path().resolve().parents) if (place / "hub").is_dir()), HUB))
    return main([hub if word == HUB else word for word in command] + short)


@contextlib.contextmanager
def inside(template: Path, folder: Path) -> Iterator[Path]:
    """A copy of the workplace, which is the present folder inside the block."""
    shutil.copytree(template, folder, dirs_exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
