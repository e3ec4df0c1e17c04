"""What stands around the steps: phases, callbacks, early stop, the best checkpoint, warnings."""

import pytest
import tiny
from runs import cut_off, in_checkpoint, same_bits
from safetensors.torch import load_file
from transformers import TrainerCallback

from align_engine.errors import BadInput, RunFailed
from align_engine.run import train
from align_engine.training import metrics
from align_engine.training.health import warnings

RECORDER = """
from pathlib import Path
from transformers import TrainerCallback

class Recorder(TrainerCallback):
    def note(self, args, *what):
        with (Path(args.output_dir) / "heard.txt").open("a") as file:
            print(*what, file=file)

    def on_train_begin(self, args, state, control, **kwargs):
        self.note(args, "begin", state.max_steps, args.learning_rate, type(kwargs["optimizer"]).__name__)

    def on_step_end(self, args, state, control, **kwargs):
        self.note(args, "step", state.global_step, state.epoch)

    def on_log(self, args, state, control, logs, **kwargs):
        self.note(args, "log", state.global_step, "loss" in logs, "eval_loss" in logs)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.note(args, "evaluate", state.global_step, "eval_loss" in metrics)

    def on_save(self, args, state, control, **kwargs):
        self.note(args, "save", state.global_step)
"""


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
        return control


def test_a_callback_by_import_path_hears_of_everything(model, completions, tmp_path):
    (tmp_path / "recorder.py").write_text(RECORDER)
    settings = dict(max_steps=2, logging_steps=2, eval_steps=2, eval_dataset_name=str(completions), save_steps=3,
                    callbacks=[f"{tmp_path}/recorder.py:Recorder"])  # fmt: skip
    folder = train("sft", tiny.sft(model, completions, tmp_path / "run", **settings))
    heard = (folder.path / "heard.txt").read_text().splitlines()
    assert heard == ["begin 2 0.001 AcceleratedOptimizer", "step 1 1.0", "step 2 2.0", "evaluate 2 True",
                     "log 2 True False", "log 2 False True", "save 2"]  # fmt: skip


def test_a_callback_object_stops_the_run(model, completions, tmp_path):
    recipe = tiny.sft(model, completions, tmp_path / "run", max_steps=9, logging_steps=2, save_steps=100)
    folder = train("sft", recipe, [StopAt(3)])
    assert [record["step"] for record in metrics.read(folder.metrics)] == [2, 3]
    assert [path.name for path in folder.checkpoints()] == ["checkpoint-000003"]
    assert folder.final.exists()


def test_what_is_no_callback_is_refused(model, completions, tmp_path):
    for name, text in (("json:dumps", "no transformers.TrainerCallback"), ("json:nothing", "has no 'nothing'"),
                       ("nowhere.at:all", "cannot import"), ("json", "module:name")):  # fmt: skip
        with pytest.raises(BadInput, match=text):
            train("sft", tiny.sft(model, completions, tmp_path / "run", callbacks=[name]))
    assert not (tmp_path / "run").exists()


BEST = dict(max_steps=30, eval_steps=2, save_steps=100, save_total_limit=1, learning_rate=3e-3, logging_steps=5,
            load_best_model_at_end=True, early_stopping_patience=2)  # fmt: skip


def overfit(model, completions, tmp_path, name, **settings):
    """Learn eight rows by heart, judged on others: the loss there rises soon."""
    other = tiny.write_rows(tmp_path / "other.jsonl", tiny.sft_rows(8, seed=5))
    return tiny.sft(model, completions, tmp_path / name, eval_dataset_name=str(other), **BEST | settings)


def test_stops_early_and_ends_with_the_best_weights(model, completions, tmp_path):
    folder = train("sft", overfit(model, completions, tmp_path, "run"))
    found = {r["step"]: r["eval_loss"] for r in metrics.read(folder.metrics) if "eval_loss" in r}
    best, last = min(found, key=found.__getitem__), max(found)
    assert last == best + 4 < 30, "two evaluations without a better one"
    assert [path.name for path in folder.checkpoints()] == [f"checkpoint-{step:06d}" for step in (best, last)]
    held, made = in_checkpoint(folder.checkpoint(best)), load_file(folder.final / "model.safetensors")
    assert made and all(held[f"model.{name}"].equal(weight) for name, weight in made.items())


def test_early_stopping_resumes_where_it_stood(model, completions, tmp_path):
    whole = train("sft", overfit(model, completions, tmp_path, "whole", save_steps=1))
    recipe = overfit(model, completions, tmp_path, "cut", save_steps=1)
    last = max(record["step"] for record in metrics.read(whole.metrics))
    for stop in (last - 1, last):  # one evaluation without a better one is behind; the run has already been stopped
        cut_off("sft", recipe, step=stop)
    cut = train("sft", recipe)
    pick = lambda folder: [(r["step"], r.get("eval_loss"), r.get("loss")) for r in metrics.read(folder.metrics)]  # noqa: E731
    assert pick(cut) == pick(whole)
    assert same_bits(whole.final, cut.final)


def test_a_metric_that_is_not_measured_names_those_that_are(model, completions, tmp_path):
    with pytest.raises(RunFailed, match=r"'rouge' is not measured; known: .*loss"):
        train("sft", overfit(model, completions, tmp_path, "run", metric_for_best_model="rouge"))
    with pytest.raises(BadInput, match="load_best_model_at_end = True needs eval_steps"):
        from align_engine import recipe as recipes

        recipes.check(overfit(model, completions, tmp_path, "run", eval_steps=None))


def test_shares_of_time_and_throughput_are_logged(model, completions, tmp_path):
    settings = dict(max_steps=4, logging_steps=2, eval_steps=2, eval_dataset_name=str(completions), save_steps=1)
    folder = train("sft", tiny.sft(model, completions, tmp_path / "run", **settings))
    record = [record for record in metrics.read(folder.metrics) if "loss" in record][-1]
    shares = {name: value for name, value in record.items() if name.startswith("time/")}
    assert set(shares) == {f"time/{phase}" for phase in ("data", "forward_backward", "step", "eval", "save")}
    assert all(value > 0 for value in shares.values()) and 0.8 < sum(shares.values()) <= 1.0
    assert record["tokens_per_second"] > 0 and record["peak_memory_mib"] > 0


def test_each_warning_comes_once_and_with_its_number():
    watched, said = {}, []
    calm = {"logps/chosen": -20.0, "rewards/margins": 1.0, "kl": 0.5}
    assert warnings(watched, said, calm) == []
    assert warnings(watched, said, calm | {"logps/chosen": -23.0}) == []
    (text,) = warnings(watched, said, calm | {"logps/chosen": -30.0})
    assert "from -20 to -30" in text
    assert warnings(watched, said, calm | {"logps/chosen": -90.0}) == []
    assert len(warnings(watched, said, {"rewards/margins": 21.0, "kl": 51.0})) == 2


def test_a_run_says_its_warnings(model, pairs, tmp_path, capsys):
    train("dpo", tiny.dpo(model, pairs, tmp_path / "run", max_steps=30, learning_rate=1e-2, beta=3.0))
    out = capsys.readouterr().out
    assert out.count("warning: rewards/margins: the margin of the rewards has run to") == 1
