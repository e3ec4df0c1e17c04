"""Rows per step, however they are shared out; sums and recipes."""

import datasets
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from align_engine.data.batches import collate_sft, epoch_order
from align_engine.data.fingerprint import content_hash
from align_engine.data.tokenize import prepare
from align_engine.data.windows import Source, endless_order, rows_seen, total_steps
from align_engine.iterate import write_pairs
from align_engine.recipe import IterateRecipe
from align_engine.rollouts.completion import Completion
from align_engine.rollouts.rewards import Reward
from align_engine.rollouts.source import Prompts
from align_engine.training import metrics
from align_engine.training.checkpoint import RunFolder
from align_engine.training.metrics import Sums


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


@pytest.mark.parametrize("count", [1, 7])
def test_prompts_are_asked_in_the_order_of_numpys_permutations_each_made_once(count, monkeypatch):
    made, real = [], epoch_order
    monkeypatch.setattr("align_engine.data.windows.epoch_order", lambda *of: made.append(of) or real(*of))
    expected = [i for epoch in range(3) for i in np.random.default_rng([2**20 + 5, epoch]).permutation(count).tolist()]
    assert [endless_order(count, 2**20 + 5, place) for place in range(3 * count)] == expected
    assert made == [(count, 2**20 + 5, epoch) for epoch in range(3)]


@pytest.fixture
def asking(tmp_path):
    """Prompts whose rows carry what no model reads: a text, a list, a picture's bytes."""
    model = tiny.write_model(tmp_path / "model")
    recipe = tiny.online(IterateRecipe, model, tmp_path / "rows.jsonl", tmp_path / "run", num_generations=2)

    def made(**changes):
        columns = {"prompt": ["w1", "w2", "w3"], "wanted": ["w4", None, "w6"], "seen": [[1], [], [2, 3]],
                   "blob": [b"x", b"", b"y"]} | changes  # fmt: skip
        rows = datasets.Dataset.from_dict(columns)
        tokenizer = AutoTokenizer.from_pretrained(model)
        prepared, _ = prepare(rows, tokenizer, "prompt")
        return Prompts(prepared, rows, tokenizer, recipe, Accelerator(cpu=True), RunFolder(tmp_path / "run", {}))

    return made


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": ["w1", "w2", "w5"]},
        {"wanted": ["w4", "", "w6"]},
        {"seen": [[1], [2], [3]]},
        {"blob": [b"xy", b"", b""]},
        {"more": [1.0, 2.0, 3.0]},
    ],
)
def test_the_fingerprint_of_prompts_covers_every_column_that_a_scorer_may_read(change, asking):
    assert asking().fingerprint() == asking().fingerprint()
    assert asking(**change).fingerprint() != asking().fingerprint()


def test_a_hash_of_rows_is_of_what_they_hold_wherever_it_lies():
    whole = datasets.Dataset.from_dict({"a": [None, "x", "yz"], "b": [{"c": [1.5]}, None, {"c": None}]})
    halves = datasets.concatenate_datasets([whole.select([0]), whole.select([1, 2])])
    assert content_hash(halves) == content_hash(whole) == content_hash(whole.select([2, 1, 0]).select([2, 1, 0]))
    assert content_hash(whole.select([0, 2, 1])) != content_hash(whole)


def test_rounds_of_iterate_ask_the_next_prompts_and_pair_the_best_answer_with_the_worst(asking, monkeypatch):
    prompts = asking()
    prompts.folder.begin({}, overwrite=False)
    said = iter(range(100))  # each completion is another one: w0, w1, ...

    def sampler(prompts, seed):
        return [Completion([(number := next(said)) + 2], torch.zeros(1), number % 2 == 0) for _ in prompts]

    monkeypatch.setattr("align_engine.iterate.sampler_of", lambda *_: sampler)
    prompts.scorers = [Reward("length", lambda completions, **_: [float(text[1:]) for text in completions])]
    for number in (1, 2):
        write_pairs(prompts, number, 2, "a model")
    asked = [i for epoch in range(2) for i in np.random.default_rng([42, epoch]).permutation(3).tolist()][:4]
    for number in (1, 2):
        rows = metrics.read(prompts.folder.path / f"round-{number}" / "samples.jsonl")
        first, second = asked[2 * number - 2 : 2 * number]
        assert [row["prompt"] for row in rows] == [f"w{i + 1}" for i in (first, first, second, second)]
        pairs = metrics.read(prompts.folder.path / f"round-{number}" / "pairs.jsonl")
        answers = [4 * (number - 1) + i for i in range(4)]
        assert [(row["chosen"], row["rejected"]) for row in pairs] == [
            (f"w{answers[1]}", f"w{answers[0]}"),
            (f"w{answers[3]}", f"w{answers[2]}"),
        ]
