"""`align samples`: answers of checkpoints side by side, against transformers' own generate, whatever is killed."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.assessment import samples
from align_engine.cli import main
from align_engine.data.sources import load_rows
from align_engine.preparation import folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
PROMPTS = [{"prompt": f"w{i} w{i + 7} w{3 * i}"[: 4 + 3 * (i % 3)].strip(), "wanted": f"w{i}"} for i in range(9)]


@pytest.fixture
def prompts(tmp_path):
    return tiny.write_rows(tmp_path / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, and an adapter on the first."""
    place = tmp_path_factory.mktemp("models")
    one, two = (tiny.write_model(place / name / "final", seed=i) for i, name in enumerate(("one", "two")))
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(one), config).save_pretrained(place / "adapter" / "final")
    AutoTokenizer.from_pretrained(one).save_pretrained(place / "adapter" / "final")
    return [one, two, place / "adapter" / "final"]


def flags(models, prompts, out, **more):
    given = dict(dataset_name=prompts, output_dir=out, max_completion_length=6, batch_size=2, **more)
    said = [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    return ["samples", "--model_name_or_path", *map(str, models), *said]


def made(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]


@torch.no_grad()
def greedy(path, prompt):
    """One prompt at a time, by transformers (which loads adapters itself)."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=1)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def test_answers_and_scores_of_each_model_in_its_place(models, prompts, tmp_path):
    scorer = tmp_path / "judge.py"
    scorer.write_text("def judge(completions, wanted, **_):\n    return [None if one == 'w2' else float(len(text))"
                      " for text, one in zip(completions, wanted)]\n")  # fmt: skip
    out = tmp_path / "out"
    more = dict(temperature=0, num_prompts=5, reward_funcs=f"{scorer}:judge")
    assert main(flags(models, prompts, out, **more)) == 0
    rows, names = made(out), ["one/final", "two/final", "adapter/final"]
    assert [(row["index"], row["model"]) for row in rows] == [(i, name) for i in range(5) for name in names]
    for row in rows:
        text = greedy(models[names.index(row["model"])], row["prompt"])
        score = None if row["wanted"] == "w2" else len(text)
        assert (row["prompt"], row["completion"]) == (PROMPTS[row["index"]]["prompt"], text)
        assert (row["score"], row["rewards"]) == (score, {"judge": score})
    assert len({row["completion"] for row in rows}) > 5, "the models differ"
    facts = json.loads((out / "report.json").read_text())
    for name, told in zip(names, facts["models"]):
        known = [row["score"] for row in rows if row["model"] == name and row["score"] is not None]
        assert told["model"] == name and told["score"] == pytest.approx(sum(known) / 4)
    page, text = ((out / name).read_text() for name in ("report.html", "report.md"))
    assert page.count("<article") == text.count("**") // 2 == 15
    assert "http" not in page and "the first of 9 rows" in page and "the first of 9 rows" in text
    assert load_rows(out)["model"][:3] == names, "the folder is a data set"


def test_each_prompt_has_the_same_random_numbers_with_every_model(models, prompts, tmp_path, capsys):
    again = tmp_path / "twin"
    shutil.copytree(models[0], again)
    out = tmp_path / "out"
    assert main(flags([models[0], again, models[1]], prompts, out)) == 0
    said = [[row["completion"] for row in made(out) if row["model"] == name] for name in ("final", "twin")]
    first, twin, other = ([row["completion"] for row in made(out)][place::3] for place in range(3))
    assert first == twin != other and len(said[1]) == 9
    assert (out / "report.html").read_text().count("the same as one/final") >= 9
    capsys.readouterr()
    assert main(flags([models[0], again, models[1]], prompts, out)) == 0 and "nothing to do" in capsys.readouterr().out


def test_what_was_answered_before_a_stop_is_not_asked_again(models, prompts, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(flags(models, prompts, whole)) == 0
    asked, add = [], folder.Journal.add

    def stops(self, rows):
        rows = list(rows)
        asked.append([(row["model"], row["row"]) for row in rows])
        if len(asked) == 8:
            raise KeyboardInterrupt
        add(self, rows)

    monkeypatch.setattr(samples.folder.Journal, "add", stops)
    assert main(flags(models, prompts, cut)) == 1 and "stopped" in capsys.readouterr().err
    assert main(flags(models, prompts, cut)) == 0
    assert len(asked) == 16 and asked[8] == asked[7], "five batches of each model, one of them twice"
    for name in ("rows.jsonl", "report.json", "report.md"):
        assert (whole / name).read_text() == (cut / name).read_text()


def test_texts_act_on_no_page(models, tmp_path):
    prompt = "<script>alert(1)</script> \x1b[31m \u202e سلام\u200cها 你好 ``` w1"
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": prompt}]}])
    out = tmp_path / "out"
    assert main(flags(models[:1], rows, out)) == 0
    page, text = ((out / name).read_text("utf-8") for name in ("report.html", "report.md"))
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "سلام\u200cها 你好" in page and "````text\n<script>" in text
    for said in (page, text):
        assert r"\x1b[31m \u202e" in said and not {"\x1b", "\u202e"} & set(said)
    assert made(out)[0]["prompt"][0]["content"] == prompt, "the data stay as they are"
    assert made(out)[0]["completion"][0]["role"] == "assistant"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(num_prompts=0), "num_prompts = 0 must be"),
        (dict(reward_funcs="human"), "reward_funcs = ['human'] takes scorers, not people"),
        (dict(reward_funcs="nothing.py:f"), "nothing.py"),
        (dict(top_p=2), "top_p = 2.0 must lie in (0, 1]"),
    ],
)
def test_refusals_write_nothing(more, words, models, prompts, tmp_path, capsys):
    assert main(flags(models[:1], prompts, tmp_path / "out", **more)) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_models_are_named_once_and_stay(models, prompts, tmp_path, capsys):
    assert main(flags([models[0]] * 2, prompts, tmp_path / "out")) == 2
    assert "names a model twice" in capsys.readouterr().err
    assert main(flags([models[0], tmp_path / "none"], prompts, tmp_path / "out")) == 2
    assert "none" in capsys.readouterr().err
    assert main(flags([models[0]], prompts, models[0])) == 2
    assert "is or holds" in capsys.readouterr().err
