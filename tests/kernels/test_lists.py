"""Lists of columns on the CPU: their choice and their products against float64, for every instruction set."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from align_kernels.backends import cpu, torch_ops
from align_kernels.backends.arguments import Lists

from .tiles import OPTIONS, empty_state

if cpu.why_not(torch.device("cpu"), torch.float32):
    pytest.skip("the extension is not built", allow_module_level=True)

_C, own = cpu.arguments._C, cpu.lists
N, V = 9, 5003
EPSILON = 2.0**-24


@pytest.fixture(params=_C.available_isas(), autouse=True)
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Case:
    """Logits with a transform, their state, and log-probs in float64."""

    def __init__(self, bias=False, scale=1.0, softcap=None, temperature=1.0):
        self.z = 4 * torch.randn(N, V, generator=rng())
        self.targets = torch.randint(0, V, (N,), generator=rng())
        self.bias = torch.randn(V, generator=rng()) if bias else None
        self.temperature = torch.rand(N, generator=rng()) + 0.5 if temperature == "rows" else temperature
        self.scale, self.softcap, self.state = scale, softcap, empty_state(N)
        cpu.forward(self.z, self.state, self.targets, **self.options(0, V))
        x = self.z.double() if self.bias is None else self.z.double() + self.bias.double()
        x = x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)
        rows = isinstance(self.temperature, Tensor)
        self.logits = x / (self.temperature.double()[:, None] if rows else self.temperature)
        self.log_p = self.logits.log_softmax(1)

    def options(self, begin: int, end: int, rows: Tensor | None = None) -> dict:
        bias, t = None if self.bias is None else self.bias[begin:end].contiguous(), self.temperature
        t = t[rows] if isinstance(t, Tensor) and rows is not None else t
        return dict(offset=begin, vocab=V, bias=bias, scale=self.scale, softcap=self.softcap, temperature=t)


def random_lists(m: int, columns: int, share: float) -> Lists:
    """With gaps between the rows, an empty row, and NaN where nothing is kept."""
    begins, ends, entries, at = [], [], [], 0
    for t in range(m):
        kept = (torch.rand(columns, generator=rng().manual_seed(t)) < (0 if t == 1 else share)).nonzero()[:, 0]
        entries += [torch.full((3,), 2**30), kept]
        begins.append(at + 3)
        at += 3 + len(kept)
        ends.append(at)
    found = torch.cat(entries)
    z = torch.randn(len(found), generator=rng()).where(found < 2**30, torch.nan)
    return Lists(torch.tensor(begins), torch.tensor(ends), found.int(), z)


def spans(lists: Lists) -> list[tuple[Tensor, Tensor]]:
    """Columns and values of each row."""
    begins, ends = lists.begins.tolist(), lists.ends.tolist()
    return [(lists.columns[b:e].long(), lists.z[b:e]) for b, e in zip(begins, ends)]


def whole(lists: Lists, columns: int) -> Tensor:
    """As a matrix in float64, zero elsewhere."""
    out = torch.zeros(len(lists.begins), columns, dtype=torch.float64)
    for t, (kept, values) in enumerate(spans(lists)):
        out[t, kept] = values.double()
    return out


# -- the choice ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("backend", [cpu, torch_ops])
def test_survey(backend: Any, name: str, every: int):
    """Columns, mass and entropy of each level, in tiles of odd widths: every so many-th run of 16 of the whole row."""
    case, rows, tau, steps, levels = Case(**OPTIONS[name]), torch.tensor([7, 0, 4]), 2**-6, 4, 20
    sums = torch.zeros(len(rows), levels + 2, 3, dtype=torch.float64)
    for begin, end in ((0, 512), (512, 2560), (2560, V)):
        tile = torch.full((N, end - begin + 3), torch.nan)[:, : end - begin].copy_(case.z[:, begin:end])
        backend.survey(
            tile, case.state, case.targets, rows, sums, first=begin, every=every, drop_mass=tau, steps=steps,
            **case.options(begin, end),
        )  # fmt: skip
    seen = (torch.arange(V) // 16) % every == every // 2
    log_p = case.log_p[rows][:, seen]
    # a column beside a level's edge may fall to either side
    edges = (math.log2(tau) - log_p / math.log(2)) * steps
    level = edges.ceil().clamp(0, levels + 1).long()
    near = torch.zeros(len(rows), levels + 2, dtype=torch.float64)
    near.scatter_add_(1, level, ((edges - edges.round()).abs() < 1e-3).double())
    slack = near + near.roll(1, 1) + near.roll(-1, 1)
    p = log_p.exp()
    middle = 0.1 if backend is cpu else 1e-4  # it takes a level's mean for p
    near_enough = torch.tensor([1.0, *[middle] * levels, 1e-4])
    for i, x in enumerate((torch.ones_like(p), p, -p * log_p)):
        true = torch.zeros_like(near).scatter_add_(1, level, x)
        largest = x.amax(1, keepdim=True) if i else 1.0
        allowed = slack * largest + (near_enough * true if i else 0.0) + 1e-12
        assert ((sums[:, :, i] - true).abs() <= allowed).all()
    assert sums[:, :, 0].sum(1).tolist() == [float(seen.sum())] * len(rows)


@pytest.mark.parametrize("name", OPTIONS)
def test_keep(name: str):
    """Columns that reach the floor, ascending, with the target, and no entry where there is no room."""
    case, rows = Case(**OPTIONS[name]), torch.tensor([7, 0, 4, 2])
    floors = torch.tensor([-6.0, -8.0, -40.0, 1.0])
    rooms = torch.tensor([V, V, 100, 5])
    begins = rooms.cumsum(0) - rooms + torch.arange(4)  # one entry apart
    size = int(begins[-1] + rooms[-1]) + 1
    into = Lists(begins, begins + rooms, torch.full((size,), -7, dtype=torch.int32), torch.full((size,), torch.nan))
    found = torch.zeros(4, dtype=torch.int64)
    for begin, end in ((0, 1), (1, 2100), (2100, V)):
        tile = torch.full((N, end - begin + 3), torch.nan)[:, : end - begin].copy_(case.z[:, begin:end])
        own.keep(tile, case.state, case.targets, rows, floors, into, found, first=begin, **case.options(begin, end))
    for i, row in enumerate(rows.tolist()):
        log_p, target = case.log_p[row], int(case.targets[row])
        sure, never = log_p >= floors[i] + 1e-4, log_p < floors[i] - 1e-4
        sure[target], never[target] = True, False
        assert int(sure.sum()) <= int(found[i]) <= int((~never).sum())
        count = min(int(found[i]), int(rooms[i]))
        columns = into.columns[begins[i] : begins[i] + count].long()
        assert (columns.diff() > 0).all() and not never[columns].any()
        assert count == rooms[i] or set(sure.nonzero()[:, 0].tolist()) <= set(columns.tolist())
        assert torch.equal(into.z[begins[i] : begins[i] + count], case.z[row, columns])
        assert int(into.columns[begins[i] + rooms[i]]) == -7, "written beside the row's room"


@pytest.mark.parametrize("name", OPTIONS)
def test_primitives_of_lists(name: str):
    """`forward` and `backward` are those of a tile: sums of the entries, and dL/dz at each, in and out of place."""
    case = Case(**OPTIONS[name])
    lists = random_lists(N, V, 0.7)
    for t, (kept, values) in enumerate(spans(lists)):
        values.copy_(case.z[t, kept])
    case.targets[2] = int(spans(lists)[2][0][-1])
    case.state = empty_state(N)
    cpu.forward(case.z, case.state, case.targets, **case.options(0, V))
    state, common = empty_state(N), case.options(0, V)
    own.forward(lists, V, state, case.targets, **common)
    for t, (kept, _) in enumerate(spans(lists)):
        l = case.logits[t, kept]
        if len(l):
            assert abs(state[t, 0] + state[t, 1].log() - l.logsumexp(0)) < 2e-6 * max(1.0, float(l.abs().max()))
        else:
            assert torch.equal(state[t], empty_state(1)[0])
    g, h = torch.randn(N, generator=rng()), torch.randn(N, generator=rng()).flip(0)
    for clamp in (None, (0.3, 0.1, "residual")):
        dz = torch.full((N, V), torch.nan)
        cpu.backward(case.z, case.state, case.targets, g, h, clamp=clamp, out=dz, **common)
        for out in (torch.full_like(lists.z, torch.nan), lists.z.clone()):
            given = lists._replace(z=out) if not out.isnan().all() else lists
            own.backward(given, V, case.state, case.targets, g, h, clamp=clamp, out=out, **common)
            for t, (kept, got) in enumerate(spans(lists._replace(z=out))):
                scale = dz[t].abs().max()
                assert ((got - dz[t, kept]).abs() <= 1e-6 * scale).all()
                here = kept == case.targets[t]
                assert torch.equal(got[here], dz[t, kept][here])


# -- products -----------------------------------------------------------------------------------------------------
WIDTHS = (1, 3, 16, 63, 224, 507)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_pull(width: int, dtype: torch.dtype):
    lists = random_lists(N, V, 0.3)
    w = torch.full((V, width + 5), torch.nan, dtype=dtype)[:, :width]
    w.copy_(torch.randn(V, width, generator=rng()))
    c = whole(lists, V)
    frame = torch.full((N + 2, width), 7.0)
    frame[1:-1] = start = torch.randn(N, width, generator=rng())
    for begin, end in ((0, 1), (1, 2500), (2500, V)):
        own.pull(frame[1:-1], lists, lists.z, w[begin:end], begin)
    error = (frame[1:-1].double() - start.double() - c @ w.double()).abs()
    assert (error <= 40 * EPSILON * (c.abs() @ w.double().abs() + start.abs())).all()
    assert (frame[0] == 7.0).all() and (frame[-1] == 7.0).all()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_push(width: int, add: bool):
    lists = random_lists(N, V, 0.1)
    x = torch.full((N, width + 5), torch.nan)[:, :width]
    x.copy_(torch.randn(N, width, generator=rng()))
    c = whole(lists, V)
    frame = torch.full((V + 2, width), 7.0)
    frame[1:-1] = torch.randn(V, width, generator=rng()) if add else torch.nan
    start = frame[1:-1].double() if add else torch.zeros(V, width, dtype=torch.float64)
    own.push(frame[1:-1], lists, lists.z, x, add)
    error = (frame[1:-1].double() - start - c.T @ x.double()).abs()
    assert (error <= 20 * EPSILON * (c.T.abs() @ x.double().abs() + start.abs())).all()
    assert (frame[0] == 7.0).all() and (frame[-1] == 7.0).all()


def test_threads_change_no_bit():
    m = 150
    lists, before = random_lists(m, V, 0.2), torch.get_num_threads()
    w, x = torch.randn(V, 300, generator=rng()), torch.randn(m, 300, generator=rng())
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            dx, dw = torch.zeros(m, 300), torch.empty(V, 300)
            own.pull(dx, lists, lists.z, w, 0)
            own.push(dw, lists, lists.z, x, False)
            results.append((dx, dw))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_products_are_counted():
    lists = random_lists(N, V, 0.3)
    kept = [columns for columns, _ in spans(lists)]
    with FlopCounterMode(display=False) as counter:
        own.pull(torch.zeros(N, 5), lists, lists.z, torch.randn(2000, 5), 1000)
    inside = sum(int(((columns >= 1000) & (columns < 3000)).sum()) for columns in kept)
    assert counter.get_total_flops() == 2 * 5 * inside
    with FlopCounterMode(display=False) as counter:
        own.push(torch.zeros(V, 5), lists, lists.z, torch.randn(N, 5), False)
    assert counter.get_total_flops() == 2 * 5 * sum(map(len, kept))


# -- what is refused ----------------------------------------------------------------------------------------------
def test_refusals():
    lists = random_lists(N, V, 0.1)
    w, x, out = torch.randn(V, 8), torch.randn(N, 8), torch.zeros(N, 8)
    with pytest.raises(ValueError, match="w must be"):
        own.pull(out, lists, lists.z, w.double(), 0)
    with pytest.raises(ValueError, match="out must be"):
        own.pull(out[:, :7], lists, lists.z, w, 0)
    with pytest.raises(ValueError, match="begins must be"):
        own.pull(out[:5], lists, lists.z, w, 0)
    with pytest.raises(ValueError, match="columns of row 0 must lie in"):
        own.push(torch.zeros(7, 8), lists, lists.z, x, False)
    with pytest.raises(ValueError, match="entries must lie in"):
        own.pull(out, lists._replace(ends=lists.ends + len(lists.z)), lists.z, w, 0)
    with pytest.raises(ValueError, match="must not end before they begin"):
        own.pull(out, lists._replace(begins=lists.ends, ends=lists.begins), lists.z, w, 0)
    case, sums = Case(), torch.zeros(1, 10, 3, dtype=torch.float64)
    for rows in (torch.tensor([N]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="rows must lie in"):
            own.survey(case.z, case.state, case.targets, rows, sums, first=0, every=1, drop_mass=0.1, steps=4,
                       **case.options(0, V))  # fmt: skip
    sample = torch.zeros(1, V, dtype=torch.uint8)
    with pytest.raises(ValueError, match="sample must be None"):
        own.survey(case.z, case.state, case.targets, torch.tensor([0]), sums, first=0, every=1, drop_mass=0.1, steps=4,
                   sample=sample, **case.options(0, V))  # fmt: skip
