"""Two processes with gloo take the same steps as one."""

import pytest
import tiny
from processes import run_on_two
from safetensors.torch import load_file

from align_engine import metrics
from align_engine.run import train

CODE = "import sys, tiny, align_engine.run as run; run.train('dpo', tiny.dpo(*sys.argv[1:4], **eval(sys.argv[4])))"


def test_two_processes_equal_one_big_batch(model, other_model, tmp_path):
    """9 pairs in windows of 8: the second step of each epoch has one pair, so that a process has none."""
    pairs = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preference_rows(9))
    settings = dict(max_steps=4, learning_rate=1e-4, ref_model_name_or_path=str(other_model), save_steps=2,
                    eval_dataset_name=str(pairs), per_device_eval_batch_size=2)  # fmt: skip
    one = train("dpo", tiny.dpo(model, pairs, tmp_path / "one", per_device_train_batch_size=8, **settings))
    two = settings | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    run_on_two(CODE, str(model), str(pairs), str(tmp_path / "two"), repr(two))

    a, b = metrics.read(one.metrics), metrics.read(tmp_path / "two" / "metrics.jsonl")
    for name in (
        "loss",
        "rewards/margins",
        "logps/chosen",
        "entropy",
        "num_tokens",
        "eval_loss",
        "eval_logps/rejected",
    ):
        want = [record[name] for record in a if name in record]
        assert [record[name] for record in b if name in record] == pytest.approx(want, abs=1e-5, rel=1e-6), name
    assert [r["loss"] for r in b if "loss" in r] == pytest.approx([r["loss"] for r in a if "loss" in r], abs=1e-6)
    a, b = load_file(one.final / "model.safetensors"), load_file(tmp_path / "two" / "final" / "model.safetensors")
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-6
