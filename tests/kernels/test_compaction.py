"""Column compaction: what `drop_mass` leaves out is bounded per row, a flat softmax is not touched, and FLOPs drop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from processes import run_ranks
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from align_kernels import LogitGradClamp, explain, linear_logprobs, sft_loss
from align_kernels.backends import cpu, torch_ops
from align_kernels.head import Head, read_head
from align_kernels.losses import LOSSES
from align_kernels.schedules import compaction, lists, support
from align_kernels.schedules import request as planning
from align_kernels.schedules.dense import softmax
from align_kernels.schedules.plan import start
from align_kernels.schedules.request import MIB
from align_kernels.schedules.tiles import TiledHead
from align_kernels.units import LossCall, keep_rows

from .oracle import Case, objective, raw_logits, transform

N, V, D = 150, 3001, 48
TAU = 2**-6
IMPLS = ("torch", "cpu")
ROOM = 64 * MIB  # all logits in one chunk


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    w = torch.randn(V, D, generator=torch.Generator().manual_seed(1))
    return (w / w.norm(dim=1, keepdim=True)).to(dtype)


def reach(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight with (nearly) these logits [N, V]: their D leading directions."""
    u, s, v = torch.linalg.svd(logits.double(), full_matrices=False)
    return (u[:, :D] * s[:D].sqrt()).float(), (v[:D].T * s[:D].sqrt()).float()


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def flat() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D, generator=rng()) * 0.3, weight()


def heavy() -> tuple[Tensor, Tensor]:
    """One column per row, no two alike, carries nearly everything."""
    return 24.0 * weight()[torch.randperm(V, generator=rng())[:N]], weight()


def spiked() -> tuple[Tensor, Tensor]:
    """Two columns per row, one for all rows and one of its own, over a floor of about drop_mass."""
    w = weight()
    return 20.0 * (w[torch.randperm(V, generator=rng())[:N]] + w[7]), w


def zipf() -> tuple[Tensor, Tensor]:
    """p falls as rank^-2, rows rank the columns alike but for some noise."""
    rank = torch.arange(1, V + 1).float()
    noise = torch.randn(N, D, generator=rng()) @ weight().T
    return reach(-2.0 * rank.log() + noise)


def mixed() -> tuple[Tensor, Tensor]:
    """Every second row is flat: half of the blocks run dense."""
    hidden, w = heavy()
    hidden[::2] = flat()[0][::2]
    return hidden, w


SHAPES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "flat": flat, "heavy": heavy, "spiked": spiked, "zipf": zipf, "mixed": mixed,
}  # fmt: skip
OPTIONS: dict[str, dict] = {
    "plain": {},
    "bias": dict(bias=True),
    "softcap": dict(softcap=30.0),
    "scale and temperature": dict(logit_scale=1.5, temperature=0.8),
    "temperature per row": dict(temperature="rows"),
    "clamp": dict(grad_clamp=LogitGradClamp(0.3)),
    "clamp in gradient units": dict(grad_clamp=LogitGradClamp(0.2, 0.01, "gradient")),
    "lora": dict(rank=3),
    "all": dict(bias=True, rank=2, softcap=40.0, logit_scale=1.2, temperature="rows", grad_clamp=LogitGradClamp(0.5)),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks, tiles and limits that fit the small sizes here."""
    monkeypatch.setattr(compaction, "BLOCK_ROWS", 32)
    monkeypatch.setattr(planning, "BLOCK_ROWS", 32)
    monkeypatch.setattr(compaction, "STEP", 50)
    monkeypatch.setattr(compaction, "FLAT", 0.1)


def make(shape: str, *, dtype=torch.float32, bias=False, rank=0, temperature=1.0, train=None, **options) -> Case:
    hidden, w = SHAPES[shape]()
    tensors = dict(hidden=hidden.to(dtype), weight=w.to(dtype))
    if bias:
        tensors["bias"] = torch.randn(V, generator=rng()).to(dtype)
    if rank:
        tensors["lora_A"] = (0.1 * torch.randn(rank, D, generator=rng())).to(dtype)
        tensors["lora_B"] = (0.1 * torch.randn(V, rank, generator=rng())).to(dtype)
    if temperature == "rows":
        temperature = torch.rand(N, generator=rng()) * 0.4 + 0.8
    case = Case(tensors, torch.zeros(N, dtype=torch.int64), temperature=temperature, **options)
    logits = transform(case, raw_logits(case, case.leaves(torch.float64)))
    case.targets = torch.multinomial(logits.detach().softmax(1), 1, generator=rng())[:, 0]
    case.targets[::11] = torch.randint(0, V, case.targets[::11].shape, generator=rng())  # unlikely ones
    case.targets[5::17] = -100
    case.train = frozenset(train or tensors)
    return case


def coefficients(entropy: bool) -> tuple[Tensor, Tensor | None]:
    g = torch.randn(N, generator=rng())
    g[::7] = 0.0
    return g, (torch.randn(N, generator=rng()).flip(0) if entropy else None)


def gradients(case: Case, g: Tensor, h: Tensor | None, **options) -> dict[str, Tensor]:
    leaves = case.leaves()
    out = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets, **case.keywords(leaves), **options)
    wanted = {k: x for k, x in leaves.items() if x.requires_grad}
    total = (out.logp * g).sum() + (0.0 if h is None else (out.entropy * h).sum())
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()))))


def truth(case: Case, g: Tensor, h: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """The exact gradients in float64, and d(logits)/dz [rows, V]."""
    leaves = case.leaves(torch.float64)
    z = raw_logits(case, leaves)
    logits = transform(case, z)
    (slope,) = torch.autograd.grad(logits.sum(), z, retain_graph=True)
    wanted = {k: x for k, x in leaves.items() if x.requires_grad}
    found = torch.autograd.grad(objective(case, logits, g, h), list(wanted.values()))
    return dict(zip(wanted, found)), slope.abs().amax(1)


def check_bound(case: Case, g: Tensor, h: Tensor | None, tau: float, **options) -> dict[str, Tensor]:
    """Rows of dX and entries of dW (and of a LoRA's B) err by no more than the dropped mass allows."""
    got, (true, slope) = gradients(case, g, h, drop_mass=tau, **options), truth(case, g, h)
    eager = gradients(case, g, h, impl="eager") if case.narrow else true
    keep, size = case.mask, g.abs().double() + (0.0 if h is None else h.abs().double())
    limit = size[keep] * tau * slope  # of the sum over columns of |error of dL/dz|, per row
    t = {k: x.double() for k, x in case.tensors.items()}
    effective = t["weight"] + (case.scaling * t["lora_B"] @ t["lora_A"] if "lora_A" in t else 0.0)

    def allowed(name: str, bound: Tensor) -> Tensor:
        noise = 2e-5 * true[name].abs().max() + 1.5 * (eager[name].double() - true[name]).abs().max()
        return bound + noise * math.sqrt(D)

    error = {k: got[k].double() - true[k] for k in got}
    if "hidden" in error:
        bound = limit * effective.norm(dim=1).max()
        assert (error["hidden"][keep].norm(dim=1) <= allowed("hidden", bound)).all()
        assert not got["hidden"][~keep].any()
    # each column of dL/dz errs by at most the row's limit, and only once in all columns
    x = t["hidden"][keep]
    inputs = dict(weight=x, bias=torch.ones(len(x), 1), lora_B=case.scaling * x @ t["lora_A"].T if "lora_A" in t else x)
    for name in error.keys() & inputs.keys():
        total = error[name].reshape(V, -1).norm(dim=1).sum()
        assert total <= (limit * inputs[name].norm(dim=1)).sum() + V * allowed(name, torch.zeros(())), name
    return got


def tiled_head(case: Case, tau: float, impl: str, late: bool = False, workspace: int = ROOM) -> TiledHead:
    leaves = case.leaves()
    head, settings, needs = read_head(leaves["hidden"], leaves["weight"], case.targets, drop_mass=tau, impl=impl,
                               workspace=workspace, **case.keywords(leaves))  # fmt: skip
    call = None if late else LossCall(LOSSES["sft"])
    tiled = start(head, settings, needs, keep_rows(case.targets, -100), call).tiled
    tiled.head = Head(*(None if x is None else x.detach() for x in head))
    return tiled


# -- the columns --------------------------------------------------------------------------------------------------
def columns_of(block: compaction.Block | lists.RowLists) -> list[Tensor]:
    """Those of each row."""
    if isinstance(block, compaction.Block):
        assert len(block.columns) <= compaction.MOST_COLUMNS * V
        return [block.columns] * len(block.rows)
    begins, ends, columns, _ = block.lists
    return [columns[begin:end].long() for begin, end in zip(begins.tolist(), ends.tolist())]


COMPACTED = {("heavy", 2**-4), ("heavy", 2**-8), ("heavy", 2**-12), ("mixed", 2**-4), ("mixed", 2**-8)}


@pytest.mark.parametrize("entropy", [False, True], ids=["mass", "entropy too"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tau", [2**-4, 2**-8, 2**-12])
def test_dropped_mass(shape: str, impl: str, entropy: bool, tau: float):
    """Of every block: what it leaves out. Peaked rows have blocks, flat ones run dense."""
    case = make(shape, bias=True, temperature="rows", softcap=40.0)
    tiled = tiled_head(case, tau, impl)
    p = transform(case, raw_logits(case, case.leaves(torch.float64))).detach().softmax(1)
    targets, seen, blocks = case.targets[case.mask], [], 0
    for chunk in tiled.chunks(0, len(tiled.kept)):
        assert len(chunk.targets) == len(p)
        store = tiled.store(len(p))
        state = softmax(tiled, chunk, store)
        for block in compaction.cut(tiled, chunk, state, store, torch.arange(len(p)), seen, ROOM, entropy=entropy):
            seen.append(block.rows)
            blocks += 1
            q, dropped = p[block.rows], torch.ones(len(block.rows), V, dtype=torch.bool)
            for t, columns in enumerate(columns_of(block)):
                dropped[t, columns] = False
                assert len(columns.unique()) == len(columns)
            assert (q * dropped).sum(1).max() <= tau
            assert not dropped.gather(1, targets[block.rows][:, None]).any()
            if entropy:
                height = -(q * q.log()).sum(1, keepdim=True)
                assert (q * (q.log() + height).abs() * dropped).sum(1).max() <= tau * 1.001
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(len(p)))
    assert blocks == 0 if shape == "flat" else blocks > 0 or (shape, tau) not in COMPACTED


def test_eps_of_blocks_is_the_largest_that_serves(monkeypatch):
    """Thresholds a quarter of a halving higher would drop too much of some row, but where an estimate was too low."""
    tiled = tiled_head(make("spiked"), TAU, "torch")
    (chunk,) = tiled.chunks(0, len(tiled.kept))
    store = tiled.store(len(chunk.targets))
    state, suffices, asked = softmax(tiled, chunk, store), compaction.suffices, []

    def recorded(*args) -> Tensor:
        asked.append(bool((found := suffices(*args)).all()))
        return found

    monkeypatch.setattr(compaction, "suffices", recorded)
    higher = 0
    for _ in compaction.cut(tiled, chunk, state, store, torch.arange(len(state)), dense := [], ROOM, entropy=False):
        assert asked[-1] and not any(asked[:-1])
        higher += len(asked) > 1
        asked.clear()
    assert higher > 1 and not dense


def test_the_cheapest_blocks():
    """Against every way to cut eight rows, and eight pieces of 16 rows."""
    rng = torch.Generator().manual_seed(0)
    for piece, each, extra, most in ((1, 0.1, 2, 5), (16, 3, 30, 70), (1, 0, 0, 8)):
        for _ in range(20):
            needed = torch.rand(8, 40, generator=rng) < torch.rand(8, 1, generator=rng) ** 3
            ends = [piece * (i + 1) for i in range(7)] + [8 * piece - piece // 2]
            edges = [0, *ends]
            shares = torch.zeros(8, 8, dtype=torch.float64)
            for i, j in itertools.combinations_with_replacement(range(8), 2):
                shares[j, i] = needed[i : j + 1].any(0).double().mean()

            def price(i: int, j: int, shares=shares, edges=edges, each=each, extra=extra) -> float:
                share, rows = float(shares[j - 1, i]), edges[j] - edges[i]
                return rows if share > compaction.MOST_COLUMNS else min(each + share * (rows + extra), rows)

            ways = []
            for count in range(8):
                for inner in itertools.combinations(range(1, 8), count):
                    cuts = list(itertools.pairwise((0, *inner, 8)))
                    if all(edges[j] - edges[i] <= most for i, j in cuts):
                        ways.append(sum(price(i, j) for i, j in cuts))
            found = support.cheapest(shares, ends, most, each, extra)
            places = [(edges.index(begin), edges.index(end)) for begin, end, _ in found]
            assert [i for i, _ in places] == [0, *(j for _, j in places[:-1])] and places[-1][1] == 8
            assert sum(price(i, j) for i, j in places) == pytest.approx(min(ways))
            assert [dense for *_, dense in found] == [price(i, j) == edges[j] - edges[i] for i, j in places]


def test_shares_of_pieces():
    rng = torch.Generator().manual_seed(1)
    sample = torch.randint(0, 9, (37, 50), generator=rng).to(torch.uint8)
    found = support.Support(
        torch.zeros(37), torch.randint(0, 5, (37,), generator=rng), sample, torch.tensor(50.0), None
    )
    places = torch.randperm(37, generator=rng)[:30]
    for piece in (1, 4):
        shares = found._shares(places, piece)
        parts = places.split(piece)
        for i, j in itertools.combinations_with_replacement(range(len(parts)), 2):
            rows = torch.cat(parts[i : j + 1])
            assert shares[j, i] == (sample[rows] <= found.level[rows][:, None]).any(0).double().mean()


@pytest.mark.parametrize(
    "options", [{}, dict(softcap=9.0), dict(scale=-1.5)], ids=["plain", "softcap", "negative scale"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaks(dtype: torch.dtype, options: dict):
    """The largest log-prob of each column over some rows, of odd widths."""
    for c in (1, 63, 2049, 5000):
        z = torch.full((9, c + 3), torch.nan, dtype=dtype)[:, :c]
        z.copy_(torch.randn(9, c, generator=rng()) * 4)
        bias, temperature = torch.randn(c, generator=rng()), torch.rand(9, generator=rng()) + 0.5
        common = dict(offset=0, vocab=c, bias=bias, scale=1.0, softcap=None, temperature=temperature) | options
        targets, state = torch.zeros(9, dtype=torch.int64), tiled_head(make("flat"), TAU, "torch").new_state(9)
        torch_ops.forward(z.double(), state, targets, **common)
        l = common["scale"] * (z.double() + bias)
        l = l if common["softcap"] is None else 9.0 * torch.tanh(l / 9.0)
        rows, out = torch.tensor([7, 0, 4]), torch.full((c + 2,), torch.nan)
        torch_ops.peaks(z, state, targets, rows, out=out[1:-1], **common)
        true = (l / temperature.double()[:, None]).log_softmax(1)[rows].amax(0)
        assert (out[1:-1] - true).abs().max() < 2e-5 * true.abs().max().clamp(min=1.0)
        assert out[0].isnan() and out[-1].isnan()


@pytest.mark.parametrize(
    ("shape", "compacted"), [("flat", 0), ("heavy", N), ("spiked", N), ("zipf", N // 2), ("mixed", N // 3)]
)
def test_who_is_compacted(shape: str, compacted: int):
    case = make(shape)
    case.targets[case.targets < 0] = 0
    tiled = tiled_head(case, TAU, "torch")
    (chunk,) = tiled.chunks(0, N)
    store = tiled.store(N)
    state = softmax(tiled, chunk, store)
    kept = sum(
        len(b.rows) for b in compaction.cut(tiled, chunk, state, store, torch.arange(N), [], ROOM, entropy=False)
    )
    assert kept >= compacted > 0 or kept == compacted == 0


@pytest.mark.parametrize("entropy", [False, True], ids=["mass", "entropy too"])
@pytest.mark.parametrize("tau", [2**-4, 2**-10])
def test_support(tau: float, entropy: bool, monkeypatch):
    """Of a sample that is the whole vocabulary: how many columns each row needs, to the column."""
    monkeypatch.setattr(support, "EVERY", 1)
    case = make("zipf", bias=True, temperature="rows")
    tiled = tiled_head(case, tau, "torch")
    (chunk,) = tiled.chunks(0, len(tiled.kept))
    store = tiled.store(len(chunk.targets))
    state = softmax(tiled, chunk, store)
    rows = torch.arange(0, len(chunk.targets), 2)
    with torch.no_grad():
        found = support.estimate(tiled, chunk, state, store, rows, entropy=entropy)
        p = transform(case, raw_logits(case, case.leaves(torch.float64))).softmax(1)[rows]
    wanted = []
    for row in p:
        height = -(row * row.log()).sum()
        for eps in (tau / 2 ** (j / support.STEPS) for j in range(support.LEVELS + 1)):
            dropped = row[row < eps]
            serves = not entropy or ((dropped * (-dropped.log() - height)).sum() <= tau and math.log(eps) <= -height)
            if dropped.sum() <= tau and serves:
                wanted.append(V - len(dropped))
                break
        else:
            wanted.append(V)
    near = (found.columns - torch.tensor(wanted)).abs()
    assert near.max() <= 2 and (near == 0).float().mean() > 0.9  # p within rounding of a power of two
    assert min(wanted) < max(wanted)


@pytest.mark.parametrize(
    ("impl", "v", "seed", "tau", "most"),
    [("torch", 20011, seed, tau, most) for seed in range(3) for tau, most in ((2**-8, 2.3), (2**-12, 2.85))]
    + [
        ("cpu", v, seed, tau, most)
        for v in (20011, 151936)
        for seed in range(3)
        for tau, most in ((2**-8, 2.3), (2**-12, 3.0))
    ],
)
def test_few_wide_rows_spoil_no_others(impl: str, v: int, seed: int, tau: float, most: float, monkeypatch):
    """Rows with a median of one significant column and a tail that needs thousands: products in units of NVD."""
    monkeypatch.undo()  # blocks of the real size
    torch.manual_seed(seed)
    n, d = 512, 64
    w = torch.randn(v, d) / 8
    y = torch.multinomial(1.0 / torch.arange(1, v + 1).float(), n, replacement=True)
    hidden = (w[y] * 24 + torch.randn(n, d) * 0.3).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        sft_loss(hidden, w.requires_grad_(), y, drop_mass=tau, workspace=1024 * MIB, impl=impl).loss.backward()
    assert counter.get_total_flops() / (n * v * d) <= most


# -- gradients ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "entropy too"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bound_on_gradients(shape: str, name: str, impl: str, entropy: bool):
    check_bound(make(shape, **OPTIONS[name]), *coefficients(entropy), TAU, impl=impl)


@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "entropy too"])
@pytest.mark.parametrize(
    "train", [("hidden",), ("weight", "bias"), ("bias",), ("hidden", "lora_A", "lora_B"), ("lora_A",)]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_needs(impl: str, train: tuple[str, ...], entropy: bool):
    case = make("mixed", bias=True, rank=2, train=train)
    assert set(check_bound(case, *coefficients(entropy), TAU, impl=impl)) == set(train)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bound_in_bfloat16(shape: str, impl: str):
    check_bound(make(shape, dtype=torch.bfloat16, bias=True), *coefficients(True), TAU, impl=impl)


def test_bound_in_float64():
    check_bound(make("heavy", dtype=torch.float64), *coefficients(True), TAU, impl="torch")


@pytest.mark.parametrize("workspace", [200, 120, 20], ids="{} rows of logits".format)
@pytest.mark.parametrize("shape", ["heavy", "mixed", "flat"])
def test_small_workspaces(shape: str, workspace: int):
    """Several chunks; where they do not fit, dense rows are made again."""
    check_bound(make(shape, bias=True), *coefficients(True), TAU, workspace=workspace * V * 4)


def test_all_rows_dropped():
    case = make("heavy")
    assert not any(x.any() for x in gradients(case, torch.zeros(N), None, drop_mass=TAU).values())


def test_not_a_number_comes_through():
    case = make("heavy")
    case.tensors["hidden"][3] = torch.nan
    found = gradients(case, torch.ones(N), None, drop_mass=TAU)
    assert found["hidden"][3].isnan().all() and found["weight"].isnan().all()
    assert found["hidden"][4].isfinite().all()


@pytest.mark.parametrize("workspace", [None, 60 * V * 4], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_loss_equals_late(shape: str, workspace: int | None):
    case = make(shape)
    results = []
    for fused in (True, False):
        leaves = case.leaves()
        args = leaves["hidden"], leaves["weight"], case.targets
        if fused:
            loss = sft_loss(*args, drop_mass=TAU, workspace=workspace).loss
        else:
            loss = -linear_logprobs(*args, drop_mass=TAU, workspace=workspace).logp.sum() / case.mask.sum()
        results.append(torch.autograd.grad(loss, [leaves["hidden"], leaves["weight"]]))
    exact, _ = truth(case, -case.mask.double() / case.mask.sum(), None)
    for result in results:
        error = result[0][case.mask].double() - exact["hidden"][case.mask]
        longest = case.tensors["weight"].double().norm(dim=1).max()
        assert error.norm(dim=1).max() <= TAU / case.mask.sum() * longest + 1e-6


# -- stepping aside -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("train", [("hidden", "weight"), ("hidden",)], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("impl", IMPLS)
def test_flat_runs_dense_to_the_bit(impl: str, train: tuple[str, ...]):
    # no residual exceeds 1: the clamp only keeps the exact schedule to raw logits, as compaction is
    case, (g, h) = make("flat", train=train, grad_clamp=LogitGradClamp(2.0)), coefficients(True)
    for upstream in ((g, None), (g, h)):
        dense = gradients(case, *upstream, impl=impl)
        for name, x in gradients(case, *upstream, impl=impl, drop_mass=TAU).items():
            assert torch.equal(x, dense[name]), name


def test_a_flat_softmax_costs_no_pass(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a flat row was looked at")

    for backend, name in ((torch_ops, "peaks"), (torch_ops, "survey"), (cpu, "survey")):
        monkeypatch.setattr(backend, name, never)
    for impl in IMPLS:
        gradients(make("flat"), *coefficients(False), impl=impl, drop_mass=TAU)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_is_the_exact_path(shape: str, impl: str, monkeypatch):
    case, upstream = make(shape, bias=True), coefficients(True)
    assert not explain_of(case, 0.0, impl).compact
    before = gradients(case, *upstream, impl=impl)
    monkeypatch.setattr(compaction, "cut", None)
    monkeypatch.setattr(compaction, "save", None)
    after = gradients(case, *upstream, impl=impl, drop_mass=0.0)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_mass_below_rounding_keeps_every_column():
    case, (g, h) = make("heavy"), coefficients(False)
    dense = gradients(case, g, h)
    assert all(torch.equal(x, dense[k]) for k, x in gradients(case, g, h, drop_mass=1e-7).items())


def explain_of(case: Case, tau: float, impl: str = "auto", **options):
    leaves = case.leaves()
    return explain(leaves["hidden"], leaves["weight"], case.targets, drop_mass=tau, impl=impl, **options)


def test_the_plan_says_so():
    case = make("heavy")
    assert "column compaction" in str(explain_of(case, TAU)) and explain_of(case, TAU).schedule == "compaction"
    assert "column compaction" in str(explain_of(case, TAU, loss="sft"))
    assert "compaction" not in str(explain_of(case, 0.0))


@pytest.mark.parametrize("fused", [True, False], ids=["one pass", "late"])
@pytest.mark.parametrize("train", [("hidden", "weight"), ("hidden",)], ids=["head trained", "head frozen"])
@pytest.mark.parametrize("impl", IMPLS)
def test_flops(train: tuple[str, ...], fused: bool, impl: str):
    """2NVD, and 2NVD for each gradient times the share of columns kept."""
    case = make("heavy", train=train)
    case.targets[case.targets == -100] = 0
    tiled = tiled_head(case, TAU, impl)
    leaves = case.leaves()
    args = leaves["hidden"], leaves["weight"], case.targets
    (chunk,) = tiled.chunks(0, N)
    store = tiled.store(N)
    state = softmax(tiled, chunk, store)
    entropy = not fused and len(train) > 1
    blocks = list(compaction.cut(tiled, chunk, state, store, torch.arange(N), dense := [], ROOM, entropy=entropy))
    assert not sum(map(len, dense))
    kept = sum(len(columns) for b in blocks for columns in columns_of(b))
    assert kept < 0.1 * N * V
    options = dict(drop_mass=TAU, workspace=ROOM, impl=impl)
    with FlopCounterMode(display=False) as counter:
        (sft_loss(*args, **options).loss if fused else linear_logprobs(*args, **options).logp.sum()).backward()
    assert counter.get_total_flops() == 2 * D * (N * V + len(train) * kept)


# -- what waits ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", IMPLS)
def test_what_waits_is_small(impl: str):
    case = make("heavy")
    tiled = tiled_head(case, TAU, impl, late=True)
    (chunk,) = tiled.chunks(0, len(tiled.kept))
    store = tiled.store(len(tiled.kept))
    saved = compaction.save(tiled, chunk, softmax(tiled, chunk, store), store, tiled.plan.saved // 4, alone=True)
    values, layout = compaction.pack([saved], store.own)
    whole = len(store.own)
    assert len(values) < 0.1 * whole and len(values) + len(layout) < 0.2 * whole
    (again,) = compaction.unpack(tiled, values, layout)
    assert again.logits is not None and not len(again.logits.own) and torch.equal(again.dense, saved.dense)
    for a, b in zip(again.blocks, saved.blocks, strict=True):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.values(), b.values())
        assert all(torch.equal(x, y) for x, y in zip(columns_of(a), columns_of(b), strict=True))


def test_the_workspace_holds():
    case = make("mixed")
    rows = 120
    tiled = tiled_head(case, TAU, "cpu", late=True, workspace=rows * V * 4)
    assert tiled.plan.schedule == "compaction" and tiled.plan.workspace <= rows * V * 4
    schedule = compaction.Compaction(tiled)
    schedule.begin(len(tiled.kept))
    sizes = []
    for chunk in tiled.chunks(0, len(tiled.kept)):
        schedule.save(schedule.forward(chunk)[1])
        sizes.append(len(chunk.targets))
    assert len(sizes) > 1
    values, _ = schedule.packed()
    assert values.nbytes + max(sizes) * V * 4 <= rows * V * 4


def test_a_graph_serves_twice():
    case, (g, _) = make("mixed"), coefficients(False)
    leaves = case.leaves()
    out = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets, drop_mass=TAU)
    wanted = [leaves["hidden"], leaves["weight"]]
    first = torch.autograd.grad((out.logp * g).sum(), wanted, retain_graph=True)
    second = torch.autograd.grad((out.logp * g).sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("fused", [True, False], ids=["one pass", "late"])
def test_compiled(fused: bool):
    case = make("mixed")

    def loss(hidden: Tensor, w: Tensor) -> Tensor:
        if fused:
            return sft_loss(hidden, w, case.targets, drop_mass=TAU).loss
        return linear_logprobs(hidden, w, case.targets, drop_mass=TAU).logp.sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        wanted = [leaves["hidden"], leaves["weight"]]
        results.append(torch.autograd.grad(call(*wanted), wanted))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_refused_values():
    case = make("heavy")
    for tau in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="drop_mass"):
            gradients(case, *coefficients(False), drop_mass=tau)
    assert explain_of(case, TAU).workspace <= 256 * MIB


# -- vocabulary-parallel ------------------------------------------------------------------------------------------
RANK_CODE = """
import sys, torch, torch.distributed as dist
from align_kernels import linear_logprobs, sft_loss
from align_kernels.schedules import compaction, request
compaction.BLOCK_ROWS = request.BLOCK_ROWS = 32
compaction.FLAT = 0.1
folder, impl, tau, workspaces = sys.argv[1], sys.argv[2], float(sys.argv[3]), map(int, sys.argv[4:])
dist.init_process_group("gloo")
rank = dist.get_rank()
hidden, weight, targets, g, h, edges = torch.load(f"{folder}/inputs.pt")
hidden, weight = hidden.requires_grad_(), weight[edges[rank] : edges[rank + 1]].clone().requires_grad_()
results = []
for workspace in workspaces:
    options = dict(drop_mass=tau, workspace=workspace, tp_group=dist.group.WORLD, impl=impl)
    out = linear_logprobs(hidden, weight, targets, **options)
    late = torch.autograd.grad((out.logp * g).sum() + (out.entropy * h).sum(), [hidden, weight])
    fused = torch.autograd.grad(sft_loss(hidden, weight, targets, **options).loss, [hidden, weight])
    results.append([late, fused])
# a block whose softmax spreads over more columns than it may keep: every rank must give it up at the same depth
compaction.FLAT = 1e9
x, w = torch.zeros_like(hidden), torch.full((edges[-1], hidden.shape[1]), -20.0)
x[:, 0], w[7:1207, 0] = 1.0, 0.0
mine, places = w[edges[rank] : edges[rank + 1]].clone().requires_grad_(), torch.full_like(targets, 10)
spread = torch.autograd.grad(linear_logprobs(x, mine, places, **options).logp.sum(), mine)
torch.save(spread, f"{folder}/spread{rank}.pt")
torch.save(results, f"{folder}/{rank}.pt")
"""


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "edges", [(0, 1200, V), (0, 7, 1700, V), (0, 1700, 1700, V)], ids=["2 ranks", "3 ranks", "empty"]
)
def test_vocabulary_parallel(tmp_path, edges: tuple[int, ...], impl: str):
    """Ranks that share the vocabulary choose columns together: what one process gives."""
    case, (g, h), world = make("mixed"), coefficients(True), len(edges) - 1
    hidden, w = case.tensors["hidden"], case.tensors["weight"]
    torch.save([hidden, w, case.targets, g, h, edges], tmp_path / "inputs.pt")
    workspaces = ROOM, 120 * V * 2
    run_ranks(world, RANK_CODE, tmp_path, impl, TAU, *workspaces)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]

    p = torch.full((V,), math.exp(-20.0), dtype=torch.float64)
    p[7:1207] = 1.0
    p /= p.sum()
    p[10] -= 1.0
    found = torch.cat([torch.load(tmp_path / f"spread{rank}.pt")[0] for rank in range(world)])
    torch.testing.assert_close(found[:, 0].double(), -N * p, atol=1e-6, rtol=1e-5)

    options = dict(drop_mass=TAU, workspace=ROOM, impl=impl)
    one = gradients(case, g, h, **options), {}
    leaves = case.leaves()
    loss = sft_loss(leaves["hidden"], leaves["weight"], case.targets, **options).loss
    one[1].update(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    exact = gradients(case, g, h)
    longest, size = w.norm(dim=1).max(), g.abs() + h.abs()
    for (k, workspace), (i, true) in itertools.product(enumerate(workspaces), enumerate(one)):
        dx, dw = parts[0][k][i][0], torch.cat([part[k][i][1] for part in parts])
        assert all(torch.equal(part[k][i][0], dx) for part in parts), "ranks differ"
        if workspace == ROOM:
            assert torch.allclose(dx, true["hidden"], atol=1e-5 * true["hidden"].abs().max())
            assert torch.allclose(dw, true["weight"], atol=1e-5 * true["weight"].abs().max())
        elif i == 0:
            assert ((dx - exact["hidden"]).norm(dim=1) <= size * TAU * longest + 1e-4).all()
