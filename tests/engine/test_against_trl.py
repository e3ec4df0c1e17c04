"""TRL's own trainers on the same model, rows, order and settings: the same losses, step by step."""

import pytest
import tiny
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.data.batches import epoch_order
from align_engine.run import train
from align_engine.training import metrics

STEPS, SEED = 20, 42
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # of TRL


def trl_logs(name, model, rows, out, **settings):
    """What TRL's trainer logs at each step; rows are taken in their order."""
    config = getattr(trl, f"{name}Config")(
        output_dir=str(out), max_steps=STEPS, learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        **settings,
    )  # fmt: skip
    trainer = getattr(trl, f"{name}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def spaced(rows):
    """TRL tokenises prompt and answer as one text: a space keeps their words apart."""
    return [
        {key: f" {text}" if key in ("chosen", "rejected", "completion") else text for key, text in row.items()}
        for row in rows
    ]


def compare(ours, theirs, names):
    for name in names:
        want = [log[name] for log in theirs]
        assert len(want) >= STEPS - 1
        assert [log[name] for log in ours] == pytest.approx(want, abs=1e-4, rel=1e-4), name


def test_dpo(model, tmp_path):
    rows, batch = spaced(tiny.preference_rows(16)), 4
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    order = [i for epoch in range(5) for i in epoch_order(16, SEED, epoch)]
    theirs = trl_logs(
        "DPO", model, [rows[i] for i in order], tmp_path / "trl", per_device_train_batch_size=batch, beta=0.3
    )
    recipe = tiny.dpo(model, data, tmp_path / "ours", per_device_train_batch_size=batch, beta=0.3, max_steps=STEPS)
    ours = metrics.read(train("dpo", recipe).metrics)
    compare(ours, theirs, ("loss", "grad_norm", "rewards/chosen", "rewards/rejected",
                           "rewards/margins", "logps/chosen", "logps/rejected"))  # fmt: skip
    # in the first step every pair is a tie, but for what the reference's own pass rounds
    compare(ours[1:], theirs[1:], ("rewards/accuracies",))
    assert ours[0]["loss"] - ours[-1]["loss"] > 0.3


def test_kto(model, tmp_path):
    """TRL pairs a prompt with the completion before it in its batch; here that is our permutation of all rows."""
    rows = spaced([row | {"label": i % 3 == 0} for i, row in enumerate(tiny.sft_rows(12))])
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    settings = dict(per_device_train_batch_size=12, beta=0.3, desirable_weight=1.5, undesirable_weight=0.8)
    ordered = [rows[i] for i in epoch_order(12, SEED, 0)]
    theirs = trl_logs("KTO", model, ordered, tmp_path / "trl", **settings)
    recipe = tiny.offline("kto", model, data, tmp_path / "ours", max_steps=STEPS, **settings)
    ours = metrics.read(train("kto", recipe).metrics)
    compare(ours, theirs, ("loss", "grad_norm", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins"))
    assert max(log["kl"] for log in ours) > 0.01, "the reference point must have moved"
