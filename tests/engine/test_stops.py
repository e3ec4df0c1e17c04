"""Ctrl-C and SIGTERM: the first ends the step with a checkpoint, the second ends the process."""

import os
import signal
import time

import pytest
import tiny
from nursery import shared
from runs import same_bits
from transformers import TrainerCallback

from align_engine.iterate import iterate
from align_engine.recipe import GrpoRecipe, IterateRecipe
from align_engine.run import train
from align_engine.training import stops


class Signal(TrainerCallback):
    """Sends this process a signal in the course of a step."""

    def __init__(self, number: signal.Signals, step: int, event: str = "on_step_end") -> None:
        def send(args, state, control, **_):
            if state.global_step == step:
                os.kill(os.getpid(), number)

        setattr(self, event, send)


@pytest.mark.parametrize("number", stops.SIGNALS)
def test_the_first_signal_writes_a_checkpoint_and_the_run_goes_on_from_it(number, model, completions, tmp_path, capsys):
    settings = dict(max_steps=6, save_steps=500)
    whole = train("sft", tiny.sft(model, completions, tmp_path / "whole", **settings))
    recipe = tiny.sft(model, completions, tmp_path / "run", **settings)
    with pytest.raises(stops.Stopped, match=r"stopped after step 3; the same command goes on from checkpoint-000003"):
        train("sft", recipe, callbacks=[Signal(number, 3)])
    assert f"{number.name}: stopping after this step, with a checkpoint" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a caller's own handlers are back"
    assert same_bits(whole.final, train("sft", recipe).final)


def test_a_signal_while_completions_are_sampled_ends_the_run_between_two_batches(model, tmp_path, monkeypatch):
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(8))
    settings = dict(max_steps=4, save_steps=500, per_device_train_batch_size=8, per_device_generation_batch_size=4)
    whole = train("grpo", tiny.online(GrpoRecipe, model, rows, tmp_path / "whole", **settings))
    recipe = tiny.online(GrpoRecipe, model, rows, tmp_path / "run", **settings)
    pauses, pause = [], stops.pause

    def at_the_sixth_batch():
        pauses.append(None)
        if len(pauses) == 8:  # one pause a step, and one for each of its two batches
            os.kill(os.getpid(), signal.SIGINT)
        pause()

    monkeypatch.setattr(stops, "pause", at_the_sixth_batch)
    with pytest.raises(stops.Stopped, match="stopped after step 2; the same command goes on from checkpoint-000002"):
        train("grpo", recipe)
    assert same_bits(whole.final, train("grpo", recipe).final)


def test_iterative_training_goes_on_inside_its_round(model, tmp_path, monkeypatch):
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(6))
    settings = dict(rounds=1, max_steps=2, per_device_generation_batch_size=8)
    whole = iterate(tiny.online(IterateRecipe, model, rows, tmp_path / "whole", **settings))
    recipe = tiny.online(IterateRecipe, model, rows, tmp_path / "run", **settings)
    pauses, pause = [], stops.pause

    def at_the_third_batch():
        pauses.append(None)
        if len(pauses) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        pause()

    with monkeypatch.context() as patch, pytest.raises(stops.Stopped, match="stopped in round 1"):
        patch.setattr(stops, "pause", at_the_third_batch)
        iterate(recipe)
    assert len(list((tmp_path / "run/round-1/answers").iterdir())) == 2
    assert same_bits(whole.final, iterate(recipe).final)


def test_an_interrupt_before_the_first_step_says_that_nothing_was_saved(model, completions, tmp_path, monkeypatch):
    from align_engine import run

    monkeypatch.setattr(run, "load_policy", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(stops.Stopped, match="no checkpoint had been written, so the same command starts afresh"):
        train("sft", tiny.sft(model, completions, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_second_signal_ends_the_process_at_once(model, completions, tmp_path):
    paths = [str(path) for path in (model, completions, tmp_path / "run")]
    child = shared().start(f"""
import tiny, align_engine.run as run
from transformers import TrainerCallback
class Slow(TrainerCallback):
    def on_step_end(self, *_, **__):
        open({str(tmp_path / "asleep")!r}, "w").close()
        __import__("time").sleep(60)
run.train("sft", tiny.sft(*{paths!r}), callbacks=[Slow])
""")
    try:
        child.wait_until((tmp_path / "asleep").exists)
        child.kill(signal.SIGTERM)
        time.sleep(0.2)
        began = time.monotonic()
        child.kill(signal.SIGTERM)
        assert child.end() == -signal.SIGTERM
        assert time.monotonic() - began < 30
    finally:
        child.stop()
