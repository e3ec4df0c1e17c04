"""Whole runs on a tiny model, against plain float64 formulas and against each other."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from runs import cut_off, in_checkpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.errors import BadInput, RunFailed
from align_engine.run import train
from align_engine.training import metrics, reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # of peft
    pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning"),  # of peft, on adapters of tied heads
]


def numbers(folder, name="loss"):
    return [record[name] for record in metrics.read(folder.metrics) if name in record]


def weights(folder, name="model.safetensors"):
    return load_file(folder.final / name)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def plain_logps(path, rows, side):
    """Summed log-probs of completions in float64, one sequence at a time, without padding or mask."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(logps[torch.arange(len(ids[0]) - 1), ids[0, 1:]][len(prompt) - 1 :])
    return model, found


def test_dpo_loss_rewards_and_gradient_norm_equal_the_formula(model, other_model, pairs, tmp_path):
    recipe = tiny.dpo(model, pairs, tmp_path / "run", ref_model_name_or_path=str(other_model), beta=0.3, max_steps=1,
                      label_smoothing=0.1, per_device_train_batch_size=8)  # fmt: skip
    record = metrics.read(train("dpo", recipe).metrics)[0]
    rows = tiny.preference_rows(8)
    policy, chosen = plain_logps(model, rows, "chosen")
    _, rejected = plain_logps(model, rows, "rejected")
    policy.zero_grad()
    sums = {}
    for side in ("chosen", "rejected"):
        _, ref = plain_logps(other_model, rows, side)
        sums[f"ref_{side}"] = torch.stack([x.sum().detach() for x in ref])
    model64, chosen = plain_logps(model, rows, "chosen")
    tokenizer = AutoTokenizer.from_pretrained(model)
    rejected = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([[*prompt, *tokenizer(row["rejected"])["input_ids"], tokenizer.eos_token_id]])
        logps = model64(input_ids=ids).logits[0, :-1].log_softmax(-1)
        rejected.append(logps[torch.arange(len(ids[0]) - 1), ids[0, 1:]][len(prompt) - 1 :])
    good = torch.stack([x.sum() for x in chosen]) - sums["ref_chosen"]
    bad = torch.stack([x.sum() for x in rejected]) - sums["ref_rejected"]
    z = 0.3 * (good - bad)
    loss = (-0.9 * F.logsigmoid(z) - 0.1 * F.logsigmoid(-z)).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model64.parameters()]).norm()
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert record["rewards/chosen"] == pytest.approx(0.3 * good.mean().item(), abs=1e-4)
    assert record["rewards/rejected"] == pytest.approx(0.3 * bad.mean().item(), abs=1e-4)
    assert record["rewards/margins"] == pytest.approx(z.mean().item(), abs=1e-4)
    assert record["rewards/accuracies"] == (z > 0).double().mean().item()
    assert record["logps/chosen"] == pytest.approx(torch.stack([x.sum() for x in chosen]).mean().item(), abs=1e-4)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert 0 < record["rewards/accuracies"] < 1, "the case must not be trivial"


def test_sft_loss_is_the_mean_over_completion_tokens(model, completions, tmp_path):
    settings = dict(
        per_device_train_batch_size=3, gradient_accumulation_steps=3, max_steps=1, per_device_eval_batch_size=3
    )
    recipe = tiny.sft(model, completions, tmp_path / "run", eval_dataset_name=str(completions), **settings)
    folder = train("sft", recipe)
    _, logps = plain_logps(model, tiny.preference_rows(8), "chosen")
    assert numbers(folder)[0] == pytest.approx(-torch.cat(logps).mean().item(), abs=1e-5)
    _, logps = plain_logps(folder.final, tiny.preference_rows(8), "chosen")
    assert numbers(folder, "eval_loss")[0] == pytest.approx(-torch.cat(logps).mean().item(), abs=1e-5)


@pytest.mark.parametrize(("clamp", "gate"), [(None, None), (0.3, None), (None, 0.05), (0.3, 0.05)])
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_limits_of_gradients_reach_the_logits(name, clamp, gate, model64, tmp_path):
    """The oracle writes dL/dlogits = g (1[v = y] - p) by hand, with the residual cut off and the gate on g."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.OFFLINE[name][1](8))
    recipe = tiny.offline(name, model64, rows, tmp_path / "run", dtype="auto", max_steps=1, grad_clamp=clamp,
                          prob_gate=gate, per_device_train_batch_size=8)  # fmt: skip
    record = metrics.read(train(name, recipe).metrics)[0]

    policy, tokenizer = AutoModelForCausalLM.from_pretrained(model64), AutoTokenizer.from_pretrained(model64)
    texts = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in tiny.preference_rows(8)]
    found = []  # (logits [n, V], targets [n]) of each completion
    for prompt, completion in texts if name == "dpo" else texts[:8]:
        before, after = tokenizer(prompt)["input_ids"], [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        logits = policy(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        found.append((logits, torch.tensor(after)))
    tokens = sum(len(targets) for _, targets in found)
    over = 0
    for i, (logits, targets) in enumerate(found):
        p, label = logits.detach().softmax(-1), F.one_hot(targets, logits.shape[1])
        # at the first step the reference is the policy: each pair's gradient is -+ beta / 2 / pairs
        g = torch.full(targets.shape, -1 / tokens if name == "sft" else (0.05 if i >= 8 else -0.05) / 8).double()
        if gate is not None:
            over += int(((p * label).sum(1) > gate).sum())
            g[(p * label).sum(1) > gate] = 0
        residual = (label - p) if clamp is None else (label - p).clamp(-clamp, clamp)
        logits.backward(g[:, None] * residual)
    norm = torch.stack([parameter.grad.norm() for parameter in policy.parameters()]).norm()
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    assert gate is None or 0 < over < tokens, "the gate must divide the tokens"


@pytest.mark.parametrize("name", tiny.OFFLINE)
def test_accumulation_equals_one_big_batch(name, model64, other_model, tmp_path):
    folders, rows = [], tiny.write_rows(tmp_path / "rows.jsonl", tiny.OFFLINE[name][1](8))
    extra = {"ref_model_name_or_path": str(other_model)} if name in tiny.WITH_REFERENCE else {}
    for batch, steps in ((8, 1), (1, 8), (3, 3)):  # 3 x 3: the last micro-batch is short
        recipe = tiny.offline(name, model64, rows, tmp_path / f"{batch}x{steps}", dtype="auto",
                              per_device_train_batch_size=batch,
                              gradient_accumulation_steps=steps, learning_rate=1e-4, **extra)  # fmt: skip
        folders.append(train(name, recipe))
    for other in folders[1:]:
        assert numbers(other) == pytest.approx(numbers(folders[0]), abs=1e-6)
        assert numbers(other, "grad_norm") == pytest.approx(numbers(folders[0], "grad_norm"), rel=1e-5)
        assert largest_difference(weights(folders[0]), weights(other)) < 1e-6
    start, end = load_file(model64 / "model.safetensors"), weights(folders[0])
    shared = start.keys() & end.keys()
    moved = largest_difference({key: start[key] for key in shared}, {key: end[key] for key in shared})
    assert moved > 1e-4, "the weights must have moved"


def test_references_agree(model, pairs, tmp_path):
    settings = dict(max_steps=4, per_device_train_batch_size=4, eval_dataset_name=str(pairs))
    frozen = train("dpo", tiny.dpo(model, pairs, tmp_path / "frozen", reference="frozen", **settings))
    stored = train("dpo", tiny.dpo(model, pairs, tmp_path / "stored", reference="precomputed", **settings))
    assert numbers(frozen) == pytest.approx(numbers(stored), abs=1e-6)
    assert numbers(frozen, "eval_loss") == pytest.approx(numbers(stored, "eval_loss"), abs=1e-6)
    assert numbers(frozen)[0] == pytest.approx(0.693147, abs=1e-5)
    assert numbers(frozen)[-1] < 0.6


@pytest.mark.parametrize("modules", [None, ["q_proj", "lm_head"]])
def test_lora_trains_the_adapter_alone(modules, model, pairs, tmp_path):
    settings = dict(use_peft=True, lora_target_modules=modules, max_steps=4, learning_rate=1e-2)
    off = train("dpo", tiny.dpo(model, pairs, tmp_path / "off", reference="adapter-off", **settings))
    stored = train("dpo", tiny.dpo(model, pairs, tmp_path / "stored", reference="precomputed", **settings))
    assert numbers(off) == pytest.approx(numbers(stored), abs=1e-6)
    assert numbers(off)[-1] < 0.6
    assert all("lora_" in name for name in weights(off, "adapter_model.safetensors"))
    assert all("lora_" in name for name in in_checkpoint(off.checkpoints()[-1]))

    from peft import AutoPeftModelForCausalLM

    loaded = AutoPeftModelForCausalLM.from_pretrained(off.final).state_dict()
    base = load_file(model / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    name = "base_model.model.model.layers.0.mlp.up_proj" + (".base_layer.weight" if modules is None else ".weight")
    assert torch.equal(loaded[name], base)


def test_auto_takes_the_reference_that_costs_least(pairs, tmp_path):
    kind = lambda **settings: reference.of(tiny.dpo("model", pairs, tmp_path, **settings))[0]  # noqa: E731
    assert kind(use_peft=True) == "adapter-off"
    assert kind(use_peft=True, ref_model_name_or_path="other") == "precomputed"
    assert kind() == "precomputed"
    assert kind(use_peft=True, reference="frozen") == "frozen"


def test_backends_and_checkpointing_give_the_same_losses(model, pairs, tmp_path):
    base = numbers(train("dpo", tiny.dpo(model, pairs, tmp_path / "a", max_steps=5, impl="eager")))
    for i, settings in enumerate(({"impl": "torch"}, {"impl": "cpu"}, {"gradient_checkpointing": False})):
        got = numbers(train("dpo", tiny.dpo(model, pairs, tmp_path / str(i), max_steps=5, **settings)))
        assert got == pytest.approx(base, abs=1e-5), settings


def test_bfloat16_stays_close(model, other_model, pairs, tmp_path):
    settings = dict(max_steps=3, ref_model_name_or_path=str(other_model))
    full = numbers(train("dpo", tiny.dpo(model, pairs, tmp_path / "full", **settings)))
    half = numbers(train("dpo", tiny.dpo(model, pairs, tmp_path / "half", bf16=True, **settings)))
    assert half == pytest.approx(full, rel=2**-8)  # one rounding to bfloat16
    assert half != full


def test_plain_transformers_loads_the_final_model(model, completions, tmp_path):
    folder = train("sft", tiny.sft(model, completions, tmp_path / "run", max_steps=30, learning_rate=1e-2))
    loaded = AutoModelForCausalLM.from_pretrained(folder.final)
    tokenizer = AutoTokenizer.from_pretrained(folder.final)
    row = tiny.sft_rows(8)[0]
    prompt = tokenizer(row["prompt"], return_tensors="pt")
    out = loaded.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=1)
    answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == row["completion"], "30 steps on 8 rows must be learnt by heart"


def test_a_loss_that_is_not_finite_stops_before_the_step(model, pairs, tmp_path):
    recipe = tiny.dpo(model, pairs, tmp_path / "run", learning_rate=1e30, save_steps=1, max_steps=9, max_grad_norm=0)
    with pytest.raises(RunFailed, match=r"step 2: the loss is .*nan.*learning_rate"):
        train("dpo", recipe)
    folder = tmp_path / "run"
    assert (folder / "checkpoint-000001" / "tensors").exists()
    assert not json.loads((folder / "run.json").read_text())["finished"]
    assert not (folder / "final").exists()


def test_tampered_reference_is_noticed(model, pairs, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    train("dpo", tiny.dpo(model, pairs, tmp_path / "run", max_steps=2, save_steps=1))
    path = tmp_path / "run" / "reference-train.safetensors"
    with safe_open(path, "pt") as file:
        stamp, table = file.metadata(), file.get_tensor("logps")
    save_file({"logps": table + 1}, path, metadata=stamp)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"finished": False}))
    with pytest.raises(BadInput, match="does not hold this model's log-probs"):
        train("dpo", tiny.dpo(model, pairs, tmp_path / "run", max_steps=2, save_steps=1))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"nonsense", lambda data: data[:-8]])
def test_a_damaged_reference_is_computed_again(damage, model, pairs, tmp_path):
    recipe = tiny.dpo(model, pairs, tmp_path / "run", max_steps=2, save_steps=1)
    cut_off("dpo", recipe, step=1)
    path = tmp_path / "run" / "reference-train.safetensors"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    train("dpo", recipe)
    assert path.read_bytes() == data


def test_a_part_of_a_step_of_warm_up_is_a_step(model, completions, tmp_path):
    """A quarter of six steps is two: as transformers rounds."""
    recipe = tiny.sft(model, completions, tmp_path / "run", max_steps=6, warmup_ratio=0.25, learning_rate=1e-3)
    assert numbers(train("sft", recipe), "learning_rate")[:3] == pytest.approx([0.0, 5e-4, 1e-3])
