"""LoRA's products one onto another: peft's numbers, fewer FLOPs where activations are recomputed."""

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from align_engine.models import load, lora
from align_engine.recipe import ModelSection

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
IDS = torch.arange(2, 34).view(2, 16)


def adapted(model, fused=True, dropout=0.0, dtype=torch.float64):
    """A model with adapters that do something, fused or as peft has them."""
    with pytest.MonkeyPatch.context() as patch:
        if not fused:
            patch.setattr(lora, "fuse", lambda model: None)
        made = load.add_adapters(LlamaForCausalLM.from_pretrained(model), ModelSection(lora_r=4), dropout=dropout)
    torch.manual_seed(3)
    for name, weight in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return made.to(dtype).train()


def results(model):
    """Logits, and gradients of the adapters."""
    model.zero_grad()
    torch.manual_seed(4)
    logits = model(input_ids=IDS, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def same(a, b, most=1e-12):
    return all((x - y).norm() <= most * y.norm() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pefts_numbers(dropout, checkpointing, model):
    ours, theirs = (adapted(model, fused, dropout) for fused in (True, False))
    if checkpointing:
        load.checkpoint_activations(ours)
    expected = results(theirs)
    assert same(results(ours), expected) and len(expected) == 1 + 2 * 2 * 7


def test_a_bias_of_the_base_is_added():
    config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    torch.manual_seed(0)
    made = Qwen2ForCausalLM(config)
    torch.nn.init.normal_(made.model.layers[0].self_attn.q_proj.bias)
    made = load.add_adapters(made, ModelSection(lora_r=4), dropout=0.0).double()
    found = results(made)
    for module in made.modules():
        vars(module).pop("forward", None)
    assert same(found, results(made))


def test_fresh_adapters_leave_every_bit(model):
    made = load.add_adapters(LlamaForCausalLM.from_pretrained(model), ModelSection(lora_r=4), dropout=0.0)
    found = made(input_ids=IDS).logits
    with made.disable_adapter():
        assert found.equal(made(input_ids=IDS).logits)


def test_what_is_not_plain_is_pefts_own(model):
    made, theirs = adapted(model), adapted(model, fused=False)
    with made.disable_adapter(), theirs.disable_adapter():
        assert made(input_ids=IDS).logits.equal(theirs(input_ids=IDS).logits)
    for one in (made, theirs):
        torch.manual_seed(5)
        one.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        one.double().base_model.set_adapter(["default", "second"])
    assert same([made(input_ids=IDS).logits], [theirs(input_ids=IDS).logits])
    made.merge_adapter()
    assert same([made(input_ids=IDS).logits], [theirs(input_ids=IDS).logits])


def test_adapters_of_another_type_than_the_weights_are_pefts_own(model):
    made, theirs = (adapted(model, fused, dtype=torch.bfloat16) for fused in (True, False))
    for one in (made, theirs):
        for name, weight in one.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.float()
    assert made(input_ids=IDS).logits.equal(theirs(input_ids=IDS).logits)


def test_the_last_product_of_a_block_is_not_made_again(model):
    counts = {}
    for fused in (True, False):
        made = adapted(model, fused)
        load.checkpoint_activations(made)
        with FlopCounterMode(display=False) as counter:
            results(made)
        counts[fused] = counter.get_total_flops()
    config = made.config
    # the adapter's, of rank 4, is the last one of peft, which torch does not make again either
    product = 2 * IDS.numel() * config.hidden_size * (config.intermediate_size - 4)
    assert counts[False] - counts[True] == config.num_hidden_layers * product
