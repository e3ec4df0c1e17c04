"""Rows of a chunk on a GPU: the model of waves against tiles dealt out one by one, and what the planner makes of it."""

from __future__ import annotations

import dataclasses
import importlib
import random
from pathlib import Path

import pytest

from align_kernels.schedules import waves
from align_kernels.schedules.plan import plan
from align_kernels.schedules.request import Request
from align_kernels.units import cut


def dealt(m: int, n: int, processors: int) -> int:
    """Rounds in which each multiprocessor takes one tile, until none is left."""
    left = sum(1 for _ in range(0, m, 128) for _ in range(0, n, 256))
    rounds = 0
    while left > 0:
        left, rounds = left - processors, rounds + 1
    return rounds


@pytest.mark.parametrize(("m", "n"), [(1, 1), (128, 256), (129, 256), (1024, 3584), (1152, 3584), (8192, 152064)])
@pytest.mark.parametrize("processors", [1, 78, 132])
def test_waves_are_tiles_dealt_out(m: int, n: int, processors: int):
    assert waves.waves(m, n, processors) == dealt(m, n, processors)


def test_the_rows_are_about_the_best_and_within_their_limits():
    pick = random.Random(0)
    for _ in range(40):
        needs = pick.random() < 0.8, pick.random() < 0.5
        head = waves.Head(pick.choice([5000, 152064]), pick.choice([896, 3584]), pick.choice([1, 2]), *needs, 132)
        rows, least, most = pick.choice([7, 900, 8192, 20000]), pick.choice([64, 512]), pick.choice([300, 2500, 9000])
        chosen = waves.chunk_rows(head, rows, least, most)
        assert 1 <= chosen <= min(rows, most) and chosen >= min(rows, least, most)
        some = [n for n in range(min(rows, least, most), min(rows, most) + 1, 64) if n % 128 == 0]
        assert all(waves.total(head, rows, chosen) <= 1.011 * waves.total(head, rows, n) for n in some)


def test_a_nearly_empty_wave_is_avoided():
    """1025 rows are a ninth row of tiles for one row, 1024 of a head of 3584 features 112 tiles on 132."""
    head = waves.Head(152064, 3584, 1, True, True, 132)
    assert waves.seconds(head, 1025, True) > 1.04 * waves.seconds(head, 1024, True)
    assert waves.chunk_rows(head, 2050, 512, 4096) != 1025


def test_pieces():
    assert list(cut(3, 13, 4, True)) == [(3, 6), (6, 9), (9, 13)]
    assert list(cut(3, 13, 4, False)) == [(3, 7), (7, 11), (11, 13)]
    assert list(cut(3, 3, 4, False)) == []


def asked(rows: int, mode: str, **options) -> Request:
    head = mode in ("trained", "late")
    request = Request(
        rows=rows, vocab=152064, width=3584, itemsize=4, gradient_itemsize=2, device="cuda", backend="triton",
        needs_input=True, needs_head=head, needs_weight=head, late=mode in ("late", "frozen"), plain=True,
        memory=85 * 10**9, processors=132,
    )  # fmt: skip
    return dataclasses.replace(request, **options)


@pytest.mark.parametrize("mode", ["frozen", "trained", "late"])
@pytest.mark.parametrize("rows", [300, 2048, 8192, 32768])
@pytest.mark.parametrize("memory", [0, 16 * 10**9, 85 * 10**9, 150 * 10**9])
def test_plans_of_a_gpu(memory: int, rows: int, mode: str):
    """Within a twentieth of its memory, in chunks of whole tiles of rows."""
    made = plan(asked(rows, mode, memory=memory))
    assert made.workspace <= (memory // 20 or 2 << 30) and not made.even
    assert made.chunk_rows % 128 == 0 or made.chunk_rows == rows or made.chunk_rows < 512
    assert made.tile_cols >= 8192


def test_late_gradients_of_a_trained_head_keep_exponentials():
    """8192 rows of the 7B head: 2.5 GB, a share of 80 GB, where 5 GB of float32 logits are none."""
    late = plan(asked(8192, "late"))
    assert (late.name, late.passes, late.chunk_rows) == ("plain keep", 3, 8192)
    assert plan(asked(8192, "late", plain=False)).schedule == "recompute"
    assert plan(asked(8192, "late", memory=16 * 10**9)).schedule == "recompute"
    assert plan(asked(8192, "late", workspace=4 << 30)).name == "plain keep"


# -- the page ------------------------------------------------------------------------------------------------------
@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches" / "gpu"))
    return importlib.import_module("model")


def test_the_committed_page(model):
    assert model.PAGE.read_text() == model.page(), "make gpu-plans"


def test_what_the_model_says_of_the_7b_head(model):
    """An H100, 8192 rows: the bars of the work on exponentials, and what was expected before it."""
    ms = {mode: model.predicted("Qwen2.5-7B", 8192, mode, "H100")[1:] for mode in model.MODES}
    bars = dict(forward=14.9, frozen=28.5, trained=41.5, late=45.0)
    assert all(ms[mode][0] <= bar for mode, bar in bars.items()), ms
    before = dict(forward=15.6, frozen=32.2, trained=45.7, late=59.0)
    assert all(abs(ms[mode][1] - expected) < 0.04 * expected for mode, expected in before.items()), ms


def test_what_the_model_says_of_the_epilogue(model):
    """What was predicted before any of it ran; the 37 ms of a trained head leave out that dW is made 16 bits wide."""
    expected = importlib.import_module("predicted").PREDICTED["epilogue"]
    for mode in model.WITH_EPILOGUE:
        parts = model.with_epilogue(8192, *model.HEADS["Qwen2.5-7B"], model.CARDS["H100"], mode)
        made = 1e3 * sum(parts.values()) - (1.1 if mode == "trained" else 0.0)
        assert abs(made - expected[f"{mode}, epilogue"]) < 0.04 * made, mode


def test_no_plan_is_expected_to_be_slower_than_before(model):
    for name in model.HEADS:
        for rows in model.ROWS:
            for mode in model.MODES:
                for card in model.CARDS:
                    _, now, then = model.predicted(name, rows, mode, card)
                    assert now <= 1.01 * then, (name, rows, mode, card)
