"""Whole runs whose batches are packed: the numbers of padded ones, from fewer tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
from processes import run_on_two
from runs import cut_off, same_bits
from safetensors.torch import load_file

from align_engine.data.windows import Source
from align_engine.errors import BadInput
from align_engine.models import tree_attention
from align_engine.recipe import GrpoRecipe, PpoRecipe, Recipe, RlooRecipe
from align_engine.rollouts.source import Rollouts
from align_engine.run import train
from align_engine.training import metrics, packing

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
UNLIKE = ("time/", "tokens_per_second", "peak_memory")  # what a layout is there to change
ONLINE = {"rloo": RlooRecipe, "grpo": GrpoRecipe, "ppo": PpoRecipe}


def assert_alike(name: str, packed: Recipe, padded: Recipe) -> None:
    """Both runs log the same numbers and end with the same weights, but for the order of sums."""
    packed.train.packing = "on"
    one, other = train(name, packed), train(name, padded)
    records, wanted = metrics.read(one.metrics), metrics.read(other.metrics)
    assert [sorted(record) for record in records] == [sorted(record) for record in wanted] and records
    for record, want in zip(records, wanted):
        for key, number in want.items():
            if not key.startswith(UNLIKE):
                assert record[key] == pytest.approx(number, rel=2e-4, abs=2e-5), key
    weights, oracle = (load_file(folder.final / "model.safetensors") for folder in (one, other))
    assert all((weights[key] - oracle[key]).abs().max() < 2e-4 for key in oracle)
    assert not all(weights[key].equal(oracle[key]) for key in oracle), "the layout has not changed"


@pytest.mark.parametrize("name", tiny.OFFLINE)
def test_fixed_rows(name, model, other_model, tmp_path):
    """KTO's rows and their mismatched completions, the reference's pass and the evaluation are packed too."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.OFFLINE[name][1](10))
    held_out = tiny.write_rows(tmp_path / "held_out.jsonl", tiny.OFFLINE[name][1](6, seed=5))
    settings: dict[str, Any] = dict(per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=3)
    settings |= dict(eval_dataset_name=str(held_out), eval_steps=2)
    if name in tiny.WITH_REFERENCE:
        settings["ref_model_name_or_path"] = str(other_model)
    recipes = [tiny.offline(name, model, rows, tmp_path / way, **settings) for way in ("packed", "padded")]
    assert_alike(name, *recipes)


def test_experts_are_balanced_over_the_tokens_of_all_sequences(experts, tmp_path):
    """A prompt's tokens count as often as sequences read them: aux_loss is among the numbers that are compared. It is
    of one forward pass, and the two layouts share out a window otherwise."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.several_rows(6))
    settings: dict[str, Any] = dict(per_device_train_batch_size=6, max_steps=3)
    recipes = [tiny.dpo(experts, rows, tmp_path / way, **settings) for way in ("packed", "padded")]
    assert_alike("dpo", *recipes)
    assert all(record["aux_loss"] > 1 for record in metrics.read(tmp_path / "packed" / "metrics.jsonl"))


@pytest.mark.parametrize("name", ONLINE)
def test_rollouts(name, model, tmp_path):
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(6))
    settings = dict(per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=2, beta=0.1)
    if name == "ppo":
        del settings["beta"]
    recipes = [tiny.online(ONLINE[name], model, rows, tmp_path / way, **settings) for way in ("packed", "padded")]
    assert_alike(name, *recipes)


def test_samples_of_a_prompt_share_it(model, tmp_path, monkeypatch):
    """A window's completions lie by prompt, so that whole groups meet: its row holds each prompt once."""
    rows, seen = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(8)), []
    window = Rollouts.window

    def noted(source, step):
        found = window(source, step)
        prompts = {tuple(row["prompt_ids"]) for row in source.experience}
        assert len(source.experience) == 16 and len(prompts) == 4
        completions = sum(len(row["completion_ids"]) for row in source.experience)
        seen.append((sum(micro.batch.input_ids.numel() for micro in found), sum(map(len, prompts)) + completions))
        return found

    monkeypatch.setattr(Rollouts, "window", noted)
    settings = dict(per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=2, packing="on")
    train("grpo", tiny.online(GrpoRecipe, model, rows, tmp_path / "run", **settings))
    assert len(seen) == 2 and all(tokens == wanted for tokens, wanted in seen)


def test_two_processes_equal_one(model64, tmp_path):
    """9 rows in windows of 8: the second step of each epoch has one row, so that a process has none."""
    jobs, names = [], ("sft", "rm", "dpo", "kto")
    for name in names:
        rows = tiny.write_rows(tmp_path / f"{name}.jsonl", tiny.OFFLINE[name][1](9))
        settings = dict(max_steps=4, dtype="auto", learning_rate=1e-4, packing="on", tokens_per_batch=30)
        one = tiny.offline(name, model64, rows, tmp_path / "one" / name, per_device_train_batch_size=8, **settings)
        train(name, one)
        settings |= dict(per_device_train_batch_size=4)
        paths = [str(path) for path in (model64, rows, tmp_path / "two" / name)]
        jobs.append(f"run.train({name!r}, tiny.offline({name!r}, *{paths!r}, **{settings!r}))")
    run_on_two("\n".join(("import tiny, align_engine.run as run", *jobs)))
    for name in names:
        one, two = (load_file(tmp_path / kind / name / "final" / "model.safetensors") for kind in ("one", "two"))
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-6, name


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo"])
def test_forward_passes_are_cut_by_tokens(name, model, other_model, tmp_path, monkeypatch):
    """A step is the same however its rows are shared out."""
    seen, window = [], Source.window

    def noted(source, step):
        found = window(source, step)
        seen.append([micro.batch.input_ids.numel() for micro in found if micro.batch.trees])
        assert sorted(row for micro in found for row in micro.batch.index.tolist()) == sorted(source.window_rows(step))
        return found

    monkeypatch.setattr(Source, "window", noted)
    if name == "grpo":
        rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompt_rows(6))
        make = functools.partial(tiny.online, GrpoRecipe, model, rows)
    else:
        rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.OFFLINE[name][1](10))
        make = functools.partial(tiny.offline, name, model, rows, ref_model_name_or_path=str(other_model))
    settings = dict(per_device_train_batch_size=16, max_steps=2)
    packed = make(tmp_path / "packed", tokens_per_batch=50, **settings)
    assert_alike(name, packed, make(tmp_path / "padded", **settings))
    passes = [tokens for tokens in seen if tokens]
    assert len(passes) == 2 and all(len(tokens) > 2 and max(tokens) <= 50 for tokens in passes)


def test_a_packed_run_goes_on_bit_for_bit(model, pairs, tmp_path):
    def recipe(name: str) -> Recipe:
        return tiny.dpo(model, pairs, tmp_path / name, packing="auto", max_steps=4, save_steps=2)

    whole = train("dpo", recipe("whole"))
    cut_off("dpo", recipe("cut"), step=2)
    assert same_bits(train("dpo", recipe("cut")).final, whole.final)


def test_auto_says_what_it_took_and_why(model, pairs, tmp_path, monkeypatch, capsys):
    train("dpo", tiny.dpo(model, pairs, tmp_path / "on", packing="auto", max_steps=1))
    said = capsys.readouterr().out
    assert "packing on: " in said and "tokens in place of" in said
    monkeypatch.setattr(packing, "why_not", lambda model: "it has a state that runs through the row")
    off = train("dpo", tiny.dpo(model, pairs, tmp_path / "off", packing="auto", max_steps=1))
    assert "packing off: it has a state that runs through the row" in capsys.readouterr().out
    assert same_bits(off.final, train("dpo", tiny.dpo(model, pairs, tmp_path / "padded", max_steps=1)).final)
    with pytest.raises(BadInput, match="packing = 'on': it has a state that runs through the row; set it to 'off'"):
        train("dpo", tiny.dpo(model, pairs, tmp_path / "refused", packing="on", max_steps=1))


def test_a_wrong_layout_is_refused_with_the_figure(model, pairs, tmp_path, monkeypatch):
    attend = tree_attention._attend
    short = tree_attention.Rule(0.25, 2, None, 0.0)  # a window that the model does not have
    monkeypatch.setattr(tree_attention, "_attend", lambda q, k, v, rule: attend(q, k, v, short))
    with pytest.raises(BadInput, match=r"packing = 'on': what the model says of a packed batch is \d\.\de-0\d off"):
        train("dpo", tiny.dpo(model, pairs, tmp_path / "run", packing="on", max_steps=1))
    assert not (tmp_path / "run").exists()
