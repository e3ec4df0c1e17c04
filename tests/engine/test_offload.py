"""Activations that leave the device until the backward pass: the same numbers, from copies of what may leave."""

import pytest
import tiny
import torch
from runs import same_bits
from transformers import AutoModelForCausalLM

from align_engine.errors import BadInput
from align_engine.models.load import checkpoint_activations
from align_engine.run import train
from align_engine.training import offload
from align_engine.training.offload import Away, Offload

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tensors_leave_too(monkeypatch):
    monkeypatch.setattr(offload, "LEAST", 1)


@pytest.fixture
def left(monkeypatch):
    """Every tensor that has left, as it was, with its copy."""
    found = []

    def copied(self, saved, once=Offload._copied):
        found.append((saved.detach().clone(), copy := once(self, saved)))
        return copy

    monkeypatch.setattr(Offload, "_copied", copied)
    return found


def gradients(model, around):
    model.zero_grad()
    ids = torch.arange(2, 26).view(2, 12)
    with around:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_are_the_same_bits(checkpointing, model, left):
    made = AutoModelForCausalLM.from_pretrained(model).train()
    if checkpointing:
        checkpoint_activations(made)
    away = Offload(made, CPU)
    expected = gradients(made, torch.enable_grad())
    assert not left
    assert all(a.equal(b) for a, b in zip(gradients(made, away), expected, strict=True))
    assert all(was.equal(copy) for was, copy in left)
    layers = [was for was, _ in left if was.shape == (2, 12, 32)]
    assert len(layers) >= made.config.num_hidden_layers
    weights = {tuple(weight.shape) for weight in made.parameters() if weight.dim() == 2}
    shapes = {tuple(was.shape) for was, _ in left} | {tuple(was.T.shape) for was, _ in left if was.dim() == 2}
    assert not weights & shapes
    assert not away.gone, "copies live as long as the graph that asks for them"


def test_what_is_saved_twice_leaves_once(model, left):
    x = torch.randn(8, requires_grad=True)
    with Offload(torch.nn.Linear(1, 1), CPU):
        y = x.exp()  # saves its result
        z = y * y.sin()  # which is saved again
    assert [was.equal(y) for was, _ in left].count(True) == 1
    z.sum().backward()
    assert x.grad.equal(torch.autograd.grad((y_ := x.exp()) * y_.sin(), x, torch.ones(8))[0])


def test_a_new_tensor_at_the_address_of_one_that_is_gone_leaves_too():
    away, block, packed = Offload(torch.nn.Linear(1, 1), CPU), bytearray(256), []
    with away:
        for value in (1.0, 2.0):  # as a device's allocator gives a block out again
            saved = torch.frombuffer(block, dtype=torch.float32)
            saved.numpy()[:] = value  # behind the back of the version counter
            packed.append(away.pack(saved))
            del saved
    assert all(isinstance(one, Away) and away.unpack(one).eq(value).all() for one, value in zip(packed, (1.0, 2.0)))


def test_a_tensor_that_was_changed_in_place_leaves_again():
    away, x = Offload(torch.nn.Linear(1, 1), CPU), torch.ones(64)
    with away:
        one = away.pack(x)
        x.zero_()
        two = away.pack(x)
    assert away.unpack(one).eq(1).all() and away.unpack(two).eq(0).all()


@pytest.mark.parametrize("name", ["dpo", "rm", "sft"])
def test_a_run_ends_with_the_same_bits(name, model, left, tmp_path, monkeypatch):
    monkeypatch.setattr("align_engine.run.check_device", lambda *_: None)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.OFFLINE[name][1](8))
    settings = dict(max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    plain = train(name, tiny.offline(name, model, rows, tmp_path / "plain", **settings))
    assert not left
    away = train(name, tiny.offline(name, model, rows, tmp_path / "away", activation_offloading=True, **settings))
    assert len(left) >= 2 * 2 * 2, "steps x micro-batches x layers"
    assert not any(copy.shape == (64, 32) for _, copy in left), "the loss keeps its own, the head's gradient among them"
    assert same_bits(plain.final, away.final)


def test_on_a_cpu_it_is_refused(model, completions, tmp_path):
    with pytest.raises(BadInput, match="activation_offloading = True: this run is on a CPU, where activations lie in"):
        train("sft", tiny.sft(model, completions, tmp_path / "run", activation_offloading=True))
    assert not (tmp_path / "run").exists()
