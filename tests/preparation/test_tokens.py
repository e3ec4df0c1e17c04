"""Words that give answers away: counted, compared, and asked about."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import datasets
import numpy as np
import planted
import pytest
import tiny

from align_engine.cli import main
from align_engine.errors import BadInput
from align_engine.preparation import edits, frequent, report, sway, tokens
from align_engine.preparation.answers import Answers, pairs_of
from align_engine.preparation.edits import STYLES, of_marker, without
from align_engine.preparation.frequent import Finding, Marker


def test_counts_are_those_of_a_plain_count():
    rng, words = random.Random(1), ["a", "b,", "B,", "c\n", "d"]
    texts = [(rng.choice("xyz"), " ".join(rng.choices(words, k=rng.randint(0, 9)))) for _ in range(300)]
    counts = frequent.count(texts, 3, 4)
    expected, totals = Counter(), Counter()
    for source, text in texts:
        parts = text.split()
        held = {("opening", tuple(parts[:n])) for n in (1, 2, 3) if n <= len(parts)}
        held |= {("ngram", tuple(parts[i : i + n])) for n in (1, 2, 3) for i in range(len(parts) - n + 1)}
        expected.update((kind, " ".join(some), source) for kind, some in held)
        totals.update((kind, len(some), source) for kind, some in held)
    assert counts.sources == ["x", "y", "z"] and counts.answers.sum() == 300
    for marker, row in zip(counts.markers, counts.found):
        assert row.tolist() == [expected[marker.kind, marker.text, source] for source in "xyz"]
    known = {(marker.kind, marker.text) for marker in counts.markers}
    assert known == {key[:2] for key in expected if sum(expected[*key[:2], s] for s in "xyz") >= 4}
    for (kind, length), row in counts.totals.items():
        assert row.tolist() == [totals[kind, length, source] for source in "xyz"]


def test_log_odds_are_those_of_the_paper():
    counts = np.array([[30.0, 2.0, 5.0], [4.0, 40.0, 3.0], [0.0, 6.0, 0.0]])
    totals = np.array([100.0, 200.0, 50.0])
    found = frequent.log_odds(counts, totals, 350.0)
    for w in range(3):
        prior = 500.0 * counts[w].sum() / 350.0
        for s in range(3):
            y, n = counts[w, s], totals[s]
            other, rest = counts[w].sum() - y, 350.0 - n
            odds = math.log((y + prior) / (n + 500.0 - y - prior))
            delta = odds - math.log((other + prior) / (rest + 500.0 - other - prior))
            assert found[w, s] == pytest.approx(delta / math.sqrt(1 / (y + prior) + 1 / (other + prior)), rel=1e-12)


@pytest.mark.parametrize("columns, given, expected", [
    ({"completion": "a"}, [], ["completion"]),
    ({"completion": "a", "model": "m"}, [], ["m"]),
    ({"chosen": "a", "rejected": "b"}, [], ["chosen", "rejected"]),
    ({"chosen": "a", "rejected": "b", "chosen_model": "m", "rejected_model": "n"}, [], ["m", "n"]),
    ({"chosen": "a", "rejected": "b", "topic": "t"}, ["topic"], ["t", "t"]),
])  # fmt: skip
def test_sources_are_the_models_where_rows_name_them(columns, given, expected):
    rows = datasets.Dataset.from_list([{"prompt": "p", **columns}])
    assert [source for source, _ in Answers(rows, given, "error")] == expected


def test_rows_of_several_answers_give_each_pair():
    row = {"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d"]}
    rows = datasets.Dataset.from_list([row])
    assert list(Answers(rows, [], "error")) == [("chosen", "a"), ("chosen", "b"), ("rejected", "c"), ("rejected", "d")]
    pairs, origins = pairs_of(rows, None, 0, "error")
    assert pairs == [("p", "a", "c"), ("p", "a", "d"), ("p", "b", "c"), ("p", "b", "d")] and len(origins) == 4


def test_a_bad_row_is_named_by_its_place_among_all_rows():
    rows = [{"prompt": "p", "chosen": f"c{i}", "rejected": None if i == 17 else "r"} for i in range(20)]
    refused = 0
    for seed in range(10):
        try:
            pairs_of(datasets.Dataset.from_list(rows), 10, seed, "error")
        except BadInput as error:
            assert str(error).startswith("row 18, counted from 1: 'rejected' is missing"), error
            refused += 1
    assert 0 < refused < 10


def test_one_thing_said_is_one_finding():
    def find(kind, text, count, source="x"):
        return Finding(Marker(kind, text), source, count, 0.1, 0.0, 5.0)

    found = [
        find("opening", "I'm", 100), find("opening", "I'm sorry", 60), find("opening", "I'm sorry but", 40),
        find("opening", "Sure,", 50), find("opening", "Sure, here", 20), find("opening", "Sure,", 9, "y"),
        find("ngram", "I'm", 110), find("ngram", "sorry but", 45), find("ngram", "Sure, here is", 20),
        find("ngram", "as an", 30), find("ngram", "an AI", 28), find("ngram", "as an AI", 28),
    ]  # fmt: skip
    kept = [(one.marker.text, one.marker.kind, one.source) for one in frequent.distinct(found)]
    assert kept == [
        ("I'm sorry but", "opening", "x"), ("Sure,", "opening", "x"), ("Sure,", "opening", "y"),
        ("I'm", "ngram", "x"), ("as an AI", "ngram", "x"),
    ]  # fmt: skip


def test_edits_give_an_answer_without_and_with_their_mark():
    opening, ngram = of_marker(Marker("opening", "Sure, here")), of_marker(Marker("ngram", "of course"))
    assert opening.apply("Sure,  here\nit is.") == ("it is.", "Sure,  here\nit is.")
    assert opening.apply("Surely not") == ("Surely not", "Sure, here Surely not")
    assert opening.apply("Sure, here") is None and opening.apply(" ") is None
    assert ngram.apply("Yes, of course it is") == ("Yes, it is", "Yes, of course it is")
    assert ngram.apply("course of courses") is None and ngram.apply("of course") is None
    text = "One is. Two are.\nThree"
    assert {name: edit.apply(text) for name, edit in STYLES.items()} == {
        "longer": (text, f"{text} Three"), "reversed": (text, "Three Two are. One is."),
        "bold": (text, "**One is.** Two are.\nThree"), "list": (text, "- One is.\n- Two are.\n- Three"),
        "heading": (text, "# One is.\n\nTwo are. Three"), "exclamation": (text, "One is! Two are!\nThree"),
    }  # fmt: skip
    assert without("Sure, Yes, sure, Sure,", ["Sure,", "Yes,"]) == ("Sure, Yes, ", "sure, Sure,")
    assert edits.prefix_end("Sure.", "Sure") is None


def test_holm_corrects_for_the_number_of_tests():
    assert sway.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert sway.holm([]) == []


def test_effects_are_what_was_planted():
    rng = random.Random(0)
    pairs = [(str(i), f"{rng.random()} a b", f"{rng.random()} c") for i in range(60)]

    def score(prompts, texts):
        return np.array(
            [
                2.0 * text.startswith("Hi ") + planted.noise(prompt) + text.count("c")
                for prompt, text in zip(prompts, texts)
            ]
        )

    some = [of_marker(Marker("opening", word)) for word in ("Hi", "Ho")]
    neutral = [of_marker(Marker("opening", f"n{i}")) for i in range(6)]
    hi, ho = sway.effects(some, {"opening": neutral}, pairs, score)
    assert (hi.name, hi.sways, hi.pairs) == ("Hi", True, 60) and ho.sways is False and ho.p_holm == 1.0
    assert (hi.effect, hi.raw, hi.chosen, hi.rejected) == pytest.approx((2.0,) * 4)
    assert (hi.less, hi.neutral) == (6, 6) and ho.less < 6
    right = [planted.noise(p) < planted.noise(p) for p, *_ in pairs]
    assert hi.flips == 0.0 and not any(right), "the rejected answers are ahead anyway"


def test_a_marker_beyond_all_neutral_words_is_named_where_they_spread(tmp_path):
    """A reward model that any word before an answer moves, more or less: nothing is told from neutral words, but that
    one moves it further than all of them is said."""
    data, out = tiny.write_rows(tmp_path / "pairs.jsonl", planted.rows(300)), tmp_path / "out"
    flags = ["--dataset_name", data, "--output_dir", out, "--reward_model", f"{__file__}:any_first_word"]
    assert main(["tokens", *map(str, flags), "--num_pairs", "40"]) == 0
    found = {one["name"]: one for one in json.loads((out / "report.json").read_text())["effects"]}
    assert not found["Sure,"]["sways"] and found["Sure,"]["less"] == found["Sure,"]["neutral"] == tokens.NEUTRAL
    assert all(found[word]["less"] < tokens.NEUTRAL for word in planted.TRIGGERS if word != "Sure,")
    assert "further than each of them: Sure,." in (out / "report.md").read_text()


def any_first_word(prompts, completions, **_):
    """The first word counts, by chance; "Sure," a little more than any."""
    first = [text.split()[0] for text in completions]
    return [1.2 if word == "Sure," else float(planted.noise(word) > 0.2) for word in first]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("tokens") / "pairs.jsonl", planted.rows(1500))


def asked(data, out, model):
    flags = ["--dataset_name", data, "--output_dir", out, "--reward_model", model, "--num_pairs", 60]
    assert main(["tokens", *map(str, flags), "--markers", *planted.CONTROLS]) == 0
    found = json.loads((out / "report.json").read_text())["effects"]
    return [one for one in found if one["kind"] == "opening"]


def test_planted_triggers_come_first_and_no_control_passes(data, tmp_path):
    found = asked(data, tmp_path / "out", f"{planted.__file__}:score")
    assert {one["name"] for one in found[:5]} == set(planted.TRIGGERS)
    assert all(one["sways"] and one["low"] > 0 for one in found[:5])
    assert {one["name"] for one in found} >= set(planted.CONTROLS) and not any(one["sways"] for one in found[5:])
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {one["text"] for one in facts["telling"] if one["source"] == "chosen" and one["kind"] == "opening"} == set(
        planted.TRIGGERS
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What sways the reward model" in page and "an answer with it" in page
    assert "| Sure, | opening | yes |" in (tmp_path / "out" / "report.md").read_text()


def test_an_interrupted_command_starts_afresh(tmp_path, monkeypatch, capsys):
    data = tiny.write_rows(tmp_path / "pairs.jsonl", planted.rows(60))
    flags = ["--dataset_name", data, "--output_dir", tmp_path / "out", "--reward_model", f"{planted.__file__}:score"]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "swayed", stop)
        assert main(["tokens", *map(str, flags)]) == 1
    assert "the same command starts afresh" in capsys.readouterr().err
    assert not any((tmp_path / "out" / name).exists() for name in report.NAMES)
    assert main(["tokens", *map(str, flags)]) == 0 and (tmp_path / "out" / "report.html").exists()


def test_a_trained_reward_model_is_swayed_by_what_its_pairs_gave_away(data, tmp_path):
    from align_engine.recipe import RmRecipe
    from align_engine.run import train

    words = [*planted.TRIGGERS, *planted.CONTROLS, *planted.WORDS]
    base = tiny.write_model(tmp_path / "base", vocab=len(words) + 2, words=words, initializer_range=0.05)
    settings = dict(max_steps=150, per_device_train_batch_size=32, gradient_accumulation_steps=1, learning_rate=5e-3)
    train("rm", tiny.recipe(RmRecipe, base, data, tmp_path / "rm", **settings))
    found = asked(data, tmp_path / "out", tmp_path / "rm" / "final")
    assert {one["name"] for one in found[:5]} == set(planted.TRIGGERS)
    assert all(one["sways"] and one["low"] > 0 for one in found[:5])
    assert not any(one["sways"] for one in found[5:])


def test_what_cannot_be_counted_or_asked_about_is_said(data, tmp_path, capsys):
    def said(rows, *flags):
        assert main(["tokens", "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out"), *flags]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    answers = tiny.write_rows(tmp_path / "answers.jsonl", [{"prompt": "p", "completion": "a b", "model": "m"}] * 9)
    assert "source_column = 'who': there is no such column" in said(answers, "--source_column", "who")
    assert "one column, or two where rows hold" in said(answers, "--source_column", "model", "prompt")
    assert "holds no pairs to ask it about" in said(answers, "--reward_model", f"{planted.__file__}:score")
    assert "no such folder" in said(data, "--reward_model", str(tmp_path / "none"))
    assert "has no `score` head" in said(data, "--reward_model", str(planted.bert(tmp_path / "bert")))
    broken = tiny.write_rows(tmp_path / "broken.jsonl", [{"prompt": "p", "completion": None}, {"completion": "a"}])
    assert "row 1, counted from 1: 'completion' is missing" in said(broken)
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a b", "rejected": ""}])
    complaint = said(answers, "--reward_model", f"{planted.__file__}:score", "--pairs_name", str(pairs))
    assert f"{pairs}: row 1, counted from 1: 'rejected' is empty" in complaint
