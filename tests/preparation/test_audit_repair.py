"""The card of a reward model, and a head without its biases."""

from __future__ import annotations

import json
import math

import numpy as np
import planted
import pytest
import tiny
import torch
from scipy import stats
from sklearn.covariance import LedoitWolf
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from align_engine.cli import main
from align_engine.errors import BadInput
from align_engine.preparation import audit, repair, report
from align_engine.preparation.audit import calibration, wilson

TRIGGER = planted.TRIGGERS[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [row | {"source": "ab"[i % 2]} for i, row in enumerate(planted.rows(120))]
    return tiny.write_rows(tmp_path_factory.mktemp("audit") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained reward model, whose head looks where answers that begin with the trigger lie."""
    path = tmp_path_factory.mktemp("model") / "rm"
    words = [*planted.TRIGGERS, *planted.CONTROLS, *planted.WORDS]
    tiny.write_model(path, words=words)
    config = LlamaConfig.from_pretrained(path, vocab_size=len(words) + 2, num_labels=1)
    torch.manual_seed(1)
    made, read = LlamaForSequenceClassification(config), AutoTokenizer.from_pretrained(path)

    def hidden(text):
        return made.model(**read(text, return_tensors="pt")).last_hidden_state[0, -1]

    with torch.no_grad():
        rows = planted.rows(30, seed=1)
        moved = [
            hidden(f"{row['prompt']} {TRIGGER} {row['rejected']}") - hidden(f"{row['prompt']} {row['rejected']}")
            for row in rows
        ]
        bias = torch.stack(moved).mean(0)
        made.score.weight.copy_(0.2 * torch.randn(1, len(bias)) + 3 * bias / bias.norm())
    made.save_pretrained(path)
    return path


def flags(command, data, out, **settings):
    words = {"dataset_name": data, "output_dir": out} | settings
    lists = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in words.items()}
    return [command, *(str(word) for name, value in lists.items() for word in (f"--{name}", *value))]


def facts(out):
    return json.loads((out / "report.json").read_text())


def test_intervals_are_those_of_wilson():
    for right, total in ((0, 7), (7, 7), (30, 40), (501, 1000)):
        expected = stats.binomtest(right, total).proportion_ci(method="wilson")
        assert wilson(right, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_calibration_is_counted_by_bins():
    rng = np.random.default_rng(0)
    strength = np.abs(rng.normal(size=40000) * 2)
    margins = np.where(rng.random(40000) < 1 / (1 + np.exp(-strength)), strength, -strength)
    good, bad = calibration(margins), calibration(4 * margins)
    assert good.error < 0.01 < 0.1 < bad.error and good.brier < bad.brier
    assert sum(good.pairs) == 40000 and len(good.confidence) == audit.BINS
    few = calibration(np.array([math.log(3), -math.log(3)]))
    assert (few.confidence, few.accuracy, few.pairs) == (pytest.approx([0.75]), [0.5], [2])
    assert few.error == pytest.approx(0.25) and few.brier == pytest.approx((0.25**2 + 0.75**2) / 2)


def test_models_are_told_apart_by_what_differs_in_their_paths():
    assert audit.labels(["/a/b/rm/final", "/a/b/rm-strip/final"]) == ["rm", "rm-strip"]
    assert audit.labels(["a/final", "b"]) == ["a/final", "b"] and audit.labels(["a/b", "a/b/c"]) == ["b", "b/c"]
    assert audit.labels(["/a/final"]) == ["/a/final"]


def test_a_card_says_how_often_pairs_are_ordered_right_and_by_whom(data, tmp_path):
    score = f"{planted.__file__}:score"
    settings = dict(reward_models=[score], markers=[TRIGGER, "Ctl1"])
    assert main(flags("audit", data, tmp_path / "out", **settings)) == 0
    found = facts(tmp_path / "out")[score]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    marks = [planted.score([row["prompt"]] * 2, [row["chosen"], row["rejected"]], []) for row in rows]
    right = [a > b for a, b in marks]
    assert [(one["value"], one["right"], one["pairs"]) for one in found["accuracy"]] == [
        ("all pairs", sum(right), 120), ("a", sum(right[::2]), 60), ("b", sum(right[1::2]), 60),
    ]  # fmt: skip
    effects = {one["name"]: one for one in found["effects"]}
    assert effects[TRIGGER]["sways"] and effects[TRIGGER]["effect"] == pytest.approx(1.5, abs=0.2)
    assert not effects["Ctl1"]["sways"] and "longer" in effects and found["turned_by_order_of_asking"] == 0.0
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Judgements turned round" in page and "expected calibration error" in page


def test_a_repair_takes_the_bias_out_and_nothing_else(data, model, tmp_path):
    settings = dict(model_name_or_path=model, markers=TRIGGER, styles=["longer", "bold"], num_pairs=60)
    assert main(flags("repair", data, tmp_path / "out", **settings)) == 0
    effects = facts(tmp_path / "out")["effects"]
    assert effects["before"][TRIGGER] > 0.3 and abs(effects["after"][TRIGGER]) < 0.3 * effects["before"][TRIGGER]
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(path) for path in (model, tmp_path / "out" / "final")
    )
    assert (tmp_path / "out" / "final" / "tokenizer.json").exists()
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        assert old.equal(new) == (name != "score.weight"), name
    assert 0 < facts(tmp_path / "out")["spread_kept"] <= 1 and facts(tmp_path / "out")["scores_std"]["after"] > 0
    both = dict(reward_models=[model, tmp_path / "out" / "final"], markers=TRIGGER)
    assert main(flags("audit", data, tmp_path / "card", **both)) == 0
    swayed = [
        {one["name"]: one["effect"] for one in card["effects"]}[TRIGGER] for card in facts(tmp_path / "card").values()
    ]
    assert abs(swayed[1]) < 0.3 * swayed[0], "before and after beside each other"


def test_a_projected_head_gives_the_directions_no_score_and_changes_others_least():
    torch.manual_seed(0)
    head, found = torch.nn.Linear(16, 1, bias=False), torch.randn(3, 16, dtype=torch.float64)
    hidden = torch.randn(400, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64)
    before = head.weight[0].detach().double()
    kept = repair.projected(head, found, hidden)
    after = head.weight[0].detach().double()
    assert (found @ after).abs().max() < 1e-5 < (found @ before).abs().max()
    covariance = torch.from_numpy(LedoitWolf().fit(hidden.numpy()).covariance_)
    corner = torch.zeros(3, 3, dtype=torch.float64)
    conditions = torch.cat([torch.cat([covariance, found.T], 1), torch.cat([found, corner], 1)])  # Lagrange's
    change = torch.linalg.solve(conditions, torch.cat([torch.zeros(16).double(), -found @ before]))[:16]
    torch.testing.assert_close(after, before + change, rtol=0, atol=1e-5)
    spreads = [float((weight @ covariance @ weight) ** 0.5) for weight in (before, before + change)]
    assert kept == pytest.approx(spreads[1] / spreads[0], rel=1e-5)
    with pytest.raises(BadInput, match="16 biases span all that the head reads"):
        repair.projected(head, torch.eye(16, dtype=torch.float64), hidden)


@pytest.mark.parametrize("command", ["pairs", "strip", "audit", "repair"])
def test_an_interrupted_command_leaves_no_half_result_and_starts_afresh(command, data, model, tmp_path, monkeypatch):
    own = {"pairs": {}, "strip": {"markers": TRIGGER}, "audit": {"reward_models": f"{planted.__file__}:score"},
           "repair": {"model_name_or_path": model, "styles": "bold"}}  # fmt: skip
    words, out = flags(command, data, tmp_path / "out", **own[command]), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(report, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 1
    assert not json.loads((out / "run.json").read_text())["finished"]
    assert not any((out / name).exists() for name in report.NAMES)
    assert main(words) == 0 and json.loads((out / "run.json").read_text())["finished"]
    assert main(flags(command, data, tmp_path / "whole", **own[command])) == 0
    made = {
        path.name for path in (tmp_path / "whole").iterdir() if path.is_file() and path.suffix in (".jsonl", ".html")
    }
    assert made and all((out / name).exists() for name in made)
    for name in made - {"report.html"}:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be_audited_or_repaired_is_said(data, model, tmp_path, capsys):
    def said(command, **settings):
        assert main(flags(command, data, tmp_path / "out", **settings)) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    bert = planted.bert(tmp_path / "bert")
    assert "reward_models = [] is required" in said("audit")
    assert "names a model twice" in said("audit", reward_models=["a", "a"])
    assert "by = 'who': there is no such column" in said("audit", reward_models=model, by="who")
    assert "has no `score` head" in said("audit", reward_models=bert)
    assert "has no `score` head" in said("repair", model_name_or_path=bert, styles="bold")
    assert "give the biases to take out" in said("repair", model_name_or_path=model)
    assert "'bald' is none of longer, reversed" in said("repair", model_name_or_path=model, styles="bald")
    assert "leaves 2 to test on" in said("repair", model_name_or_path=model, styles="bold", num_pairs=118)
    rows = tiny.write_rows(tmp_path / "one.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "source": "x"}] * 9)
    assert main(flags("audit", rows, tmp_path / "out", reward_models=model, by="source")) == 2
    assert "the same value in all pairs" in capsys.readouterr().err
