"""Completions that online runs write beside their metrics: against what the reward functions were shown."""

import io
import math
from collections import defaultdict

import pytest
import tiny
from runs import cut_off

from align_engine.recipe import GrpoRecipe, IterateRecipe, PpoRecipe, RlooRecipe
from align_engine.run import train
from align_engine.training import metrics
from align_engine.training.samples import KEPT, some, table

KINDS = {"rloo": RlooRecipe, "grpo": GrpoRecipe, "ppo": PpoRecipe}


def letters(completions, **_):
    return [float(len(text)) for text in completions]


@pytest.fixture
def prompts(tmp_path):
    return tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(12))


@pytest.mark.parametrize("name", list(KINDS))
def test_each_logged_step_leaves_some_of_its_rollout(name, model, prompts, tmp_path, monkeypatch):
    seen = []

    def watched(prompts, completions, **columns):
        seen.append(list(zip(prompts, completions)))
        return letters(completions)

    monkeypatch.setattr(tiny, "watched", watched, raising=False)
    settings = dict(reward_funcs=["tiny:watched", "tiny:word_reward"], reward_weights=[0.5, 2.0], logging_steps=2,
                    max_steps=5, per_device_train_batch_size=40, num_generations=4)  # fmt: skip
    if name == "ppo":
        settings |= dict(num_ppo_epochs=1)
    folder = train(name, tiny.online(KINDS[name], model, prompts, tmp_path / "run", **settings))
    found, wanted = defaultdict(list), {row["prompt"]: row["wanted"] for row in tiny.prompt_rows(12)}
    for row in metrics.read(folder.path / "samples.jsonl"):
        found[row["step"]].append(row)
    assert list(found) == [2, 4, 5], "the logged steps, and the last one"
    for step, rows in found.items():
        shown = [(row["prompt"], row["completion"]) for row in rows]
        assert shown == seen[step - 1][::3] and len(shown) == 14 <= KEPT, "of the rollout of that step, in its order"
        assert {prompt for prompt, _ in shown} == {prompt for prompt, _ in seen[step - 1]}, "some of each prompt"
        for row in rows:
            share = tiny.word_reward([row["prompt"]], [row["completion"]], [wanted[row["prompt"]]])[0]
            assert row["rewards"] == {"watched": len(row["completion"]), "word_reward": share}
            assert math.isclose(row["score"], 0.5 * len(row["completion"]) + 2 * (share or 0))


def test_a_stop_inside_a_rollout_leaves_no_gap(model, prompts, tmp_path):
    settings = dict(max_steps=6, save_steps=3, num_iterations=2, steps_per_generation=2)  # four steps of each rollout
    whole = train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "whole", **settings))
    recipe = tiny.online(GrpoRecipe, model, prompts, tmp_path / "cut", **settings)
    cut_off("grpo", recipe, step=3)
    with (tmp_path / "cut" / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt": "w')
    written = [(folder.path / "samples.jsonl").read_text() for folder in (whole, train("grpo", recipe))]
    assert written[0] == written[1] and {row["step"] for row in metrics.read(whole.path / "samples.jsonl")} == {
        *range(1, 7)
    }


def test_an_evaluation_leaves_the_same_prompts_each_time(model, prompts, tmp_path, capsys):
    held_out = tiny.write_rows(tmp_path / "held_out.jsonl", tiny.prompt_rows(40, seed=9))
    settings = dict(eval_dataset_name=str(held_out), eval_steps=2, max_steps=4, log_completions=True,
                    num_completions_to_print=3, num_generations=2)  # fmt: skip
    folder = train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", **settings))
    rows = [row for row in metrics.read(folder.path / "samples.jsonl") if row.get("eval")]
    asked = [[row["prompt"] for row in rows if row["step"] == step] for step in (2, 4)]
    assert asked[0] == asked[1] == [row["prompt"] for row in tiny.prompt_rows(40, seed=9)][::3]
    said = capsys.readouterr().out
    assert said.count("word_reward") == 6, "four steps and two evaluations"


def test_iterate_shows_its_rounds(model, prompts, tmp_path, capsys):
    from align_engine.iterate import iterate

    settings = dict(rounds=1, max_steps=1, log_completions=True, num_completions_to_print=4)
    folder = iterate(tiny.online(IterateRecipe, model, prompts, tmp_path / "run", **settings))
    assert "round 1" in capsys.readouterr().out
    rows = metrics.read(folder.path / "round-1" / "samples.jsonl")
    assert len(rows) == 48 and all(row["rewards"] == {"word_reward": row["score"]} for row in rows)


def test_some_are_spread_over_all():
    assert some(range(64), 16) == list(range(0, 64, 4))
    assert some(range(5), 16) == some(range(5), None) == [0, 1, 2, 3, 4]
    assert some(range(17), 16) == list(range(0, 17, 2)) and some([], 16) == []
    assert some(range(16), 1) == [0]


def test_a_table_acts_on_no_terminal():
    from rich.console import Console

    prompt = [{"role": "user", "content": "\x1b[2J[red]سلام\u200cها"}]
    row = {"prompt": prompt, "completion": "a\x07\u202eb", "score": None, "rewards": {"[b]f": 0.25}}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table("step 1", [row]))
    said = console.export_text()
    assert r"\x1b[2J[red]سلام" in said and r"a\x07\u202eb" in said and "[b]f" in said and "0.25" in said and "-" in said
    assert not {"\x1b", "\x07", "\u202e"} & set(said)
