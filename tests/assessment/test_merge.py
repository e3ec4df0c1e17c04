"""`align merge`: the merged model's numbers are those of the adapters on their base, and nothing is written over."""

import json
import subprocess
import sys
import time

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align_engine import cli
from align_engine.assessment import merge

pytestmark = pytest.mark.filterwarnings(  # of peft
    "ignore:.*is_gradient_checkpointing.*:FutureWarning", "ignore:Model has `tie_word_embeddings=True`:UserWarning"
)
IDS = torch.tensor([[2, 3, 4, 5, 6]])
CARD = "---\nlicense: mit\nlibrary_name: peft\n---\n\n# A run\n"


def adapters(base, path, scalar=False, **more):
    """Saved LoRA adapters with numbers in both of their matrices, a tokenizer and a card."""
    torch.manual_seed(1)
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = kind.from_pretrained(base, **({"num_labels": 1} if scalar else {}))
    task = "SEQ_CLS" if scalar else "CAUSAL_LM"
    config = LoraConfig(**{"target_modules": "all-linear", "init_lora_weights": False, "task_type": task} | more)
    get_peft_model(model, config).save_pretrained(path, save_embedding_layers=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(path)
    (path / "README.md").write_text(CARD)
    return path


def merged(capsys, path, out, *flags):
    code = cli.main(["merge", "--model_name_or_path", str(path), "--output_dir", str(out), *flags])
    return code, capsys.readouterr()


@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "lm_head"], ["embed_tokens", "up_proj"]], ids=str)
def test_logits_are_those_of_the_adapters(modules, tmp_path, capsys):
    """With tied weights too, where an adapter lies on one of the two."""
    base = tiny.write_model(tmp_path / "base")
    settings = json.loads((base / "generation_config.json").read_text()) | {"max_new_tokens": 7}
    (base / "generation_config.json").write_text(json.dumps(settings))
    path = adapters(base, tmp_path / "adapters", target_modules=modules)
    code, said = merged(capsys, path, tmp_path / "out")
    assert code == 0 and f"in the weights of {base}" in said.out
    want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)(input_ids=IDS).logits
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(got(input_ids=IDS).logits, want, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS).logits
    assert (plain - want).abs().max() > 1e-2
    assert got.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0].content }}"
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapters", "base", "out"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card and "license: mit" in card and "# A run" in card


def test_a_reward_model_keeps_its_head(tmp_path, capsys):
    base = tiny.write_model(tmp_path / "base")
    path = adapters(base, tmp_path / "adapters", scalar=True)
    assert merged(capsys, path, tmp_path / "out")[0] == 0
    one = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    one.config.pad_token_id = 1
    want = PeftModel.from_pretrained(one, path)(input_ids=IDS).logits
    got = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")(input_ids=IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_refusals_leave_everything_as_it_was(tmp_path, capsys, monkeypatch):
    base = tiny.write_model(tmp_path / "base")
    path = adapters(base, tmp_path / "adapters")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place, out, wanted in [
        (base, "out", "is a whole model: there is nothing to merge"),
        (path, "adapters", "is or holds model_name_or_path"),
        (path, "base", "is or holds model_name_or_path"), (path, ".", "is or holds model_name_or_path"),
        (path, "full", "holds notes.txt: give a new or empty folder"), (path, "file", "is a file; give a folder"),
        (path, "file/out", "cannot be written to"), (tmp_path / "none", "out", "no such folder"),
    ]:  # fmt: skip
        code, said = merged(capsys, place, tmp_path / out)
        assert code == 2 and wanted in said.err and said.err.count("\n") == 1, said.err
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"

    def full(side, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "settle", full)
    code, said = merged(capsys, path, tmp_path / "out")
    assert code == 1 and "No space left on device; the same command starts afresh" in said.err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapters", "base", "file", "full"]


def test_a_merge_that_is_killed_is_run_again(tmp_path, capsys):
    """A kill -9 while the weights are written leaves nothing at its place, and no lock."""
    path = adapters(tiny.write_model(tmp_path / "base"), tmp_path / "adapters")
    code = (
        "import sys, time; from align_engine.assessment import merge; from align_engine.cli import main\n"
        "merge.settle = lambda side, target: time.sleep(60)\n"
        f"main(['merge', '--model_name_or_path', {str(path)!r}, '--output_dir', {str(tmp_path / 'out')!r}])"
    )
    running = subprocess.Popen([sys.executable, "-c", code])
    side = tmp_path / "out.align-tmp" / "README.md"
    while running.poll() is None and not side.exists():
        time.sleep(0.05)
    assert side.exists() and not (tmp_path / "out").exists()
    second, said = merged(capsys, path, tmp_path / "out")
    assert second == 2 and "in use by another merge" in said.err
    running.kill()
    running.wait()
    assert merged(capsys, path, tmp_path / "out")[0] == 0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapters", "base", "out"]
