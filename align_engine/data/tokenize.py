"""From rows to token ids: the prompt is encoded once, completions are appended, what is dropped is counted."""

from __future__ import annotations

import contextlib
import gc
import inspect
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from datasets import config
from datasets.fingerprint import Hasher

from align_engine.data.encoder import Encoder, Written
from align_engine.data.exact import as_written
from align_engine.data.formats import BadRow, Kind, answers, detect_layout, normalise, template_arguments
from align_engine.data.limits import fit
from align_engine.errors import BadInput, Naming, rows_named

pc: Any = pyarrow.compute
ROWS_PER_PROCESS = 10_000  # fewer are tokenised before a further process has started
BESIDE = ("tools", "chat_template_kwargs")  # columns for the chat template
CARRIED = {"preference": ("margin", "chosen_rank", "rejected_rank"), "unpaired": ("label",)}  # numbers beside the texts
CARRIED_TYPES = {
    "label": datasets.Value("bool"),
    **dict.fromkeys(CARRIED["preference"], datasets.Value("float64")),
}
WAYS = {"bad": "--bad_rows drop leaves them out", "long": "--overlong truncate, or drop, goes on"}
SIDES = {"sft": ("completion",), "unpaired": ("completion",), "preference": ("chosen", "rejected"), "prompt": ()}


def prepare(
    rows: datasets.Dataset,
    tokenizer: Any,
    kind: Kind,
    *,
    max_length: int | None = 1024,
    max_prompt_length: int | None = None,
    overlong: Literal["truncate", "drop", "error"] = "truncate",
    bad_rows: Literal["error", "drop"] = "error",
    num_proc: int | None = None,
    assistant_only: bool = False,
    named: Naming = rows_named,
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Tokenise `rows` for `kind` of training: "sft", "preference", "unpaired" or "prompt" (prompts to generate from).

    Returns the data set and a report (see `describe`). Columns of the data set, ids as lists of int:
      sft: index, prompt_ids, completion_ids         preference: index, prompt_ids, chosen_ids, rejected_ids, the
      prompt: index, prompt_ids                      latter lists of ids each where a row has several answers
      unpaired: index, prompt_ids, completion_ids, label; a row of preference data becomes one of each answer
    and those of `CARRIED` that the rows have: margin, chosen_rank, rejected_rank of preference data, lists of numbers
    where a row has several answers: n x m margins, those of the first chosen answer first, n and m ranks.
    Rows that hold these ids already are taken as they stand.
    `index` is the number in `rows` of the row that it comes from, whatever was dropped. Texts without a prompt ("text",
    "messages") have an empty `prompt_ids`: every token is trained on.

    `max_length` limits prompt + completion (None: no limit), `max_prompt_length` the prompt. With `overlong="truncate"`
    the prompt gives way first, from its left and down to a quarter of max_length, then the completion's end; "drop"
    drops such rows, "error" raises. `bad_rows` says what to do with rows that lack a value, hold a wrong type, an empty
    completion, or a chosen equal to its rejected. With `assistant_only`, of "sft", rows are conversations and get a
    column `assistant_masks`: 1 for each of the completion's tokens that the assistant writes. `named` is what messages
    call rows, by `index`.

    The work is cached by `datasets` and shared by `num_proc` processes.

    Raises BadInput: missing columns, bad rows, no row left; a tokenizer without a chat template or an EOS token where
    one is needed.
    """
    sides, settings = SIDES[kind], {"max_length": max_length, "max_prompt_length": max_prompt_length}
    if kind == "unpaired" and "label" not in rows.column_names and "rejected" in rows.column_names:
        more: Any = {"overlong": overlong, "bad_rows": bad_rows, "num_proc": num_proc, "named": named}
        kept, report = prepare(rows, tokenizer, "preference", **settings, **more)
        report["changed"]["pairs, each split into desirable and undesirable rows"] = len(kept)
        return _split_pairs(kept), report
    names = ("prompt_ids", *(f"{side}_ids" for side in sides))
    carried = tuple(name for name in CARRIED.get(kind, ()) if name in rows.column_names)
    ready = kind != "unpaired" and set(names) <= set(rows.column_names)
    if ready and assistant_only:
        raise BadInput("assistant_only_loss needs conversations, and the rows hold token ids")
    layout = () if ready else tuple(name for name in detect_layout(rows.column_names, kind) if name != "label")
    read = [name for name in (*(names if ready else layout), *carried, *BESIDE) if name in rows.column_names]
    features = {name: rows.features[name] for name in read}
    limits = {**settings, "truncate": overlong == "truncate"}
    several = any(_several(rows, name) for name in (names[1:] if ready else layout) if kind == "preference")
    done = _mapped(
        rows.select_columns(read),
        Work(Encoder(tokenizer, assistant_only), names, carried, layout, sides, limits, features, several),
        processes(len(rows), num_proc),
        f"Tokenising {kind} data",
    )
    report, good = _report(done)
    kept = done if len(good) == len(done) else done.select(good)
    _refuse(report["dropped"], len(rows), len(kept), {"bad": bad_rows, "long": overlong}, named)
    report["dropped"] = {status.partition(": ")[2]: where for status, where in report["dropped"].items()}
    if kind == "sft":
        report["trained"] = _trained(kept)
    return kept.remove_columns(["length", "status", "notes"]), report


def processes(rows: int, num_proc: int | None) -> int | None:
    """How many processes tokenise so many rows: those asked for, or one per core where each has enough to do; None:
    this one alone."""
    many = min(len(os.sched_getaffinity(0)), rows // ROWS_PER_PROCESS) if num_proc is None else num_proc
    return many if many > 1 else None


def describe(report: dict[str, Any], named: Naming = rows_named) -> str:
    """The report of `prepare` as lines for the terminal."""
    lines = [f"{report['kept']} of {report['rows']} rows kept, the longest of {report['longest']} tokens"]
    if trained := report.get("trained"):
        lines.append("trained on {:,} of {:,} tokens: {}".format(*trained))
    lines += [f"dropped {len(where)}: {reason} ({named(where)})" for reason, where in report["dropped"].items()]
    return "\n".join([*lines, *(f"changed {count}: {note}" for note, count in report["changed"].items())])


def has_several_answers(rows: datasets.Dataset) -> bool:
    """Whether the tokenised rows of preference data are lists of answers on each side."""
    return hasattr(getattr(rows.features.get("chosen_ids"), "feature", None), "feature")


def check_vocab(
    dataset: datasets.Dataset, vocab_size: int, model: str = "the model", named: Naming = rows_named
) -> None:
    """Raise BadInput, naming the id and the row, where a token id does not fit a `model` with `vocab_size` tokens."""
    columns = [name for name in dataset.column_names if name.endswith("_ids")]
    table: Any
    for name in columns:  # whole ones: the last may hold what other rows have in an earlier one
        for table in dataset.select_columns(["index", name]).with_format("arrow").iter(batch_size=10_000):
            largest = pc.max(pc.list_flatten(table[name], recursive=True)).as_py()
            if largest is not None and largest >= vocab_size:
                rows = table[name].combine_chunks()
                row = next(i for i in range(len(rows)) if any(largest in ids for ids in answers(rows[i].as_py())))
                what = f"token id {largest} in '{name}' of {named([table['index'][row].as_py()])}"
                why = "the tokenizer belongs to another model, or the embeddings were not resized"
                raise BadInput(f"{what}, is outside {model}'s vocabulary of {vocab_size}: {why}")


class Work(NamedTuple):
    """What `_encode_rows` does to rows."""

    encoder: Encoder
    names: tuple[str, ...]  # of the columns of ids: of the prompt, of each side
    carried: tuple[str, ...]
    layout: tuple[str, ...]  # columns with the texts; (): the ids are there
    sides: tuple[str, ...]
    limits: dict[str, Any]
    features: dict[str, Any]
    several: bool  # rows have lists of answers on each side


@dataclass(slots=True)
class Row:
    """A row on its way to ids, or the reason why it gets none."""

    beside: dict[str, Any]
    many: list[int] = field(default_factory=list)  # answers on each side
    written: Written | None = None
    ids: list[list[int]] | None = None  # of the prompt, of each answer
    assistant_mask: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: BadRow | None = None


def _mapped(rows: datasets.Dataset, work: Work, num_proc: int | None, said: str) -> datasets.Dataset:
    """The rows with their ids, out of the cache where the same work has been done on the same rows.

    The cache of rows that `save_to_disk` wrote would lie among them; here it lies with the others.
    """
    ids, text, number = datasets.List(datasets.Value("int32")), datasets.Value("string"), datasets.Value("int64")
    many: Any = datasets.List if work.several else lambda feature: feature
    features = {"prompt_ids": ids} | {name: many(ids) for name in work.names[1:]}
    features |= {name: many(CARRIED_TYPES[name]) for name in work.carried}
    if work.encoder.assistant_only:
        features["assistant_masks"] = datasets.List(datasets.Value("int8"))
    features |= {"index": number, "length": number, "status": text, "notes": datasets.List(text)}
    code = [
        inspect.getsource(sys.modules[module])
        for module in sorted(sys.modules)
        if module.startswith("align_engine.data")
    ]
    key = Hasher.hash([rows._fingerprint, code, work])
    place = Path(config.HF_DATASETS_CACHE) / "align"
    if rows.cache_files:
        place.mkdir(parents=True, exist_ok=True)
    return rows.map(
        _encode_rows, batched=True, with_indices=True, fn_kwargs={"work": work}, num_proc=num_proc, desc=said,
        remove_columns=rows.column_names, features=datasets.Features(features), new_fingerprint=key,
        cache_file_name=str(place / f"{key}.arrow") if rows.cache_files else None,
    )  # fmt: skip


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Inside the block Python does not look for circles of objects: a batch has none, and the search through its many
    lists takes a third of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@_uncollected()
def _encode_rows(batch: Mapping[str, list[Any]], indices: list[int], work: Work) -> dict[str, list[Any]]:
    columns = {name: [as_written(v, feature) for v in batch[name]] for name, feature in work.features.items()}
    rows = [_written(dict(zip(columns, values)), work) for values in zip(*columns.values())]
    work.encoder.foresee([row.written for row in rows if row.written is not None])
    for row in rows:
        _read(row, work)
    work.encoder.known = {}
    out: dict[str, list[Any]] = {"index": indices, "notes": [row.notes for row in rows]}
    out["prompt_ids"] = [row.ids[0] if row.ids else [] for row in rows]
    for i, name in enumerate(work.names[1:]):
        side = [row.ids[1 + sum(row.many[:i]) :][: row.many[i]] if row.ids else [[]] for row in rows]
        out[name] = side if work.several else [ids for (ids,) in side]
    if work.encoder.assistant_only:
        out["assistant_masks"] = [row.assistant_mask for row in rows]
    for name in work.carried:
        out[name] = [row.beside.get(name) for row in rows]
    out["status"] = [f"{row.bad.kind}: {row.bad}" if row.bad else "" for row in rows]
    out["length"] = [len(row.ids[0]) + max(map(len, row.ids[1:]), default=0) if row.ids else 0 for row in rows]
    return out


def _written(row: dict[str, Any], work: Work) -> Row:
    """The row's texts, or the ids that it holds."""
    beside: dict[str, Any] = {}
    try:
        if not work.several:
            beside = {name: _number(name, row[name]) for name in work.carried}
        prompts, sides = _texts(row, work) if work.layout else _ids(row, work)
        many = [len(side) for side in sides]
        if work.several:
            beside = {name: _numbers(name, row[name], *many) for name in work.carried}
        flat = [answer for side in sides for answer in side]
        if not work.layout:
            return Row(beside, many, ids=[*prompts, *flat])
        prompt, arguments = prompts[0] if prompts else None, template_arguments(row)
        written = work.encoder.write(prompt, flat, arguments)
        if work.encoder.assistant_only:
            if not written.rendered:
                raise BadRow("assistant_only_loss needs conversations, and this row is text")
            written = work.encoder.located(written, [*(prompt or []), *flat[0]], arguments)
        return Row(beside, many, written)
    except BadRow as error:
        return Row(beside, bad=error)


def _texts(row: dict[str, Any], work: Work) -> tuple[list[Any], list[list[Any]]]:
    """The prompt of a row, where it has one, and its answers on each side."""
    parts = normalise(row, work.layout, work.encoder.unit)
    prompts = parts.pop("prompt", [])
    return prompts, [parts[side] for side in work.sides if side in parts] or [*parts.values()]


def _ids(row: dict[str, Any], work: Work) -> tuple[list[Any], list[list[Any]]]:
    """The same of the ids that a row holds."""
    prompt, *sides = (row[name] for name in work.names)
    several = [answers(side) if work.several and isinstance(side, list) else [side] for side in sides]
    checked = [[_checked_ids(name, ids) for ids in side] for name, side in zip(work.names[1:], several)]
    return [_checked_ids("prompt_ids", prompt)], checked


def _several(rows: datasets.Dataset, name: str) -> bool:
    """Whether a column has lists of answers, or of their ids, in any row."""
    if name == "prompt":
        return False
    feature: Any = rows.features[name]
    if isinstance(feature, datasets.Json):  # a text per row
        texts: Any = rows.with_format("arrow").select_columns(name)
        return any(
            pc.any(pc.match_substring_regex(part[name].cast(pa.string()), r'^\[["\[]')).as_py()
            for part in texts.iter(batch_size=10_000)
        )
    inner = getattr(feature, "feature", None)
    return hasattr(inner, "feature") or (not name.endswith("_ids") and isinstance(inner, datasets.Value))


def _read(row: Row, work: Work) -> None:
    """Give a row its ids, within the limits, or the reason why it has none."""
    if row.bad:
        return
    try:
        if row.written is None:
            ids, notes, cuts = row.ids or [], [], []
        else:
            prompt, completions, notes = work.encoder.read(row.written)
            mask = work.encoder.assistant_mask(row.written, prompt) if work.encoder.assistant_only else []
            prompt, completions, cuts = fit(prompt, completions, work.encoder.bos, **work.limits)
            ids = [prompt, *completions]
            row.assistant_mask = mask[: len(completions[0])] if mask else []
            if mask and not any(row.assistant_mask[1 - bool(prompt) :]):
                raise BadRow("no token of the assistant's is left to learn from", "drop")
        if any(len(completion) < 2 - bool(ids[0]) for completion in ids[1:]):
            raise BadRow("no completion token is left to predict", "drop")
        if row.many and any(answer in ids[1 + row.many[0] :] for answer in ids[1 : 1 + row.many[0]]):
            raise BadRow("chosen and rejected are the same tokens" + (" after truncation" if cuts else ""), "drop")
        if len(ids) == 1 and not ids[0]:
            raise BadRow("'prompt' is empty")
        row.ids, row.notes = ids, [*dict.fromkeys(notes), *cuts]
    except BadRow as error:
        row.ids, row.bad = None, error


def _number(name: str, value: Any) -> bool | float:
    """What stands beside the texts: a mark of unpaired data, a finite number otherwise."""
    if value is None:
        raise BadRow(f"'{name}' is missing")
    if name == "label":
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(f"'label' is {value!r:.60}, expected true or false, 1 or 0")
        return bool(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"'{name}' is {value!r:.60}, which is not a number to reckon with")
    return float(value)


def _numbers(name: str, value: Any, chosen: int, rejected: int) -> list[float]:
    """What stands beside several answers: a number of each pair, or of each answer of the side that `name` begins
    with."""
    sizes = {"chosen_rank": [chosen], "rejected_rank": [rejected]}.get(name, [chosen, rejected])
    value = value if isinstance(value, list) else [value]
    if len(sizes) == 2 and value and all(isinstance(one, list) for one in value):
        if [len(value), *{len(one) for one in value}] != sizes:
            raise BadRow(f"'{name}' is {value!r:.60}, expected {chosen} lists of {rejected} numbers, one of each pair")
        value = [one for inner in value for one in inner]
    if len(value) != math.prod(sizes):
        raise BadRow(f"'{name}' holds {value!r:.60}, expected {' x '.join(map(str, sizes))} numbers")
    return [float(_number(name, one)) for one in value]


def _checked_ids(name: str, ids: Any) -> list[int]:
    """Ids that a row holds already."""
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise BadRow(f"'{name}' is {ids!r:.60}, expected a list of token ids")
    if wrong := [one for one in ids if not 0 <= one < 2**31]:
        raise BadRow(f"'{name}' holds {wrong[0]}, which is no token id")
    if not ids and name != "prompt_ids":
        raise BadRow(f"'{name}' is empty")
    return ids


def _report(done: datasets.Dataset) -> tuple[dict[str, Any], np.ndarray]:
    """What `describe` says of rows with a status, those dropped by status; and the numbers of the others."""
    table: Any = done.data
    status = table["status"].to_numpy()
    good, dropped = np.flatnonzero(status == ""), {}
    for i in np.flatnonzero(status != "").tolist():
        dropped.setdefault(status[i], []).append(i)
    counts = pc.value_counts(pc.list_flatten(table["notes"])).to_pylist()
    lengths = table["length"].to_numpy()[good]
    report = {
        "rows": len(done),
        "kept": len(good),
        "longest": int(lengths.max()) if len(good) else 0,
        "dropped": dropped,
        "changed": {count["values"]: count["counts"] for count in counts},
    }
    return report, good


def _trained(rows: datasets.Dataset) -> tuple[int, int, str]:
    """Of so many tokens of sft rows how many are trained on, and which."""
    table: Any = rows.data

    def count(name: str) -> int:
        return pc.sum(pc.list_value_length(table[name])).as_py()

    everything = count("prompt_ids") + count("completion_ids")
    if "assistant_masks" in rows.column_names:
        return pc.sum(pc.list_flatten(table["assistant_masks"])).as_py(), everything, "the assistant's messages"
    return count("completion_ids"), everything, "the completions" if count("prompt_ids") else "the whole texts"


def _split_pairs(pairs: datasets.Dataset) -> datasets.Dataset:
    def split(pair: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {name: [] for name in ("index", "prompt_ids", "completion_ids", "label")}
        for i, prompt, *sides in zip(*(pair[name] for name in ("index", "prompt_ids", "chosen_ids", "rejected_ids"))):
            for ids, label in ((ids, label) for side, label in zip(sides, (True, False)) for ids in answers(side)):
                for name, value in zip(out, (i, prompt, ids, label)):
                    out[name].append(value)
        return out

    return pairs.map(split, batched=True, remove_columns=pairs.column_names, desc="Splitting pairs")


def _refuse(dropped: dict[str, list[int]], rows: int, kept: int, asked: dict[str, str], named: Naming) -> None:
    """Raise BadInput where rows are dropped for a reason that the recipe asks an error for, or none is left."""
    kinds = [kind for kind, way in asked.items() if way == "error" and any(one.startswith(kind) for one in dropped)]
    if kept and not kinds:
        return
    refused = {status: where for status, where in dropped.items() if status.partition(":")[0] in kinds}
    count = sum(map(len, refused.values()))
    lines = [f"{count} of {rows} rows cannot be used:" if refused else f"none of {rows} rows is left:"]
    for status, where in (refused or dropped).items():
        lines.append(f"{len(where)} x {status.partition(': ')[2]} ({named(where)})")
    if kept:
        lines.append(f"({'; '.join(WAYS[kind] for kind in kinds)})")
    raise BadInput("\n  ".join(lines))
