"""Rows per step, however they are shared out; sums and recipes."""

import datasets
import pytest
import torch

from align_engine.data.batches import collate_sft
from align_engine.metrics import Sums
from align_engine.source import Source, rows_seen, total_steps


def rows(count):
    return datasets.Dataset.from_list(
        [{"index": i, "prompt_ids": [i + 1], "completion_ids": [i + 1, 2]} for i in range(count)]
    )


def source(count, batch, accumulation=1, rank=0, world=1, seed=3):
    return Source(rows(count), collate_sft, 0, batch, accumulation, rank, world, seed)


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)])
@pytest.mark.parametrize("count", [8, 11, 16, 17])
def test_every_split_of_a_window_holds_the_same_rows(count, batch, accumulation, world):
    ranks = [source(count, batch, accumulation, rank, world) for rank in range(world)]
    whole = source(count, 8)
    for step in range(2 * whole.steps_per_epoch):
        shares = [one.window(step) for one in ranks]
        assert len({len(share) for share in shares}) == 1, "ranks must run equally many passes"
        found = [i for share in shares for micro in share if micro.real for i in micro.batch.index.tolist()]
        assert sorted(found) == sorted(whole.window_rows(step))
        assert all(len(micro.batch.index) <= batch for share in shares for micro in share)


def test_an_epoch_sees_every_row_once_and_epochs_differ():
    one = source(11, 4)
    epochs = [[i for step in range(3 * e, 3 * e + 3) for i in one.window_rows(step)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11))
    assert epochs[0] != epochs[1]
    assert source(11, 4, seed=4).window_rows(0) != one.window_rows(0)
    assert source(11, 4).window_rows(5) == one.window_rows(5), "a step's rows do not depend on earlier steps"


def test_steps_and_rows_of_a_run():
    one = source(11, 4)
    assert total_steps(one, 2.0, -1) == 6
    assert total_steps(one, 0.1, -1) == 1
    assert total_steps(one, 2.0, 5) == 5
    assert rows_seen(one, 2) == sorted(one.window_rows(0) + one.window_rows(1))
    assert rows_seen(one, 3) == list(range(11))


def test_the_fingerprint_is_of_the_token_ids():
    assert source(9, 2).fingerprint() == source(9, 8, seed=1).fingerprint()
    assert source(9, 2).fingerprint() != source(8, 2).fingerprint()
    moved = source(2, 1)
    moved.rows = datasets.Dataset.from_list(  # the same ids, cut elsewhere
        [
            {"index": 0, "prompt_ids": [1], "completion_ids": [1]},
            {"index": 1, "prompt_ids": [2], "completion_ids": [2, 2, 2]},
        ]
    )
    assert moved.fingerprint() != source(2, 1).fingerprint()


def test_sums_weigh_by_count_and_ignore_what_has_none():
    sums, more = Sums(), Sums()
    sums.add("loss", torch.tensor(2.0), 3)
    sums.add("loss", torch.tensor(float("nan")), 0)
    more.add("loss", 6.0, 1)
    more.add("never", 1.0, 0)
    sums.merge(more)
    assert {name: float(value) for name, value in sums.means().items()} == {"loss": 3.0}
