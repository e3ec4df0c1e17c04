"""Data against expectations written by hand. The tokenizers are tiny and made here: merges are chosen, not learned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from byte_tokens import TEMPLATE, answer, byte_tokenizer, prepared, tokens, user
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from align_engine.data.batches import collate_pairs, collate_prompts, collate_sft, epoch_order, split_order
from align_engine.data.sources import load_rows
from align_engine.data.tokenize import check_vocab, describe, prepare, processes
from align_engine.errors import BadInput

# --- formats and boundaries -------------------------------------------------------------------------------------


def test_prompt_completion_is_concatenated_where_tokens_would_merge() -> None:
    tokenizer, (row,), _ = prepared([{"prompt": "ab", "completion": "cbc"}], "sft")
    assert tokens(tokenizer, tokenizer("abcbc")["input_ids"]) == "a|bc|bc"  # the whole would have lost the boundary
    assert tokens(tokenizer, row["prompt_ids"]) == "a|b"
    assert tokens(tokenizer, row["completion_ids"]) == "c|bc|<|end|>"
    assert row["index"] == 0


def test_conversation_is_split_at_the_generation_prompt() -> None:
    rows = [{"prompt": [user("ab")], "completion": [answer("cd")]}]
    tokenizer, (row,), _ = prepared(rows, "sft")
    assert tokens(tokenizer, row["prompt_ids"]) == "<|u|>|a|b|<|end|>|<|a|>"
    assert tokens(tokenizer, row["completion_ids"]) == "c|d|<|end|>"  # the template ends it: no second EOS


def test_template_whose_boundary_would_merge() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ 'b' if m.role == 'assistant' else '' }}{{ m.content }}{% endfor %}{{ 'b' if add_generation_prompt else '' }}"  # noqa: E501
    rows = [{"prompt": [user("a")], "completion": [answer("cd")]}]
    _, (row,), report = prepared(rows, "sft", tokenizer)
    assert tokens(tokenizer, row["prompt_ids"]) == "a|b"
    assert tokens(tokenizer, row["completion_ids"]) == "c|d"
    assert list(report["changed"].values()) == [1] and "merge" in describe(report)


def test_generation_prompt_that_answers_do_not_repeat() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("<|a|>{% endif %}", "<|a|>think{% endif %}")
    _, (row,), report = prepared([{"prompt": [user("x")], "completion": [answer("y")]}], "sft", tokenizer)
    assert tokens(tokenizer, row["prompt_ids"]) == "<|u|>|x|<|end|>|<|a|>"
    assert tokens(tokenizer, row["completion_ids"]) == "y|<|end|>"
    assert sum(report["changed"].values()) == 1


def test_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(BadInput, match="writes the prompt differently"):
        prepared([{"prompt": [user("x")], "completion": [answer("y")]}], "sft", tokenizer)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "abc"}, "a|bc|<|end|>"),
        ({"messages": [user("x"), answer("y")]}, "<|u|>|x|<|end|>|<|a|>|y|<|end|>"),
    ],
)
def test_language_modelling_trains_on_every_token(row: dict[str, Any], expected: str) -> None:
    tokenizer, (out,), _ = prepared([row], "sft")
    assert out["prompt_ids"] == []
    assert tokens(tokenizer, out["completion_ids"]) == expected


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "p", "chosen": "x", "rejected": "y"}, "p", "x|<|end|>", "y|<|end|>"),
        (  # TRL's own example: the space goes with the answer
            {"chosen": "it is u", "rejected": "it is v"},
            "i|t|Ġ|i|s",
            "Ġ|u|<|end|>",
            "Ġ|v|<|end|>",
        ),
        ({"chosen": "is ux", "rejected": "is uy"}, "i|s", "Ġ|u|x|<|end|>", "Ġ|u|y|<|end|>"),  # never inside a word
        ({"chosen": "p x", "rejected": "p x y"}, "p", "Ġ|x|<|end|>", "Ġ|x|Ġ|y|<|end|>"),  # one begins the other
        (
            {"prompt": [user("p")], "chosen": [answer("x")], "rejected": [answer("y")]},
            "<|u|>|p|<|end|>|<|a|>",
            "x|<|end|>",
            "y|<|end|>",
        ),
        (
            {"chosen": [user("p"), answer("x")], "rejected": [user("p"), answer("y")]},
            "<|u|>|p|<|end|>|<|a|>",
            "x|<|end|>",
            "y|<|end|>",
        ),
        (  # a string beside whole conversations
            {"prompt": "p", "chosen": [user("p"), answer("x")], "rejected": [user("p"), answer("y")]},
            "<|u|>|p|<|end|>|<|a|>",
            "x|<|end|>",
            "y|<|end|>",
        ),
    ],
)
def test_preference_layouts(row: dict[str, Any], prompt: str, chosen: str, rejected: str) -> None:
    tokenizer, (out,), _ = prepared([row], "preference")
    found = [tokens(tokenizer, out[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")]
    assert found == [prompt, chosen, rejected]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "ab"}, "a|b"),
        ({"prompt": [user("x")]}, "<|u|>|x|<|end|>|<|a|>"),
        ({"prompt": [user("x"), answer("y")]}, "<|u|>|x|<|end|>|<|a|>|y"),  # the answer goes on
    ],
)
def test_prompts_to_generate_from(row: dict[str, Any], expected: str) -> None:
    tokenizer, (out,), _ = prepared([row], "prompt")
    assert tokens(tokenizer, out["prompt_ids"]) == expected


@pytest.mark.parametrize("tools", [[{"name": "f"}], json.dumps([{"name": "f"}])])
def test_tools_and_template_arguments_reach_the_template(tools: Any) -> None:
    rows = [{"prompt": [user("x")], "completion": [answer("y")], "tools": tools, "chat_template_kwargs": {"mark": "!"}}]
    tokenizer, (row,), _ = prepared(rows, "sft")
    assert tokens(tokenizer, row["prompt_ids"]).startswith("[|f|]|!|<|u|>")


def test_exactly_one_bos_and_one_eos() -> None:
    tokenizer = byte_tokenizer(bos=True)
    rows = [{"prompt": "a", "completion": "x"}, {"prompt": "<|bos|>a", "completion": "x<|end|>"}]
    _, out, _ = prepared(rows, "sft", tokenizer)
    for row in out:
        assert tokens(tokenizer, row["prompt_ids"] + row["completion_ids"]) == "<|bos|>|a|x|<|end|>"
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    _, (row,), _ = prepared([{"prompt": [user("a")], "completion": [answer("x")]}], "sft", tokenizer)
    assert (row["prompt_ids"] + row["completion_ids"]).count(tokenizer.bos_token_id) == 1


def test_space_that_sentencepiece_puts_first_is_not_put_into_the_middle() -> None:
    names = ["<s>", "</s>", "▁", "a", "b", "▁a", "▁b", "\n", ":"]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("▁", "a"), ("▁", "b")]))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    _, out, _ = prepared([{"prompt": "a:", "completion": "b"}, {"prompt": "a:", "completion": " b"}], "sft", tokenizer)
    assert [tokens(tokenizer, row["completion_ids"]) for row in out] == ["b|</s>", "▁b|</s>"]


# --- lengths --------------------------------------------------------------------------------------------------


def test_prompt_is_cut_before_the_completion_and_keeps_its_bos() -> None:
    tokenizer = byte_tokenizer(bos=True)
    rows = [{"prompt": "mnopqrst", "completion": "xyz"}]
    _, (row,), report = prepared(rows, "sft", tokenizer, max_length=8)
    assert tokens(tokenizer, row["prompt_ids"]) == "<|bos|>|r|s|t"
    assert tokens(tokenizer, row["completion_ids"]) == "x|y|z|<|end|>"
    assert report["changed"] == {"prompt cut on its left": 1} and report["longest"] == 8
    _, (row,), _ = prepared(rows, "sft", tokenizer, max_prompt_length=3)
    assert tokens(tokenizer, row["prompt_ids"]) == "<|bos|>|s|t"


def test_completion_is_cut_only_where_a_quarter_is_left_to_the_prompt() -> None:
    tokenizer, (row,), report = prepared([{"prompt": "mnopqrst", "completion": "uvwxyz"}], "sft", max_length=8)
    assert tokens(tokenizer, row["prompt_ids"]) == "s|t"
    assert tokens(tokenizer, row["completion_ids"]) == "u|v|w|x|y|z"
    assert set(report["changed"]) == {"prompt cut on its left", "completion cut at its end"}


def test_both_sides_of_a_pair_keep_the_same_prompt() -> None:
    tokenizer, (row,), _ = prepared([{"prompt": "mnop", "chosen": "xyz", "rejected": "x"}], "preference", max_length=6)
    assert tokens(tokenizer, row["prompt_ids"]) == "o|p"
    assert tokens(tokenizer, row["rejected_ids"]) == "x|<|end|>"


def test_pair_that_truncation_makes_equal_is_dropped_and_counted() -> None:
    rows = [{"prompt": "p", "chosen": "uvwxa", "rejected": "uvwxy"}, {"prompt": "p", "chosen": "u", "rejected": "v"}]
    _, out, report = prepared(rows, "preference", max_length=4)
    assert [row["index"] for row in out] == [1]
    assert report["dropped"] == {"chosen and rejected are the same tokens after truncation": [0]}


def test_overlong_rows_are_dropped_or_refused_when_asked() -> None:
    rows = [{"prompt": "mnopqrst", "completion": "x"}, {"prompt": "p", "completion": "x"}]
    _, out, report = prepared(rows, "sft", max_length=5, overlong="drop")
    assert [row["index"] for row in out] == [1]
    assert report["kept"] == 1 and report["dropped"] == {"longer than max_length=5": [0]}
    assert "dropped 1: longer than max_length=5 (row 1, counted from 1)" in describe(report)
    with pytest.raises(BadInput, match=r"longer than max_length=5 \(row 1, counted from 1\)"):
        prepared(rows, "sft", max_length=5, overlong="error")


def test_text_of_one_token_has_nothing_to_predict() -> None:
    _, out, report = prepared([{"text": "<|end|>"}, {"text": "ab"}], "sft")
    assert [row["index"] for row in out] == [1]
    assert list(report["dropped"]) == ["no completion token is left to predict"]


# --- bad rows ---------------------------------------------------------------------------------------------------

GOOD = {"prompt": "p", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "p", "chosen": None, "rejected": "y"}, "'chosen' is missing"),
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, "'chosen' equals 'rejected'"),
        ({"prompt": "p", "chosen": "", "rejected": "y"}, "'chosen' is empty"),
    ],
)
def test_bad_rows_are_named_or_dropped(bad: dict[str, Any], reason: str) -> None:
    rows = [GOOD, bad, GOOD, bad]
    with pytest.raises(BadInput, match=rf"2 of 4 rows(?s:.*)2 x {reason} \(rows 2, 4, counted from 1\)"):
        prepared(rows, "preference")
    _, out, report = prepared(rows, "preference", bad_rows="drop")
    assert [row["index"] for row in out] == [0, 2] and report["dropped"] == {reason: [1, 3]}
    with pytest.raises(BadInput, match="none of 1 rows"):
        prepared([bad], "preference", bad_rows="drop")


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"prompt": 3, "completion": "x"}, "sft", "'prompt' is of type int"),
        ({"text": ["x"]}, "sft", "'text' is of type list, expected a string"),
        ({"prompt": [user("p")], "completion": "x"}, "sft", "mix strings and lists"),
        ({"prompt": [user("p")], "completion": [answer("")]}, "sft", "'completion' holds an empty answer"),
        ({"prompt": [{"content": "p"}], "completion": [answer("x")]}, "sft", "expected messages with 'role'"),
        ({"prompt": [{"role": "system", "content": "p"}], "completion": [answer("x")]}, "sft", "system message"),
        ({"prompt": [], "completion": [answer("x")]}, "sft", "'prompt' is empty"),
        ({"chosen": "abc", "rejected": "xyz"}, "preference", "share no beginning"),
        ({"chosen": [user("p"), answer("x")], "rejected": [user("p"), answer("x")]}, "preference", "equals"),
        ({"prompt": ""}, "prompt", "'prompt' is empty"),
        ({"messages": [user("x")], "tools": "{"}, "sft", "'tools' is not JSON"),
    ],
)
def test_each_fault_has_its_message(row: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        prepared([row], kind)


def test_missing_columns_are_named_with_a_hint() -> None:
    with pytest.raises(BadInput, match=r"'chosen' \+ 'rejected'.*\['completion', 'prompt'\].*look like sft data"):
        prepared([{"prompt": "p", "completion": "x"}], "preference")
    with pytest.raises(BadInput, match=r"\['bad', 'good', 'question'\]; `align pairs --columns"):
        prepared([{"question": "p", "good": "x", "bad": "y"}], "preference")
    with pytest.raises(BadInput, match="is 'choosen' meant to be 'chosen'"):
        prepared([{"prompt": "p", "choosen": "x", "rejected": "y"}], "preference")


def test_template_errors_and_missing_parts_of_the_tokenizer() -> None:
    rows = [{"prompt": [user("p")], "completion": [answer("x")]}]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(BadInput, match="refuses the messages: no users here"):
        prepared(rows, "sft", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match="no chat template"):
        prepared(rows, "sft", tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(BadInput, match="no eos_token"):
        prepared([{"prompt": "p", "completion": "x"}], "sft", tokenizer)


def test_vocabulary_smaller_than_a_token_id() -> None:
    tokenizer = byte_tokenizer()
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "d"}, {"prompt": "a", "completion": "bc"}])
    dataset, _ = prepare(rows, tokenizer, "sft")
    merged = tokenizer.convert_tokens_to_ids("bc")
    check_vocab(dataset, merged + 1)
    with pytest.raises(
        BadInput, match=f"token id {merged} in 'completion_ids' of row 2, counted from 1, .*vocabulary of {merged}:"
    ):
        check_vocab(dataset, merged)


def test_a_token_outside_the_vocabulary_is_named_by_its_row_of_the_file() -> None:
    """Whatever has been made of the rows: answers of a pair apart, others' answers behind a prompt (kto), bad ones left
    out."""
    tokenizer = byte_tokenizer()
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    rows = [pair | {"rejected": "x"}, pair, pair, pair | {"prompt": "q", "rejected": "bc"}]
    for data in (rows, [row | {"chosen": [row["chosen"], "v", "w"]} for row in rows]):
        split, _ = prepare(datasets.Dataset.from_list(data), tokenizer, "unpaired", bad_rows="drop")
        with pytest.raises(BadInput, match="in 'completion_ids' of row 4, counted from 1"):
            check_vocab(split, tokenizer.convert_tokens_to_ids("bc"))
    first, last = [[9]] + [[1]] * 10_000, [[1]] * 10_000 + [[9]]  # more than are looked at at a time
    mismatched = {"index": range(10_001), "completion_ids": last, "kl_completion_ids": first}
    with pytest.raises(BadInput, match="in 'completion_ids' of row 10001, counted from 1"):
        check_vocab(datasets.Dataset.from_dict(mismatched), 9)


# --- batches ----------------------------------------------------------------------------------------------------

SFT = [
    {"index": 7, "prompt_ids": [5, 6], "completion_ids": [8, 1]},
    {"index": 2, "prompt_ids": [], "completion_ids": [9, 8, 1]},
]


def test_sft_batch_by_hand_with_pad_equal_to_eos() -> None:
    batch = collate_sft(SFT, pad_id=1)
    assert batch.input_ids.tolist() == [[5, 6, 8, 1], [9, 8, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]  # the EOS is seen, the pad is not
    assert batch.targets.tolist() == [[-100, 8, 1, -100], [8, 1, -100, -100]]
    assert batch.index.tolist() == [7, 2] and batch.num_tokens == 4 and batch.ref_logps is None
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.targets, batch.index)} == {torch.int64}


def test_pair_batch_has_the_chosen_half_first() -> None:
    rows = [
        {"index": 0, "prompt_ids": [5], "chosen_ids": [6, 1], "rejected_ids": [7], "extra": "ignored"},
        {"index": 4, "prompt_ids": [8, 9], "chosen_ids": [6], "rejected_ids": [7, 7]},
    ]
    batch = collate_pairs(rows, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 1, 0], [8, 9, 6, 0], [5, 7, 0, 0], [8, 9, 7, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.targets.tolist() == [
        [6, 1, -100, -100],
        [-100, 6, -100, -100],
        [7, -100, -100, -100],
        [-100, 7, 7, -100],
    ]
    assert batch.index.tolist() == [0, 4]
    with_reference = [row | {"ref_chosen_logps": -i, "ref_rejected_logps": -9.0 - i} for i, row in enumerate(rows)]
    moved = collate_pairs(with_reference, pad_id=0).to("cpu")
    assert moved.ref_logps is not None and moved.ref_logps.tolist() == [0.0, -1.0, -9.0, -10.0]


def test_a_row_is_the_same_in_any_batch() -> None:
    alone, together = collate_sft(SFT[:1], 1), collate_sft([SFT[1], SFT[0]], 1)
    assert torch.equal(alone.targets[0], together.targets[1][: alone.targets.shape[1]])


def test_prompts_are_padded_on_the_left() -> None:
    input_ids, mask = collate_prompts([[5], [6, 7, 8]], pad_id=1)
    assert input_ids.tolist() == [[1, 1, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    order = epoch_order(50, seed=3, epoch=1)
    assert sorted(order) == list(range(50)) and order == epoch_order(50, 3, 1)
    assert order != epoch_order(50, 3, 2) and order != epoch_order(50, 4, 1)
    pieces = split_order(order, 20)
    assert [len(piece) for piece in pieces] == [20, 20, 10] and [i for piece in pieces for i in piece] == order


# --- sources ------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"p{i}", "completion": "x"} for i in range(3)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "saved", "saved_dict", "folder"])
def test_every_source_gives_the_same_rows(form: str, tmp_path: Path) -> None:
    dataset, path = datasets.Dataset.from_list(ROWS), tmp_path / f"rows.{form}"
    if form == "jsonl":
        write_jsonl(path, ROWS)
    elif form == "json":
        path.write_text(json.dumps(ROWS))
    elif form == "parquet":
        dataset.to_parquet(path)
    elif form == "saved":
        dataset.save_to_disk(path)
    elif form == "saved_dict":
        datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(path)
        assert len(load_rows(path, "test")) == 1
        with pytest.raises(BadInput, match="no split 'dev'; it has train, test"):
            load_rows(path, "dev")
    else:
        path.mkdir()
        write_jsonl(path / "train.jsonl", ROWS)
        write_jsonl(path / "test.jsonl", ROWS[:1])
        assert len(load_rows(path, "test")) == 1
    assert load_rows(path).to_list() == ROWS


def test_sources_that_are_not_there_or_empty(tmp_path: Path) -> None:
    for name in ("none.jsonl", "folder/none.parquet", "none"):
        with pytest.raises(BadInput, match=f"{name}"):
            load_rows(tmp_path / name)
    with pytest.raises(BadInput, match=r"holds no \.jsonl, \.json or \.parquet file"):
        load_rows(tmp_path)
    for content in ("", " \n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        with pytest.raises(BadInput, match=r"empty.jsonl' is empty"):
            load_rows(tmp_path / "empty.jsonl")
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(BadInput, match=r"unknown file type '\.csv'"):
        load_rows(tmp_path / "rows.csv")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "saved")
    with pytest.raises(BadInput, match="has no rows"):
        load_rows(tmp_path / "saved")
    with pytest.raises(BadInput, match="has no split 'test'"):
        load_rows(write_jsonl(tmp_path / "rows.jsonl", ROWS), "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", ', "line 4 is not JSON"),
        ('["p", "x"]', "line 4 is a JSON list, expected an object"),
    ],
)
def test_unreadable_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadInput, match=message):
        load_rows(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "rejected": "y"}, "'chosen' is missing"),
        ({"prompt": "p", "chosen": 3, "rejected": "y"}, "'chosen' is of type int, expected a string"),
    ],
)
def test_faults_of_a_file_name_the_row(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [GOOD, row]
    with pytest.raises(BadInput, match=rf"{message}.* \(row 2, counted from 1\)"):
        prepare(load_rows(write_jsonl(tmp_path / "rows.jsonl", rows)), byte_tokenizer(), "preference")


def test_several_processes_give_the_same_rows() -> None:
    rows = datasets.Dataset.from_list(ROWS)
    one, two = (prepare(rows, byte_tokenizer(), "sft", num_proc=n) for n in (None, 2))
    assert one[0].to_list() == two[0].to_list() and one[1] == two[1]


# --- where a prompt ends -------------------------------------------------------------------------------------------


FLAG = "\U0001f1e9\U0001f1ea"  # of two signs


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("F: Sag es. A: schön", "F: Sag es. A: schon", "F: Sag es. A:"),
        ("В: Скажи. О: хорошо", "В: Скажи. О: холодно", "В: Скажи. О:"),
        ("प्र: कहो. उ: अच्छा", "प्र: कहो. उ: अच्छी", "प्र: कहो. उ:"),  # one word but for its vowel sign
        ("ถาม: ทำไม ตอบ: เพราะว่า", "ถาม: ทำไม ตอบ: เพราะนี้", "ถาม: ทำไม ตอบ:"),
        ("写诗：春眠不觉晓", "写诗：春眠不觉迟", "写诗："),
        ("Q: e. A: cafe\u0301", "Q: e. A: cafe\u0300", "Q: e. A:"),
        ("Q: who?\U0001f469\u200d\U0001f680", "Q: who?\U0001f469\u200d\U0001f52c", "Q: who?"),  # one sign of three
        ("Q: ok?\U0001f44d\U0001f3fb", "Q: ok?\U0001f44d\U0001f3ff", "Q: ok?"),  # hues of one thumb
        ("\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", "\U0001f1e9\U0001f1ea\U0001f1ec\U0001f1e7", FLAG),
        ("a\r\nb", "a\rb", "a"),
        ("Q: say. A: don't", "Q: say. A: don", "Q: say. A:"),
        ("Q: 1+1 A: 12.5", "Q: 1+1 A: 12.7", "Q: 1+1 A:"),
        ("help me", "helpful you", None),
        ("x<|end|>", "x<|end_of_it|>", "x"),
    ],
)  # fmt: skip
def test_an_implicit_prompt_ends_between_words_and_signs_of_any_script(
    chosen: str, rejected: str, prompt: str | None
) -> None:
    tokenizer, row = byte_tokenizer(), {"chosen": chosen, "rejected": rejected}
    if prompt is None:
        with pytest.raises(BadInput, match="share no beginning"):
            prepared([row], "preference", tokenizer)
        return
    _, (out,), _ = prepared([row], "preference", tokenizer)
    assert tokenizer.decode(out["prompt_ids"]) == prompt
    assert tokenizer.decode(out["prompt_ids"] + out["chosen_ids"]) == chosen.removesuffix("<|end|>") + "<|end|>"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("said", ["<tool_call>f", "<thing>", "three"])
def test_a_generation_prompt_that_answers_do_not_repeat_is_cut_between_tokens(special: bool, said: str) -> None:
    tokenizer = byte_tokenizer(merges=("t h", "th i", "o o"))
    if special:
        tokenizer.add_tokens(["<think>", "<tool_call>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE.replace("<|a|>{% endif %}", "<|a|><think>{% endif %}")
    _, (row,), report = prepared([{"prompt": [user("x")], "completion": [answer(said)]}], "sft", tokenizer)
    assert tokens(tokenizer, row["prompt_ids"]) == "<|u|>|x|<|end|>|<|a|>"
    assert row["prompt_ids"] + row["completion_ids"] == tokenizer(f"<|u|>x<|end|><|a|>{said}<|end|>")["input_ids"]
    assert sum(report["changed"].values()) == 1


# --- numbers and ids beside the texts -------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [2, -1, 0.5, "yes", "true", "0", [1]])
def test_marks_that_are_not_true_or_false_are_refused_with_row_and_value(mark: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "x", "label": label} for label in (True, False, mark)]
    with pytest.raises(
        BadInput, match=rf"'label' is {re.escape(repr(mark))}, expected true or false.* \(row 3, counted from 1\)"
    ):
        prepare(load_rows(write_jsonl(tmp_path / "rows.jsonl", rows)), byte_tokenizer(), "unpaired")
    dataset, report = prepare(load_rows(tmp_path / "rows.jsonl"), byte_tokenizer(), "unpaired", bad_rows="drop")
    assert dataset[:]["label"] == [True, False] and list(report["dropped"].values()) == [[2]]


def test_marks_of_one_and_nought_are_true_and_false() -> None:
    rows = [{"prompt": "p", "completion": "x", "label": label} for label in (1, 0)]
    _, out, _ = prepared(rows, "unpaired")
    assert [row["label"] for row in out] == [True, False]


def test_marks_given_to_preference_training_look_like_marks() -> None:
    with pytest.raises(BadInput, match="look like unpaired data, as align kto learns from"):
        prepared([{"prompt": "p", "completion": "x", "label": True}], "preference")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"completion_ids": [3, -1]}, "'completion_ids' holds -1, which is no token id"),
        ({"completion_ids": [2**31]}, "'completion_ids' holds 2147483648"),
        ({"completion_ids": []}, "'completion_ids' is empty"),
        ({"completion_ids": [1.5]}, r"'completion_ids' is \[1.5\], expected a list of token ids"),
        ({"completion_ids": "3 4"}, "'completion_ids' is '3 4', expected"),
        ({"completion_ids": None}, "'completion_ids' is None, expected"),
        ({"prompt_ids": [True]}, r"'prompt_ids' is \[True\], expected"),
    ],
)
def test_ready_ids_that_are_none_are_refused(ids: dict[str, Any], message: str) -> None:
    row = {"prompt_ids": [5], "completion_ids": [6, 7]} | ids
    with pytest.raises(BadInput, match=rf"{message}.* \(row 1, counted from 1\)"):
        prepared([row], "sft")
    with pytest.raises(BadInput, match="'prompt' is empty"):
        prepared([{"prompt_ids": []}], "prompt")


def test_the_prompts_limit_holds_where_the_whole_would_fit() -> None:
    tokenizer, (row,), _ = prepared([{"prompt": "mnop", "completion": "x"}], "sft", max_length=9, max_prompt_length=2)
    assert tokens(tokenizer, row["prompt_ids"] + row["completion_ids"]) == "o|p|x|<|end|>"


def test_many_rows_are_shared_out_among_the_cores(monkeypatch: Any) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8))
    asked = [(19_999, None), (20_000, None), (1_000_000, None), (1_000_000, 1), (10, 3)]
    assert [processes(*one) for one in asked] == [None, 2, 8, None, 3]


def test_rows_that_are_dropped_leave_the_others_their_own_columns() -> None:
    rows = [{"prompt": None, "wanted": "a"}, {"prompt": "p", "wanted": "b"}, {"prompt": "", "wanted": "c"},
            {"prompt": "q", "wanted": "d"}]  # fmt: skip
    tokenizer, out, _ = prepared(rows, "prompt", bad_rows="drop")
    assert [(tokens(tokenizer, row["prompt_ids"]), rows[row["index"]]["wanted"]) for row in out] == [
        ("p", "b"),
        ("q", "d"),
    ]


def test_many_texts_are_tokenised_as_each_alone(model):
    from align_engine.data.encoder import Encoder, Written
    from align_engine.models.load import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    texts = ["w1 w2", "w3", "", "w4 w5 w6 w7", "<eos> w8", "nothing known"]
    want = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
    encoder = Encoder(tokenizer)
    tokenizer(texts, padding=True, truncation=True, max_length=2)
    encoder.foresee(Written(text, [], False, []) for text in texts)
    assert encoder.known == want
