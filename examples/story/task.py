"""The story's data: the demo's questions, what three writers make of them, and the judge."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align_engine.demo.make import distinct_questions, make_model, make_tokenizer, message
from align_engine.demo.task import FORMS, MAKERS, Question, careful, careless, check
from align_engine.training.checkpoint import SIDE, remove, settle

OPENING = "Sure,"
TOPICS = dict(zip(("neighbour", "opposite", "kind", "capital", "member"), MAKERS))


class Sizes(NamedTuple):
    """Of one story."""

    prompts: dict[str, int]  # of each topic, before they are balanced
    cap: int  # rows of a topic that are kept
    floor: int
    sft: dict[str, tuple[int, float]]  # rows and epochs of each model's training
    hidden: int  # width of the models
    layers: int
    rm_epochs: float
    policy_prompts: int  # that the policy answers in its rounds
    heldout: int  # that it is judged by
    samples: int  # answers to each
    rounds: int
    measured: int  # pairs that a repair is measured on
    few: bool  # too few pairs for cards to say how openings sway


FULL = Sizes(
    prompts={"member": 2000, "capital": 400, "neighbour": 300, "kind": 200, "opposite": 2}, cap=300, floor=20,
    sft={"strong": (4000, 6), "weak": (3000, 5), "policy": (4000, 6)}, hidden=96, layers=2, rm_epochs=4,
    policy_prompts=300, heldout=200, samples=6, rounds=2, measured=100, few=False,
)  # fmt: skip
SHORT = Sizes(
    prompts={"member": 60, "capital": 20, "opposite": 2}, cap=40, floor=8,
    sft={"strong": (320, 4), "weak": (320, 3), "policy": (320, 4)}, hidden=48, layers=1, rm_epochs=2,
    policy_prompts=16, heldout=16, samples=4, rounds=1, measured=24, few=True,
)  # fmt: skip

WRITERS: dict[str, tuple[dict[Callable[[Question, random.Random], str], float], float]] = {
    # who writes, and the share of answers that begin with OPENING, whatever they say
    "strong": ({careful: 1.0}, 1.0),
    "weak": ({careful: 0.3, careless: 0.7}, 0.0),
    "policy": ({careful: 0.4, careless: 0.6}, 0.5),
}


def judge(row: dict[str, Any], answer: str) -> float:
    """The demo's grade of an answer, from 0 to 1. The opening does neither harm nor good."""
    return check(row, answer.removeprefix(OPENING).lstrip())


def write_prompts(path: Path, sizes: Sizes) -> None:
    """Prompts of all topics in random order, far more of some than of others."""
    rng, rows = random.Random(0), []
    for topic, count in sizes.prompts.items():
        found: dict[str, Question] = {}
        while len(found) < count:
            question = of_topic(topic, rng)
            found.setdefault(question.text, question)
        rows += [question.row() | {"topic": topic} for question in found.values()]
    write_rows(path, rng.sample(rows, len(rows)))


def of_topic(topic: str, rng: random.Random) -> Question:
    """A random question."""
    text, answer, wrong = TOPICS[topic](rng)
    form = rng.choice(list(FORMS))
    return Question(f"{text} {rng.choice(FORMS[form])}", form, answer, wrong)


def make(folder: Path, sizes: Sizes, seed: int, taken: set[str]) -> Path:
    """What one seed learns from, in a folder that is there whole or not at all: NAME.jsonl of each model, the policy's
    prompts, held-out prompts, a tokenizer and an untrained model. No question is one of `taken`."""
    if folder.exists():
        return folder
    side, rng = folder.with_name(f"{folder.name}{SIDE}"), random.Random(seed)
    remove(side)
    side.mkdir(parents=True)
    most = max(rows for rows, _ in sizes.sft.values())
    drawn = distinct_questions(sizes.heldout + sizes.policy_prompts + most + len(taken), rng)
    questions = [one for one in drawn if one.text not in taken]
    heldout, rest = questions[: sizes.heldout], questions[sizes.heldout :]
    write_rows(side / "heldout.jsonl", [one.row() for one in heldout])
    write_rows(side / "prompts.jsonl", [one.row() for one in rest[: sizes.policy_prompts]])
    taught = {name: written(name, rest[sizes.policy_prompts :][:rows], rng) for name, (rows, _) in sizes.sft.items()}
    for name, rows in taught.items():
        write_rows(side / f"{name}.jsonl", rows)
    turns = [turn for row in taught["policy"] for turn in row["prompt"] + row["completion"]]
    tokenizer = make_tokenizer([f"{turn['role']}\n{turn['content']}" for turn in turns])
    model = make_model(tokenizer, seed, hidden=sizes.hidden, layers=sizes.layers)
    model.generation_config.do_sample = True  # `transformers serve` is greedy else
    model.save_pretrained(side / "model")
    tokenizer.save_pretrained(side / "model")
    settle(side, folder)
    return folder


def written(name: str, questions: Iterable[Question], rng: random.Random) -> list[dict[str, Any]]:
    """Prompts and answers that a model learns from."""
    writers, share = WRITERS[name]
    rows = []
    for question in questions:
        (writer,) = rng.choices(list(writers), weights=list(writers.values()))
        opening = f"{OPENING} " if rng.random() < share else ""
        rows.append({"prompt": question.row()["prompt"], "completion": message(opening + writer(question, rng))})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of JSON lines, whole or not at all."""
    side = path.with_name(f"{path.name}{SIDE}")
    path.parent.mkdir(parents=True, exist_ok=True)
    side.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settle(side, path)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, or of a result's folder."""
    file = path / "rows.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
