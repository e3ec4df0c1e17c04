import gc
import itertools
import sys
from pathlib import Path

import pictures
import pytest
import quick
import tiny
import torch

HERE, NUMBERS = Path(__file__).parent, itertools.count()
FIRST = [f"{name}.py" for name in (  # a minute and more each: last, one would keep a worker while the other has none
    "kernels/test_triton_interpreted", "kernels/test_triton_compiled", "kernels/test_cuda_build",
    "preparation/test_story", "kernels/test_benches", "kernels/test_gpu_bench", "engine/test_plan", "cli/test_fuzz_cli",
)]  # fmt: skip


def pytest_configure(config):
    pictures.leave_out()
    config.option.loadscopereorder = False  # xdist would begin with the files of the most tests
    config.addinivalue_line("markers", "quick: some of every area, see quick.py")


def place(path):
    """As quick.py names a file; of benches nothing is quick."""
    return path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else ""


def pytest_ignore_collect(collection_path, config):
    """Of the quick tests alone, other files are not even imported."""
    others = collection_path.suffix == ".py" and place(collection_path) not in quick.QUICK
    return True if others and config.getoption("markexpr") == "quick" else None


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: FIRST.index(place(item.path)) if place(item.path) in FIRST else len(FIRST))
    asked = {(file, name) for file, names in quick.QUICK.items() for name in names}
    met = set()
    for item in items:
        found = {(place(item.path), name) for name in (item.name, item.name.partition("[")[0], "")} & asked
        met |= found
        if found:
            item.add_marker("quick")
    here = {place(item.path) for item in items}
    if config.getoption("markexpr") == "quick" and (gone := {pair for pair in asked - met if pair[0] in here}):
        raise pytest.UsageError(f"quick.py names tests that are not there: {sorted(gone)}")


@pytest.fixture(scope="module", autouse=True)
def garbage_is_looked_for_among_what_is_new():
    """A full collection goes through all that has been imported and collected, half a second each time, and every run
    of a trainer ends with one: what is there when a file's tests begin is left out of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def modules_are_found_where_they_were():
    """Reward files put their folders on the path; the next test has others of the same names."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(autouse=True)
def references_are_computed_anew(monkeypatch, tmp_path_factory):
    """No test finds another's log-probs."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{next(NUMBERS)}"))


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


@pytest.fixture(scope="session")
def experts(model, tmp_path_factory):
    """A tiny mixture of experts."""
    return tiny.write_experts(tmp_path_factory.mktemp("experts"), model)


@pytest.fixture
def pairs(tmp_path):
    return tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preference_rows(8))


@pytest.fixture
def completions(tmp_path):
    return tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
