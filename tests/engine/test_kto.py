"""KTO: mismatched completions, the reference point, the balance of classes, and the loss against a plain formula."""

import datasets
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.algorithms.kto import class_weights, with_mismatched
from align_engine.data.batches import epoch_order
from align_engine.data.sources import load_rows
from align_engine.data.tokenize import prepare
from align_engine.errors import BadInput
from align_engine.recipe import DataSection, KtoLoss, KtoRecipe, TrainSection
from align_engine.run import train
from align_engine.training import metrics

ROWS = dict(index=[0, 1, 2, 3, 4, 5], label=[True, False, True, False, True, False],
            prompt_ids=[[1], [1], [1], [2], [2], [3, 3]],
            completion_ids=[[10, 1], [11, 1], [12, 1], [13, 1], [14, 1], [15, 16, 17, 1]])  # fmt: skip


def recipe_of(seed, max_length):
    return KtoRecipe(train=TrainSection(seed=seed), data=DataSection(max_length=max_length))


def test_a_mismatched_completion_answers_another_prompt():
    rows = datasets.Dataset.from_dict(ROWS)
    for seed in range(20):
        found = with_mismatched(rows, recipe_of(seed, 99))
        owner = {tuple(ids): prompt for ids, prompt in zip(ROWS["completion_ids"], ROWS["prompt_ids"])}
        for row in found:
            assert owner[tuple(row["kl_completion_ids"])] != row["prompt_ids"]
        order = epoch_order(6, seed, 0)
        for here, before in zip(order, [order[-1], *order]):  # a neighbour of another prompt is taken as it stands
            if ROWS["prompt_ids"][here] != ROWS["prompt_ids"][before]:
                assert found[here]["kl_completion_ids"] == ROWS["completion_ids"][before]


def test_a_mismatched_completion_is_cut_to_fit_behind_the_prompt():
    found = with_mismatched(datasets.Dataset.from_dict(ROWS), recipe_of(0, 3))
    assert all(len(row["prompt_ids"]) + len(row["kl_completion_ids"]) <= 3 for row in found)
    assert all(row["kl_completion_ids"] for row in found)


def test_one_prompt_has_no_mismatched_completions():
    with pytest.raises(BadInput, match="at least two prompts"):
        with_mismatched(datasets.Dataset.from_dict({**ROWS, "prompt_ids": [[1]] * 6}), recipe_of(0, 9))


def test_pairs_are_taken_apart(model, pairs):
    tokenizer = AutoTokenizer.from_pretrained(model)
    kept, report = prepare(load_rows(pairs), tokenizer, "unpaired")
    whole, _ = prepare(load_rows(pairs), tokenizer, "preference")
    assert kept["label"][:] == [True, False] * 8 and kept["index"][:] == [i // 2 for i in range(16)]
    assert kept["completion_ids"][::2] == whole["chosen_ids"][:]
    assert kept["completion_ids"][1::2] == whole["rejected_ids"][:]
    assert report["changed"] == {"pairs, each split into desirable and undesirable rows": 8}


def test_a_label_that_is_none_is_refused(model, tmp_path):
    rows = [row | {"label": None if i == 5 else row["label"]} for i, row in enumerate(tiny.label_rows(8))]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadInput, match=r"'label' is missing \(row 6, counted from 1"):
        prepare(load_rows(path), AutoTokenizer.from_pretrained(model), "unpaired")


@pytest.mark.parametrize(("good", "bad", "weights"), [(1, 4, (4.0, 1.0)), (8, 2, (1.0, 3.0)), (4, 4, (1.0, 1.0))])
def test_balance_is_said_and_restored_on_request(good, bad, weights):
    rows = datasets.Dataset.from_dict({"label": [True] * good + [False] * bad})
    recipe, said = class_weights(rows, KtoRecipe())
    assert recipe == KtoRecipe() and f"{good} desirable and {bad} undesirable" in said
    assert said.startswith("warning") == (good != bad)
    recipe, said = class_weights(rows, KtoRecipe(loss=KtoLoss(balance_classes=True)))
    loss = recipe.loss
    assert (loss.desirable_weight, loss.undesirable_weight) == pytest.approx(weights)
    assert 1 <= round(loss.desirable_weight * good / (loss.undesirable_weight * bad), 9) <= 4 / 3 + 1e-9
    assert not said.startswith("warning") and (good == bad or "balanced with" in said)


def plain_logps(model, prompts, completions):
    found = []
    for prompt, completion in zip(prompts, completions):
        logps = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, :-1].log_softmax(-1)
        found.append(logps[torch.arange(len(logps)), torch.tensor([*prompt, *completion])[1:]][len(prompt) - 1 :].sum())
    return torch.stack(found)


@pytest.mark.parametrize("swapped", [False, True])  # the mean over mismatched completions: above 0, and below
def test_kto_loss_and_metrics_equal_the_formula(swapped, model, other_model, tmp_path):
    model, other_model = (other_model, model) if swapped else (model, other_model)
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.label_rows(8))
    settings = dict(beta=0.05, max_steps=1, desirable_weight=1.5, undesirable_weight=0.7, gradient_accumulation_steps=3,
                    ref_model_name_or_path=str(other_model), per_device_train_batch_size=3, reference="frozen",
                    eval_dataset_name=str(data), per_device_eval_batch_size=3, learning_rate=1e-12)  # fmt: skip
    record, last = metrics.read(train("kto", tiny.offline("kto", model, data, tmp_path / "run", **settings)).metrics)
    kept, _ = prepare(load_rows(data), AutoTokenizer.from_pretrained(model), "unpaired")
    rows = with_mismatched(kept, KtoRecipe())
    policy, reference = (AutoModelForCausalLM.from_pretrained(x, dtype=torch.float64) for x in (model, other_model))
    with torch.no_grad():
        ratio, strange = (
            plain_logps(policy, rows["prompt_ids"][:], rows[name][:])
            - plain_logps(reference, rows["prompt_ids"][:], rows[name][:])
            for name in ("completion_ids", "kl_completion_ids")
        )
    z0, good = strange.mean().clamp(min=0), torch.tensor(rows["label"][:])
    assert (strange.mean() < 0) == swapped, "both cases must be there"
    values = torch.where(
        good, 1.5 * (1 - torch.sigmoid(0.05 * (ratio - z0))), 0.7 * (1 - torch.sigmoid(0.05 * (z0 - ratio)))
    )
    for found, before in ((record, ""), (last, "eval_")):
        assert found[f"{before}loss"] == pytest.approx(values.mean().item(), abs=1e-5)
        assert found[f"{before}kl"] == pytest.approx(z0.item(), abs=1e-4)
        rewards = [0.05 * ratio[good].mean().item(), 0.05 * ratio[~good].mean().item()]
        assert found[f"{before}rewards/chosen"] == pytest.approx(rewards[0], abs=1e-4)
        assert found[f"{before}rewards/rejected"] == pytest.approx(rewards[1], abs=1e-4)
        assert found[f"{before}rewards/margins"] == pytest.approx(rewards[0] - rewards[1], abs=1e-4)


def test_classes_that_never_meet_in_a_batch(model, tmp_path):
    """Micro-batches of one row are of one class; a data set of one class trains too."""
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.label_rows(6))
    base = train("kto", tiny.offline("kto", model, data, tmp_path / "whole", per_device_train_batch_size=6))
    one = dict(per_device_train_batch_size=1, gradient_accumulation_steps=6)
    split = train("kto", tiny.offline("kto", model, data, tmp_path / "single", **one))
    for name in ("loss", "rewards/margins", "logps/rejected", "kl"):
        want, got = ([record[name] for record in metrics.read(run.metrics)] for run in (base, split))
        assert got == pytest.approx(want, abs=1e-5), name
    good = tiny.write_rows(tmp_path / "good.jsonl", [row | {"label": True} for row in tiny.label_rows(6)])
    record = metrics.read(train("kto", tiny.offline("kto", model, good, tmp_path / "good", max_steps=2)).metrics)[-1]
    assert "rewards/chosen" in record and "rewards/rejected" not in record and "rewards/margins" not in record


def test_the_imbalance_is_said_before_training(model, tmp_path, capsys):
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.label_rows(9))
    train("kto", tiny.offline("kto", model, data, tmp_path / "run", max_steps=1))
    assert "warning: 3 desirable and 6 undesirable rows, weighed 0.5 to 1" in capsys.readouterr().out
    assert KtoRecipe().loss.desirable_weight == 1.0
