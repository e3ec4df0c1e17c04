"""A GPU is waited for once a call, for the number of rows that have a target, and where rows without a coefficient are
dropped once more: nothing else of the device is looked at, in any schedule or loss."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from align_kernels import LogitGradClamp, autograd, explain, head, linear_logprobs, sft_loss, sums, units
from align_kernels.schedules import exponentials, tiles

from .losses_table import ROWS, TARGETS
from .losses_table import tensors as of_losses
from .narrow import as_on_a_gpu
from .test_logprobs import make, with_rows

gpu = as_on_a_gpu  # the plans and dtypes of one

aten = torch.ops.aten
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal, aten.is_nonzero,
    aten._unique2, aten.unique_dim, aten.repeat_interleave,
    aten.lift_fresh,  # torch.tensor of numbers: a copy from the CPU
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Refuses what waits for a device, and counts what `read_back` reads."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITING, f"{func} waits for the device"
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} by a mask waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    seen = Watch()

    def read_back(numbers: Tensor) -> list[int]:
        seen.reads += 1
        return numbers.tolist()

    def refused(x: Tensor) -> None:
        raise AssertionError("numbers of the device are read by themselves")

    for module in (autograd, tiles, units):
        monkeypatch.setattr(module, "read_back", read_back)
    for module in (autograd, exponentials):
        monkeypatch.setattr(module, "waits", lambda device: True)
    for name in ("item", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, refused)
    yield seen


HALF, BOTH, HIDDEN = torch.bfloat16, frozenset({"hidden", "weight"}), frozenset({"hidden"})
TINY = dict(workspace=1 << 10)
CALLS = {  # the schedule's name, what is trained, options of the call, of the head; reads of the forward and backward
    "forward": ("forward", frozenset(), {}, {}, 1),
    "online": ("online", HIDDEN, {}, {}, 1),
    "frozen": ("frozen", HIDDEN, {}, dict(softcap=5.0), 1),
    "plain keep": ("plain keep", BOTH, {}, {}, 2),
    "keep": ("keep", BOTH, {}, dict(softcap=5.0), 2),
    "keep, clamp": ("keep", BOTH, {}, dict(grad_clamp=LogitGradClamp(0.1)), 2),
    "recompute": ("recompute", BOTH, TINY, {}, 2),
    "recompute, bias": ("recompute", BOTH | {"bias"}, TINY, dict(bias=True), 2),
    "lora": ("plain keep", frozenset({"hidden", "lora_A", "lora_B"}), {}, dict(rank=3), 2),
}


@pytest.mark.parametrize("rows", [False, True], ids=["", "temperature per row"])
@pytest.mark.parametrize("call", CALLS)
def test_log_probs(call: str, rows: bool, watch: Watch):
    name, train, options, head, reads = CALLS[call]
    case = make((3, 11), 207, 32, dtype=HALF, train=train, **head)
    case = with_rows(case) if rows else case
    t = case.leaves()
    args = (t["hidden"], t["weight"], case.targets)
    assert explain(*args, impl="torch", **case.keywords(t), **options).name == name
    watch.reads = 0
    g = torch.ones(case.targets.shape)
    with watch:
        out = linear_logprobs(*args, impl="torch", **case.keywords(t), **options)
        assert watch.reads == 1
        if train:
            out.logp.backward(g)
    assert watch.reads == reads


def reads_with_a_gradient_of_the_entropy(watch: Watch) -> int:
    case = make((3, 11), 207, 32, dtype=HALF, train=BOTH)
    t = case.leaves()
    with watch:
        out = linear_logprobs(t["hidden"], t["weight"], case.targets, impl="torch")
        torch.autograd.backward([out.logp, out.entropy], [torch.ones_like(out.logp)] * 2)
    return watch.reads


def test_a_gradient_of_the_entropy(watch: Watch):
    assert reads_with_a_gradient_of_the_entropy(watch) == 2


@pytest.mark.parametrize("options", [{}, TINY], ids=["", "tiny workspace"])
@pytest.mark.parametrize("name", ROWS)
def test_losses(name: str, options: dict, watch: Watch):
    """Those that are often zero ask once more, for all that are closed together."""
    leaves = {key: x.to(HALF).requires_grad_() for key, x in of_losses().items()}
    with watch:
        out = ROWS[name].call(leaves["hidden"], leaves["weight"], TARGETS, impl="torch", **options)
        out.loss.backward()
    assert leaves["hidden"].grad is not None and leaves["weight"].grad is not None
    assert watch.reads <= 2


# -- the capture of a graph ---------------------------------------------------------------------------------------
@pytest.fixture
def captured(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Nothing may be looked at while a graph is captured."""
    monkeypatch.setattr(head, "capturing", lambda device: True)
    return watch


@pytest.mark.parametrize("rows", [False, True], ids=["", "temperature per row"])
@pytest.mark.parametrize("call", CALLS)
def test_a_capture_reads_nothing(call: str, rows: bool, captured: Watch, monkeypatch: pytest.MonkeyPatch):
    """Every position passes, those without a target too: fields and gradients are those of a call that drops them."""
    _, train, options, of_head, _ = CALLS[call]
    case = make((3, 11), 207, 32, dtype=HALF, train=train, **of_head)
    case = with_rows(case) if rows else case
    assert not case.mask.all()
    case.tensors["hidden"][~case.mask] = torch.nan
    if isinstance(case.temperature, Tensor):
        case.temperature[~case.mask] = -1.0
    found = []
    for capture in (True, False):
        monkeypatch.setattr(head, "capturing", lambda device, capture=capture: capture)
        t = case.leaves()
        args, captured.reads = (t["hidden"], t["weight"], case.targets), 0
        with captured:
            out = linear_logprobs(*args, impl="torch", **case.keywords(t), **options)
            if train:
                (out.logp * 0.5).backward(torch.ones_like(out.logp))
        assert not capture or captured.reads == 0
        found.append([*out, *(x.grad for x in t.values() if x.requires_grad)])
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=2e-2 if mine.dtype == HALF else 1e-5, atol=1e-5)


def test_a_capture_reads_nothing_for_a_gradient_of_the_entropy(captured: Watch):
    assert reads_with_a_gradient_of_the_entropy(captured) == 0


@pytest.mark.parametrize(("wrong", "value"), [("target", 207), ("target", -1), ("temperature", 0.0)])
def test_a_capture_checks_on_the_device(wrong: str, value: float, captured: Watch):
    case = with_rows(make((3, 11), 207, 32, train=frozenset()))
    place = tuple(case.mask.nonzero()[0])
    if wrong == "target":
        case.targets[place] = int(value)
    else:
        assert isinstance(case.temperature, Tensor)
        case.temperature[place] = value
    t = case.leaves()
    with pytest.raises(RuntimeError, match="targets must lie in"):
        linear_logprobs(t["hidden"], t["weight"], case.targets, **case.keywords(t))


@pytest.mark.parametrize("options", [dict(drop_mass=0.1), dict(impl="eager")], ids=str)
def test_a_capture_refuses_what_must_look(options: dict, captured: Watch):
    t, targets = of_losses(), TARGETS
    with pytest.raises(ValueError, match="a CUDA graph can capture neither"):
        linear_logprobs(t["hidden"], t["weight"], targets, **options)
    with pytest.raises(ValueError, match="capture linear_logprobs, and the loss of its log-probs"):
        sft_loss(t["hidden"], t["weight"], targets)
    with pytest.raises(ValueError, match="in which hidden needs a row for every target"):
        linear_logprobs(t["hidden"][TARGETS != -100], t["weight"], targets)


def test_nothing_is_captured_on_a_gpu_that_is_not_there():
    assert not sums.capturing(torch.device("cuda"))
    assert not sums.capturing(torch.device("cpu"))
