"""`linear_logprobs` against float64: every option of the head, every backend, every schedule, both gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from accuracy import check
from torch import Tensor

from align_kernels import LogitGradClamp, linear_logprobs

from .oracle import FIELDS, Case, judge, run, truth

TINY = 1 << 10  # bytes: a workspace that keeps no logits
WAYS = [("torch", None), ("torch", TINY), ("cpu", None), ("cpu", TINY), ("eager", None)]  # impl, workspace
GRADIENTS = ("logp", "entropy", "both")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels(shape: tuple[int, ...], vocab: int, *, masked: float = 0.3, ignore: int = -100, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, shape, generator=rng)
    return targets.masked_fill(torch.rand(shape, generator=rng) < masked, ignore)


def make(
    shape: tuple[int, ...] = (37,),
    V: int = 123,
    D: int = 19,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    rank: int = 0,
    masked: float = 0.3,
    **options,
) -> Case:
    tensors = dict(hidden=normal(*shape, D, seed=1, dtype=dtype), weight=normal(V, D, seed=2))
    tensors["weight"] = (tensors["weight"] * 0.7).to(weight_dtype or dtype)
    if bias:
        tensors["bias"] = normal(V, seed=3, dtype=dtype)
    if rank:
        tensors |= dict(lora_A=normal(rank, D, seed=4, dtype=dtype) * 0.3, lora_B=normal(V, rank, seed=5, dtype=dtype))
        options.setdefault("train", frozenset({"hidden", "lora_A", "lora_B"}))
    return Case(tensors, labels(shape, V, masked=masked, ignore=options.get("ignore_index", -100)), **options)


def rows(case: Case, low: float = 0.5) -> Tensor:
    return torch.rand(case.targets.shape, generator=torch.Generator().manual_seed(6)) + low


def with_rows(case: Case) -> Case:
    case.temperature = rows(case)
    return case


def strided(case: Case) -> Case:
    """Nothing is contiguous: transposed storage, sliced columns, every second target."""
    t = case.tensors
    t["hidden"] = torch.cat((t["hidden"], t["hidden"]), -1)[..., : t["hidden"].shape[-1]]
    t["weight"] = t["weight"].T.contiguous().T
    case.targets = torch.stack((case.targets, case.targets), -1)[..., 0]
    assert not any(x.is_contiguous() for x in (t["hidden"], t["weight"], case.targets))
    return case


def expanded(case: Case) -> Case:
    """One hidden row seen at every position, one column of the weight seen as every feature."""
    t = case.tensors
    t["hidden"] = t["hidden"][..., :1, :].expand(t["hidden"].shape)
    t["weight"] = t["weight"][:, :1].expand(t["weight"].shape)
    return case


def sliced(case: Case) -> Case:
    t = case.tensors
    wide = torch.cat((t["weight"], torch.full_like(t["weight"], torch.nan)), 1)
    t["weight"] = torch.cat((wide, wide))[: len(wide), : t["weight"].shape[1]]
    return case


CASES: dict[str, Callable[[], Case]] = {
    "plain": make,
    "bias": lambda: make(bias=True),
    "scale": lambda: make(logit_scale=0.25),
    "softcap": lambda: make(softcap=3.0),
    "temperature": lambda: make(temperature=0.7),
    "temperature per row": lambda: with_rows(make()),
    "lora": lambda: make(rank=4),
    "lora with bias and trained base": lambda: make(
        rank=3, bias=True, train=frozenset({"hidden", "weight", "bias", "lora_A", "lora_B"})
    ),
    "lora alone": lambda: make(rank=1, train=frozenset({"lora_A", "lora_B"})),
    "everything": lambda: with_rows(make(bias=True, rank=5, logit_scale=1.5, softcap=9.0, ignore_index=7)),
    "1-D": lambda: make((5,)),
    "2-D": lambda: make((3, 11)),
    "4-D": lambda: make((2, 3, 2, 5)),
    "strided": lambda: strided(make((3, 11))),
    "expanded": lambda: expanded(make((3, 11))),
    "sliced": lambda: sliced(make()),
    "one row": lambda: make((1,), masked=0.0),
    "one column": lambda: make(V=1),
    "one feature": lambda: make(D=1),
    "63 columns": lambda: make((64,), 63, 63),
    "507 columns": lambda: make((123,), 507, 65),
    "2049 columns": lambda: make((9,), 2049, 16, bias=True),
    "nothing masked": lambda: make(masked=0.0),
    "all masked": lambda: make(masked=1.1),
    "all masked, everything": lambda: with_rows(make(masked=1.1, bias=True, rank=2, softcap=4.0)),
    "no rows": lambda: make((0,)),
    "no rows, 3-D": lambda: make((2, 0, 3), bias=True),
    "ignore_index 0": lambda: make(ignore_index=0),
    "ignore_index beyond V": lambda: make(ignore_index=1 << 40),
    "frozen head": lambda: make(train=frozenset({"hidden"})),
    "frozen head, all masked": lambda: make(train=frozenset({"hidden"}), masked=1.1),
    "frozen hidden": lambda: make(bias=True, train=frozenset({"weight", "bias"})),
    "bias alone": lambda: make(bias=True, train=frozenset({"bias"})),
    "nothing trained": lambda: make(bias=True, train=frozenset()),
}


def upstream(case: Case, which: str) -> tuple[Tensor, Tensor | None]:
    """Coefficients of logp and entropy, some of them zero."""
    g, h = normal(*case.targets.shape, seed=7), normal(*case.targets.shape, seed=8)
    g, h = (torch.where(x.abs() < 0.2, 0.0, x) for x in (g, h))
    if which == "entropy":
        g = torch.zeros_like(g)
    return g, (None if which == "logp" else h)


def poisoned(case: Case) -> Case:
    """Hidden states and temperatures of ignored positions are NaN: they must not meet the head."""
    hidden = case.tensors["hidden"].clone(memory_format=torch.preserve_format)
    case.tensors["hidden"] = hidden.masked_fill(~case.mask[..., None], torch.nan)
    if isinstance(case.temperature, Tensor):
        case.temperature = case.temperature.masked_fill(~case.mask, torch.nan)
    return case


def verify(case: Case, impl: str, which: str, **options) -> None:
    g, h = upstream(case, which)
    true = truth(case, g, h)
    got = run(case, None if which == "entropy" else g, h, impl=impl, **options)
    judge(case, got, true, truth(case, g, h, None) if case.narrow else None)
    assert torch.equal(got.fields["correct"], true.fields["correct"])
    for name in FIELDS:
        assert not got.fields[name][~case.mask].any(), f"{name} of an ignored position is not zero"


@pytest.mark.parametrize("which", GRADIENTS)
@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("name", CASES)
def test_options(name: str, impl: str, workspace: int | None, which: str):
    verify(CASES[name](), impl, which, workspace=workspace)


@pytest.mark.parametrize("which", ["logp", "both"])
@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("head", ["plain", "everything", "frozen head"])
@pytest.mark.parametrize(
    "clamp",
    [
        LogitGradClamp(0.05),
        LogitGradClamp(0.3, 0.02),
        LogitGradClamp(0.002, units="gradient"),
        LogitGradClamp(0.05, 0.01, "gradient"),
    ],
    ids=str,
)
def test_clamp(clamp: LogitGradClamp, head: str, impl: str, workspace: int | None, which: str):
    case = CASES[head]()
    g, h = upstream(case, which)
    free = truth(case, g, h)
    case.grad_clamp = clamp
    assert not torch.equal(free.grads["hidden"], truth(case, g, h).grads["hidden"]), "the clamp of this case is idle"
    verify(case, impl, which, workspace=workspace)


@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("units", ["residual", "gradient"])
def test_clamp_reaches_a_target_whose_probability_underflows(units: str, impl: str, workspace: int | None):
    """`prob_above=0` means every entry, and this one most of all."""
    case = make((9,), 64, 3, masked=0.0, grad_clamp=LogitGradClamp(0.01, units=units))
    case.tensors |= dict(hidden=torch.ones(9, 3), weight=torch.zeros(64, 3))
    case.tensors["weight"][7] = 400.0
    case.targets[:] = torch.arange(9)
    verify(case, impl, "logp", workspace=workspace)


HALF = torch.bfloat16, torch.float16
PAIRS = [(x, x) for x in (*HALF, torch.float64)] + [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float64),
]


@pytest.mark.parametrize("which", ["logp", "both"])
@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(str(x).removeprefix("torch.") for x in pair))
@pytest.mark.parametrize("options", [{}, dict(bias=True, rank=4, softcap=20.0), dict(train=frozenset({"hidden"}))])
def test_dtypes(options: dict, dtypes: tuple, impl: str, workspace: int | None, which: str):
    """Hidden states and weight in their own dtypes: results in float32 at least, gradients in the tensors' dtypes."""
    if impl == "cpu" and torch.float64 in dtypes:
        with pytest.raises(ValueError, match=r'impl="\w+" cannot serve torch.float64 .* float32(,| and) bfloat16'):
            verify(make(dtype=dtypes[0], weight_dtype=dtypes[1], **options), impl, which)
        return
    case = make((97,), 507, 64, dtype=dtypes[0], weight_dtype=dtypes[1], **options)
    verify(with_rows(case), impl, which, workspace=workspace)


@pytest.mark.parametrize("of_head", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "cpu", "eager"])
def test_bias_and_lora_in_another_dtype(impl: str, dtype: torch.dtype, of_head: torch.dtype):
    case = make((41,), 207, 33, dtype=dtype, bias=True, rank=3, train=frozenset({"hidden", "bias", "lora_A", "lora_B"}))
    case.tensors |= {name: case.tensors[name].to(of_head) for name in ("bias", "lora_A", "lora_B")}
    verify(case, impl, "both")


@pytest.mark.parametrize("which", GRADIENTS)
@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits(dtype: torch.dtype, size: float, impl: str, workspace: int | None, which: str):
    """Integers whose products and sums are exact in float32, so that logits of +-1e4 carry no rounding."""
    case = make((29,), 307, 8, masked=0.2)
    rng = torch.Generator().manual_seed(11)
    hidden = torch.randint(-3, 4, (29, 8), generator=rng)
    hidden[:, 0] = 1
    weight = torch.randint(-2, 3, (307, 8), generator=rng)
    weight[:, 0] = (torch.randint(-10, 11, (307,), generator=rng) / 10 * 128).round()  # logits within +-152
    case.tensors |= dict(hidden=hidden.to(dtype), weight=weight.to(dtype))
    case.logit_scale = 2.0 ** round(torch.tensor(size / 152).log2().item())
    keep = case.mask.nonzero()[:, 0]
    best = (hidden @ weight.T).argmax(1)
    case.targets[keep[::2]] = best[keep[::2]]  # half of the rows are sure of their target, half of another
    case.targets[keep[1]] = 306
    verify(case, impl, which, workspace=workspace)


@pytest.mark.parametrize("impl", ["torch", "cpu", "eager"])
def test_targets_at_the_edges(impl: str):
    case = make((64,), 509, masked=0.0)
    case.targets[::2], case.targets[1::2] = 508, 0
    verify(case, impl, "both")


@pytest.mark.parametrize("impl", ["torch", "cpu", "eager"])
def test_ties_take_the_first_column(impl: str):
    """Integer logits with many columns at the maximum: `correct` asks for the first of them."""
    hidden, weight = torch.ones(4, 1), torch.tensor([0.0, 3, 1, 3, 3])[:, None].repeat(300, 1)
    out = linear_logprobs(hidden, weight, torch.tensor([1, 3, 6, 0]), impl=impl)
    assert out.correct.tolist() == [True, False, False, False]


@pytest.mark.parametrize("impl", ["torch", "cpu", "eager"])
@pytest.mark.parametrize(("target", "options"), [(123, {}), (-1, {}), (-100, dict(ignore_index=5)), (1 << 40, {})])
def test_a_target_outside_the_vocabulary_is_named(target: int, options: dict, impl: str):
    hidden, weight = normal(6, 4), normal(123, 4)
    targets = torch.tensor([0, 122, 5, target, 3, 7])
    with pytest.raises(ValueError, match=rf"(^|[ ,]){target}\b"):
        linear_logprobs(hidden, weight, targets, impl=impl, **options)


@pytest.mark.parametrize("impl", ["torch", "cpu", "eager"])
@pytest.mark.parametrize("column", [0, 122])
def test_nan_is_never_swallowed(column: int, impl: str):
    case = make((6,), masked=0.0)
    case.tensors["weight"][column] = torch.nan
    out = linear_logprobs(case.tensors["hidden"], case.tensors["weight"], case.targets, impl=impl)
    for name in FIELDS[:-1]:
        assert out._asdict()[name].isnan().all(), name


@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("clamp", [None, LogitGradClamp(0.1), LogitGradClamp(0.1, 0.01, "gradient")], ids=str)
def test_a_nan_coefficient_is_never_swallowed(clamp: LogitGradClamp | None, impl: str, workspace: int | None):
    case = make((6,), masked=0.0, grad_clamp=clamp)
    g = torch.ones(6)
    g[2] = torch.nan
    grads = run(case, g, None, impl=impl, workspace=workspace).grads
    assert grads["weight"].isnan().all()
    assert grads["hidden"].isnan().any(1).tolist() == [False, False, True, False, False, False]
    assert grads["hidden"][2].isnan().all()


@pytest.mark.parametrize(("impl", "workspace"), WAYS)
@pytest.mark.parametrize("which", GRADIENTS)
@pytest.mark.parametrize("gone", [range(0, 123, 5), range(70), range(64, 123)], ids=str)
def test_a_bias_of_minus_infinity_removes_a_column(gone: range, which: str, impl: str, workspace: int | None):
    kept = torch.tensor([v for v in range(123) if v not in gone])
    small = make(V=len(kept), bias=True, train=frozenset({"hidden", "weight"}))
    case = make(bias=True, train=small.train)
    small.tensors |= {name: case.tensors[name][kept] for name in ("weight", "bias")}
    case.targets = torch.where(small.mask, kept[small.targets.clamp(min=0)], -100)
    case.tensors["bias"][list(gone)] = -torch.inf
    g, h = upstream(case, which)
    got, true = run(case, None if which == "entropy" else g, h, impl=impl, workspace=workspace), truth(small, g, h)
    assert (got.fields["mean_logit"][case.mask] == -torch.inf).all()
    got.fields["mean_logit"] = true.fields["mean_logit"].float()
    assert not got.grads["weight"][list(gone)].any()
    judge(small, got._replace(grads=got.grads | {"weight": got.grads["weight"][kept]}), true)


@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_a_confident_target_keeps_its_gradient(impl: str, workspace: int | None):
    """1 - p far below float32's resolution around 1: the backends are to be better than eager float32 here."""
    case = make((8,), 300, 4, masked=0.0)
    case.tensors["weight"][7] = 6.0
    case.tensors["hidden"] = torch.ones(8, 4) + torch.arange(8)[:, None] / 256
    case.targets[:] = 7
    g, _ = upstream(case, "logp")
    got, true = run(case, g, None, impl=impl, workspace=workspace), truth(case, g, None)
    assert 1e-8 < true.fields["logp"].abs().max() < 1e-6
    for name in ("hidden", "weight"):
        check(f"gradient of {name}", got.grads[name], true.grads[name])


def test_no_gradient_under_no_grad():
    case = make(bias=True)
    with torch.no_grad():
        out = linear_logprobs(case.leaves()["hidden"], case.leaves()["weight"], case.targets)
    assert not out.logp.requires_grad and not out.entropy.requires_grad


@pytest.mark.parametrize("impl", ["torch", "cpu", "eager"])
def test_only_logp_and_entropy_carry_gradients(impl: str):
    leaves = make().leaves()
    out = linear_logprobs(leaves["hidden"], leaves["weight"], make().targets, impl=impl)
    assert [name for name in FIELDS if out._asdict()[name].requires_grad] == ["logp", "entropy"]
    assert out.correct.dtype == torch.bool


WRONG = [
    (dict(hidden=torch.zeros(3, 5)), r"\(3, 5\) and \(7, 4\)"),
    (dict(hidden=torch.zeros(3, 4, dtype=torch.int64)), "hidden must be floating point, got torch.int64"),
    (dict(weight=torch.zeros(7, 4, dtype=torch.int8)), "weight must be floating point, got torch.int8"),
    (dict(weight=torch.zeros(7)), r"do not fit: \(3, 4\) and \(7,\)"),
    (dict(targets=torch.zeros(2, dtype=torch.int64)), r"leading shape \(3,\), got \(2,\)"),
    (dict(targets=torch.zeros(3)), "targets must be int64, got torch.float32"),
    (dict(bias=torch.zeros(6)), r"bias must have shape \(7,\), got \(6,\)"),
    (dict(temperature=0.0), "temperature must be a finite number above 0, got 0.0"),
    (dict(temperature=-1.0), "got -1.0"),
    (dict(temperature=float("nan")), "temperature .* got nan"),
    (dict(temperature=torch.ones(2)), r"one per row \(3,\), got \(2,\)"),
    (dict(temperature=torch.tensor([1.0, 0.0, 1.0])), r"temperature .*got 0"),
    (dict(temperature=torch.tensor([1.0, 1.0, float("inf")])), r"temperature .*got inf"),
    (dict(temperature=torch.ones(3, requires_grad=True)), r"temperature.detach\(\)"),
    (dict(logit_scale=0.0), "logit_scale must be finite and not 0, got 0.0"),
    (dict(logit_scale=float("inf")), "logit_scale .* got inf"),
    (dict(softcap=-1.0), "softcap must be a finite number above 0 or None, got -1.0"),
    (dict(softcap=0.0), "softcap .* got 0.0"),
    (dict(grad_clamp=LogitGradClamp(0.0)), "grad_clamp.limit .* got 0.0"),
    (dict(grad_clamp=LogitGradClamp(1.0, 1.0)), "grad_clamp.prob_above .* got 1.0"),
    (dict(grad_clamp=LogitGradClamp(1.0, 0.0, "logits")), "grad_clamp.units .* got 'logits'"),  # type: ignore
    (dict(drop_mass=1.0), "drop_mass .* got 1.0"),
    (dict(workspace=0), "workspace .* got 0"),
    (dict(lora=(torch.zeros(2, 5), torch.zeros(7, 2), 1.0)), r"lora=.* got A \(2, 5\)"),
    (dict(lora=(torch.zeros(2, 4), torch.zeros(7, 3), 1.0)), r"B \(7, 3\)"),
    (dict(lora=(torch.zeros(2, 4), torch.zeros(7, 2), float("nan"))), r"scaling .*nan"),
    (dict(impl="cuda13"), "impl must be one of auto, .*got 'cuda13'"),
]


@pytest.mark.parametrize("impl", ["torch", "cpu", "eager"])
@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(wrong: dict, message: str, impl: str):
    names: dict = dict(hidden=torch.zeros(3, 4), weight=torch.zeros(7, 4), targets=torch.tensor([0, 6, 2]), impl=impl)
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**(names | wrong))


def test_numbers_of_numpy_are_numbers():
    case = make(softcap=2.0)
    plain = linear_logprobs(case.tensors["hidden"], case.tensors["weight"], case.targets, softcap=2.0, logit_scale=0.5)
    clamp = LogitGradClamp(np.float64(0.5), np.float32(0.25))
    hidden = case.tensors["hidden"].requires_grad_()
    out = linear_logprobs(
        hidden,
        case.tensors["weight"],
        case.targets,
        softcap=np.float64(2.0),
        logit_scale=np.float32(0.5),
        temperature=np.float64(1.0),
        ignore_index=np.int64(-100),
        workspace=np.int64(1 << 20),
        grad_clamp=clamp,
        lora=None,
    )
    out.logp.sum().backward()
    torch.testing.assert_close(out.logp, plain.logp)
