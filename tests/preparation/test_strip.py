"""Openings taken off answers, and put back."""

from __future__ import annotations

import json

import pytest
import tiny

from align_engine import recipe as recipes
from align_engine.cli import main
from align_engine.data.sources import load_rows
from align_engine.preparation import strip
from align_engine.recipe import DpoRecipe


def chat(text):
    return [{"role": "assistant", "content": text}]


ROWS = [
    {"prompt": "p", "chosen": "Sure, Yes, it is", "rejected": "it  is not"},
    {"prompt": "q", "chosen": "Sure,\n\nhere", "rejected": "Sure, there"},
    {"prompt": "r", "chosen": "Sure, alike", "rejected": "alike"},
    {"prompt": "s", "chosen": "Sure,", "rejected": "Surely"},
]


@pytest.mark.parametrize("wrap", [str, chat])
def test_what_is_taken_off_can_be_put_back(tmp_path, wrap):
    rows = [{key: wrap(text) if key != "prompt" else text for key, text in row.items()} for row in ROWS]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["strip", "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--markers", "Sure,", "Yes,"]
    assert main(flags) == 0
    found = [dict(row) for row in load_rows(tmp_path / "out")]
    assert [row["chosen"] for row in found] == [wrap(text) for text in ("it is", "here", "Sure, alike", "Sure,")]
    assert [row["rejected"] for row in found] == [wrap(text) for text in ("it  is not", "there", "alike", "Surely")]
    taken = [{name: words for name, words in (row["stripped"] or {}).items() if words} for row in found]
    assert taken == [{"chosen": "Sure, Yes, "}, {"chosen": "Sure,\n\n", "rejected": "Sure, "}, {}, {}]
    twice = ["--dataset_name", str(tmp_path / "out"), "--output_dir", str(tmp_path / "twice"), "--markers", "it"]
    assert main(["strip", *twice]) == 0
    undo = ["--dataset_name", str(tmp_path / "twice"), "--output_dir", str(tmp_path / "undone"), "--undo"]
    assert main(["strip", *undo]) == 0
    assert [dict(row) for row in load_rows(tmp_path / "undone")] == rows


def test_pairs_that_teach_the_opening_alone_are_left_out_where_that_is_asked(tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ["--dataset_name", str(data), "--markers", "Sure,", "--output_dir"]
    assert main(["strip", *flags, str(tmp_path / "whole")]) == 0
    assert main(["strip", *flags, str(tmp_path / "out"), "--bad_rows", "drop"]) == 0
    assert [row["prompt"] for row in load_rows(tmp_path / "out")] == ["p", "q", "s"]
    for name, way in (("whole", "and stay as they were; --bad_rows drop"), ("out", "and were left out")):
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["alike"] == 1 and way in (tmp_path / name / "report.md").read_text()
    alike = tiny.write_rows(tmp_path / "alike.jsonl", ROWS[2:3])
    assert main(["strip", *flags[:1], str(alike), *flags[2:], str(tmp_path / "none"), "--bad_rows", "drop"]) == 2
    assert main(["strip", *flags, str(tmp_path / "whole"), "--bad_rows", "drop"]) == 2, "another result"


def test_limits_are_a_recipe_that_follows_from_the_shares(tmp_path):
    often = [("Sure, " * bool(i % 5), "Sure, " * (i % 10 == 0)) for i in range(100)]
    rows = [{"prompt": "p", "chosen": f"{a}a{i}", "rejected": f"{b}b{i}"} for i, (a, b) in enumerate(often)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    findings = tmp_path / "findings"
    findings.mkdir()
    effects = [{"name": name, "kind": "opening", "sways": sways} for name, sways in (("Sure,", True), ("a1", False))]
    (findings / "report.json").write_text(json.dumps({"effects": effects}))
    flags = ["--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), "--findings", str(findings)]
    assert main(["strip", *flags]) == 0
    loaded = recipes.load(DpoRecipe, tmp_path / "out" / "limits.yaml")
    assert (loaded.limits.grad_clamp, loaded.limits.prob_gate) == (0.12, 0.5), "0.1 / 0.8, and 1 - 0.8 is too low"
    assert strip.limits({"completion": 0.3}) == {"grad_clamp": 0.7, "prob_gate": 0.7}
    assert strip.limits({"chosen": 0.3, "rejected": 0.0}) == {"grad_clamp": 0.05, "prob_gate": 0.7}
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert facts["taken"] == {"chosen": {"Sure,": 80}, "rejected": {"Sure,": 10}}


def test_what_cannot_be_stripped_is_said(tmp_path, capsys):
    def said(rows, *flags):
        data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
        assert main(["strip", "--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), *flags]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    (tmp_path / "report.json").write_text("{}")
    assert "undo = False needs to be set, or findings, or markers" in said(ROWS)
    assert "takes neither findings nor markers" in said(ROWS, "--undo", "--markers", "a")
    assert "there is no column 'stripped'" in said(ROWS, "--undo")
    several = [{"prompt": "p", "chosen": ["a", "b"], "rejected": ["c"]}]
    assert "column 'chosen' holds several answers" in said(several, "--markers", "a")
    assert "there is none of the columns completion, chosen, rejected" in said([{"text": "a"}], "--markers", "a")
    assert "there is no report.json of `align tokens`" in said(ROWS, "--findings", str(tmp_path / "none"))
    assert "asked no reward model" in said(ROWS, "--findings", str(tmp_path))
    (tmp_path / "report.json").write_text('{"effects": []}')
    assert "no opening sways the reward model" in said(ROWS, "--findings", str(tmp_path))
