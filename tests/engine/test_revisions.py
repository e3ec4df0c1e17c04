"""`model_revision` and `dataset_config`: a hub's cache with two revisions, a folder with two configurations."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny

from align_engine.cli import main
from align_engine.data.sources import load_rows
from align_engine.errors import BadInput
from align_engine.preparation import folder
from align_engine.preparation.sections import InputSection

RUN = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
from align_engine import cli
from align_engine.iterate import planned
from align_engine.recipe import DpoRecipe
from align_engine.training import reference

asked = []
loaded = reference.loaded

def watched(engine):
    model = loaded(engine)
    asked.append(float(model.get_input_embeddings().weight.sum()))
    return model

reference.loaded = watched
for flags in json.loads(sys.argv[1]):
    asked.clear()
    codes = [cli.main(["dpo", "--model_name_or_path", "org/tiny", "--reference", "frozen", "--max_steps", "1",
                       "--learning_rate", "1e-12", *flags])]
    out = Path(flags[flags.index("--output_dir") + 1])
    final = load_file(out / "final" / "model.safetensors")["model.embed_tokens.weight"]
    tokens = json.loads((out / "final" / "tokenizer.json").read_text())["model"]["vocab"]
    plain = json.loads((out / "run.json").read_text())["identity"]["files of model_name_or_path"]
    codes.append(cli.main(["dpo", "--model_name_or_path", "org/tiny", "--use_peft", "--max_steps", "1", *flags[:-1],
                           flags[-1] + "-lora"]))
    lora = json.loads(Path(flags[-1] + "-lora", "final", "adapter_config.json").read_text())
    print(json.dumps({"codes": codes, "policy": float(final.sum()), "reference": asked, "commit": plain,
                      "tokens": "extra" in tokens, "adapter": [lora["base_model_name_or_path"], lora["revision"]]}))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The hub's cache of org/tiny: `main`, and `v1` with other weights and another tokenizer."""
    folder = tmp_path_factory.mktemp("hub")
    place = folder / "models--org--tiny"
    for name, seed, words in (("main", 0, tiny.WORDS), ("v1", 7, [*tiny.WORDS, "extra"])):
        commit = str(seed) * 40
        tiny.write_model(place / "snapshots" / commit, seed=seed, words=words)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / name).write_text(commit)
    return folder


def total(cache, commit):
    from safetensors.torch import load_file

    file = cache / "models--org--tiny" / "snapshots" / (commit * 40) / "model.safetensors"
    return float(load_file(file)["model.embed_tokens.weight"].sum())


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """What was found of each commit, by one process: the hub's libraries read where their cache is at import."""
    folder = tmp_path_factory.mktemp("runs")
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.preference_rows(4))
    asked = {"0": [], "7": ["--model_revision", "v1"]}
    words = [[*flags, "--dataset_name", str(rows), "--output_dir", str(folder / commit)]
             for commit, flags in asked.items()]  # fmt: skip
    place = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(words)], capture_output=True, text=True, env=place)
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"codes"')]))


@pytest.mark.parametrize("commit", ["0", "7"], ids=["main", "v1"])
def test_policy_tokenizer_and_reference_are_of_the_revision(commit, cache, runs):
    found = runs[commit]
    want = pytest.approx(total(cache, commit), abs=1e-4)
    assert found["codes"] == [0, 0] and found["policy"] == want and found["reference"] == [want]
    assert found["tokens"] == (commit == "7") and found["commit"] == commit * 16
    assert found["adapter"] == ["org/tiny", None if commit == "0" else "v1"]
    assert abs(total(cache, "0") - total(cache, "7")) > 1e-2


def test_a_revision_of_a_folder_is_refused(tmp_path, capsys):
    model = tiny.write_model(tmp_path / "model")
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sft_rows(4))
    flags = ["sft", "--model_name_or_path", str(model), "--dataset_name", str(rows), "--output_dir",
             str(tmp_path / "run"), "--model_revision", "v1"]  # fmt: skip
    assert main(flags) == 2
    assert "model_revision = 'v1' is of a model on the hub" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def two(tmp_path):
    """A data set of two configurations, as its README says."""
    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        tiny.write_rows(tmp_path / "two" / name / "train.jsonl", [{"prompt": name, "completion": name}])
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("a", "b"))
    (tmp_path / "two" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    return tmp_path / "two"


def test_a_configuration_is_that_of_datasets(two, tmp_path, capsys):
    from datasets import load_dataset

    for name in ("a", "b"):
        assert load_rows(two, config=name)[:] == load_dataset(str(two), name, split="train")[:]
    with pytest.raises(BadInput, match=r"cannot be read: .*BuilderConfig 'c' not found"):
        load_rows(two, config="c")
    file = shutil.copy(two / "a" / "train.jsonl", tmp_path / "file.jsonl")
    with pytest.raises(BadInput, match=r"dataset_config = 'a': .* has no configurations"):
        load_rows(file, config="a")
    model, out = tiny.write_model(tmp_path / "model"), tmp_path / "run"
    flags = ["--dataset_name", str(two), "--dataset_config", "b", "--output_dir", str(out), "--max_steps", "1"]
    assert main(["sft", "--model_name_or_path", str(model), *flags]) == 0
    assert "configuration b" in (out / "final" / "README.md").read_text()
    assert folder.read(InputSection(dataset_name=str(two), dataset_config="b"))["prompt"][:] == ["b"]
