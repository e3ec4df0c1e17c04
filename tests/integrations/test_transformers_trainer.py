"""FusedTrainer takes the steps of transformers.Trainer, and asks for no logits."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from processes import run_on_two
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from align_engine.errors import BadInput
from align_engine.integrations.transformers import FusedTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
V = 67


def rows(count=24):
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(3, V, (count, 10), generator=rng)
    start = torch.randint(1, 9, (count, 1), generator=rng)  # windows of unequal counts: a mean of means is wrong
    return [{"input_ids": i, "labels": i.masked_fill(torch.arange(10) < s, -100)} for i, s in zip(ids, start)]


def build(kind, model, out, **settings):
    options = {name: settings.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in settings}
    defaults = dict(max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=3, learning_rate=2e-3,
                    logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)  # fmt: skip
    args = TrainingArguments(str(out), **defaults | settings)
    return kind(model, args, train_dataset=rows(), eval_dataset=rows(6), data_collator=default_data_collator, **options)


def run(trainer):
    trainer.train()
    logs = [{k: log[k] for k in ("loss", "grad_norm")} for log in trainer.state.log_history if "loss" in log]
    return logs, {k: v.clone() for k, v in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}


def same(a, b):
    assert len(a[0]) == len(b[0]) > 0
    for ours, theirs in zip(a[0], b[0]):
        assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)
    for name, weight in b[1].items():
        torch.testing.assert_close(a[1][name], weight, atol=1e-4, rtol=0)


def llama(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(folder):
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False,
                               task_type="CAUSAL_LM", ensure_weight_tying=False)  # fmt: skip
    return peft.get_peft_model(llama(folder), settings)


def experts(folder):
    config = MixtralConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, pad_token_id=0,
                           num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, bos_token_id=1,
                           eos_token_id=1, output_router_logits=True, router_aux_loss_coef=0.3)  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("make", [llama, adapted, experts])
@pytest.mark.parametrize(
    "settings", [dict(), dict(gradient_checkpointing=True, gradient_accumulation_steps=1)], ids=str
)
def test_same_steps(make, settings, trl_model, tmp_path):
    torch.manual_seed(0)
    model = make(trl_model)
    twin = copy.deepcopy(model)
    same(run(build(FusedTrainer, model, tmp_path, **settings)), run(build(Trainer, twin, tmp_path, **settings)))


def test_evaluation(trl_model, tmp_path):
    """The loss alone without logits; with metrics, logits are what was asked for."""
    found = []
    for kind in (FusedTrainer, Trainer):
        shapes = []
        metrics = lambda out, shapes=shapes: shapes.append(out.predictions.shape) or {}  # noqa: E731
        plain, measured = (build(kind, llama(trl_model), tmp_path, **o) for o in ({}, dict(compute_metrics=metrics)))
        with FlopCounterMode(display=False) as counter:
            loss = plain.evaluate()["eval_loss"]
        found.append((loss, measured.evaluate()["eval_loss"], counter.get_total_flops()))
        assert shapes == [(6, 10, V)]
    assert found[0][:2] == pytest.approx(found[1][:2], abs=1e-5)
    assert found[0][2] < found[1][2]


@pytest.mark.parametrize("masked", [[0, 1], [0, 1, 2, 3]], ids=["a batch", "all"])
def test_batches_without_targets(masked, trl_model, tmp_path):
    """NaN where transformers gives NaN, and never a loss of 0 in the mean; training and without labels as well."""
    data = [{**row, "labels": torch.full((10,), -100)} if i in masked else row for i, row in enumerate(rows(4))]
    bare = [{"input_ids": row["input_ids"]} for row in data]
    found = []
    for kind in (FusedTrainer, Trainer):
        settings = dict(max_steps=2, gradient_accumulation_steps=1, per_device_eval_batch_size=2)
        settings |= dict(prediction_loss_only=True, logging_nan_inf_filter=False)
        trainer = build(kind, llama(trl_model), tmp_path, **settings)
        trainer.train_dataset = data
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        evaluated = [trainer.evaluate(part)["eval_loss"] for part in (data, data[:2], rows(4))]
        predicted = trainer.predict(bare)
        assert predicted.predictions is None and "test_loss" not in predicted.metrics
        found.append(losses + evaluated + [float(p.sum()) for p in trainer.model.parameters()])
    assert found[0] == pytest.approx(found[1], abs=1e-4, rel=1e-4, nan_ok=True)
    assert found[0][3] != found[0][3]


def test_refusals(trl_model, tmp_path):
    for settings, message in (
        (dict(label_smoothing_factor=0.1), r"label_smoothing_factor = 0\.1 takes logits"),
        (dict(compute_loss_func=lambda *a, **k: None), "compute_loss_func takes logits"),
    ):
        with pytest.raises(BadInput, match=message):
            build(FusedTrainer, llama(trl_model), tmp_path, **settings)
    bart = BartConfig(vocab_size=V, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16,
                      encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=16, is_decoder=True,
                      is_encoder_decoder=False)  # fmt: skip
    with pytest.raises(BadInput, match="BartForCausalLM has a loss of its own"):
        build(FusedTrainer, AutoModelForCausalLM.from_config(bart), tmp_path)


TWO = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_transformers_trainer import FusedTrainer, Trainer, build, llama, run, same
folder, out = map(Path, sys.argv[1:3])
settings = dict(max_steps=4, gradient_accumulation_steps=2)
same(*(run(build(kind, llama(folder), out, **settings)) for kind in (FusedTrainer, Trainer)))
"""


def test_two_processes(trl_model, tmp_path):
    run_on_two(TWO, trl_model, tmp_path, Path(__file__).parent)
