"""Every example runs and learns, and all of them take the same steps."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = [  # of transformers, TRL and Lightning themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ROOT = Path(__file__).parents[2]
NEEDS = {"lightning_module": "lightning", "trl_sft": "trl"}
FILES = sorted(file for file in (ROOT / "examples").glob("*.py") if file.stem != "data")
RUNNABLE = [file for file in FILES if importlib.util.find_spec(NEEDS.get(file.stem, "torch")) is not None]


@pytest.mark.parametrize("file", RUNNABLE, ids=lambda file: file.stem)
def test_example(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    monkeypatch.delitem(sys.modules, "data", raising=False)
    losses = runpy.run_path(str(file))["main"](steps=12)
    assert len(losses) == 12
    assert losses[0] == pytest.approx(6.2, abs=0.15)  # log 500
    assert losses[-1] < losses[0] - 0.3


def test_the_readme_names_every_example():
    named = set(re.findall(r"examples/(\w+)\.py", (ROOT / "README.md").read_text()))
    assert named == {file.stem for file in FILES}
