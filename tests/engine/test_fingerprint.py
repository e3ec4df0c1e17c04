"""Fingerprints of files: what counts and what does not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from align_engine.errors import BadInput
from align_engine.models import fingerprint


@pytest.fixture
def folder(tmp_path):
    """A model of one large file with a tiny tensor between two large ones."""
    path = tmp_path / "model"
    path.mkdir()
    save_tensors(path, 1.0)
    (path / "config.json").write_text("{}")
    return path


def save_tensors(path, norm):
    large = torch.zeros(3_000_001)
    save_file({"a": large, "b.norm": torch.full((7,), norm), "c": large + 1}, path / "model.safetensors")


def test_a_copy_elsewhere_has_the_same_fingerprint_and_other_files_do_not_count(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a note")
    (tmp_path / "copy" / "runs").mkdir()
    assert fingerprint.of_model(folder) == fingerprint.of_model(tmp_path / "copy")


def test_a_change_of_one_small_tensor_in_a_large_file_is_seen(folder):
    before = fingerprint.of_model(folder)
    save_tensors(folder, 1.5)
    assert (folder / "model.safetensors").stat().st_size > fingerprint.WHOLE
    assert fingerprint.of_model(folder) != before


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "modeling_mine.py", "model-00001-of-00002.safetensors"]
)
def test_a_file_that_changes_or_comes_or_goes_is_seen(folder, name):
    seen = {fingerprint.of_model(folder)}
    for content in ("{ }", "[ ]"):
        (folder / name).write_text(content)
        seen.add(fingerprint.of_model(folder))
    (folder / name).unlink()
    seen.add(fingerprint.of_model(folder))
    assert len(seen) == (4 if name == "config.json" else 3)


def test_an_adapter_has_another_fingerprint_where_its_base_model_has(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    before = fingerprint.of_model(adapter)
    save_tensors(folder, 2.0)
    assert fingerprint.of_model(adapter) != before


def test_a_hub_name_stands_for_the_commit_in_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--some--model"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    assert fingerprint.of_model("some/model") == commit[:16]
    with pytest.raises(BadInput, match="no model at 'some/other'"):
        fingerprint.of_model("some/other")
