"""The blocks of the documents run as they stand: Python, whole pages, the commands and rows of each method."""

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import workplace
import yaml
from documents import CURRENT, ROOT, blocks, commands, lines, name_of, write_files

from align_engine.data.formats import LAYOUTS, detect_layout, normalise
from align_engine.recipe import RECIPES
from align_engine.reports import legend

DOCS = ROOT / "docs"
SEVERAL_STEPS = {"clip_ratio/region_mean"}  # a rollout must serve
METHODS = [page for page in sorted((DOCS / "methods").glob("*.md")) if page.stem != "index"]
ELSEWHERE = {"extending.md": "test_extending.py", "drop-in.md": "test_examples.py", "start.md": "below"}
ELSEWHERE_TOO = (DOCS / "uses" / "drop-in.md").read_text()  # the README shows its first block
WITH_PYTHON = [
    page for page in CURRENT if page.name not in ELSEWHERE and any(b.language == "python" for b in blocks(page))
]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return workplace.make(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def here(template, tmp_path):
    with workplace.inside(template, tmp_path):
        yield tmp_path


def tensors():
    """What operators take, by the names that the documents give it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (4, 6))
    targets[:, :2] = -100
    return {"torch": torch, "hidden": hidden, "weight": weight, "targets": targets, "ref_logps": -torch.rand(4)}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_runs(page, here):
    """Blocks of a page in their order, in one namespace; those with a title are files."""
    write_files(page, here)
    sys.path.insert(0, str(here))
    names = tensors()
    for block in blocks(page):
        if block.language == "python" and not block.title and block.code.strip() not in ELSEWHERE_TOO:
            exec(compile(block.code, f"{name_of(page)}:{block.line}", "exec"), names)
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize("page", METHODS, ids=name_of)
def test_a_methods_page_trains_on_its_own_rows(page, here):
    write_files(page, here)
    if page.stem in ("rm", "sft"):  # it makes what the others begin with
        shutil.rmtree(f"runs/{page.stem}")
    written = set()
    for _, command in commands(page):
        waits = "human" in command
        assert workplace.run(command) == (1 if waits else 0), command
        out = here / command[command.index("--output_dir") + 1]
        assert (out / "marks").is_dir() if waits else (out / "final" / "config.json").exists()
        for line in (out / "metrics.jsonl").read_text().splitlines() if not waits else ():
            written |= set(json.loads(line))
    assert {name for name in written - {"step"} if legend.line(name) is None} == set()  # docs/metrics.md is made of it
    said = page.read_text().partition("## Which way")[2].partition("\n## ")[0]
    named = {name for line in said.splitlines() for name in re.findall(r"`([\w/]+)`", line.split(" | ")[0])}
    assert {name.removeprefix("eval_") for name in named} <= written | SEVERAL_STEPS


def test_models_are_listed_as_the_page_on_data_says():
    (code,) = (block.code for block in blocks(DOCS / "data.md") if block.language == "yaml")
    shown, file = (yaml.safe_load(text)["models"] for text in (code, (ROOT / "examples" / "tiers.yaml").read_text()))
    assert len(shown) == len(file) and all(one.items() <= whole.items() for one, whole in zip(shown, file))


@pytest.mark.parametrize("page", CURRENT, ids=name_of)
def test_rows_are_of_their_kind(page):
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.code)
        if block.language != "jsonl":
            continue
        rows = [json.loads(line) for line in block.code.splitlines()]
        kinds = [kind for kind in LAYOUTS for layout in LAYOUTS[kind] if set(layout) <= set(rows[0])]
        assert kinds and len(rows) >= 2, block.title
        for row in rows:
            assert normalise(row, detect_layout(list(row), kinds[0]))


def test_the_first_page_from_its_first_line_to_its_last(here, capsys, monkeypatch):
    """Ten minutes: the reader's own table and rows, a plan, a run, its reports, a talk, an answer."""
    page = DOCS / "start.md"
    write_files(page, here)
    (here / "ratings.csv").write_text("question,good_answer,bad_answer\nWhere?,Here.,Who knows.\n")
    names: dict = {}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.code, f"start.md:{block.line}", "exec"), names)
        for line in lines(block.code) if block.language == "bash" else ():
            if line.startswith(("head", "tail")):
                subprocess.run(line, shell=True, check=True)
            elif line.startswith("python -c"):
                assert "make_demo" in line  # tests/engine/test_demo.py makes one
            elif line.startswith("align "):
                monkeypatch.setattr(sys, "stdin", io.StringIO("How long?\n"))  # of align chat
                (command,) = (words for _, words in commands(page) if " ".join(words)[:12] == line[6:18])
                hub = [str(here / "hub") if word == workplace.HUB else word for word in command]
                short = ["--max_new_tokens", "4"] if command[0] == "chat" else []
                assert workplace.main(hub + short) == 0, capsys.readouterr().err
    assert json.loads((here / "from_table.jsonl").read_text())["chosen"][0]["content"] == "Here."
    assert (here / "runs/first/report.html").exists() and len((here / "train.jsonl").read_text().splitlines()) == 3
    metrics = [json.loads(line) for line in (here / "runs/first/metrics.jsonl").read_text().splitlines()]
    named = {cell.strip("`") for line in page.read_text().splitlines() if line.startswith("| `")
             for cell in line.split(" | ")[0].removeprefix("| ").split(", ")}  # fmt: skip
    assert named <= {name for record in metrics for name in record}


def test_a_scorer_over_http_scores(here):
    """The server of docs/rewards.md, asked as the page says, and by a run."""
    import threading
    import urllib.request

    write_files(DOCS / "rewards.md", here)
    sys.path.insert(0, str(here))
    import scorer

    server = scorer.serve(port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked, answered = (block.code for block in blocks(DOCS / "rewards.md") if block.language == "json")
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/score", asked.encode()) as reply:
        assert json.load(reply) == json.loads(answered)
    tiny_rows = [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "3 + 5?", "answer": "8"}]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows))
    address = f"http://127.0.0.1:{server.server_port}/score"
    command = f"rloo --model_name_or_path hub --dataset_name rows.jsonl --reward_funcs {address} --output_dir runs/http"
    assert workplace.run(command.split()) == 0
    server.shutdown()
    server.server_close()


def test_every_method_has_a_page():
    named = {name for page in METHODS for _, (name, *_) in commands(page)}
    assert named >= set(RECIPES)
    for page in METHODS:
        heads = [line for line in page.read_text().splitlines() if line.startswith("## ")]
        assert {"## When", "## Data", "## Which way", "## Watch"} <= set(heads), page.name
        assert "```math" in page.read_text() or page.stem == "iterate"
