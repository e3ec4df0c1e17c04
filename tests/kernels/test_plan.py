"""Which schedule the planner takes, within which memory, and that it says why."""

from __future__ import annotations

import random

import pytest
import torch

from align_kernels import LogitGradClamp, explain
from align_kernels.losses import LOSSES
from align_kernels.schedules import SCHEDULES
from align_kernels.schedules import plan as planner
from align_kernels.schedules.request import MIB, PROFILES, Plan, Request, profiled

V, D = 32000, 64
BOTH, HIDDEN, HEAD = (True, True), (True, False), (False, True)


def request(rows: int = 500, needs: tuple[bool, bool] = BOTH, **options) -> Request:
    needs_input, needs_head = needs
    names: dict = dict(vocab=V, width=D, itemsize=4, device="cpu", backend="cpu", late=False)
    names |= dict(needs_input=needs_input, needs_head=needs_head, needs_weight=needs_head)
    return Request(rows=rows, **(names | options))


def plan(*args, **options) -> Plan:
    return planner.plan(request(*args, **options))


NEVER_FITS = dict(late=True, rows=100_000, workspace=160 * MIB)
CHOICES = [
    ("forward", 2, "nothing needs a gradient", dict(needs=(False, False))),
    ("forward", 2, "nothing needs a gradient", dict(needs=(False, False), late=True)),
    ("frozen", 4, "head is frozen", dict(needs=HIDDEN, late=True)),
    ("frozen", 4, "head is frozen", dict(needs=HIDDEN, late=True, rows=100_000)),
    ("keep", 4, "fit and wait for g", dict(needs=HIDDEN, late=True, scale_free=False)),
    (
        "recompute",
        6,
        "do not fit in 160 MiB",
        dict(NEVER_FITS, needs=HIDDEN, scale_free=False),
    ),
    ("recompute", 6, "do not fit in 1 MiB", dict(needs=HIDDEN, late=True, workspace=MIB)),
    ("keep", 6, "61 MiB of logits fit and wait for g", dict(late=True)),
    ("keep", 4, "61 MiB of logits fit", dict(late=True, needs=HEAD)),
    ("recompute", 8, "244 MiB of logits do not fit in 160 MiB", dict(late=True, rows=2000, workspace=160 * MIB)),
    ("recompute", 8, "61 MiB of logits do not fit in 32 MiB", dict(late=True, workspace=32 * MIB)),
    ("one pass", 6, "closes inside a chunk", {}),
    ("one pass", 4, "closes inside a chunk", dict(needs=HIDDEN)),
    ("one pass", 4, "closes inside a chunk", dict(needs=HEAD)),
    ("one pass", 6, "closes inside a chunk", dict(rows=100_000)),
    ("one pass", 6, "closes inside a chunk", dict(rows=100_000, largest_unit=1200)),
    (
        "recompute",
        8,
        "a unit has 1400 rows and 160 MiB keep the logits of 1310",
        dict(rows=4000, largest_unit=1400, workspace=160 * MIB),
    ),
    ("recompute", 8, "too few for the GEMMs: 8 MiB keep the logits of 65", dict(workspace=8 * MIB)),
    ("one pass", 4, "closes inside a chunk", dict(workspace=8 * MIB, needs=HIDDEN)),
    ("one pass", 6, "closes inside a chunk", dict(plain=True)),
    ("one pass", 4, "closes inside a chunk", dict(needs=HIDDEN, plain=True, sparse=True)),
    ("online", 4, "no logits are kept", dict(needs=HIDDEN, plain=True, sparse=True, workspace=MIB)),
    ("online", 4, "no logits are kept", dict(needs=HIDDEN, plain=True)),
    ("online", 4, "no logits are kept", dict(needs=HIDDEN, plain=True, late=True, workspace=MIB, rows=9000)),
    ("frozen", 4, "head is frozen", dict(needs=HIDDEN, plain=True, late=True, drop_mass=0.01)),
    ("one pass", 6, "closes inside a chunk", dict(workspace=8 * MIB, rows=60)),
]


@pytest.mark.parametrize(("schedule", "cost", "why", "call"), CHOICES, ids=[f"{c[0]}-{c[3]}" for c in CHOICES])
def test_choice(schedule: str, cost: int, why: str, call: dict):
    made = plan(**call)
    assert made.schedule == schedule
    assert made.gemm_flops == cost * made.rows * V * D
    assert why in made.why
    words = str(made)
    assert why in words and f"schedule {schedule}" in words and f"GEMMs {cost}NVD" in words
    assert f"{made.rows} rows x 32000 columns x 64" in words and f"{made.workspace / MIB:.1f} MiB" in words


def test_a_unit_longer_than_a_chunk_is_one_chunk():
    made = plan(rows=6000, vocab=1000, largest_unit=3000)
    assert made.schedule == "one pass" and PROFILES["cpu"].max_rows < 3000 <= made.chunk_rows


def test_a_bias_or_lora_costs_no_weight_gradient():
    assert plan(needs_weight=False).gemm_flops == 4 * 500 * V * D
    assert plan(needs_weight=False, late=True, workspace=MIB).gemm_flops == 6 * 500 * V * D


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu"])
def test_workspace_is_kept(device: str):
    """The limit, and a tile of 64 columns, than which none is narrower, with a copy of the weight's."""
    pick = random.Random(0)
    seen = set()
    for _ in range(5000):
        rows, itemsize = pick.choice([1, 7, 100, 500, 2000, 100_000]), pick.choice([2, 4, 8])
        workspace = pick.choice([None, int(2 ** pick.uniform(8, 33))])
        width, weight_itemsize = pick.choice([1, 64, 1024, 4096]), pick.choice([0, 0, 4])
        made = plan(
            rows,
            (pick.random() < 0.7, pick.random() < 0.6),
            vocab=pick.choice([1, 100, 5000, 32000, 152_064]),
            itemsize=itemsize,
            device=device,
            workspace=workspace,
            late=pick.random() < 0.5,
            scale_free=pick.random() < 0.8,
            plain=pick.random() < 0.5,
            sparse=pick.random() < 0.5,
            may_alias=pick.random() < 0.5,
            width=width,
            weight_itemsize=weight_itemsize,
            largest_unit=pick.choice([1, 50, 3000]),
        )
        limit = workspace or PROFILES.get(device, PROFILES["cuda"]).workspace
        narrowest = (made.first_rows * itemsize + width * weight_itemsize) * min(64, made.vocab)
        assert made.workspace <= limit + narrowest, (made, workspace)
        assert made.workspace >= made.tile_cols * width * weight_itemsize
        assert 1 <= made.chunk_rows <= made.first_rows <= max(rows, 1) and 1 <= made.tile_cols <= made.vocab
        seen.add(made.schedule)
    assert seen == {"forward", "online", "frozen", "keep", "one pass", "recompute"}


# -- the table of schedules ---------------------------------------------------------------------------------------
def test_the_first_schedule_that_serves_is_taken():
    """Those before it say why not, the last serves every call, and each bears the name that the table knows it by."""
    *_, last = SCHEDULES.values()
    for *_, call in CHOICES:
        asked, made = request(**call), plan(**call)
        reasons = {name: schedule.why_not(asked) for name, schedule in SCHEDULES.items()}
        assert made.name == next(name for name, reason in reasons.items() if reason is None)
        assert SCHEDULES[made.name].schedule == made.schedule
        assert all(reason is None or len(reason) > 10 for reason in reasons.values())
        assert last.why_not(asked) is None
    assert all(schedule.name == name for name, schedule in SCHEDULES.items())


def test_a_profile_holds_within_its_context_alone():
    before = PROFILES["cpu"]
    with pytest.raises(ZeroDivisionError), profiled("cpu", max_rows=7) as small:
        assert plan(needs=(False, False)).chunk_rows == 7 and small == before._replace(max_rows=7)
        raise ZeroDivisionError
    assert PROFILES["cpu"] == before and plan(needs=(False, False)).chunk_rows == 500


# -- explain ------------------------------------------------------------------------------------------------------
def tensors(*train: str) -> dict:
    made = dict(hidden=torch.zeros(4, 6, D), weight=torch.zeros(500, D))
    targets = torch.full((4, 6), -100)
    targets[:, 2:5] = 3
    return {name: x.requires_grad_(name in train) for name, x in made.items()} | dict(targets=targets)


def test_explain_counts_kept_rows_and_computes_nothing():
    t = tensors("hidden", "weight")
    t["hidden"].data.fill_(torch.nan)
    made = explain(**t)
    assert (made.schedule, made.rows, made.vocab, made.width) == ("keep", 12, 500, D)
    assert explain(**t, loss="dpo").schedule == "one pass"
    assert explain(**t, loss="dpo", workspace=1000).schedule == "recompute"
    assert explain(**t, loss="sft", workspace=12 * 500 * 4).schedule == "one pass"
    assert explain(**t, impl="torch").backend == "torch"


def test_explain_sees_what_needs_a_gradient():
    assert explain(**tensors()).schedule == "forward"
    assert explain(**tensors("hidden")).schedule == "online"
    assert explain(**tensors("hidden"), softcap=5.0).schedule == "frozen"
    assert explain(**tensors("hidden"), grad_clamp=LogitGradClamp(0.1)).schedule == "frozen"
    assert explain(**tensors("hidden"), grad_clamp=LogitGradClamp(0.1, units="gradient")).schedule == "keep"
    with torch.no_grad():
        assert explain(**tensors("hidden", "weight")).schedule == "forward"
    bias = torch.zeros(500, requires_grad=True)
    assert explain(**tensors("hidden"), bias=bias).schedule == "keep"
    lora = (torch.zeros(2, D, requires_grad=True), torch.zeros(500, 2), 1.0)
    assert explain(**tensors(), lora=lora).schedule == "keep"


def test_explain_refuses_what_has_no_plan():
    with pytest.raises(ValueError, match=r"loss must be one of .*sft.*got 'dqo'"):
        explain(**tensors(), loss="dqo")
    with pytest.raises(ValueError, match="eager"):
        explain(**tensors(), impl="eager")
    with pytest.raises(ValueError, match="softcap"):
        explain(**tensors(), softcap=-1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_explain_knows_every_loss(name: str):
    assert explain(**tensors("hidden", "weight"), loss=name).schedule == "one pass"
