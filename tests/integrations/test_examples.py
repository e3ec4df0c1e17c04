"""Every example runs, learns, and takes the steps that it would take without this project."""

import csv
import importlib.util
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
import workplace
from documents import blocks
from tokenizers import pre_tokenizers

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


def test_the_documents_name_every_example():
    text = (ROOT / "docs" / "examples.md").read_text()
    files = (path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb", ".yaml"))
    assert {file.name for file in files} <= set(re.findall(r"`examples/([\w.]+)`", text))
    folders = {path.name for path in (ROOT / "examples" / "own_data").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(re.findall(r"`examples/own_data/(\w+)`", text))


# -- from own data --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return workplace.make(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def example(template, tmp_path, request):
    """A copy of examples/own_data, in the folder of one of them, beside the small model."""
    with workplace.inside(template, tmp_path):
        shutil.copytree(ROOT / "examples" / "own_data", tmp_path / "own_data")
        os.chdir(tmp_path / "own_data" / request.param)
        yield request.param
    for name in ("answers", "verifier"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("example", ["dpo", "grpo", "kto"], indirect=True)
def test_own_data_to_a_model(example, tmp_path, capsys):
    """The commands of docs/examples.md: data, a run, a comparison; three steps of the small model."""
    prepare = runpy.run_path("prepare.py", run_name="prepare")
    prepare["main"]()
    base = str(tmp_path / "hub")
    if example == "kto":
        prepare["with_template"](base, Path("models/base"))
        base = "models/base"
        assert "{% generation %}" in Path(base, "chat_template.jinja").read_text()
    more = {"max_steps": 3, "model_name_or_path": base, "num_generations": 4}
    assert workplace.run([example, "--recipe", "recipe.yaml"], **more) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in Path(f"runs/{example}/metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in record for record in records) == 3
    assert any(name.startswith("eval_") for record in records for name in record)
    compare = runpy.run_path("compare.py", run_name="compare")
    score = compare[{"dpo": "plain", "grpo": "right", "kto": "direct"}[example]]
    lines = Path("held-out.jsonl").read_text().splitlines(keepends=True)
    Path("few.jsonl").write_text("".join(lines[:2]))
    means = compare["compare"]([base, f"runs/{example}/final"], "few.jsonl", score)
    assert len(means) == 2 and all(0 <= mean <= 1 for mean in means.values())


def test_scores_of_own_data():
    """What the examples call good is good, and the other way round."""
    own = ROOT / "examples" / "own_data"
    say = lambda *texts: [[{"role": "assistant", "content": text}] for text in texts]  # noqa: E731
    verifier = runpy.run_path(str(own / "grpo" / "verifier.py"))
    said = say("30 - 4 is 26. #### 26", "#### 1,024", "26", "#### 26 or so", "so #### 27")
    wanted = ["26", "1024", "26", "26", "26"]
    assert verifier["right"](said, said, result=wanted) == [1, 1, 0, 0, 0]
    assert verifier["form"](said, said) == [1, 1, 0, 0, 1]
    with (own / "dpo" / "ratings.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    sys.path.insert(0, str(own))
    plain = runpy.run_path(str(own / "dpo" / "compare.py"), run_name="compare")["plain"]
    better, worse = (plain(rows, say(*(row[side] for row in rows))) for side in ("better", "worse"))
    assert min(better) == 1 and sum(worse) < 0.2 * len(worse)
    direct = runpy.run_path(str(own / "kto" / "compare.py"), run_name="compare")["direct"]
    prepare = runpy.run_path(str(own / "kto" / "prepare.py"), run_name="prepare")
    marked = prepare["rows"]()
    scores = direct(marked, [row["completion"] for row in marked])
    assert all((score == 1) == row["label"] for score, row in zip(scores, marked))
    sys.modules.pop("answers", None)


# -- beside TRL -----------------------------------------------------------------------------------------------------
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


@needs_trl
def test_the_notebook_beside_trl():
    """Its cells in their order, on a small vocabulary; with `fuse` and without the losses are the same."""
    cells = json.loads((ROOT / "examples" / "beside_trl.ipynb").read_text())["cells"]
    names: dict = {}
    for number, cell in enumerate(cells):
        code = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if "VOCABULARY, " in code:
                code += "\nVOCABULARY, WIDTH, STEPS = 500, 32, 3"
            exec(compile(code, f"cell {number}", "exec"), names)
    eager, fused = names["found"]["TRL"], names["found"]["TRL, fused"]
    assert fused.losses == pytest.approx(eager.losses, abs=1e-5) and len(eager.losses) == 3


@needs_trl
def test_the_page_of_drop_ins(monkeypatch, tmp_path):
    """The blocks of docs/uses/drop-in.md, which takes names for what its reader has."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import DPOConfig, DPOTrainer

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    sys.modules.pop("data", None)
    data = importlib.import_module("data")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 400)}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    short = dict(max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
    own = dict(bf16=False, gradient_checkpointing=False, precompute_ref_log_probs=True)
    pair = {"prompt": "w3 w4", "chosen": " w5 w6", "rejected": " w7"}
    ids = torch.stack([row["input_ids"] for row in data.rows(4)])
    hidden, weight = torch.randn(4, 24, 32, requires_grad=True), torch.randn(500, 32, requires_grad=True)
    names = {
        "DPOTrainer": DPOTrainer, "model": data.tiny_model(), "tokenizer": tokenizer, "ids": ids, "labels": ids,
        "config": DPOConfig(str(tmp_path), **own, **short),
        "dataset": Dataset.from_list([pair] * 4), "args": transformers.TrainingArguments(str(tmp_path), **short),
        "rows": data.rows(4), "collator": transformers.default_data_collator, "hidden": hidden, "weight": weight,
    }  # fmt: skip
    ran = [block.code for block in blocks(ROOT / "docs" / "uses" / "drop-in.md") if block.language == "python"]
    for code in ran:
        exec(code, names)
    assert len(ran) == 4 and torch.isfinite(names["loss"])
