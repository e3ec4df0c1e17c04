"""Logits in the memory of a dW that is still to be written: never read after they are gone, and the same gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from accuracy import check

from align_kernels import dpo_loss, explain
from align_kernels.schedules import aliasing
from align_kernels.schedules import plan as planner
from align_kernels.schedules.aliasing import aliased_columns
from align_kernels.schedules.request import MIB, Plan, Request, profiled

from .oracle import Case
from .twins import dpo, sft, verify

V, D = 1003, 24


def survives(rows: int, vocab: int, width: int, tile: int, columns: int) -> bool:
    """Whether every tile of logits is whole when it is read, and while its dW is written: one mark per number of dW."""
    memory = [-1] * (vocab * width)
    begin = len(memory) - columns * rows
    if begin < 0:
        return False
    for i in range(columns * rows):
        memory[begin + i] = i // rows  # the column that this number belongs to
    for v0 in range(0, columns, tile):
        v1 = min(v0 + tile, columns)
        for i in range(v0 * width, v1 * width):  # written while the tile's logits are still read
            memory[i] = -1
        here = begin + v0 * rows
        if any(memory[here + i] != v0 + i // rows for i in range((v1 - v0) * rows)):
            return False
    return True


def test_no_logits_are_lost_and_few_are_outside(monkeypatch):
    monkeypatch.setattr(aliasing, "STEP", 1)
    pick = random.Random(0)
    aliased = 0
    for _ in range(400):
        rows, vocab, width = pick.randint(1, 40), pick.randint(1, 60), pick.randint(1, 30)
        tile = pick.randint(1, max(vocab // 3, 1))
        columns = aliased_columns(rows, vocab, width, tile)
        assert 0 <= columns <= vocab
        assert survives(rows, vocab, width, tile, columns), (rows, vocab, width, tile, columns)
        room = width * vocab // rows  # columns of logits as large as dW
        assert columns >= min(room, vocab) - tile * max(rows, width) // min(rows, width) - tile - 1
        aliased += columns > 0
    assert aliased > 200


def plan(rows: int, vocab: int, width: int, **options) -> Plan:
    names: dict = dict(itemsize=4, device="cpu", backend="cpu", late=False, may_alias=True, plain=True)
    needs = dict(needs_input=True, needs_head=True, needs_weight=True)
    return planner.plan(Request(rows=rows, vocab=vocab, width=width, **(names | needs | options)))


@pytest.mark.parametrize("workspace", [None, 24 * MIB])
@pytest.mark.parametrize(("rows", "vocab", "width"), [(512, 151_936, 896), (256, 128_256, 2048), (3584, 152_064, 3584)])
def test_as_many_rows_as_the_hidden_size_take_one_chunk(rows: int, vocab: int, width: int, workspace: int | None):
    made = plan(rows, vocab, width, workspace=workspace)
    assert (made.schedule, made.aliased, made.first_rows) == ("one pass", True, rows)
    assert made.workspace <= 56 * MIB < rows * vocab * 4
    assert f"1 chunk(s) of {rows} rows in memory of dW" in str(made)


def test_more_rows_take_two_chunks_and_the_memory_of_the_second():
    made = plan(2048, 49_152, 576)
    assert made.aliased and made.first_rows + made.chunk_rows >= 2048 and made.first_rows > 576 + made.chunk_rows // 2
    assert made.workspace < 160 * MIB


@pytest.mark.parametrize(
    "options", [dict(may_alias=False), dict(needs_weight=False), dict(drop_mass=0.01), dict(late=True)], ids=str
)
def test_nothing_is_aliased_where_dw_is_not_to_be_written_tile_by_tile(options: dict):
    assert not plan(512, 151_936, 896, **options).aliased


def case(lengths: list[int], *, bias: bool = False, dtype: torch.dtype = torch.float32, **options) -> Case:
    rng = torch.Generator().manual_seed(len(lengths))
    targets = torch.full((len(lengths), 4 + max(lengths)), -100)
    for row, n in enumerate(lengths):
        targets[row, 4 : 4 + n] = torch.randint(0, V, (n,), generator=rng)
    targets[0, 4], targets[-1, 4] = V - 1, 0
    hidden = torch.randn(*targets.shape, D, generator=rng)
    tensors = dict(hidden=hidden, weight=torch.randn(V, D, generator=rng) * 0.5)
    if bias:
        tensors["bias"] = torch.randn(V, generator=rng)
    return Case({name: x.to(dtype) for name, x in tensors.items()}, targets, **options)


CASES = {
    "about as many rows as D": lambda: case([12, 10, 6, 5]),
    "more": lambda: case([30, 9, 22, 14, 3, 40]),
    "many": lambda: case([60, 50, 41, 33, 52, 44]),
    "bias and softcap": lambda: case([30, 9, 22, 14], bias=True, softcap=9.0, temperature=0.7),
    "hidden frozen": lambda: case([30, 9, 22, 14], train=frozenset({"weight"})),
    "bfloat16": lambda: case([30, 9, 22, 14], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize("rows", [24, 40, 90], ids="room for {} rows".format)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, rows: int, impl: str):
    made = CASES[name]()
    leaves = made.leaves()
    way = dict(impl=impl, workspace=rows * V * 4)
    with profiled("cpu", min_rows=8):
        took = explain(leaves["hidden"], leaves["weight"], made.targets, loss="sft", **made.keywords(leaves), **way)
        assert took.aliased, took
        verify(made, sft(made), way)
        verify(made, dpo(made), way)


def test_after_a_first_chunk_without_a_gradient_the_memory_is_aliased_again():
    """Pairs far on the right side of a hinge have none: their rows are dropped, and dW is still to be written."""
    made = case([6, 40, 38, 30, 6, 40, 38, 30])
    ref = torch.tensor([-9e3, 0, 0, 0, 9e3, 0, 0, 0])
    leaves = made.leaves()
    options: Any = dict(loss_type="hinge", beta=1.0)
    hidden, weight = leaves["hidden"], leaves["weight"]
    loss = dpo_loss(hidden, weight, made.targets, ref, **options, workspace=70 * V * 4).loss
    true = dpo_loss(hidden.double(), weight.double(), made.targets, ref, **options, impl="eager").loss
    got, wanted = (torch.autograd.grad(y, [hidden, weight]) for y in (loss, true))
    for name, x, y in zip(("hidden", "weight"), got, wanted):
        check(name, x, y.double())
    assert not bool(got[0][0].any()) and bool(got[0][1:4].any())
