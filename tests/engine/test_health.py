"""Warnings come from what training did, never from which rows a step saw."""

import pytest
import tiny

from align_engine.recipe import CpoRecipe, DpoLoss, DpoRecipe, ModelSection, SftRecipe
from align_engine.run import train
from align_engine.training import metrics
from align_engine.training.engine import Progress
from align_engine.training.health import Health, reference_beta
from align_engine.training.metrics import Sums


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    # pictures take longer than these runs
    monkeypatch.setattr("align_engine.reports.report.write_report", lambda *_: None)


def unequal_rows(count):
    """Pairs of very different lengths: means over a few of them differ by far more than any limit."""
    return [
        {"prompt": f"w{i}", "chosen": "w1 " * (1 + 3 * i), "rejected": "w2 " * (1 + 2 * (count - i))}
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["dpo", "simpo"])
def test_nothing_is_said_where_nothing_was_trained(kind, model, tmp_path, capsys):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", unequal_rows(8))
    settings = dict(per_device_train_batch_size=2, max_steps=9, learning_rate=1e-30, eval_dataset_name=str(rows),
                    eval_steps=4, gradient_checkpointing=False)  # fmt: skip
    train(kind, tiny.offline(kind, model, rows, tmp_path / "run", **settings))
    assert "warning" not in capsys.readouterr().out


SHARED = [  # chosen and rejected begin alike, so that pushing the one down drags the other along
    {"prompt": f"w{i}", "chosen": "w5 w6 w7 w8 w9 w3", "rejected": "w5 w6 w7 w8 w9 w4"} for i in range(8)
]


@pytest.mark.parametrize("reference", ["auto", "none"])
def test_a_real_fall_of_the_chosen_answers_is_said_once(reference, model, tmp_path, capsys):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", SHARED)
    settings = dict(per_device_train_batch_size=4, max_steps=16, learning_rate=5e-2, gradient_checkpointing=False,
                    beta=0.3, reference=reference, logging_steps=4)  # fmt: skip
    folder = train("dpo", tiny.dpo(model, rows, tmp_path / "run", **settings))
    logps = [record["logps/chosen"] for record in metrics.read(folder.metrics)]
    assert logps[-1] < 1.3 * logps[0], "else there is nothing to say"
    assert capsys.readouterr().out.count("warning: logps/chosen: the chosen answers' log-probability fell from") == 1


def sums(**means):
    return Sums({name.replace("_", "/"): (2.0 * value, 2.0) for name, value in means.items()})


def test_with_the_starting_model_as_reference_each_logged_mean_is_judged_by_it():
    """Log-prob -30, of which the reference has -20 (beta 0.5: reward -5): a fall by half. One nat, or a fifth of what
    the reference has, is none."""
    recipe, progress = DpoRecipe(loss=DpoLoss(beta=0.5)), Progress()
    watch = Health(recipe, progress)
    assert watch.log({"logps/chosen": -500.0, "rewards/chosen": 0.0}) == []
    assert watch.log({"logps/chosen": -5.0, "rewards/chosen": -0.45}) == []
    assert watch.log({"logps/chosen": -23.9, "rewards/chosen": -1.95}) == []
    (text,) = watch.log({"logps/chosen": -30.0, "rewards/chosen": -5.0})
    assert "fell from -20 to -30" in text
    assert watch.log({"logps/chosen": -90.0, "rewards/chosen": -35.0}) == [], "once in a run"
    (text,) = watch.log({"logps/chosen": -5.0, "rewards/chosen": 0.0, "rewards/margins": 21.0})
    assert "margin of the rewards has run to 21" in text


def test_without_one_whole_epochs_are_compared():
    watch = Health(CpoRecipe(), Progress())
    assert watch.log({"logps/chosen": -1.0, "rewards/margins": 90.0}) == []
    assert watch.log({"logps/chosen": -90.0, "rewards/margins": 900.0}) == [], "other rows"
    for mean in (-10.0, -30.0):
        watch.step(sums(logps_chosen=mean, rewards_margins=30.0))
    assert watch.epoch() == []
    watch.step(sums(logps_chosen=-34.0, rewards_margins=35.0))
    watch = Health(CpoRecipe(), watch.progress)  # the run is stopped, and goes on
    watch.step(sums(logps_chosen=-12.0, rewards_margins=35.0))
    assert watch.epoch() == []
    for _ in range(2):
        watch.step(sums(logps_chosen=-25.0, rewards_margins=70.0))
    assert [text[:60] for text in watch.epoch()] == [
        "logps/chosen: the chosen answers' log-probability fell from ",
        "rewards/margins: the margin of the rewards has run to 70: th",
    ]


def test_evaluations_are_compared_with_the_first():
    watch = Health(CpoRecipe(), Progress())
    assert watch.evaluation({"eval_logps/chosen": -40.0, "eval_loss": 1.0}) == []
    assert watch.evaluation({"eval_logps/chosen": -47.0, "eval_loss": 1.0}) == []
    (text,) = watch.evaluation({"eval_logps/chosen": -49.0, "eval_loss": 1.0})
    assert "fell from -40 to -49" in text


def test_which_reference_is_the_model_that_training_starts_from(model, tmp_path):
    def beta(path=model, **loss):
        recipe = DpoRecipe(loss=DpoLoss(beta=0.5, **loss), model=ModelSection(model_name_or_path=str(path)))
        return reference_beta(recipe)

    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    assert beta() == beta(reference="frozen") == beta(reference="adapter-off") == beta(adapters) == 0.5
    assert beta(reference="none") is beta(ref_model_name_or_path="other") is None
    assert beta(adapters, reference="adapter-off") is reference_beta(SftRecipe()) is reference_beta(CpoRecipe()) is None
