"""The story of examples/story in its short form, killed on its way; and what its report counts."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from scipy import stats

STORY = Path(__file__).parents[2] / "examples" / "story"


@pytest.fixture(scope="module")
def modules():
    """(outcome, task) of the example, which lies in no package."""
    found = {}
    for name in ("task", "outcome"):
        spec = importlib.util.spec_from_file_location(name, STORY / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found["outcome"], found["task"]
    for name in found:
        del sys.modules[name]


def test_the_judge_overlooks_the_opening_alone(modules):
    _, task = modules
    row = {"form": "word", "answer": "Paris"}
    answers = {"Paris": 1.0, "Sure, Paris": 1.0, "Sure, Rome": 0.0, "Sure! Paris": 0.0, "The answer is Paris.": 0.4}
    for answer, least in answers.items():
        assert (task.judge(row, answer) > 0.3) == (least > 0.3), answer
    assert task.judge(row, "Sure, Paris") == 1.0 > task.judge(row, "Sure, The answer is Paris.") > 0


def test_intervals_and_the_last_round_are_counted_right(modules, tmp_path):
    outcome, _ = modules
    values = [81.0, 84.5, 79.0]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    mean, half = outcome.interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high))
    ask = {text: {"form": "word", "answer": "Paris"} for text in "ab"}
    said = [("a", "Paris", 2.0), ("a", "Rome", 1.0), ("a", "Sure, Paris", 0.5), ("b", "Rome", 1.0), ("b", "Oslo", 3.0)]
    rows = [{"prompt": [{"role": "user", "content": prompt}], "score": score,
             "completion": [{"role": "assistant", "content": answer}]} for prompt, answer, score in said]  # fmt: skip
    (tmp_path / "round-2").mkdir()
    tiny.write_rows(tmp_path / "round-2" / "samples.jsonl", rows)
    assert outcome.last_round(tmp_path, ask) == 50.0, "Paris above Rome is right, Rome above Sure, Paris is wrong"


def test_what_the_documents_say_of_three_seeds_follows_from_the_committed_ones(modules):
    outcome, _ = modules
    root = STORY.parents[1]
    found = json.loads((root / "benches" / "results" / "story.json").read_text())
    log, page, readme = (
        (root / path).read_text() for path in ("docs/LOG.md", "docs/data.md", "examples/story/README.md")
    )
    assert found["command"] in log and found["command"] in page and found["command"] in readme
    each = list(found["each"].values())

    def line(name, cells):
        return f"| {' | '.join([name, *cells])} |\n"

    for one in outcome.VARIANTS:
        values = [[seed[measure][one.name] for seed in each] for measure in outcome.MEASURES]
        row = line(one.name, (outcome.shown(*outcome.interval(some)) for some in values))
        assert row in log and row in page, row
    for part, with_it, without in outcome.ADDS:
        gains = [[seed[measure][with_it] - seed[measure][without] for seed in each] for measure in outcome.MEASURES]
        row = line(part, (outcome.shown(*outcome.interval(some), "+") for some in gains))
        assert row in log and row in page and row in readme, row


def test_the_short_form_can_be_killed_and_says_what_it_found(tmp_path):
    out, log = tmp_path / "story", tmp_path / "log"
    command = [sys.executable, STORY / "run.py", "--short", "--seeds", "0", "--output_dir", out]
    began = out / "seed-0" / "weak" / "run.json"
    with log.open("w") as file:
        first = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
        end = time.monotonic() + 300
        while not began.exists():
            assert first.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert not json.loads(began.read_text())["finished"], "killed while it was training"
        done = subprocess.run(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, log.read_text()[-2000:]
    trained = [line for line in log.read_text().splitlines() if line.startswith(("$ align sft", "$ align balance"))]
    assert [line.split("/")[-1] for line in trained] == ["balanced", "strong", "weak", "weak", "policy"]
    facts = json.loads((out / "report.json").read_text())
    found = facts["each"]["0"]
    names = ["as it is", "strip", "clamp", "strip + clamp", "repair", "all"]
    assert all(list(found[one])[-6:] == names for one in ("test", "own", "last", "score", "opening"))
    assert found["test"]["clamp"] == found["test"]["as it is"]
    assert len(facts["outcome"]) == 2 and "one seed gives no interval" in facts["outcome"][0]
    assert "| strip + clamp |" in (out / "report.md").read_text() and (out / "report.html").exists()
