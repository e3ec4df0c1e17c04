"""Score heads: read at the last attended token, saved for transformers, trained by `align rm`."""

import peft
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align_engine.errors import BadInput
from align_engine.models import score_head
from align_engine.recipe import ModelSection, RmRecipe
from align_engine.run import train
from align_engine.training import metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft


def scalar(path, lora=False):
    torch.manual_seed(0)
    model = score_head.load_scalar_model(str(path), ModelSection(), 1, fresh_head=True)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)) if lora else model


def plain_scores(model, sequences):
    """The head on the last hidden state of each sequence by itself, without padding: the oracle."""
    found = []
    for ids in sequences:
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        found.append(model.score(hidden)[0, :, 0])
    return found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_scores_and_values_by_the_mask(model, left, lora):
    """Sequences that end in the pad id (it is the EOS id too), padded on either side."""
    made = scalar(model, lora)
    sequences = [[5, 6, 7, 1], [9, 1], [8, 3, 1, 1, 1, 4, 1]]
    ids, mask = torch.full((3, 7), 1), torch.zeros(3, 7, dtype=torch.int64)
    for i, one in enumerate(sequences):
        place = slice(7 - len(one), 7) if left else slice(0, len(one))
        ids[i, place], mask[i, place] = torch.tensor(one), 1
    want = plain_scores(made.get_base_model() if lora else made, sequences)
    got = score_head.scores(made, ids, mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.stack([x[-1] for x in want]), atol=1e-6, rtol=1e-5)
    if not left:
        values = score_head.values(made, ids, mask)
        for i, x in enumerate(want):
            torch.testing.assert_close(values[i, : len(x)], x, atol=1e-6, rtol=1e-5)
    got.sum().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if "score" in name and p.requires_grad)


def test_an_architecture_without_a_score_head_is_refused(model):
    from transformers import AutoModelForCausalLM

    with pytest.raises(BadInput, match="LlamaForCausalLM has no `score` head"):
        score_head.score_module(AutoModelForCausalLM.from_pretrained(model))


def sequences(path, rows, side):
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = lambda row: tokenizer(f"{row['prompt']} {row[side]}")["input_ids"]  # noqa: E731
    return [[*text(row), tokenizer.eos_token_id] for row in rows]


def test_rm_loss_and_metrics_equal_the_formula(model, tmp_path):
    rows = [row | {"chosen_rank": 1, "rejected_rank": 2 + i % 2} for i, row in enumerate(tiny.preference_rows(8))]
    data = tiny.write_rows(tmp_path / "pairs.jsonl", rows)
    recipe = tiny.recipe(RmRecipe, model, data, tmp_path / "run", max_steps=1, learning_rate=1e-9, rank_margin=0.5,
                         center_rewards_coefficient=0.01, gradient_accumulation_steps=2,
                         per_device_train_batch_size=4)  # fmt: skip
    folder = train("rm", recipe)
    record = metrics.read(folder.metrics)[0]
    made = AutoModelForSequenceClassification.from_pretrained(folder.final)
    chosen, rejected = (
        torch.stack([x[-1] for x in plain_scores(made, sequences(model, rows, side))])
        for side in ("chosen", "rejected")
    )
    margin = torch.tensor([0.5, 1.0] * 4)
    loss = (-F.logsigmoid(chosen - rejected - margin) + 0.01 * (chosen + rejected) ** 2).mean()
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert record["accuracy"] == (chosen > rejected).float().mean().item()
    assert record["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert record["mean_reward"] == pytest.approx(torch.cat([chosen, rejected]).mean().item(), abs=1e-5)


def test_a_saved_reward_model_scores_the_same_in_plain_transformers(model, tmp_path):
    """Its pad token is not its EOS token, which transformers' own pooling would take for padding."""
    data = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preference_rows(16))
    recipe = tiny.recipe(RmRecipe, model, data, tmp_path / "run", max_steps=20, learning_rate=3e-3,
                         eval_dataset_name=str(data))  # fmt: skip
    folder = train("rm", recipe)
    last = metrics.read(folder.metrics)[-1]
    assert last["eval_accuracy"] > 0.9 and last["eval_margin"] > 1
    made, tokenizer = (
        kind.from_pretrained(folder.final) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = tiny.preference_rows(16)
    texts = [f"{row['prompt']} {row[side]} <eos>" for side in ("chosen", "rejected") for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    got = made(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, 0]
    torch.testing.assert_close(got, score_head.scores(made, batch["input_ids"], batch["attention_mask"]))
    chosen, rejected = got.chunk(2)
    assert (chosen > rejected).float().mean().item() == last["eval_accuracy"]


def test_rm_with_lora_trains_adapter_and_head(model, pairs, tmp_path):
    from safetensors.torch import load_file

    settings = dict(use_peft=True, max_steps=20, learning_rate=1e-2, eval_dataset_name=str(pairs))
    folder = train("rm", tiny.recipe(RmRecipe, model, pairs, tmp_path / "run", **settings))
    assert metrics.read(folder.metrics)[-1]["eval_accuracy"] == 1.0
    names = load_file(folder.final / "adapter_model.safetensors")
    assert any("score" in name for name in names) and any("lora_A" in name for name in names)


def test_ranks_that_are_not_there_are_refused(model, pairs, tmp_path):
    with pytest.raises(BadInput, match="no column chosen_rank and no rejected_rank"):
        train("rm", tiny.recipe(RmRecipe, model, pairs, tmp_path / "run", rank_margin=1.0))


def test_the_head_of_a_bfloat16_model_scores_in_float32(model):
    made = score_head.load_scalar_model(str(model), ModelSection(dtype="bfloat16"), 1, fresh_head=True)
    assert next(made.model.parameters()).dtype == torch.bfloat16 and made.score.weight.dtype == torch.float32
    found = score_head.scores(made, torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64))
    assert found.dtype == torch.float32 and found.item() != found.bfloat16().item()
