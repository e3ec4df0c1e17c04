"""Log-probs of a precomputed reference that other runs find: what they save, and what they must not take."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from align_engine.errors import BadInput
from align_engine.run import train
from align_engine.training import metrics, precomputed, reference_cache

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
FEW = precomputed.SPOT_ROWS


@pytest.fixture
def asked(monkeypatch):
    """Sequences that a reference was asked for, in each pass, and whether they were packed."""
    seen: list[tuple[int, bool]] = []
    own = precomputed.reference_logps

    def noted(model, batch, options):
        seen.append((len(batch.targets), batch.trees is not None))
        return own(model, batch, options)

    monkeypatch.setattr(precomputed, "reference_logps", noted)
    return seen


def taken(asked: list[tuple[int, bool]]) -> int:
    count = sum(number for number, _ in asked)
    asked.clear()
    return count


def files() -> list[Path]:
    return sorted(Path(os.environ["ALIGN_CACHE"]).glob("reference/*/*"))


def stored(folder) -> torch.Tensor:
    return load_file(folder.path / "reference-train.safetensors")["logps"]


def test_a_sweep_computes_the_reference_once(model, pairs, tmp_path, asked, monkeypatch, capsys):
    def run(beta: float, name: str, **settings):
        return train("dpo", tiny.dpo(model, pairs, tmp_path / name, beta=beta, **settings))

    first = run(0.1, "first")
    assert (
        taken(asked) == 16 and "reference log-probs of 8 train rows, 16 answers: 16 computed" in capsys.readouterr().out
    )
    second = run(0.3, "second", per_device_train_batch_size=2, packing="on", max_steps=4)
    assert [packed for _, packed in asked] == [True] * 2 and taken(asked) == 2 * FEW
    where = files()[0].parent
    assert len(files()) == 1 and f"16 answers: 16 read from {where}\n" in capsys.readouterr().out
    assert stored(first).equal(stored(second))
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "elsewhere"))
    alone = run(0.3, "alone", per_device_train_batch_size=2, packing="on", max_steps=4)
    assert taken(asked) == 16
    losses = [[record["loss"] for record in metrics.read(one.metrics)] for one in (second, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    shutil.rmtree(second.path)
    again = run(0.3, "second", per_device_train_batch_size=2, packing="on", max_steps=4)
    assert taken(asked) == 2 * FEW and stored(again).equal(stored(alone))


def test_other_rows_and_methods_find_the_answers_that_they_share(model, tmp_path, asked):
    rows = tiny.preference_rows(10)
    (few, all_of_them, several) = (tmp_path / f"{name}.jsonl" for name in ("few", "all", "several"))
    tiny.write_rows(few, rows[:6])
    tiny.write_rows(all_of_them, rows[::-1])
    train("dpo", tiny.dpo(model, few, tmp_path / "few"))
    assert taken(asked) == 12
    train("dpo", tiny.dpo(model, all_of_them, tmp_path / "all"))
    assert taken(asked) == 2 * (4 + FEW) and len(files()) == 2
    tiny.write_rows(several, [rows[0] | {"chosen": [rows[0]["chosen"], "w9 w8"], "rejected": [rows[0]["rejected"]]}])
    train("dpo", tiny.dpo(model, several, tmp_path / "several"))
    assert taken(asked) == 3, "a row is asked for whole"
    kept = load_file(files()[0])
    total = sum(len(load_file(file)["logps"]) for file in files())
    assert kept["keys"].shape == (len(kept["logps"]), 2) and total == 20 + 1
    train("kto", tiny.recipe(tiny.OFFLINE["kto"][0], model, all_of_them, tmp_path / "kto", max_steps=100))
    assert taken(asked) == 2 * 20, "a row's completion of another prompt is new"
    assert sum(len(load_file(file)["logps"]) for file in files()) == total + 20


def test_another_model_finds_nothing(model, other_model, pairs, tmp_path, asked):
    train("dpo", tiny.dpo(model, pairs, tmp_path / "first"))
    assert taken(asked) == 16
    shutil.copytree(model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    ways = {
        "other": dict(ref_model_name_or_path=str(other_model)),
        "stretched": dict(ref_model_name_or_path=str(tmp_path / "model")),
        "bf16": dict(bf16=True),
        "narrow": dict(dtype="bfloat16"),
        "adapted": dict(use_peft=True, reference="precomputed"),
    }
    for name, settings in ways.items():
        train("dpo", tiny.dpo(model, pairs, tmp_path / name, max_steps=1, **settings))
        assert taken(asked) == 16, name
    assert len({file.parent for file in files()}) == 6


def test_a_run_has_its_own_copy_and_damaged_files_are_computed_again(model, pairs, tmp_path, asked):
    whole = train("dpo", tiny.dpo(model, pairs, tmp_path / "whole"))
    want = stored(whole)
    (file,) = files()
    file.write_bytes(file.read_bytes()[:50])
    asked.clear()
    again = train("dpo", tiny.dpo(model, pairs, tmp_path / "again"))
    assert taken(asked) == 16 and stored(again).equal(want)
    assert (
        reference_cache.read(file.parent, load_file(file)["keys"].numpy()).tolist() == load_file(file)["logps"].tolist()
    )
    for broken in ({"keys": torch.zeros(3, 2)}, {"keys": torch.zeros(3, 1).long(), "logps": torch.zeros(3)},
                   {"keys": torch.zeros(0, 2).long(), "logps": torch.zeros(0)}):  # fmt: skip
        save_file(broken, file.with_name("foreign.safetensors"))
        train("dpo", tiny.dpo(model, pairs, tmp_path / "beside", overwrite=True))
        assert taken(asked) == 2 * FEW


def test_numbers_of_another_model_are_refused(model, pairs, tmp_path):
    train("dpo", tiny.dpo(model, pairs, tmp_path / "first"))
    (file,) = files()
    save_file({name: x if name == "keys" else x + 1.0 for name, x in load_file(file).items()}, file)
    with pytest.raises(
        BadInput, match=rf"{file.parent} does not hold this model's log-probs \(of \d rows computed again some differ"
    ):
        train("dpo", tiny.dpo(model, pairs, tmp_path / "second"))


def test_a_cache_that_cannot_be_written_is_said(model, pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "file"))
    train("dpo", tiny.dpo(model, pairs, tmp_path / "run"))
    said = capsys.readouterr().out
    assert "warning: the reference is not kept for other runs: " in said and "16 computed" in said


def test_a_key_tells_where_the_prompt_ends(tmp_path):
    sequences = [([1, 2], [3]), ([1], [2, 3]), ([], [1, 2, 3]), ([1, 2], [4])]
    keys = reference_cache.keys_of(sequences)
    assert len({tuple(key) for key in keys.tolist()}) == 4 and keys.dtype == np.int64
    reference_cache.add(tmp_path / "m", keys[[2, 0]], np.array([-1.0, -2.0]))
    reference_cache.add(tmp_path / "m", keys[[1]], np.array([-3.0]))
    found = reference_cache.read(tmp_path / "m", keys)
    assert found[:3].tolist() == [-2.0, -3.0, -1.0] and np.isnan(found[3])
    assert not list(tmp_path.rglob("*.align-tmp")) and np.isnan(reference_cache.read(tmp_path / "none", keys)).all()
