"""Rows with several chosen and rejected answers to one prompt: the numbers of a row for each pair, from one tree."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from byte_tokens import answer, byte_tokenizer, prepared, tokens, user
from processes import run_on_two
from runs import cut_off, same_bits
from safetensors.torch import load_file

from align_engine.algorithms import ALGORITHMS, register
from align_engine.data.batches import collate_pairs
from align_engine.data.sources import load_rows
from align_engine.data.tokenize import prepare
from align_engine.data.windows import Source
from align_engine.errors import BadInput
from align_engine.recipe import DpoRecipe
from align_engine.run import train
from align_engine.training import metrics
from align_engine.training.algorithm import Algorithm

COUNTED_ONCE = ("entropy", "mean_token_accuracy", "num_tokens")  # of each answer, however many pairs it is in
UNLIKE = (
    "time/",
    "tokens_per_second",
    "peak_memory",
    *(f"{way}{name}" for name in COUNTED_ONCE for way in ("", "eval_")),
)
METHODS: dict[str, dict[str, Any]] = {
    "dpo": dict(reference="precomputed"),
    "dpo, mixed": dict(loss_type="sigmoid,sft", loss_weights=[1.0, 0.5], reference="frozen"),
    "rm": dict(center_rewards_coefficient=0.1),
    "simpo": {},
    "orpo": {},
    "cpo": {},
}


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_trains_as_all_its_pairs(method, packing, model, other_model, tmp_path):
    """A window of six prompts in three forward passes, and of all their pairs in one."""
    name, settings, found = method.partition(",")[0], dict(max_steps=3), []
    if "reference" in METHODS[method]:
        settings["ref_model_name_or_path"] = str(other_model)
    rows, held_out = tiny.several_rows(6), tiny.several_rows(4, seed=5)
    if name == "rm":
        for i, row in enumerate(rows):
            row["margin"] = [[i + a - b / 4 for b in range(len(row["rejected"]))] for a in range(len(row["chosen"]))]
    for several in (True, False):
        kinds = (rows, held_out) if several else map(tiny.each_pair, (rows, held_out))
        made, held = (tiny.write_rows(tmp_path / f"{i}{several}.jsonl", kind) for i, kind in enumerate(kinds))
        if name == "rm" and not several:
            flat = [one for row in rows for inner in row["margin"] for one in inner]
            pairs = [pair | {"margin": margin} for pair, margin in zip(tiny.each_pair(rows), flat, strict=True)]
            tiny.write_rows(made, pairs)
        sizes: dict[str, Any] = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, packing=packing)
        if not several:
            sizes = dict(per_device_train_batch_size=len(tiny.each_pair(rows)))
        out = tmp_path / f"run{several}"
        recipe = tiny.offline(
            name, model, made, out, eval_dataset_name=str(held), **sizes, **settings, **METHODS[method]
        )
        found.append(train(name, recipe))
    records, wanted = (metrics.read(folder.metrics) for folder in found)
    assert [sorted(record) for record in records] == [sorted(record) for record in wanted] and len(records) > 2
    for record, want in zip(records, wanted):
        for key, number in want.items():
            if not key.startswith(UNLIKE):
                assert record[key] == pytest.approx(number, rel=2e-4, abs=2e-5), key
    weights, oracle = (load_file(folder.final / "model.safetensors") for folder in found)
    assert all((weights[key] - oracle[key]).abs().max() < 2e-4 for key in oracle)
    if "precomputed" in METHODS[method].values():
        stored = [load_file(folder.path / "reference-train.safetensors")["logps"] for folder in found]
        assert [len(one) for one in stored] == [
            sum(len(row["chosen"]) + len(row["rejected"]) for row in rows), 2 * len(tiny.each_pair(rows)),
        ]  # fmt: skip


def test_two_processes_equal_one_and_a_cut_run_goes_on(model64, tmp_path):
    """Nine rows in windows of 8: in every second step a process has no row. Passes are cut by tokens."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.several_rows(9))
    settings = dict(max_steps=4, dtype="auto", learning_rate=1e-4, packing="on", tokens_per_batch=60, save_steps=2)
    jobs = []
    for name in ("dpo", "rm"):
        one = tiny.offline(name, model64, rows, tmp_path / "one" / name, per_device_train_batch_size=8, **settings)
        train(name, one)
        paths = [str(path) for path in (model64, rows, tmp_path / "two" / name)]
        more = settings | dict(per_device_train_batch_size=4)
        jobs.append(f"run.train({name!r}, tiny.offline({name!r}, *{paths!r}, **{more!r}))")
    run_on_two("\n".join(("import tiny, align_engine.run as run", *jobs)))
    for name in ("dpo", "rm"):
        one, two = (load_file(tmp_path / kind / name / "final" / "model.safetensors") for kind in ("one", "two"))
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-6, name
    cut = [tiny.dpo(model64, rows, tmp_path / "cut", per_device_train_batch_size=8, **settings) for _ in range(2)]
    cut_off("dpo", cut[0], step=2)
    assert same_bits(train("dpo", cut[1]).final, tmp_path / "one" / "dpo" / "final")


def test_one_tree_holds_every_answer_once():
    row = {"index": 3, "prompt_ids": [5, 6], "chosen_ids": [[7, 8], [9]], "rejected_ids": [[10], [11, 12], [13]]}
    pair = {"index": 4, "prompt_ids": [5], "chosen_ids": [[14]], "rejected_ids": [[15]]}
    packed, padded = (collate_pairs([row, pair], pad_id=pad_id) for pad_id in (None, 0))
    assert packed.input_ids.numel() == 2 + 7 + 1 + 2 and padded.input_ids.shape == (7, 4)
    for batch in (packed, padded):
        assert batch.index.tolist() == [3, 4] and len(batch.targets) == 7 and batch.num_tokens == 9
        assert batch.ends.tolist() == [[0, 0, 0, 1, 1, 1, 2], [3, 4, 5, 3, 4, 5, 6]]
    alone = collate_pairs([pair, pair | {"index": 5}], pad_id=0)
    assert alone.pairs is None and alone.ends.tolist() == [[0, 1], [2, 3]]
    assert packed.to("meta").ends.is_meta


def test_a_pass_is_as_long_as_its_answers():
    import datasets

    row = {"index": 0, "prompt_ids": [5, 6], "chosen_ids": [[7, 8], [9]], "rejected_ids": [[10], [11, 12, 4], [13]]}
    rows = datasets.Dataset.from_list([row | {"index": i, "prompt_ids": [5, i]} for i in range(3)])
    source = Source(rows, collate_pairs, 0, 1)
    source.packed = True
    assert source.longest() == 2 + 3
    for most, sizes in ((9, [1, 1, 1]), (20, [2, 1]), (30, [3])):
        source.tokens_per_batch = most
        assert [len(micro.batch.index) for micro in source.share([0, 1, 2])] == sizes
    assert source.batch([0, 1]).input_ids.numel() == 20


# --- what rows may look like ----------------------------------------------------------------------------------------


def read(path, rows):
    """Their tokens as lines of a file, whose columns may mix types."""
    tokenizer = byte_tokenizer()
    return tokenizer, prepare(load_rows(tiny.write_rows(path / "rows.jsonl", rows)), tokenizer, "preference")[
        0
    ].to_list()


def test_texts_and_conversations_of_several_answers(tmp_path):
    tokenizer, (row,) = read(tmp_path, [{"prompt": "p", "chosen": ["x", "yy"], "rejected": ["z"]}])
    assert [tokens(tokenizer, ids) for ids in row["chosen_ids"]] == ["x|<|end|>", "y|y|<|end|>"]
    assert [tokens(tokenizer, ids) for ids in row["rejected_ids"]] == ["z|<|end|>"]
    chat = {"prompt": [user("p")], "chosen": [[answer("x")]], "rejected": [[answer("z")], [answer("v")]]}
    tokenizer, (row, single) = read(tmp_path, [chat, chat | {"chosen": [answer("x")], "rejected": [answer("z")]}])
    assert tokens(tokenizer, row["prompt_ids"]) == "<|u|>|p|<|end|>|<|a|>"
    assert [tokens(tokenizer, ids) for ids in row["rejected_ids"]] == ["z|<|end|>", "v|<|end|>"]
    assert single["chosen_ids"] == row["chosen_ids"] and single["rejected_ids"] == row["rejected_ids"][:1]
    ready = {"prompt_ids": [5], "chosen_ids": [[6], [7, 8]], "rejected_ids": [[9]]}
    _, (row,) = read(tmp_path, [ready])
    assert {name: row[name] for name in ready} == ready


def test_the_prompt_is_what_all_answers_begin_with():
    tokenizer, (row,), _ = prepared([{"chosen": ["q: a b", "q: a c"], "rejected": ["q: d", "q: e"]}], "preference")
    assert tokenizer.decode(row["prompt_ids"]) == "q:"
    both = [[user("p"), answer(text)] for text in ("x", "y", "z")]
    for prompt in ({}, {"prompt": "p"}):  # a string beside conversations, as in ultrafeedback_binarized
        tokenizer, (row,), _ = prepared([{"chosen": both[:1], "rejected": both[1:]} | prompt], "preference")
        assert tokens(tokenizer, row["prompt_ids"]) == "<|u|>|p|<|end|>|<|a|>" and len(row["rejected_ids"]) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": ["x", "z"]}, "'chosen' and 'rejected' have an answer in common"),
        ({"chosen": ["x", ""]}, "'chosen' holds an empty answer"),
        ({"chosen": []}, "'chosen' is empty"),
        ({"chosen": ["x", None]}, "'chosen' is missing"),
        ({"chosen": ["x", ["y"]]}, "'chosen' holds 'y', expected messages"),
        ({"margin": [[1, 2]]}, r"'margin' is \[\[1, 2\]\], expected 2 lists of 2 numbers, one of each pair"),
        ({"margin": [1, 2, 3]}, r"'margin' holds \[1, 2, 3\], expected 2 x 2 numbers"),
        ({"margin": 1.0}, r"'margin' holds \[1.0\], expected 2 x 2 numbers"),
        ({"margin": [1, 2, 3, None]}, "'margin' is missing"),
        ({"chosen_rank": [1, 2], "rejected_rank": [3]}, r"'rejected_rank' holds \[3\], expected 2 numbers"),
    ],
)
def test_rows_that_cannot_be_used(row, said, tmp_path):
    good = {"prompt": "p", "chosen": ["x", "y"], "rejected": ["z", "v"]}
    with pytest.raises(BadInput, match=rf"{said}.* \(row 1, counted from 1\)"):
        read(tmp_path, [good | row])


def test_margins_are_a_matrix_or_a_list_and_ranks_make_them():
    row = {"prompt": "p", "chosen": ["x", "y"], "rejected": ["z", "v", "u"]}
    for margin in ([[1, 2, 3], [4, 5, 6.5]], [1, 2, 3, 4, 5, 6.5]):
        _, (out,), _ = prepared([row | {"margin": margin}], "preference")
        assert out["margin"] == [1, 2, 3, 4, 5, 6.5]
        batch = collate_pairs([out, out], pad_id=0)
        assert batch.margin.tolist() == [1, 2, 3, 4, 5, 6.5] * 2 and batch.ends.shape == (2, 12)
    import datasets

    ranked = row | {"chosen_rank": [1, 2], "rejected_rank": [3, 4, 6]}
    _, (out,), _ = prepared([ranked], "preference")
    recipe = tiny.OFFLINE["rm"][0]()
    recipe.loss.rank_margin = 0.5
    assert ALGORITHMS["rm"].rows(datasets.Dataset.from_list([out]), recipe)["margin"][:] == [[1, 1.5, 2.5, 0.5, 1, 2]]


def test_kto_learns_from_each_answer():
    rows = [
        {"prompt": "p", "chosen": ["x"], "rejected": ["z", "v", "u"]},
        {"prompt": "q", "chosen": ["x", "y"], "rejected": ["z"]},
    ]
    tokenizer, out, _ = prepared(rows, "unpaired", byte_tokenizer())
    assert [tokens(tokenizer, row["completion_ids"])[0] for row in out] == list("xzvuxyz")
    assert [row["label"] for row in out] == [True, False, False, False, True, True, False]
    assert [row["index"] for row in out] == [0] * 4 + [1] * 3


def test_a_method_that_reads_halves_refuses_them(model, tmp_path):
    class HalvesRecipe(DpoRecipe):
        """Reads halves."""

    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.several_rows(4))
    dpo = ALGORITHMS["dpo"]
    register(Algorithm("halves", "preference", dpo.collate, dpo.count, dpo.loss), HalvesRecipe)
    try:
        with pytest.raises(BadInput, match="several chosen or rejected answers, and halves learns from one of each"):
            train("halves", tiny.recipe(HalvesRecipe, model, rows, tmp_path / "run"))
    finally:
        from align_engine.recipe import RECIPES

        del ALGORITHMS["halves"], RECIPES["halves"]
    assert not (tmp_path / "run").exists() and torch.is_grad_enabled()
