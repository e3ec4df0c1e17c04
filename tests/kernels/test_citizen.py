"""Manners inside PyTorch: compile, fake tensors, autocast, checkpointing, functional transforms, determinism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2Model

from align_kernels import (
    LogitGradClamp,
    ProbGate,
    dpo_loss,
    linear_logprobs,
    ops,
    ppo_clip_loss,
    sequence_logprobs,
    sft_loss,
)
from align_kernels.head import Needs, Settings, Transform
from align_kernels.losses import registry
from align_kernels.units import LossCall

from .oracle import Case, judge, loss_truth, run, truth
from .test_logprobs import make, rows, upstream

V, D = 211, 16
TINY = 1 << 10


def tokens(B: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))
    targets = ids.roll(-1, 1)
    targets[:, :3] = targets[1, T // 2 :] = -100
    return ids, targets


class Model(nn.Module):
    """A small Qwen2 without its head; the head's weight is the embedding's, or its own."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, use_cache=False, initializer_range=0.3,
        )  # fmt: skip
        self.body = Qwen2Model(config)
        self.head = self.body.embed_tokens.weight if tied else nn.Parameter(torch.randn(V, D) * 0.3)
        self.bias = nn.Parameter(torch.randn(V))

    def hidden(self, ids: Tensor) -> Tensor:
        return self.body(input_ids=ids).last_hidden_state

    def grads(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        self.zero_grad()
        return found


class Embedded(Model):
    """An embedding alone: a transformer's own lines take a compiler ten times as long as the loss."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.body = nn.Embedding(V, D)
        self.head, self.bias = nn.Parameter(torch.randn(V, D) * 0.3), nn.Parameter(torch.randn(V))

    def hidden(self, ids: Tensor) -> Tensor:
        return self.body(ids).tanh()


def sft(model: Model, ids: Tensor, targets: Tensor, **head: Any) -> Tensor:
    return 3 * sft_loss(model.hidden(ids), model.head, targets, bias=model.bias, **head).loss


def dpo(model: Model, ids: Tensor, targets: Tensor, **head: Any) -> Tensor:
    out = dpo_loss(model.hidden(ids), model.head, targets, torch.full((len(ids),), -40.0), **head)
    return out.loss + 0 * out.metrics["rewards/margins"] + 0 * out.logps.sum()


def ppo(model: Model, ids: Tensor, targets: Tensor, **head: Any) -> Tensor:
    old, advantages = torch.full(ids.shape, -5.4), torch.linspace(-1, 1, ids.numel()).view(ids.shape)
    hidden = model.hidden(ids)
    return ppo_clip_loss(hidden, model.head, targets, old, advantages, entropy_coef=0.1, **head).loss


def late(model: Model, ids: Tensor, targets: Tensor, **head: Any) -> Tensor:
    out = linear_logprobs(model.hidden(ids), model.head, targets, softcap=20.0, temperature=0.8, **head)
    return (out.logp.exp() - 0.1 * out.entropy).sum() + out.lse.sum() + out.correct.sum()


LOSSES: dict[str, Callable[..., Tensor]] = {"sft": sft, "dpo": dpo, "ppo": ppo, "logprobs": late}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        check(name, grad, expected[name].double())


# -- torch.compile ------------------------------------------------------------------------------------------------
@pytest.fixture
def compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("name", "head"), [*((name, {}) for name in LOSSES), ("logprobs", dict(workspace=TINY))])
def test_compile_fullgraph(name: str, head: dict):
    """A model's forward and the loss in one graph, on new values and a new length too."""
    model = Model() if name == "sft" else Embedded()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    for ids, targets in (tokens(4, 12), tokens(4, 12, seed=1), tokens(4, 9)):
        y = compiled(model, ids, targets, **head)
        y.backward()
        got = model.grads()
        plain = LOSSES[name](model, ids, targets, impl="eager")
        plain.backward()
        check(name, y.detach(), plain.detach().double())
        same(got, model.grads())


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_compile_with_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = Model(tied=True)
    ids, targets = tokens(4, 12)

    def step(hidden: Tensor) -> Tensor:
        clamp = LogitGradClamp(0.3)
        dpo = dpo_loss(hidden, model.head, targets, torch.full((4,), -40.0), grad_clamp=clamp, label_smoothing=0.1)
        return dpo.loss * 2 + linear_logprobs(hidden, model.head, targets).logp.exp().mean()

    hidden = model.hidden(ids).detach().requires_grad_()
    results = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what an older version compiled would pass
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", False)  # programs that try what the processor can take the longest
    for call in (torch.compile(step, fullgraph=True), step):
        y = call(hidden)
        y.backward()
        results.append(model.grads() | {"y": y.detach(), "hidden": hidden.grad})
        hidden.grad = None
    same(*results)


@pytest.mark.usefixtures("compiler")
def test_compile_without_gradient():
    model = Model()
    _, targets = tokens(2, 8)
    hidden = torch.randn(2, 8, D)
    call = lambda: linear_logprobs(hidden, model.head, targets)  # noqa: E731
    with torch.no_grad():
        for got, expected in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(), call()):
            assert torch.equal(got, expected)


# -- operators ----------------------------------------------------------------------------------------------------
def op_inputs(needs: Needs, workspace: int | None, *, every: bool = False) -> tuple[list[Any], Settings]:
    case = make((23,), 37, 5, bias=every, rank=2 if every else 0)
    t = case.leaves()
    for name, x in t.items():
        x.requires_grad_(getattr(needs, name))
    temperature = rows(case) if every else None
    optional = t.get("bias"), temperature, t.get("lora_A"), t.get("lora_B")
    clamp = LogitGradClamp(0.4) if every else None
    settings = Settings(Transform(0.5, 20.0), clamp, 0.5, impl="torch", workspace=workspace)
    return [t["hidden"], t["weight"], case.targets, *optional], settings


NEEDS = {
    "trained": Needs(True, True, False, False, False),
    "frozen": Needs(True, False, False, False, False),
    "every": Needs(True, True, True, True, True),
    "nothing": Needs(False, False, False, False, False),
}


@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("name", NEEDS)
def test_opcheck_logprobs(name: str, workspace: int | None):
    tensors, settings = op_inputs(NEEDS[name], workspace, every=name == "every")
    torch.library.opcheck(ops.logprobs_op, (*tensors, ops.encode_settings(settings, NEEDS[name])))


@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("name", NEEDS)
def test_opcheck_loss(name: str, loss: str):
    tensors, settings = op_inputs(NEEDS[name], None, every=name == "every")
    hyper, gate, side = {}, None, {}
    if loss == "dpo":
        tensors[0] = tensors[0].detach()[:20].requires_grad_(NEEDS[name].hidden)
        tensors[2] = tensors[2][:20].view(4, 5)
        tensors[4] = None if tensors[4] is None else tensors[4][:20]
        hyper, gate, side = (
            dict(beta=0.1, loss_type=("hinge", "sigmoid")),
            ProbGate(0.5),
            dict(ref_logps=torch.zeros(4)),
        )
    text = LossCall(registry.LOSSES[loss], hyper, gate, tuple(side)).encode()
    encoded = ops.encode_settings(settings, NEEDS[name])
    torch.library.opcheck(ops.loss_op, (*tensors, list(side.values()), torch.tensor(3.0), text, encoded))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fake_tensors(dtype: torch.dtype):
    case = make((3, 7), dtype=dtype, bias=True)
    real = run(case, *upstream(case, "both"))
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False) as mode:
        leaves = {name: mode.from_tensor(x).requires_grad_() for name, x in case.tensors.items()}
        targets = mode.from_tensor(case.targets)
        out = linear_logprobs(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"])
        for name, x in out._asdict().items():
            assert (x.shape, x.dtype) == (real.fields[name].shape, real.fields[name].dtype), name
        (out.logp.sum() + out.entropy.sum()).backward()
        loss = sft_loss(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"])
        assert loss.loss.shape == () and loss.logps.shape == targets.shape
        loss.loss.backward()
        for name, x in leaves.items():
            assert (x.grad.shape, x.grad.dtype) == (case.tensors[name].shape, dtype), name


# -- autocast -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", ["auto", "torch", "eager"])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast(inside: bool, impl: str):
    """The GEMMs' inputs are rounded to bfloat16, as those of a linear layer; everything else is float32."""
    case = make((31,), bias=True, rank=3, train=frozenset({"hidden", "weight", "bias", "lora_A", "lora_B"}))
    g, h = upstream(case, "both")
    leaves = case.leaves()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets, **case.keywords(leaves), impl=impl)
        y = (out.logp * g).sum() + (out.entropy * h).sum()
        if inside:
            y.backward()
    if not inside:
        y.backward()
    assert out.logp.dtype == torch.float32
    assert all(x.grad.dtype == torch.float32 for x in leaves.values())
    rounded = {name: x.bfloat16() for name, x in case.tensors.items()}
    narrow = Case(rounded, case.targets, scaling=case.scaling, train=case.train)
    true, eager = truth(case, g, h), truth(narrow, g, h, None)
    for name, x in leaves.items():
        check(f"gradient of {name}", x.grad, true.grads[name], eager.grads[name])
    for name in ("logp", "entropy"):
        check(name, out._asdict()[name].detach(), true.fields[name], eager.fields[name])


# -- autograd -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("workspace", [None, TINY])
def test_checkpoint(name: str, reentrant: bool, workspace: int | None):
    model = Model()
    ids, targets = tokens(4, 12)
    hidden = model.hidden(ids).detach().requires_grad_()

    def step(hidden: Tensor) -> Tensor:
        model.hidden = lambda ids: hidden
        return LOSSES[name](model, ids, targets, workspace=workspace)

    results = []
    for call in (lambda: checkpoint(step, hidden, use_reentrant=reentrant), lambda: step(hidden)):
        y = call()
        y.backward()
        results.append(model.grads() | {"y": y.detach(), "hidden": hidden.grad})
        hidden.grad = None
    for name, x in results[0].items():
        assert torch.equal(x, results[1][name]), name


@pytest.mark.parametrize("train", [{"hidden", "weight"}, {"hidden"}], ids=["trained", "frozen"])
@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("impl", ["torch", "cpu", "eager"])
def test_a_retained_graph_may_be_used_again(impl: str, workspace: int | None, train: set):
    """Each backward of one `linear_logprobs` call, with its own coefficients, is right."""
    case = make((61,), 507, 33, train=frozenset(train))
    leaves = case.leaves()
    out = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets, impl=impl, workspace=workspace)
    wanted = {name: x for name, x in leaves.items() if name in train}
    for which in ("logp", "both", "logp", "entropy"):
        g, h = upstream(case, which)
        y = (out.logp * g).sum() + (0 if h is None else (out.entropy * h).sum())
        grads = torch.autograd.grad(y, list(wanted.values()), retain_graph=True)
        true = truth(case, g, h)
        judge(case, true._replace(fields=out._asdict(), grads=dict(zip(wanted, grads))), true)


def test_a_freed_graph_says_so():
    case = make()
    leaves = case.leaves()
    y = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets).logp.sum()
    y.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


@pytest.mark.parametrize("workspace", [None, TINY])
def test_weights_changed_before_the_backward_are_noticed(workspace: int | None):
    case = make()
    leaves = case.leaves()
    y = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets, workspace=workspace).logp.sum()
    with torch.no_grad():
        leaves["weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_tied_weights_sum_both_gradients():
    ids, targets = tokens(4, 12)
    results = []
    for impl in ("auto", "eager"):
        model = Model(tied=True)
        (sft(model, ids, targets, impl=impl) + dpo(model, ids, targets, impl=impl)).backward()
        results.append(model.grads())
    assert "head" in results[0] and "body.embed_tokens.weight" not in results[0]
    same(*results)


def test_inference_mode():
    case = make(bias=True)
    plain = linear_logprobs(**case.tensors_for_call())
    with torch.inference_mode():
        for got, expected in zip(linear_logprobs(**case.tensors_for_call()), plain):
            assert torch.equal(got, expected)
        sft_loss(case.tensors["hidden"], case.tensors["weight"], case.targets)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("workspace", [None, TINY])
def test_func_grad(workspace: int | None, impl: str):
    case = make((4, 9))
    hidden, weight = case.tensors["hidden"], case.tensors["weight"]
    g, h = upstream(case, "both")
    assert h is not None
    options = dict(impl=impl, workspace=workspace)

    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_logprobs(hidden, weight, case.targets, **options)
        return (out.logp * g).sum() + (out.entropy * h).sum()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return dpo_loss(hidden, weight, case.targets, torch.zeros(4), **options).loss

    true = truth(case, g, h).grads
    for name, grad in zip(("hidden", "weight"), torch.func.grad(log_probs, (0, 1))(hidden, weight)):
        check(name, grad, true[name])
    _, expected = loss_truth(case, dpo_twin(case))
    for name, grad in zip(("hidden", "weight"), torch.func.grad(loss, (0, 1))(hidden, weight)):
        check(name, grad, expected.grads[name])
    for f in (log_probs, loss):
        with pytest.raises(RuntimeError, match=r"cannot differentiate .* twice"):
            torch.func.grad(lambda hidden, f=f: torch.func.grad(f)(hidden, weight).pow(2).sum())(hidden)
        with pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(f, (0, None))(hidden.repeat(2, 1, 1, 1), weight)


def dpo_twin(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    """The default dpo loss of two pairs without a reference."""

    def formula(logp: Tensor, entropy: Tensor) -> Tensor:
        total = logp.sum(1)
        return torch.nn.functional.softplus(-0.1 * (total[:2] - total[2:])).mean()

    return formula


# -- determinism --------------------------------------------------------------------------------------------------
@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_targets_that_many_rows_share_are_summed_in_one_order(impl: str):
    """1200 x 128 numbers for 70 rows of dW: enough for torch to cut an `index_put_` in two."""
    rng, found = torch.Generator().manual_seed(0), []
    hidden, weight = torch.randn(1200, 128, generator=rng), torch.randn(70, 128, generator=rng) * 0.1
    targets = torch.randint(0, 70, (1200,), generator=rng)
    for _ in range(30):
        w = weight.clone().requires_grad_()
        sft_loss(hidden, w, targets, impl=impl).loss.backward()
        found.append(w.grad)
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.usefixtures("two_threads")
def test_sums_of_long_sequences_have_one_order():
    logps, edges = torch.randn(200_000, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 90_000, 200_000])
    found = [sequence_logprobs(logps, cu_seqlens=edges) for _ in range(30)]
    assert all(torch.equal(x, found[0]) for x in found)
    want = torch.stack([x.double().sum() for x in logps.split([90_000, 110_000])])
    assert (found[0] - want).abs().max() < 0.05


@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_two_runs_give_the_same_bits(impl: str, workspace: int | None):
    case = make((160,), 2049, 48, bias=True, rank=2, train=frozenset({"hidden", "weight", "bias", "lora_A", "lora_B"}))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 2):
            torch.set_num_threads(count)
            got = run(case, *upstream(case, "both"), impl=impl, workspace=workspace)
            results.append({f"field {k}": v for k, v in got.fields.items()} | got.grads)
    finally:
        torch.set_num_threads(threads)
    for first, again in (results[:2], results[2:]):
        for name, x in first.items():
            assert torch.equal(x, again[name]), name
    for name, x in results[0].items():
        check(name, x.float(), results[2][name].double())
