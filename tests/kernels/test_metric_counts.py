"""Each metric's count is what the metric is a mean over: the parts of a batch make the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import align_kernels as ak

ROWS, TIME, WIDTH, VOCAB = 6, 5, 8, 17  # three pairs
LENGTHS = (1, 5, 2, 4, 3, 0)


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN, WEIGHT, REF, OLD = made(ROWS, TIME, WIDTH, seed=0), made(VOCAB, WIDTH, seed=1), made(ROWS, seed=2), -3.0
TARGETS = torch.randint(VOCAB, (ROWS, TIME), generator=torch.Generator().manual_seed(3))
TARGETS[torch.arange(TIME) >= torch.tensor(LENGTHS)[:, None]] = -100
ADVANTAGES = made(ROWS, seed=4)
GOOD = torch.tensor([True, True, False, True, False, False])
PAIR_ROWS = ([0, 3], [1, 2, 4, 5])  # one pair, and two
SPLIT = ([0, 2, 5], [1, 3, 4])  # the first has one desirable row, the second two
BAD_APART = ([0, 1, 3], [2, 4, 5])  # a class in each


def head(rows: list[int]) -> dict[str, Tensor]:
    return {"hidden": HIDDEN[rows], "weight": WEIGHT, "targets": TARGETS[rows]}


def advantages(rows: list[int]) -> Tensor:
    return ADVANTAGES[rows][:, None].expand(-1, TIME)


def old(rows: list[int]) -> Tensor:
    return torch.full((len(rows), TIME), OLD)


def scores(rows: list[int]) -> tuple[Tensor, Tensor]:
    return REF[rows][: len(rows) // 2], REF[rows][len(rows) // 2 :]


Call = Callable[[list[int]], ak.LossOutput]
CALLS: dict[str, tuple[Call, Any]] = {
    "sft": (lambda rows: ak.sft_loss(**head(rows)), SPLIT),
    "dpo": (lambda rows: ak.dpo_loss(**head(rows), ref_logps=REF[rows]), PAIR_ROWS),
    "cpo": (lambda rows: ak.cpo_loss(**head(rows)), PAIR_ROWS),
    "orpo": (lambda rows: ak.orpo_loss(**head(rows)), PAIR_ROWS),
    "kto": (lambda rows: ak.kto_loss(**head(rows), ref_logps=REF[rows], desirable=GOOD[rows], kl=0.3), SPLIT),
    "kto of a class": (
        lambda rows: ak.kto_loss(**head(rows), ref_logps=REF[rows], desirable=GOOD[rows], kl=0.3),
        BAD_APART,
    ),
    "bco": (lambda rows: ak.bco_loss(**head(rows), ref_logps=REF[rows], desirable=GOOD[rows], delta=0.1), SPLIT),
    "rloo": (lambda rows: ak.rloo_loss(**head(rows), old_logps=old(rows), advantages=ADVANTAGES[rows]), SPLIT),
    "grpo": (lambda rows: ak.grpo_loss(**head(rows), old_logps=old(rows), advantages=ADVANTAGES[rows]), SPLIT),
    "ppo": (lambda rows: ak.ppo_clip_loss(**head(rows), old_logps=old(rows), advantages=advantages(rows)), SPLIT),
    "value": (
        lambda rows: ak.value_loss(HIDDEN[rows][..., 0], old(rows), advantages(rows), TARGETS[rows] >= 0),
        SPLIT,
    ),
    "reward": (lambda rows: ak.reward_loss(*scores(rows)), PAIR_ROWS),
}


@pytest.mark.parametrize("name", CALLS)
def test_means_of_the_parts_by_their_counts_are_the_mean_of_the_whole(name: str):
    call, cut = CALLS[name]
    whole, parts = call(list(range(ROWS))), [call(rows) for rows in cut]
    assert set(whole.metrics) - set(whole.counts) <= {"rewards/margins", "count/chosen", "count/rejected"}
    assert name.startswith(("kto", "bco")) or set(whole.metrics) == set(whole.counts)
    for metric, count in whole.counts.items():
        counts = [int(part.counts[metric]) for part in parts]
        assert sum(counts) == int(count) > 0
        mean = sum(float(part.metrics[metric]) * n for part, n in zip(parts, counts)) / sum(counts)
        assert mean == pytest.approx(float(whole.metrics[metric]), rel=1e-5, abs=1e-6), metric


def test_a_call_without_tokens_counts_none():
    out = ak.sft_loss(HIDDEN, WEIGHT, torch.full_like(TARGETS, -100))
    assert {name: int(count) for name, count in out.counts.items()} == {"entropy": 0, "mean_token_accuracy": 0}
    assert {name: float(mean) for name, mean in out.metrics.items()} == {"entropy": 0.0, "mean_token_accuracy": 0.0}
