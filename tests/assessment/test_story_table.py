"""The talk's table of examples/story, of models that have learnt nothing and a server that knows all."""

import contextlib
import importlib.util
import json
import random
import sys
from pathlib import Path

import chat_server
import pytest
import tiny

from align_engine.demo.make import distinct_questions, make_model, make_tokenizer, pair

STORY = Path(__file__).parents[2] / "examples" / "story"
LISTED = "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
pytestmark = [pytest.mark.filterwarnings(one) for one in LISTED]  # lm-eval's and its packages'
RIGHT = {"word": "{}", "sentence": "It is {}.", "quotes": '"{}"', "json": '{{"answer": "{}"}}'}


@pytest.fixture(scope="module")
def modules():
    """table.py and what it imports, which lie in no package."""
    found, names = {}, ("task", "outcome", "run", "grading", "table")
    for name in names:
        file = STORY / ("tasks" if name == "grading" else ".") / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, file)
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The folder of a story, and its held-out questions."""
    place, rng = tmp_path_factory.mktemp("story"), random.Random(0)
    here = place / "seed-0"
    questions = distinct_questions(16, rng)
    rows = [{"prompt": one.row()["prompt"], **pair(one, rng)} for one in questions]
    texts = [turn["content"] for row in rows for name in ("prompt", "chosen", "rejected") for turn in row[name]]
    tokenizer = make_tokenizer(texts + [f"{role}\n" for role in ("user", "assistant")], vocab_size=400)
    for seed, name in enumerate(("weak", "policy", "iterate-strip-clamp", "strong")):
        make_model(tokenizer, seed, hidden=32, layers=1).save_pretrained(here / name / "final")
        tokenizer.save_pretrained(here / name / "final")
    for name in ("stripped", "data"):
        (here / name).mkdir()
    tiny.write_rows(here / "stripped" / "rows.jsonl", rows)
    tiny.write_rows(here / "data" / "heldout.jsonl", [one.row() for one in questions[:8]])
    return place, questions[:8]


def test_the_table_of_five(story, modules, tmp_path, monkeypatch, capsys):
    place, questions = story
    known = {one.text: RIGHT[one.form].format(one.answer) for one in questions}
    plain = questions[0].text  # answered right, in a form that nobody asked for
    known[plain] = f"The answer is {questions[0].answer}."
    monkeypatch.setattr(modules["run"], "TRAINING", dict(max_length=64, per_device_train_batch_size=8))

    @contextlib.contextmanager
    def serving(log):
        with chat_server.serving(says=lambda body, _: "Sure, " + known[body["messages"][-1]["content"]]) as server:
            yield server.url

    monkeypatch.setattr(modules["run"], "serving", serving)
    monkeypatch.setattr(sys, "argv", ["table.py", "--story", str(place), "--output_dir", str(tmp_path / "out")])
    assert modules["table"].main() == 0
    facts = json.loads((tmp_path / "out" / "eval" / "report.json").read_text())
    assert [one["name"] for one in facts["models"]] == ["baseline", "SFT", "DPO", "iterative DPO", "server"]
    scores = {one["name"]: {name: score["value"] for name, score in one["tasks"].items()} for one in facts["models"]}
    assert scores["server"] == {"instruction_following": 1 - (questions[0].form != "sentence") / 8, "common_sense": 1.0}
    assert all(scores[name] == {"instruction_following": 0, "common_sense": 0} for name in ("baseline", "SFT"))
    assert "| model | instruction_following | common_sense |" in (tmp_path / "out" / "eval" / "report.md").read_text()
    assert (tmp_path / "out" / "dpo" / "final" / "model.safetensors").exists()
    capsys.readouterr()
    assert modules["table"].main() == 0 and "nothing to do" not in capsys.readouterr().out, "what is there stays"


def test_a_story_that_was_not_told_to_its_end(modules, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table.py", "--story", str(tmp_path)])
    assert modules["table"].main() == 2
    assert "is not there yet: python examples/story/run.py --seeds 0" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "follows", "knows"), [
    ("Paris", 1, 1), ("Sure, Paris", 1, 1), ("The answer is Paris.", 0, 1), ("Rome", 1, 0), ("Sure, Rome.", 0, 0),
    ("It is Paris. It is Rome.", 0, 0), ("", 0, 0),
])  # fmt: skip
def test_form_and_content_are_told_apart(answer, follows, knows, modules):
    doc, grading = {"form": "word", "answer": "Paris"}, modules["grading"]
    assert grading.OPENING == modules["task"].OPENING
    assert (grading.follows(doc, [answer])["acc"], grading.knows(doc, [answer])["acc"]) == (follows, knows)


def test_the_documents_table_is_the_committed_one():
    text = (STORY.parents[1] / "docs" / "eval.md").read_text(encoding="utf-8")
    models = json.loads((STORY.parents[1] / "benches" / "results" / "story_table.json").read_text())["models"]
    for one in models:
        cells = [one[name] for name in ("instruction_following", "common_sense")]
        told = " | ".join("{:.3f} ({:.3f} to {:.3f})".format(cell["value"], *cell["interval"]) for cell in cells)
        assert f"| {one['name']} | {told} |" in text and {cell["examples"] for cell in cells} == {200}
    assert len(models) == 5
