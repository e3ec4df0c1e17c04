"""Two processes with gloo take the same steps as one."""

import pytest
import tiny
from processes import run_on_two
from safetensors.torch import load_file

from align_engine.run import train
from align_engine.training import metrics

WATCHED = ("loss", "rewards/margins", "logps/chosen", "accuracy", "kl", "entropy", "num_tokens", "eval_loss",
           "eval_logps/rejected")  # fmt: skip


@pytest.fixture(scope="module")
def runs(model64, other_model, tmp_path_factory):
    """9 rows in windows of 8: the second step of each epoch has one row, so that a process has none."""
    out, jobs = tmp_path_factory.mktemp("runs"), []
    for name, (_, make) in tiny.OFFLINE.items():
        rows = tiny.write_rows(out / f"{name}.jsonl", make(9))
        settings = dict(max_steps=4, dtype="auto", learning_rate=1e-4, save_steps=2, eval_dataset_name=str(rows),
                        per_device_eval_batch_size=2)  # fmt: skip
        if name in tiny.WITH_REFERENCE:
            settings["ref_model_name_or_path"] = str(other_model)
        whole = tiny.offline(name, model64, rows, out / "one" / name, per_device_train_batch_size=8, **settings)
        train(name, whole)
        settings |= dict(per_device_train_batch_size=4)
        paths = [str(path) for path in (model64, rows, out / "two" / name)]
        jobs.append(f"run.train({name!r}, tiny.offline({name!r}, *{paths!r}, **{settings!r}))")
    run_on_two("\n".join(("import tiny, align_engine.run as run", *jobs)))
    return out


@pytest.mark.parametrize("name", tiny.OFFLINE)
def test_two_processes_equal_one_big_batch(name, runs):
    one, two = runs / "one" / name, runs / "two" / name
    a, b = metrics.read(one / "metrics.jsonl"), metrics.read(two / "metrics.jsonl")
    for metric in WATCHED:
        want = [record[metric] for record in a if metric in record]
        assert [record[metric] for record in b if metric in record] == pytest.approx(want, abs=1e-5, rel=1e-6), metric
    losses = [[record["loss"] for record in records if "loss" in record] for records in (a, b)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6) and len(losses[0]) == 4
    a, b = (load_file(path / "final" / "model.safetensors") for path in (one, two))
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-6
