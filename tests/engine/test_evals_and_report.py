"""Answers that do not depend on their batch, grades, and the pages."""

import datasets
import pytest
import tiny
import torch
from pictures import drawn_again
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.reports import report
from align_engine.reports.evals import generate, score
from align_engine.run import train


@pytest.fixture
def loaded(model):
    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


def test_generation_in_batches_equals_one_by_one(loaded):
    model, tokenizer = loaded
    prompts = [tokenizer(tiny.sentence(tiny.random.Random(i), 9))["input_ids"] for i in range(7)]
    batched = generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=4)
    for prompt, answer in zip(prompts, batched):
        out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=1,
                             attention_mask=torch.ones(1, len(prompt), dtype=torch.long))  # fmt: skip
        assert answer == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    assert len(set(batched)) > 1


def test_sampling_repeats_with_its_seed_and_leaves_the_callers_alone(loaded):
    model, tokenizer = loaded
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    answers = [generate(model, tokenizer, [[2, 3]] * 4, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.rand(1) == expected
    assert answers[0] == answers[1] != answers[2]
    assert model.training


def test_score_grades_the_answer_to_its_own_row(loaded):
    model, tokenizer = loaded
    rows = datasets.Dataset.from_list([{"prompt": f"w{i} " * (i + 1), "name": i} for i in range(5)])
    seen = {}

    def check(row, answer):
        seen[row["name"]] = answer
        return float(row["name"])

    result = score(model, tokenizer, rows, check, max_new_tokens=4, batch_size=2)
    assert result.mean == 2.0 and result.grades == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert result.answers == [seen[i] for i in range(5)]


def test_a_run_leaves_pictures_and_a_page_that_holds_them(model, pairs, tmp_path):
    with drawn_again():
        folder = train("dpo", tiny.dpo(model, pairs, tmp_path / "run", eval_dataset_name=str(pairs)))
    pictures = sorted(path.name for path in (folder.path / "plots").iterdir())
    assert {"loss.png", "margins.png", "accuracies.png", "learning-rate.png"} <= set(pictures)
    assert all((folder.path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert all((folder.path / "plots" / name).stat().st_size > 5_000 for name in pictures)
    html = (folder.path / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(pictures)
    assert "http" not in html, "the page must need nothing from outside"
    assert "eval_loss" in html and "label_smoothing" in html


def test_the_page_escapes_what_it_is_given():
    html = report.page("a <b>", "lead", [report.Table("t", ("x", "y"), [("<script>", 0.25), ("n", 12345)])], [])
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "0.25" in html and "12,345" in html


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1e-5, "1.00e-05"), (1234.5, "1,234"), (True, "True"), ("w", "w")]
)
def test_numbers_read_well(value, text):
    assert report.number(value) == text
