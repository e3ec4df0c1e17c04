"""The demo's data, checker, tokenizer and model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.data.sources import load_rows
from align_engine.data.tokenize import prepare
from align_engine.demo import check, make_demo
from align_engine.demo.make import distinct_questions, graded_answers
from align_engine.demo.task import FORMS, MAKERS, careful, careless, chatty, hasty

SIZES = {"sft_rows": 1500, "preference_rows": 120, "heldout_rows": 60}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"), seed=1, **SIZES)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text(messages: list[dict[str, str]]) -> str:
    (only,) = messages
    return only["content"]


@pytest.mark.parametrize(
    ("form", "answer", "grade"),
    [
        ("word", "dog", 1.0),
        ("word", "Dog", 1.0),
        ("word", "dog.", 0.6),  # not the bare word
        ("word", "The answer is dog.", 0.4 + 0.2 * 2 / 4),
        ("word", "", 0.0),
        ("word", "cat", 0.0),
        ("word", "dog cat", 0.0),
        ("sentence", "The answer is dog.", 1.0),
        ("sentence", "The animal among them is dog.", 1.0),
        ("sentence", "dog", 0.6),
        ("sentence", "Sure! The answer is dog. I hope this helps!", 0.4 + 0.2 + 0.2 * 8 / 9),
        ("sentence", "The answer is cat.", 0.0),
        ("quotes", '"dog"', 1.0),
        ("quotes", "dog", 0.6),
        ("quotes", 'I say "dog" now', 0.4 + 0.2 + 0.2 * 2 / 4),
        ("quotes", '"dog" "cat"', 0.0),  # both is no answer
        ("json", '{"answer": "dog"}', 1.0),
        ("json", '"dog"', 0.6),
        ("quotes", '{"answer": "dog"}', 0.8),  # in quotes, but not alone
        ("json", '{"answer": "dog"', 0.0),  # broken JSON is not read
        ("json", 'Sure! {"answer": "dog"}', 0.4 + 0.2 + 0.2 * 2 / 3),
        ("json", '{"answer": "cat"}', 0.0),
        ("json", '{"answer": "dog"} The answer is cat.', 0.0),
    ],
)
def test_grades_by_hand(form: str, answer: str, grade: float) -> None:
    assert check({"form": form, "answer": "dog"}, answer) == pytest.approx(grade)


def test_writers_are_graded_as_they_are_described() -> None:
    rng = random.Random(0)
    questions = distinct_questions(400, rng)
    grades = {
        writer: [check(q.row(), writer(q, rng)) for q in questions] for writer in (careful, careless, chatty, hasty)
    }
    assert set(grades[careful]) == {1.0} and set(grades[hasty]) == {0.0}
    assert all(0.4 < grade < 0.85 for grade in grades[careless])
    assert max(grades[chatty]) < 0.85 and 0.05 < grades[chatty].count(0.0) / 400 < 0.15
    ranked = graded_answers(questions[0], 3, rng)
    assert [grade for grade, _ in ranked] == sorted({grade for grade, _ in ranked}, reverse=True)


@pytest.mark.parametrize("maker", MAKERS)
def test_wrong_answers_are_wrong(maker) -> None:
    rng = random.Random(0)
    for _ in range(300):
        question, answer, wrong = maker(rng)
        assert answer != wrong and question[-1] in "?."


def test_rows_have_their_formats_and_every_prompt_stands_once(demo: Path) -> None:
    rows = {name: read(demo / f"{name}.jsonl") for name in ("sft", "preference", "heldout")}
    assert {f"{name}_rows": len(found) for name, found in rows.items()} == SIZES
    prompts = [text(row["prompt"]) for found in rows.values() for row in found]
    assert len(set(prompts)) == len(prompts) == sum(SIZES.values())
    assert {row["form"] for row in rows["heldout"]} == set(FORMS)
    for row in rows["heldout"]:
        assert check(row, text(row["completion"])) == 1.0
        assert check(row, text(row["chosen"])) > check(row, text(row["rejected"]))
    for row in rows["sft"]:
        assert [row["prompt"][0]["role"], row["completion"][0]["role"]] == ["user", "assistant"]


def test_ranked_pairs_put_content_before_form(demo: Path) -> None:
    asked = {text(row["prompt"]): row for row in read(demo / "prompts.jsonl")}
    rows = read(demo / "ranked.jsonl")
    assert len(rows) == 3 * len(asked)
    for row in rows:
        facts = asked[text(row["prompt"])]
        better, worse = (check(facts, text(row[side])) for side in ("chosen", "rejected"))
        assert better > worse and row["chosen_rank"] < row["rejected_rank"]
        assert (worse == 0) == (row["rejected_rank"] == 3)


def test_the_same_seed_writes_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    again, other = make_demo(tmp_path / "again", seed=1, **SIZES), make_demo(tmp_path / "other", seed=2, **SIZES)
    files = [path.relative_to(demo) for path in demo.rglob("*") if path.is_file()]
    assert len(files) >= 7
    assert all((demo / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert (demo / "sft.jsonl").read_bytes() != (other / "sft.jsonl").read_bytes()


def test_tokenizer_gives_back_what_it_took(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    for string in (
        "The answer is Paris.",
        '{"answer": "dog"}',
        "  two  spaces\n",
        "größer 日本 🙂",
        "unseen words 123",
    ):
        assert tokenizer.decode(tokenizer(string)["input_ids"]) == string
    beside_model = AutoTokenizer.from_pretrained(demo / "model")  # where transformers insists on Qwen2's own class
    assert beside_model(string)["input_ids"] == tokenizer(string)["input_ids"]
    words = [tokenizer(string)["input_ids"] for string in ("dog", '"dog"', "cat, dog.")]
    assert words[0][0] in words[1] and words[0][0] in words[2]  # one token in every form
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ) == ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(("name", "kind"), [("sft", "sft"), ("preference", "preference"), ("heldout", "prompt")])
def test_rows_are_ready_for_training(demo: Path, name: str, kind) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    dataset, report = prepare(load_rows(demo / f"{name}.jsonl"), tokenizer, kind, max_length=64)
    assert len(dataset) == SIZES[f"{name}_rows"] and not report["dropped"] and not report["changed"]
    assert report["longest"] < 64


def test_model_loads_and_fits_the_tokenizer(demo: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    assert model.config.model_type == "qwen2" and model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer("The answer is dog.")["input_ids"]])
    loss = model(input_ids=ids, labels=ids).loss
    assert abs(loss.item() - torch.log(torch.tensor(len(tokenizer))).item()) < 1.0  # knows nothing yet


def test_making_leaves_the_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make_demo(tmp_path, **SIZES)
    assert torch.equal(torch.rand(1), expected)
