"""Every example runs, learns, and takes the steps that it would take without this project."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

pytestmark = [  # of transformers, TRL and Lightning themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ROOT = Path(__file__).parents[2]
NEEDS = {"lightning_module": "lightning", "trl_sft": "trl"}
FILES = sorted(file for file in (ROOT / "examples").glob("*.py") if file.stem != "data")
RUNNABLE = [file for file in FILES if importlib.util.find_spec(NEEDS.get(file.stem, "torch")) is not None]


STEPS = 12
ON_ITS_OWN = {  # what stands in an example for the library's own
    "transformers_trainer": ("align_engine.integrations.transformers.FusedTrainer", transformers.Trainer),
    "trl_sft": ("align_engine.integrations.trl.fuse", lambda trainer: trainer),
}


def losses_of(file):
    sys.modules.pop("data", None)
    return runpy.run_path(str(file))["main"](steps=STEPS)


def eager_loop(file):
    """The plain loop with transformers' own loss from whole logits."""
    data = runpy.run_path(str(file.parent / "data.py"))
    model = data["tiny_model"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    shuffled = torch.Generator().manual_seed(0)
    batches = torch.utils.data.DataLoader(data["rows"](), batch_size=8, shuffle=True, generator=shuffled)
    losses = []
    while len(losses) < STEPS:
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("file", RUNNABLE, ids=lambda file: file.stem)
def test_example(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    losses = losses_of(file)
    if file.stem in ON_ITS_OWN:
        monkeypatch.setattr(*ON_ITS_OWN[file.stem])
        want = losses_of(file)
    else:
        want = eager_loop(file)
    same = 4 if file.stem == "lightning_module" else STEPS  # it draws the order of its second epoch otherwise
    assert losses[:same] == pytest.approx(want[:same], rel=1e-5)
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.8


def test_the_readme_names_every_example():
    named = set(re.findall(r"examples/(\w+)\.py", (ROOT / "README.md").read_text()))
    assert named == {file.stem for file in FILES}
