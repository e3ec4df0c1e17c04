import pytest
import tiny
import trl_runs


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """TRL reports each trainer it builds to its authors, but not from a CI; its experimental ones warn."""
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture(scope="session")
def trl_model(tmp_path_factory):
    """Folder of a tiny model of V = 67."""
    return tiny.write_model(tmp_path_factory.mktemp("trl"), vocab=trl_runs.V)
