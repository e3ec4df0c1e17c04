"""kill -9 in the middle: the same command goes on, or starts clean, and ends with what an unbroken one gives."""

import json
from pathlib import Path

import eval_files
import pytest
import ratings
import tiny
from nursery import alike

from align_engine.assessment import ASSESSMENT
from align_engine.assessment.rate import tasks
from align_engine.run import train
from align_engine.training.checkpoint import SIDE

WHEN = {  # command -> file of its folder, and how many lines it holds at least when the command is killed
    "eval": ("_tasks.jsonl", 1),
    "diagnose": ("_answers.jsonl", 2),
    "samples": ("_journal.jsonl", 3),
    "report": ("run.json", 0),
    "ratings": ("run.json", 0),
}
ELSEWHERE = {"rate", "merge", "chat", "advise"}  # test_rate_browser.py, test_merge.py; these leave no folder


@pytest.fixture(scope="module")
def nursery():
    with alike() as made:
        made.load(*(f"align_engine.assessment.{name}" for name in WHEN), "lm_eval.evaluator", "sklearn.linear_model",
                  "lm_eval.models.huggingface", "lm_eval.tasks", "matplotlib.figure")  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def commands(model, other_model, tmp_path_factory):
    """Each command without its output_dir."""
    place = tmp_path_factory.mktemp("killed")
    prompts = tiny.write_rows(place / "prompts.jsonl", tiny.prompt_rows(10))
    task, _ = eval_files.write(place / "tasks", 10)
    trained = train("sft", tiny.sft(model, tiny.write_rows(place / "rows.jsonl", tiny.sft_rows(8)), place / "trained"))
    run = place / "run"
    run.mkdir()
    curve = [{"step": step, "eval_loss": 1.0, "eval_rewards/judge/mean": 1 / step} for step in range(1, 20)]
    tiny.write_rows(run / "metrics.jsonl", curve)
    asked = ["--dataset_name", prompts, "--max_tokens", 16, "--num_samples", 2, "--batch_size", 2]
    store = ratings.project(place / "project", ratings.pairs(8), k=1)
    (anna,) = ratings.join(store, "anna")
    while (one := tasks.current(store, anna)) is not None:
        tasks.answered(store, anna, one.id, one.version, [1, 2], "")
    store.close()
    sampled = ["--dataset_name", prompts, "--num_prompts", 10, "--max_completion_length", 16, "--batch_size", 2]
    return {
        "eval": ["--models", model, other_model, "--tasks", task],
        "diagnose": ["--model_name_or_path", model, "--run", run, *asked],
        "samples": ["--model_name_or_path", model, other_model, *sampled],
        "report": [trained.path],
        "ratings": ["--project_dir", place / "project", "--to", "marks"],
    }


def job(name, arguments, out):
    line = [name, *map(str, arguments), "--output_dir", str(out)]
    return f"raise SystemExit(__import__('align_engine.cli').cli.main({line!r}))"


def files(out: Path):
    return {one.name: one.read_bytes() for one in out.iterdir() if one.name not in ("run.json", "recipe.yaml")}


@pytest.mark.parametrize("name", WHEN)
def test_killed_it_ends_as_an_unbroken_one(name, commands, nursery, tmp_path):
    arguments, cut, whole = commands[name], tmp_path / "cut", tmp_path / "whole"
    file, lines = WHEN[name]
    nursery.kill(job(name, arguments, cut), lambda: (cut / file).exists() and _lines(cut / file) >= lines)
    begun = (cut / file).read_bytes()
    assert not json.loads((cut / "run.json").read_text())["finished"]
    assert not (cut / "report.html").exists()
    for out in (cut, whole):
        assert nursery.start(job(name, arguments, out)).end() == 0
    assert files(cut) == files(whole) and not list(tmp_path.rglob(f"*{SIDE}*"))
    assert json.loads((cut / "report.json").read_text())
    if lines:
        assert (cut / file).read_bytes().startswith(begun[: begun.rindex(b"\n") + 1]), "what was there is kept"


def _lines(path):
    return path.read_bytes().count(b"\n")


def test_every_command_is_killed_somewhere():
    assert {*WHEN} | ELSEWHERE == {*ASSESSMENT}
