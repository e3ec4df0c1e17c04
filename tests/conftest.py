import pytest
import tiny
import torch


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Folder of a tiny model with its tokenizer."""
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model64(tmp_path_factory):
    """The tiny model in float64, where rounding hides nothing (dtype: auto keeps it)."""
    return tiny.write_model(tmp_path_factory.mktemp("model64"), dtype=torch.float64)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """Another tiny model, for a reference that is not the policy."""
    return tiny.write_model(tmp_path_factory.mktemp("other"), seed=7)


@pytest.fixture
def pairs(tmp_path):
    return tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preference_rows(8))


@pytest.fixture
def completions(tmp_path):
    return tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
