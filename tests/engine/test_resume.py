"""Runs that are killed, refused, or meet a full disk."""

import json
import random
import resource

import pytest
import tiny
from nursery import alike
from runs import cut_off, same_bits

from align_engine.errors import BadInput, RunFailed
from align_engine.run import train
from align_engine.training import metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
STEADY = ("loss", "rewards/margins", "grad_norm", "learning_rate", "num_tokens", "epoch", "eval_loss")


def steady(folder):
    """The metrics that must not depend on when they were computed."""
    return [{name: r[name] for name in ("step", *STEADY) if name in r} for r in metrics.read(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def nursery():
    with alike() as made:
        yield made


@pytest.mark.parametrize("name", tiny.OFFLINE)
def test_killed_and_run_again_ends_with_the_same_bits(name, model, nursery, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.OFFLINE[name][1](8))
    settings = dict(max_steps=24, per_device_train_batch_size=3, save_steps=4, logging_steps=2, save_total_limit=2,
                    lr_scheduler_type="cosine", eval_dataset_name=str(rows), eval_steps=10)  # fmt: skip
    train(name, tiny.offline(name, model, rows, tmp_path / "unbroken", **settings))
    paths = [str(path) for path in (model, rows, tmp_path / "killed")]
    lines, journal = random.randint(2, 9), tmp_path / "killed" / "metrics.jsonl"
    nursery.kill(
        f"import tiny\nfrom align_engine.run import train\n"
        f"train({name!r}, tiny.offline({name!r}, *{paths!r}, **{settings!r}))",
        lambda: journal.exists() and len(journal.read_text().splitlines()) >= lines,
    )
    assert not (tmp_path / "killed" / "final").exists()

    train(name, tiny.offline(name, model, rows, tmp_path / "killed", **settings))
    assert same_bits(tmp_path / "unbroken" / "final", tmp_path / "killed" / "final"), f"killed after {lines} lines"
    assert steady(tmp_path / "killed") == steady(tmp_path / "unbroken")
    kept = sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert kept == ["checkpoint-000020", "checkpoint-000024"]


def test_resume_with_dropout_and_lora(model, completions, tmp_path):
    """Dropout draws random numbers: their state must come back too."""
    settings = dict(max_steps=12, use_peft=True, lora_dropout=0.3, save_steps=5, learning_rate=1e-2,
                    per_device_train_batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
    whole = train("sft", tiny.sft(model, completions, tmp_path / "whole", **settings))
    recipe = tiny.sft(model, completions, tmp_path / "cut", **settings)
    cut_off("sft", recipe)
    cut = train("sft", recipe)
    assert same_bits(whole.final, cut.final, "adapter_model.safetensors")
    assert [r["loss"] for r in metrics.read(whole.metrics)] == [r["loss"] for r in metrics.read(cut.metrics)]


def test_a_line_that_a_stop_falls_into_is_the_mean_of_all_its_steps(model, completions, tmp_path):
    settings = dict(max_steps=4, logging_steps=4, save_steps=1, per_device_train_batch_size=2)
    whole = train("sft", tiny.sft(model, completions, tmp_path / "whole", **settings))
    recipe = tiny.sft(model, completions, tmp_path / "cut", **settings)
    cut_off("sft", recipe, step=3)
    assert steady(train("sft", recipe).path) == steady(whole.path) != []


def test_a_finished_run_is_not_run_again(model, pairs, tmp_path, capsys):
    recipe = tiny.dpo(model, pairs, tmp_path / "run")
    train("dpo", recipe)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    train("dpo", recipe)
    assert "finished: nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_folder_with_another_run_is_refused_and_left_alone(model, pairs, tmp_path):
    train("dpo", tiny.dpo(model, pairs, tmp_path / "run", beta=0.1))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(BadInput, match=r"another run \(beta: 0\.1 there, 0\.2 now\)"):
        train("dpo", tiny.dpo(model, pairs, tmp_path / "run", beta=0.2))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    train("dpo", tiny.dpo(model, pairs, tmp_path / "run", beta=0.2, overwrite=True, max_steps=2))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-000002"]


def test_changed_data_are_another_run(model, pairs, tmp_path):
    recipe = tiny.dpo(model, pairs, tmp_path / "run")
    train("dpo", recipe)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"finished": False}))
    tiny.write_rows(pairs, tiny.preference_rows(8, seed=9))
    with pytest.raises(BadInput, match="another run \\(data:"):
        train("dpo", recipe)


def test_a_full_disk_leaves_the_last_checkpoint_whole(model, pairs, tmp_path):
    settings = dict(max_steps=6, save_steps=2)
    recipe = tiny.dpo(model, pairs, tmp_path / "run", **settings)
    reference = train("dpo", tiny.dpo(model, pairs, tmp_path / "unbroken", **settings))
    from align_engine.training import loop

    save, limits = loop.Engine.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def disk_full_at_4(engine, folder):
        if engine.progress.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes: below the weights
        save(engine, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Engine, "save", disk_full_at_4)
        with pytest.raises(RunFailed, match=r"checkpoint-000004: .*last checkpoint is checkpoint-000002"):
            try:
                train("dpo", recipe)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-000002"]
    train("dpo", recipe)
    assert same_bits(reference.final, tmp_path / "run" / "final")
