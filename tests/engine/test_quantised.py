"""Weights in 4 and 8 bits (bitsandbytes on the CPU): frozen bit for bit, with the loss of the model they stand for.

The truth is plain: transformers dequantises the model, peft loads the saved adapter onto it, torch takes log-softmax of
whole logits in float32.
"""

import bitsandbytes as bnb
import pytest
import tiny
import torch
import torch.nn.functional as F
from peft import PeftModel
from runs import cut_off, in_checkpoint, same_bits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from align_engine.errors import BadInput
from align_engine.integrations.hook import check_head
from align_engine.run import train
from align_engine.training import metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
BITS = {"load_in_4bit": bnb.nn.Params4bit, "load_in_8bit": bnb.nn.Int8Params}
TOLERANCE = {"load_in_4bit": 1e-5, "load_in_8bit": 1e-2}  # with 8 bits evaluation rounds its activations too


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def wide(request, tmp_path_factory):
    """Rows of 64, the size of a block that shares one scale."""
    path = tmp_path_factory.mktemp("wide")
    return tiny.write_model(path, hidden_size=64, intermediate_size=128, tie_word_embeddings=request.param)


class Watch(TrainerCallback):
    """What the base held before the first step, in which form, and what it holds after the last."""

    def base(self, model):
        return {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}

    def on_train_begin(self, args, state, control, model, **_):
        self.before = self.base(model)
        self.kinds = {type(value) for name, value in model.named_parameters() if "_proj.base_layer" in name}
        self.heads = {type(value) for name, value in model.named_parameters() if "lm_head" in name}

    def on_train_end(self, args, state, control, model, **_):
        self.after = self.base(model)


def ids_of(tokenizer, prompt, answer):
    prompt, answer = (tokenizer(text)["input_ids"] for text in (prompt, answer))
    return prompt, [*answer, tokenizer.eos_token_id]


@torch.no_grad()
def logp(model, prompt, answer):
    """Summed over the answer."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


def plain_loss(name, model, tokenizer, rows):
    pairs = [[ids_of(tokenizer, row["prompt"], row[side]) for row in rows] for side in ("chosen", "rejected")]
    if name == "sft":
        return -sum(logp(model, *one) for one in pairs[0]) / sum(len(answer) for _, answer in pairs[0])
    ratios = []
    for side in pairs:
        mine = torch.stack([logp(model, *one) for one in side])
        with model.disable_adapter():
            ratios.append(mine - torch.stack([logp(model, *one) for one in side]))
    return -F.logsigmoid(0.1 * (ratios[0] - ratios[1])).mean()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_the_loss_is_that_of_the_dequantised_model(name, bits, wide, request, tmp_path, monkeypatch):
    """Evaluated after each step, on a CPU that would store the weights otherwise for evaluation if it were let."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    preferences = tiny.preference_rows(8)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", preferences if name == "dpo" else tiny.sft_rows(8))
    watch, tokenizer = Watch(), AutoTokenizer.from_pretrained(wide)
    settings = dict(use_peft=True, lora_dropout=0.0, eval_dataset_name=str(rows), eval_steps=1, learning_rate=1e-2)
    if "untied" in request.node.callspec.id:
        settings["lora_target_modules"] = ["q_proj", "down_proj", "lm_head"]
    folder = train(name, tiny.offline(name, wide, rows, tmp_path / "run", **settings, **{bits: True}), [watch])

    assert watch.kinds == {BITS[bits]} and watch.heads <= {torch.nn.Parameter}
    assert watch.before.keys() == watch.after.keys()
    assert all(torch.equal(watch.after[key], value) for key, value in watch.before.items())
    config = BitsAndBytesConfig(
        **{bits: True}, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    whole = AutoModelForCausalLM.from_pretrained(wide, quantization_config=config, dtype=torch.float32).dequantize()
    whole = PeftModel.from_pretrained(whole.float(), folder.final).eval()
    assert not any(isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for module in whole.modules())
    adapter = load_file(folder.final / "adapter_model.safetensors")
    assert all(value.any() for key, value in adapter.items()), "the adapter must have moved"
    want = plain_loss(name, whole, tokenizer, preferences).item()
    found = [record["eval_loss"] for record in metrics.read(folder.metrics) if "eval_loss" in record]
    assert found[-1] == pytest.approx(want, rel=TOLERANCE[bits]) and found[-1] < found[0]
    with whole.disable_adapter():
        first = plain_loss("sft", whole, tokenizer, preferences).item() if name == "sft" else 0.693147
    assert metrics.read(folder.metrics)[0]["loss"] == pytest.approx(first, rel=TOLERANCE[bits])


def test_cut_off_and_run_again_ends_with_the_same_bits(wide, pairs, tmp_path):
    settings = dict(max_steps=4, save_steps=2, use_peft=True, load_in_4bit=True, learning_rate=1e-2,
                    per_device_train_batch_size=3)  # fmt: skip
    unbroken = train("dpo", tiny.dpo(wide, pairs, tmp_path / "unbroken", **settings))
    recipe = tiny.dpo(wide, pairs, tmp_path / "cut", **settings)
    cut_off("dpo", recipe)
    held = in_checkpoint(tmp_path / "cut" / "checkpoint-000002")
    assert held and all("lora_" in key for key in held), "the frozen weights lie in the model's own folder"
    cut = train("dpo", recipe)
    assert same_bits(unbroken.final, cut.final, "adapter_model.safetensors")


def test_a_head_in_4_bits_is_refused(wide, pairs, tmp_path):
    """Such a head is no product of a matrix that the fused loss can read."""
    causal = AutoModelForCausalLM.from_pretrained(wide)
    held = causal.lm_head
    causal.lm_head = bnb.nn.Linear4bit(held.in_features, held.out_features, bias=False)
    with pytest.raises(BadInput, match="the LM head is a Linear4bit"):
        check_head(causal)
