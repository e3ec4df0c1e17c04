"""What a checkpoint keeps of a model and its optimiser, in one process (several: test_other_processes)."""

import copy

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from align_engine.training import shards


class Odd(torch.optim.SGD):
    """State in a tensor that is made of two, as quantised states are; a step that is a number, a rate that is none."""

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            if not state:
                state |= {"sum": TwoTensor(torch.zeros_like(parameter), torch.zeros_like(parameter)), "step": 0}
            state["step"] += 1
            state["sum"].a.add_(parameter.grad)
            state["sum"].b.sub_(parameter.grad)
            parameter.sub_(self.param_groups[0]["lr"] * state["sum"].a)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.tied, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 2)
        self.unreached = nn.Linear(2, 2)
        self.tied.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        self.seen += 1
        return self.frozen(self.first(x) + self.tied(x)).square().sum()


def made(kind, **options):
    torch.manual_seed(0)
    net = Net()
    return net, kind([p for p in net.parameters() if p.requires_grad], **options)


def step(net, optimizer):
    net(torch.arange(6.0).view(2, 3)).backward()
    optimizer.step()
    optimizer.zero_grad()


KINDS = [
    (Odd, dict(lr=torch.tensor(0.01))),
    (torch.optim.AdamW, dict(lr=0.01)),
    (torch.optim.SGD, dict(lr=0.01, momentum=0.9)),
    (torch.optim.SGD, dict(lr=0.01)),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_what_is_read_again_takes_the_same_steps(kind, options, tmp_path):
    net, optimizer = made(kind, **copy.deepcopy(options))
    step(net, optimizer)
    optimizer.param_groups[0]["lr"] *= 0.5
    numbers = copy.deepcopy(shards.write(tmp_path / "tensors", net, optimizer))
    held = {name: tensor.clone() for name, tensor in shards.state(net, optimizer)[0].items()}
    assert {name for name in held if name.startswith("model.")} == {
        "model.first.weight", "model.first.bias", "model.tied.bias", "model.seen",
        "model.unreached.weight", "model.unreached.bias",
    }  # fmt: skip
    other, resumed = made(kind, **copy.deepcopy(options))
    shards.read(tmp_path / "tensors", other, resumed, numbers)
    again, _ = shards.state(other, resumed)
    assert again.keys() == held.keys() and all(again[name].equal(tensor) for name, tensor in held.items())
    for _ in range(2):
        step(net, optimizer)
        step(other, resumed)
    assert all(a.equal(b) for a, b in zip(net.parameters(), other.parameters()))
    assert not list(tmp_path.rglob("*.pkl")) and not list(tmp_path.rglob(".metadata"))


def test_files_are_cut(monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "FILE", 40)
    net, optimizer = made(torch.optim.AdamW)
    step(net, optimizer)
    numbers = shards.write(tmp_path / "tensors", net, optimizer)
    assert len(list((tmp_path / "tensors").iterdir())) > 3
    other, resumed = made(torch.optim.AdamW)
    shards.read(tmp_path / "tensors", other, resumed, numbers)
    assert all(a.equal(b) for a, b in zip(net.parameters(), other.parameters()))


def test_files_grow_with_the_model_and_not_their_number():
    small = shards.files({str(i): shards.FILE // 4 for i in range(40)})
    assert list(small.values()) == [1 + i // 4 for i in range(40)]
    large = shards.files({str(i): 1 << 30 for i in range(1000)})
    assert max(large.values()) == len(set(large.values())) <= shards.FILES


def test_tensors_of_another_model_are_refused_by_name(tmp_path):
    net, optimizer = made(torch.optim.AdamW)
    numbers = shards.write(tmp_path / "tensors", net, optimizer)
    halves, _ = made(torch.optim.AdamW)
    halves = halves.bfloat16()
    with pytest.raises(ValueError, match=r"model.* is \[2\] of torch.float32 in it, and \[2\] of torch.bfloat16 here"):
        shards.read(tmp_path / "tensors", halves, torch.optim.AdamW(halves.parameters()), numbers)
    larger, _ = made(torch.optim.AdamW)
    larger.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model\.more\.weight is not in it"):
        shards.read(tmp_path / "tensors", larger, torch.optim.AdamW(larger.parameters()), numbers)
