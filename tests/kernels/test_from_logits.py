"""`logprobs_from_logits` against float64: the oracle sees the logits as hidden states of an identity head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from devices import there
from torch import Tensor

from align_kernels import LogitGradClamp, logprobs_from_logits

from .oracle import FIELDS, Case, Result, judge, truth
from .test_logprobs import GRADIENTS, labels, normal, rows, upstream

logprobs_from_logits = there(logprobs_from_logits)
IMPLS = ("torch", "cpu", "eager")


def make(
    shape: tuple[int, ...] = (23,), V: int = 123, *, dtype=torch.float32, spread=4.0, masked=0.3, **options
) -> Case:
    tensors = dict(hidden=normal(*shape, V, seed=1, dtype=dtype) * spread, weight=torch.eye(V))
    targets = labels(shape, V, masked=masked, ignore=options.get("ignore_index", -100))
    return Case(tensors, targets, train=frozenset({"hidden"}), **options)


def with_rows(case: Case) -> Case:
    case.temperature = rows(case)
    return case


def strided(case: Case) -> Case:
    x = case.tensors["hidden"]
    case.tensors["hidden"] = torch.stack((x, x), -1)[..., 0]
    return case


def sliced(case: Case) -> Case:
    x = case.tensors["hidden"]
    case.tensors["hidden"] = torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., : x.shape[-1]]
    return case


def expanded(case: Case) -> Case:
    x = case.tensors["hidden"]
    case.tensors["hidden"] = x[:1].expand(x.shape)
    return case


CASES: dict[str, Callable[[], Case]] = {
    "plain": make,
    "temperature": lambda: make(temperature=0.7),
    "temperature per row": lambda: with_rows(make((3, 7))),
    "4-D": lambda: make((2, 1, 3, 4)),
    "many columns": lambda: make((5,), 5001),
    "one column": lambda: make(V=1),
    "no rows": lambda: make((0,)),
    "all masked": lambda: make(masked=1.1),
    "ignore_index 0": lambda: make(ignore_index=0),
    "strided": lambda: strided(make()),
    "sliced": lambda: sliced(make((3, 7))),
    "expanded": lambda: expanded(make((9,))),
    "clamp": lambda: make(grad_clamp=LogitGradClamp(0.1, 0.01)),
    "bfloat16": lambda: make(dtype=torch.bfloat16),
    "float64": lambda: make(dtype=torch.float64),
}


def call(case: Case, g: Tensor, h: Tensor | None, impl: str, which: str) -> Result:
    logits = case.leaves()["hidden"]
    out = logprobs_from_logits(
        logits,
        case.targets,
        temperature=case.temperature,
        ignore_index=case.ignore_index,
        grad_clamp=case.grad_clamp,
        impl=impl,
    )
    outputs = [(y, u.to(y.dtype)) for y, u in ((out.logp, g), (out.entropy, h)) if u is not None]
    outputs = outputs[1:] if which == "entropy" else outputs
    (grad,) = torch.autograd.grad([y for y, _ in outputs], [logits], [u for _, u in outputs])
    return Result(out._asdict(), {"hidden": grad})


@pytest.mark.parametrize("which", GRADIENTS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str, impl: str, which: str):
    case = CASES[name]()
    impl = "torch" if name == "float64" and impl == "cpu" else impl
    g, h = upstream(case, which)
    got, true = call(case, g, h, impl, which), truth(case, g, h)
    judge(case, got, true, truth(case, g, h, None) if case.narrow else None)
    if not case.narrow:
        assert torch.equal(got.fields["correct"], true.fields["correct"])
    for field in FIELDS:
        assert not got.fields[field][~case.mask].any(), field


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(targets=torch.tensor([0, 9, 1])), "got 9"),
        (dict(targets=torch.tensor([0, -1, 1])), "got -1"),
        (dict(targets=torch.zeros(2, dtype=torch.int64)), r"\(3, 9\), got torch.int64 \(2,\)"),
        (dict(targets=torch.zeros(3)), "must be int64"),
        (dict(temperature=0.0), "temperature .*got 0.0"),
        (dict(temperature=torch.tensor([1.0, -2.0, 1.0])), "temperature .*got -2.0"),
        (dict(temperature=torch.ones(2)), r"got shape \(2,\)"),
        (dict(temperature=torch.ones(3, requires_grad=True)), r"temperature.detach\(\)"),
        (dict(logits=torch.zeros(3, 9, dtype=torch.int64)), "logits must be floating point, got torch.int64"),
        (dict(impl="cuda13"), "got 'cuda13'"),
        (dict(grad_clamp=LogitGradClamp(-1.0)), "got -1.0"),
    ],
)
def test_wrong_arguments_are_named(wrong: dict, message: str, impl: str):
    names: dict = dict(logits=torch.zeros(3, 9), targets=torch.tensor([0, 8, 2]), impl=impl)
    with pytest.raises(ValueError, match=message):
        logprobs_from_logits(**(names | wrong))


def test_compile_fullgraph():
    torch._dynamo.reset()
    case = make((4, 6))

    def step(logits: Tensor) -> Tensor:
        out = logprobs_from_logits(logits, case.targets)
        return (out.logp - out.entropy).sum()

    grads = []
    for f in (torch.compile(step, fullgraph=True, backend="aot_eager"), step):
        logits = case.leaves()["hidden"]
        f(logits).backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_a_double_backward_is_refused(impl: str):
    case = make()
    logits = case.leaves()["hidden"]
    y = logprobs_from_logits(logits, case.targets, impl=impl).logp.sum()
    (grad,) = torch.autograd.grad(y, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot differentiate .* twice"):
        (logits.sum() + grad.pow(2).sum()).backward()
