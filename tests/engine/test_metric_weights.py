"""Metrics of a step over several micro-batches are means over what each of them counts, computed by hand."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.run import train
from align_engine.training import metrics


def encoded(model, rows, side):
    """(prompt, completion) ids of each row."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [(tokenizer(row["prompt"])["input_ids"], [*tokenizer(row[side])["input_ids"], 1]) for row in rows]


@torch.no_grad()
def seen(model, rows):
    """(logits, targets) of each completion's tokens, one row at a time."""
    made = AutoModelForCausalLM.from_pretrained(model)
    found = []
    for prompt, completion in rows:
        logits = made(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
        found.append((logits, torch.tensor(completion)))
    return found


def first_record(name, model, rows, out, **settings):
    path = tiny.write_rows(out.with_suffix(".jsonl"), rows)
    sizes = dict(per_device_train_batch_size=1, gradient_accumulation_steps=len(rows), max_steps=1)
    recipe = tiny.offline(name, model, path, out, **sizes, gradient_checkpointing=False, **settings)
    return metrics.read(train(name, recipe).metrics)[0]


def test_accuracy_and_loss_of_sft_are_means_over_tokens(model, tmp_path):
    rows = [{"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w5", "completion": "w6 w7 w8 w9 w10 w11 w12"}]
    tokenizer, policy = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    likeliest = policy(input_ids=torch.tensor([tokenizer("w1 w2")["input_ids"]])).logits[0, -1].argmax()
    rows[0]["completion"] = tokenizer.decode(likeliest)
    record = first_record("sft", model, rows, tmp_path / "run")
    parts = seen(model, encoded(model, rows, "completion"))
    shares = [(logits.argmax(-1) == targets).double().mean().item() for logits, targets in parts]
    assert abs(shares[0] - shares[1]) > 0.2, "else every weight gives the same mean"
    logits, targets = (torch.cat(part) for part in zip(*parts))
    assert record["mean_token_accuracy"] == pytest.approx(
        (logits.argmax(-1) == targets).double().mean().item(), abs=1e-6
    )
    assert record["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert record["num_tokens"] == sum(
        len(prompt) + len(answer) for prompt, answer in encoded(model, rows, "completion")
    )


@pytest.mark.parametrize("name", ["dpo", "cpo", "orpo"])
def test_logits_and_tokens_of_pairs_are_counted_by_hand(name, model, tmp_path):
    """Pairs of very different lengths, one in each micro-batch."""
    rows = [
        {"prompt": "w1", "chosen": "w2", "rejected": "w3 w4 w5 w6 w7 w8"},
        {"prompt": "w9 w10 w11", "chosen": "w12 w13 w14 w15 w16", "rejected": "w17"},
    ]
    record = first_record(name, model, rows, tmp_path / name)
    for side in ("chosen", "rejected"):
        logits = torch.cat([part for part, _ in seen(model, encoded(model, rows, side))])
        if f"logits/{side}" in record:
            assert record[f"logits/{side}"] == pytest.approx(logits.mean().item(), rel=1e-4, abs=1e-5)
    both = [len(p) + len(a) for side in ("chosen", "rejected") for p, a in encoded(model, rows, side)]
    assert record["num_tokens"] == sum(both)
    assert name != "dpo" or "logits/chosen" in record
    if "nll_loss" in record:
        logits, targets = (torch.cat(part) for part in zip(*seen(model, encoded(model, rows, "chosen"))))
        want = torch.nn.functional.cross_entropy(logits, targets).item()
        assert record["nll_loss"] == pytest.approx(want, rel=1e-4), "a mean over the chosen tokens of the whole step"


@pytest.mark.parametrize(("name", "weight"), [("cpo", 1.0), ("orpo", 1.0)])
def test_the_likelihood_beside_the_pairs_is_a_mean_over_the_whole_steps_tokens(name, weight, model, tmp_path):
    """`num_tokens` of the loss: with beta near 0 the loss is the likelihood, and log 2 for cpo's pairs."""
    rows = [
        {"prompt": "w1", "chosen": "w2", "rejected": "w3 w4 w5"},
        {"prompt": "w9 w10", "chosen": "w12 w13 w14 w15 w16 w17 w18", "rejected": "w17"},
    ]
    record = first_record(name, model, rows, tmp_path / name, beta=1e-9)
    logits, targets = (torch.cat(part) for part in zip(*seen(model, encoded(model, rows, "chosen"))))
    nll = torch.nn.functional.cross_entropy(logits, targets).item()
    assert record["loss"] == pytest.approx(weight * nll + (0.693147 if name == "cpo" else 0.0), rel=1e-5)
    assert json.loads(json.dumps(record)) == record
