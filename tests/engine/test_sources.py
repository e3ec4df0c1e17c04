"""Files as users have them: odd names, odd encodings, keys that change, damage, disks that are full."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from transformers import AutoTokenizer

from align_engine.cli import main
from align_engine.data.sources import Origin, load_rows
from align_engine.data.tokenize import prepare
from align_engine.errors import BadInput

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} {% endif %}{% for m in messages %}{{ m.content }} "
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }} {% endfor %}{% endfor %}"
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def call(**arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def tool(**properties: Any) -> dict[str, Any]:
    return {"name": "f", "parameters": {"properties": properties}}


TOOLS = [
    {"prompt": [user("w1")], "completion": [call(city="w2")], "tools": [tool(city={"type": "w3"})]},
    {"prompt": [user("w4")], "completion": [call(a=0.94, b=[1, None])], "tools": [tool(a={"enum": ["w5", None]})]},
]


class Spelled:
    """A tokenizer whose ids are the characters' numbers."""

    bos_token_id, eos_token_id, eos_token = None, 0, "\0"
    chat_template = TEMPLATE

    def __init__(self, model: Path) -> None:
        self.real = AutoTokenizer.from_pretrained(model)
        self.real.chat_template = TEMPLATE

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": [ord(c) for c in text] if isinstance(text, str) else [[ord(c) for c in t] for t in text]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [chr(i) for i in ids]

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def apply_chat_template(self, messages: Any, **how: Any) -> str:
        return self.real.apply_chat_template(messages, **how)


def written(path: Path, form: str, rows: list[dict[str, Any]]) -> Path:
    path = path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(b"\xef\xbb\xbf" * (form == "bom.jsonl") + "".join(json.dumps(r) + "\n" for r in rows).encode())
    return path


@pytest.mark.parametrize("form", ["jsonl", "bom.jsonl", "json", "parquet", "saved"])
def test_tools_and_calls_whose_keys_differ_reach_the_template_as_they_were_written(
    form: str, model: Path, tmp_path: Path
) -> None:
    tokenizer = Spelled(model)
    got, _ = prepare(load_rows(written(tmp_path, form, TOOLS)), tokenizer, "sft")
    said = ["".join(map(chr, row["prompt_ids"] + row["completion_ids"])) for row in got]
    assert said == [
        '[{"name": "f", "parameters": {"properties": {"city": {"type": "w3"}}}}] w1  {"city": "w2"} ',
        '[{"name": "f", "parameters": {"properties": {"a": {"enum": ["w5", null]}}}}] w4  {"a": 0.94, "b": [1, null]} ',
    ]


def test_nulls_of_nested_template_arguments_are_taken_off_and_a_files_own_stay(model: Path, tmp_path: Path) -> None:
    tokenizer = Spelled(model)
    tokenizer.real.chat_template = "{{ extra | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = [{"prompt": [user("p")], "chat_template_kwargs": {"extra": extra}} for extra in ({"a": 1}, {"b": {"c": 2}})]
    rows.append({"prompt": [user("p")], "chat_template_kwargs": {"extra": {"b": {"c": None}}}})
    said = {}
    for form in ("jsonl", "saved"):
        got, _ = prepare(load_rows(written(tmp_path, form, rows)), tokenizer, "prompt")
        said[form] = ["".join(map(chr, row["prompt_ids"])) for row in got]
    assert said["jsonl"] == ['{"a": 1}p', '{"b": {"c": 2}}p', '{"b": {"c": null}}p']
    assert said["saved"] == ['{"a": 1}p', '{"b": {"c": 2}}p', '{"b": {}}p'], (
        "Arrow does not tell this null from its own"
    )


def test_keys_and_types_that_change_late_in_a_large_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(24):  # 12 MB
            file.write(json.dumps({"prompt": "p" * 500_000, "tools": [{"early": i}], "score": i, "id": i}) + "\n")
        late = {"prompt": "q", "tools": [{"late": {"a": 0.94}}], "score": 0.5, "id": "x", "new": [1]}
        file.write(json.dumps(late) + "\n")
    rows = load_rows(path)
    assert rows[24] == late
    assert [rows[3][name] for name in ("tools", "score", "id", "new")] == [[{"early": 3}], 3, 3, None]


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "b?.json", "c*.JSONL", "x::y.jsonl", "x::y.parquet", "f[0]/train.Parquet"]
)
def test_the_file_of_that_name_is_read_and_no_other(name: str, tmp_path: Path) -> None:
    for other in ("a1.jsonl", "bx.json", "cc.JSONL", "y.jsonl", "y.parquet", "f0/train.Parquet", name):
        path = tmp_path / other
        path.parent.mkdir(exist_ok=True)
        rows = [{"text": "mine" if other == name else "another"}]
        if path.suffix.lower() == ".parquet":
            with path.open("wb") as file:
                pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            path.write_text(json.dumps(rows[0]) + "\n")
    path = tmp_path / name
    assert load_rows(path if path.parent == tmp_path else path.parent)[:]["text"] == ["mine"]


def test_a_changed_file_of_the_same_name_and_size_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("one", "two"):
        path.write_text(json.dumps({"text": text}) + "\n")
        assert load_rows(path)[0] == {"text": text}


def test_folders_name_their_splits_and_hold_data_of_one_type(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no \.jsonl, \.json or \.parquet file"):
        (tmp_path / "readme.txt").write_text("about")
        load_rows(tmp_path)
    names = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test_sft-00000-of-00001.jsonl",
             "eval/rows.jsonl"]  # fmt: skip
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": str(i)}) + "\n")
    (tmp_path / "dataset_infos.json").write_text("{}")
    found = {split: load_rows(tmp_path, split)[:]["text"] for split in ("train", "test_sft", "test")}
    assert found == {"train": ["0", "1"], "test_sft": ["2"], "test": ["3"]}
    datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(tmp_path / "more.parquet")
    with pytest.raises(BadInput, match=r"holds \.jsonl and \.parquet files"):
        load_rows(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": "x"}\n' * 5000 + b'{"a": "\xe9"}\n',
            r"line 5001 is not UTF-8 \(byte 0xe9\): save .* UTF-8",
        ),
        ("a.jsonl", '{"a": "x"}\n'.encode("utf-16"), "line 1 is not UTF-8"),
        ("a.jsonl", b'{"a": "x"}\n{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}\n", "line 2 is nested too deep"),
        ("a.jsonl", b'{"a": "x"}\n' * 2000 + b'{"a": \n' + b'{"a": "x"}\n' * 2000, "line 2001 is not JSON"),
        ("a.jsonl", b'{"a": "\\ud83d"}\n', r"line 1 holds \\ud83d, half of a surrogate pair"),
        ("a.jsonl", b'["p", "x"]\n["q", "y"]\n', "line 1 is a JSON list, expected an object"),
        ("a.json", b'[{"a": 1}, 3]', "item 2 of its list is a JSON int"),
        ("a.json", b'{\n"a": 1\n}', "one list of objects, or one object per line"),
        ("a.json", b"[]", "is empty"),
        ("a.jsonl", b"\xef\xbb\xbf\n", "is empty"),
        ("a.jsonl", b"{}\n", "has no columns"),
        ("a.parquet", b"PAR1 and no more PAR1", "no whole Parquet file"),
        ("a.parquet", b"", "no whole Parquet file"),
        ("a.jsonl.gz", b"\x1f\x8b", "unknown file type '.gz'.*unpack it first"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=rf"(?s){name}'.*{message}") as caught:
        load_rows(tmp_path / name)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_said_of_csv_makes_rows_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,chosen\n"Why, then?","A ""reason"""\n')
    with pytest.raises(BadInput, match=r"unknown file type '\.csv'") as caught:
        load_rows(tmp_path / "a.csv")
    exec(str(caught.value).partition("parquet: ")[2].removesuffix(" writes one"), {"datasets": datasets})
    assert load_rows(tmp_path / "a.jsonl").to_list() == [{"prompt": "Why, then?", "chosen": 'A "reason"'}]


@pytest.mark.parametrize("harm", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow", "cut"])
def test_a_damaged_folder_of_datasets_names_the_file(harm: str, tmp_path: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "x" * 99}] * 99)).save_to_disk(tmp_path / "saved")
    name = "data-00000-of-00001.arrow" if harm == "cut" else harm
    file = tmp_path / "saved" / "train" / name
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif harm == "dataset_info.json":
        file.write_text("{")
    else:
        file.unlink()
    with pytest.raises(BadInput, match=f"{name}'? is (missing|damaged)"):
        load_rows(tmp_path / "saved")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"prompt": "w1 " * 500 + str(i), "completion": "w2"} for i in range(400)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(BadInput, match=r"cannot be written \(File too large\)") as caught:
            load_rows(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(caught.value)
    assert str(tmp_path / "cache") in said and "HF_DATASETS_CACHE" in said and len(said.splitlines()) == 1
    assert len(load_rows(path)) == 400


def test_tokenising_a_saved_folder_leaves_it_as_it_was(model: Path, tmp_path: Path) -> None:
    saved = written(tmp_path, "saved", [{"prompt": "w1", "completion": "w2"}])
    before = sorted(saved.iterdir())
    prepare(load_rows(saved), AutoTokenizer.from_pretrained(model), "sft")
    assert sorted(saved.iterdir()) == before


def media(kind: str, path: Path) -> Path:
    rows = datasets.Dataset.from_dict({"prompt": ["w1", "w2"], "extra": [{"bytes": b"no media", "path": None}] * 2})
    rows.cast_column("extra", getattr(datasets, kind)()).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["Audio", "Image", "Video"])
def test_media_are_not_decoded(kind: str, tmp_path: Path) -> None:
    assert load_rows(media(kind, tmp_path / "rows"))[1] == {
        "prompt": "w2",
        "extra": {"bytes": b"no media", "path": None},
    }


def test_scorers_get_media_undecoded(model: Path, tmp_path: Path, capsys: Any) -> None:
    rows = media("Image", tmp_path / "rows")
    (tmp_path / "scorer.py").write_text(
        "def score(completions, extra, **_):\n"
        "    assert all(value == {'bytes': b'no media', 'path': None} for value in extra)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    command = ["grpo", "--model_name_or_path", model, "--dataset_name", rows, "--output_dir",
               tmp_path / "run", "--reward_funcs", f"{tmp_path}/scorer.py:score", "--max_completion_length", 3,
               "--num_generations", 2, "--max_steps", 1, "--per_device_train_batch_size", 2, "--logging_steps", 1,
               "--no-gradient_checkpointing"]  # fmt: skip
    assert main([str(part) for part in command]) == 0
    assert "reward functions get extra undecoded" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["$HOME.jsonl", "${SHELL}.jsonl"])
def test_variables_in_a_files_name_are_letters(name, tmp_path):
    (tmp_path / name).write_text(json.dumps({"text": "a"}) + "\n")
    assert load_rows(tmp_path / name)["text"] == ["a"]


def test_links_in_a_folder_of_data_are_followed_once(tmp_path):
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "elsewhere" / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    (tmp_path / "data" / "b.jsonl").write_text(json.dumps({"text": "b"}) + "\n")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "data")
    assert sorted(load_rows(tmp_path / "data")["text"]) == ["a", "b"]


def test_rows_of_a_folder_are_named_by_their_file(tmp_path: Path) -> None:
    """A fault in each row in turn: what is named is the row of the file where it was put."""
    (tmp_path / "train" / "more").mkdir(parents=True)
    files = {"train/a.jsonl": 2, "train/more/b.json": 1, "train/more/c.jsonl": 3, "test.jsonl": 2}
    whole = [(name, row) for name, count in files.items() for row in range(count)]
    for name, count in files.items():
        rows = [{"at": [name, row]} for row in range(count)]
        text = json.dumps(rows, indent=1) if name.endswith(".json") else "\n\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text)
    for split, part in (("train", whole[:6]), ("test", whole[6:])):
        origin, rows = Origin(str(tmp_path), split), load_rows(tmp_path, split)
        assert [tuple(at) for at in rows["at"]] == part
        for i, (name, row) in enumerate(part):
            assert origin.rows([i]) == f"row {row + 1} of {name}, counted from 1"
    assert Origin(str(tmp_path)).rows([0, 1, 3, 5]) == (
        "rows 1, 2 of train/a.jsonl, 1, 3 of train/more/c.jsonl, counted from 1"
    )
    assert Origin(str(tmp_path)).rows(range(6)).endswith("1, 2 of train/more/c.jsonl, ..., counted from 1")
    assert Origin(str(tmp_path / "test.jsonl")).rows([1]) == "row 2, counted from 1"
    load_rows(tmp_path / "train").to_parquet(tmp_path / "table" / "a.parquet")
    load_rows(tmp_path / "train").to_parquet(tmp_path / "table" / "b.parquet")
    assert Origin(str(tmp_path / "table")).rows([8]) == "row 3 of b.parquet, counted from 1"
    load_rows(tmp_path / "train").save_to_disk(str(tmp_path / "saved"))
    assert Origin(str(tmp_path / "saved")).rows([1]) == "row 2, counted from 1"
