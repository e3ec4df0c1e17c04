"""The demo from data to page, in small."""

import json
import os
import subprocess
import sys
import time
from functools import partial

import pytest

from align_engine.demo import run as demo
from align_engine.demo.make import make_demo
from align_engine.errors import BadInput


@pytest.fixture
def small(monkeypatch):
    """Fewer rows and steps, the same code."""
    recipe = demo.demo_recipe

    def short(*arguments):
        made = recipe(*arguments)
        made.train.max_steps, made.output.logging_steps = 2, 1
        if hasattr(made, "rollout"):
            made.rollout.max_completion_length = 6
        if hasattr(made, "iteration"):
            made.iteration.rounds, made.iteration.prompts_per_round, made.train.max_steps = 2, 12, -1
        return made

    monkeypatch.setattr(demo, "make_demo", partial(make_demo, sft_rows=80, preference_rows=40, heldout_rows=8))
    monkeypatch.setattr(demo, "demo_recipe", short)


def test_the_demo_walks_the_ladder_and_ends_with_scores_and_a_page(small, tmp_path, capsys):
    (one,) = demo.run(tmp_path, (3,), workers=1).values()
    assert all(0 <= result.points <= 100 for result in one.values())
    saved = json.loads((tmp_path / "seed-3" / "scores.json").read_text())
    assert {name: result["points"] for name, result in saved.items()} == {name: r.points for name, r in one.items()}
    assert len(one["iterative DPO"].rounds) == 2 and one["iterative DPO"].rounds[-1] == one["iterative DPO"].points
    said, html = capsys.readouterr().out, (tmp_path / "index.html").read_text()
    for stage in (demo.SFT, demo.REWARD_MODEL, *demo.METHODS):
        assert (tmp_path / "seed-3" / stage.command / "final" / "model.safetensors").exists()
        assert stage.name in said and stage.name in html
    assert html.count("data:image/png;base64,") >= 12 and "http" not in html
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_workers_end_with_a_killed_parent():
    code = """if __name__ == "__main__":
        import os, time
        from align_engine.demo.run import executor
        with executor(2) as pool:
            print(pool.submit(os.getpid).result(), flush=True)
            pool.submit(time.sleep, 600).result()"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(200):
        if not running(worker):
            return
        time.sleep(0.1)
    os.kill(worker, 9)
    pytest.fail("a worker outlived its parent by twenty seconds")


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # one that nobody has reaped
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_several_seeds_give_mean_spread_and_gain():
    def outcome(i: int) -> demo.Outcome:
        points = {"baseline": 0.0, "SFT": 50.0 + i, "reward model": 80.0} | {s.name: 70.0 + 3 * i for s in demo.METHODS}
        rounds = {"iterative DPO": [60.0, 70.0 + 3 * i]}
        return {name: demo.Result(value, [], rounds.get(name, []), 1.0) for name, value in points.items()}

    outcomes = {i: outcome(i) for i in (0, 1, 2)}
    rows = {row[0]: row[1:] for row in demo.score_rows(outcomes)}
    assert demo.header(outcomes) == [
        "points of 100",
        "seed 0",
        "seed 1",
        "seed 2",
        "mean ± spread",
        "over SFT",
    ]
    assert rows["SFT"] == ["50.0", "51.0", "52.0", "51.0 ± 1.0", ""]
    assert rows["KTO"] == ["70.0", "73.0", "76.0", "73.0 ± 3.0", "+22.0 ± 2.0"]
    assert rows["  after round 1"] == ["60.0", "60.0", "60.0", "60.0 ± 0.0", ""]
    assert rows["reward model: pairs, %"] == ["80.0", "80.0", "80.0", "80.0 ± 0.0", ""]


def test_a_folder_of_somebody_elses_is_refused(tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(BadInput, match="no demo of ours"):
        demo.run(tmp_path, (0,))
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
