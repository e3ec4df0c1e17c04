"""The demo from data to page, in small."""

import json
from functools import partial

import pytest

from align_engine.demo import run as demo
from align_engine.demo.make import make_demo


@pytest.fixture
def small(monkeypatch):
    """Fewer rows and steps, the same code."""
    recipe = demo.demo_recipe

    def short(*arguments):
        made = recipe(*arguments)
        made.train.max_steps, made.output.logging_steps = 3, 1
        return made

    monkeypatch.setattr(demo, "make_demo", partial(make_demo, sft_rows=80, preference_rows=40, heldout_rows=8))
    monkeypatch.setattr(demo, "demo_recipe", short)


def test_the_demo_ends_with_scores_and_a_page(small, tmp_path, capsys):
    (one,) = demo.run(tmp_path, (3,))
    assert all(0 <= points <= 100 for points in one.points.values())
    assert json.loads((tmp_path / "seed-3" / "scores.json").read_text())["points"] == one.points
    assert (tmp_path / "seed-3" / "dpo" / "final" / "model.safetensors").exists()
    said = capsys.readouterr().out
    for text in ("baseline", "SFT", "DPO", "seed 3"):
        assert text in said
    html = (tmp_path / "index.html").read_text()
    assert html.count("data:image/png;base64,") >= 5 and "http" not in html
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_several_seeds_give_mean_and_standard_deviation():
    outcomes = [demo.Outcome(i, {"baseline": 0.0, "SFT": 50.0 + i, "DPO": 70.0 + 3 * i}, {}, 60.0) for i in (0, 1, 2)]
    *seeds, mean = demo.score_rows(outcomes)
    assert seeds[2] == ["seed 2", "0.0", "52.0", "76.0", "+24.0", "60 s"]
    assert mean == ["mean", "0.0 ± 0.0", "51.0 ± 1.0", "73.0 ± 3.0", "+22.0", "180 s"]
