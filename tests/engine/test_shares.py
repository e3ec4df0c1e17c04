"""Packed rows shared out among ranks: every row once, in the room there is, and the ranks' tokens near equal."""

import random

import datasets
import pytest

from align_engine.data.batches import collate_sft
from align_engine.data.shares import Weight, balanced, cut, tokens
from align_engine.data.windows import Source


def weights(count, group, seed=0):
    """Rows of prompts with `group` completions each, of lengths as they occur: most are short."""
    rng = random.Random(seed)
    sizes = [min(int(rng.lognormvariate(5.5, 0.8)), 2048) for _ in range(2 * count)]
    return [Weight((i // group,), sizes[i // group], sizes[count + i]) for i in range(count)]


def loads(rows, shares):
    return [tokens([rows[i] for i in share]) for share in shares]


def test_tokens_count_a_prompt_once():
    assert tokens([Weight((1,), 5, 2), Weight((1,), 5, 3), Weight((2,), 4, 1)]) == 5 + 2 + 3 + 4 + 1
    assert tokens([]) == 0


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("group", [1, 4, 64])
@pytest.mark.parametrize("free", [True, False])
def test_every_row_has_one_rank_with_room_for_it(world, group, free):
    for seed, count in enumerate((1, world, 8 * world - 3, 8 * world)):
        rows, room = weights(count, group, seed), count if free else 8
        shares = balanced(rows, world, room)
        assert sorted(i for share in shares for i in share) == list(range(count)) and len(shares) == world
        assert all(share == sorted(share) and len(share) <= room for share in shares)


@pytest.mark.parametrize(("group", "most"), [(1, 1.01), (8, 1.2)])
def test_ranks_have_about_equally_many_tokens(group, most):
    """In place of 1.5 and more where the rows are dealt as they come. One row may have more than a fair share."""
    for seed in range(20):
        rows = weights(64, group, seed)
        found = loads(rows, balanced(rows, 8, 64))
        assert max(found) <= max(most * sum(found) / 8, max(tokens([row]) for row in rows)), (seed, found)


def test_the_longest_share_is_no_longer_than_that_of_rows_as_they_come():
    for seed in range(20):
        rows = weights(64, 8, seed)
        as_they_come = [list(range(start, start + 8)) for start in range(0, 64, 8)]
        assert max(loads(rows, balanced(rows, 8, 8))) <= max(loads(rows, as_they_come))


def test_completions_of_a_prompt_stay_together_where_that_is_no_longer():
    """Four prompts of 100 tokens with four completions of one, on two ranks: two prompts each."""
    rows = [Weight((i // 4,), 100, 1) for i in range(16)]
    assert loads(rows, balanced(rows, 2, 8)) == [208, 208]
    long = [Weight((0,), 1, 100) for _ in range(4)]  # one prompt: its completions have to part
    assert loads(long, balanced(long, 2, 4)) == [201, 201]


def test_pieces_have_no_more_tokens_than_they_may():
    rows = [Weight((1,), 5, 2), Weight((1,), 5, 3), Weight((1,), 5, 1), Weight((2,), 4, 30), Weight((2,), 4, 1)]
    assert list(cut(rows, 10)) == [[0, 1], [2], [3], [4]]
    assert list(cut([], 10)) == []


@pytest.mark.parametrize(("batch", "accumulation", "world"), [(8, 1, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)])
@pytest.mark.parametrize("most", [None, 9, 30])
@pytest.mark.parametrize("count", [8, 11, 17])
def test_every_split_of_a_packed_window_holds_the_same_rows(batch, accumulation, world, most, count):
    rng = random.Random(count)
    rows = datasets.Dataset.from_list(
        [{"index": i, "prompt_ids": [i // 2 + 1] * 3, "completion_ids": [2] * rng.randint(1, 9)} for i in range(count)]
    )
    ranks = [Source(rows, collate_sft, 0, batch, accumulation, rank, world) for rank in range(world)]
    whole = Source(rows, collate_sft, 0, 8)
    for one in ranks:
        one.packed, one.tokens_per_batch = True, most
    for step in range(whole.steps_per_epoch):
        shares = [one.window(step) for one in ranks]
        assert len({len(share) for share in shares}) == 1, "ranks must run equally many passes"
        found = [i for share in shares for micro in share if micro.real for i in micro.batch.index.tolist()]
        assert sorted(found) == sorted(whole.window_rows(step))
        for micro in (micro for share in shares for micro in share):
            size, held = micro.batch.input_ids.numel(), len(micro.batch.index)
            assert held <= batch if most is None else held == 1 or size <= most
