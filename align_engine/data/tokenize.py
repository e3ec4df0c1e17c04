"""From rows to token ids: the prompt is encoded once, completions are appended, what is dropped is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import datasets
import pyarrow.compute

from align_engine.data.encoder import Encoder
from align_engine.data.errors import DataError
from align_engine.data.formats import BadRow, Kind, detect_layout, normalise, template_arguments
from align_engine.data.limits import Limits, TooLong, fit
from align_engine.errors import BadInput

pc: Any = pyarrow.compute
CARRIED = {
    "preference": ("margin", "chosen_rank", "rejected_rank"),
    "unpaired": ("label",),
}  # columns of numbers that rows may have besides
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
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Tokenise `rows` for `kind` of training: "sft", "preference", "unpaired" or "prompt" (prompts to generate from).

    Returns the data set and a report (see `describe`). Columns of the data set, ids as lists of int:
      sft: index, prompt_ids, completion_ids         preference: index, prompt_ids, chosen_ids, rejected_ids
      prompt: index, prompt_ids
      unpaired: index, prompt_ids, completion_ids, label; rows of preference data become two, 2 x index and the next
    and those of `CARRIED` that the rows have: margin, chosen_rank, rejected_rank of preference data.
    Rows that hold these ids already are taken as they stand.
    `index` is the row's number in `rows`, whatever was dropped. Texts without a prompt ("text", "messages") have an
    empty `prompt_ids`: every token is trained on.

    `max_length` limits prompt + completion (None: no limit), `max_prompt_length` the prompt. With `overlong="truncate"`
    the prompt gives way first, from its left and down to a quarter of max_length, then the completion's end; "drop"
    drops such rows, "error" raises. `bad_rows` says what to do with rows that lack a value, hold a wrong type, an empty
    completion, or a chosen equal to its rejected. The work is cached by `datasets` and shared by `num_proc` processes.

    Raises DataError (a BadInput, a ValueError): missing columns, bad rows, no row left. BadInput: bad settings, a
    tokenizer without a chat template or an EOS token where one is needed.
    """
    if bad_rows not in ("error", "drop"):
        raise BadInput(f"bad_rows='{bad_rows}': expected 'error' or 'drop'")
    own = ["prompt_ids", *(f"{side}_ids" for side in SIDES[kind])]
    if kind != "unpaired" and set(own) <= set(rows.column_names):
        kept = rows.select_columns(own).add_column("index", list(range(len(rows))))
        longest = max(map(sum, zip(_lengths(kept, "prompt_ids"), _longest_side(kept, SIDES[kind]))))
        return kept, {"rows": len(rows), "kept": len(rows), "dropped": {}, "changed": {}, "longest": longest}
    if kind == "unpaired" and "label" not in rows.column_names and "rejected" in rows.column_names:
        limits: Any = {"max_length": max_length, "max_prompt_length": max_prompt_length, "overlong": overlong}
        kept, report = prepare(rows, tokenizer, "preference", **limits, bad_rows=bad_rows, num_proc=num_proc)
        report["changed"]["pairs, each split into a desirable and an undesirable row"] = len(kept)
        return _split_pairs(kept), report
    layout = tuple(name for name in detect_layout(rows.column_names, kind) if name != "label")
    ids = datasets.List(datasets.Value("int32"))
    columns = {name: ids for name in ("prompt_ids", *(f"{side}_ids" for side in SIDES[kind]))}
    done = rows.map(
        _encode_row,
        with_indices=True,
        fn_kwargs={
            "encoder": Encoder(tokenizer),
            "layout": layout,
            "sides": SIDES[kind],
            "limits": Limits(max_length, max_prompt_length, overlong),
        },
        remove_columns=rows.column_names,
        features=datasets.Features(
            {
                "index": datasets.Value("int64"),
                **columns,
                "status": datasets.Value("string"),
                "notes": datasets.List(datasets.Value("string")),
            }
        ),
        num_proc=num_proc,
        desc=f"Tokenising {kind} data",
    )
    status = done["status"][:]
    report = _report(status, done["notes"][:])
    _raise_where_asked(status, report, {"bad": bad_rows == "error", "long": overlong == "error"})
    kept = done.select([i for i, reason in enumerate(status) if not reason]).remove_columns(["status", "notes"])
    kept = _carry(rows, kept, kind)
    report["longest"] = max(map(sum, zip(_lengths(kept, "prompt_ids"), _longest_side(kept, SIDES[kind]))))
    return kept, report


def describe(report: dict[str, Any]) -> str:
    """The report of `prepare` as lines for the terminal."""
    lines = [f"{report['kept']} of {report['rows']} rows kept, the longest of {report['longest']} tokens"]
    for reason, count in report["dropped"].items():
        lines.append(f"dropped {count}: {reason} ({_row_numbers(report['dropped_rows'][reason], count)})")
    lines += [f"changed {count}: {note}" for note, count in report["changed"].items()]
    return "\n".join(lines)


def check_vocab(dataset: datasets.Dataset, vocab_size: int) -> None:
    """Raise ValueError, naming the id and the row, where a token id does not fit a model with `vocab_size` tokens."""
    columns = [name for name in dataset.column_names if name.endswith("_ids")]
    for table in _tables(dataset):
        for name in columns:
            largest = pc.max(pc.list_flatten(table[name])).as_py()
            if largest is not None and largest >= vocab_size:
                row = next(i for i, ids in enumerate(table[name].to_pylist()) if largest in ids)
                where = table["index"][row].as_py()
                raise BadInput(
                    f"token id {largest} in '{name}' of row {where} is outside the model's vocabulary "
                    f"of {vocab_size}: the tokenizer belongs to another model, or the embeddings were not resized"
                )


def _encode_row(
    row: dict[str, Any],
    index: int,
    *,
    encoder: Encoder,
    layout: tuple[str, ...],
    sides: tuple[str, ...],
    limits: Limits,
) -> dict[str, Any]:
    out = {"index": index, "prompt_ids": [], **{f"{side}_ids": [] for side in sides}, "status": "", "notes": []}
    try:
        parts, arguments = normalise(row, layout), template_arguments(row)
        notes: list[str] = []
        if not sides:
            prompt, completions = encoder.prompt(parts["prompt"], arguments), []
        elif "prompt" in parts:
            prompt, completions, notes = encoder.split(parts["prompt"], [parts[side] for side in sides], arguments)
        else:
            prompt, completions = [], [encoder.whole(parts[layout[0]], arguments)]
        prompt, completions, cuts = fit(prompt, completions, limits, encoder.bos)
    except BadRow as error:
        return {**out, "status": f"bad: {error}"}
    except TooLong as error:
        return {**out, "status": f"long: {error}"}
    if any(len(completion) < 2 - bool(prompt) for completion in completions):
        return {**out, "status": "drop: no completion token is left to predict"}
    if len(completions) == 2 and completions[0] == completions[1]:
        return {
            **out,
            "status": "drop: chosen and rejected are the same tokens" + (" after truncation" if cuts else ""),
        }
    if not sides and not prompt:
        return {**out, "status": "bad: 'prompt' is empty"}
    ids = {f"{side}_ids": completion for side, completion in zip(sides, completions)}
    return {**out, "prompt_ids": prompt, **ids, "notes": [*dict.fromkeys(notes), *cuts]}


def _carry(rows: datasets.Dataset, kept: datasets.Dataset, kind: Kind) -> datasets.Dataset:
    names = [name for name in CARRIED.get(kind, ()) if name in rows.column_names]
    part = rows.select_columns(names).select(kept["index"][:]) if names else rows
    for name in names:
        column = part[name][:]
        if wrong := [i for i, x in zip(kept["index"], column) if not isinstance(x, (int, float)) or x != x]:
            raise DataError(f"'{name}' must be a number: row {wrong[0]} (counted from 0) has none")
        kept = kept.add_column(name, column)
    return kept


def _split_pairs(pairs: datasets.Dataset) -> datasets.Dataset:
    def split(pair: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "index": [2 * i + side for i in pair["index"] for side in (0, 1)],
            "prompt_ids": [ids for ids in pair["prompt_ids"] for _ in (0, 1)],
            "completion_ids": [ids for both in zip(pair["chosen_ids"], pair["rejected_ids"]) for ids in both],
            "label": [label for _ in pair["index"] for label in (True, False)],
        }

    return pairs.map(split, batched=True, remove_columns=pairs.column_names, desc="Splitting pairs")


def _report(status: list[str], notes: list[list[str]]) -> dict[str, Any]:
    dropped: dict[str, list[int]] = {}
    for i, reason in enumerate(status):
        if reason:
            dropped.setdefault(reason.partition(": ")[2], []).append(i)
    return {
        "rows": len(status),
        "kept": sum(not reason for reason in status),
        "dropped": {reason: len(where) for reason, where in dropped.items()},
        "dropped_rows": {reason: where[:5] for reason, where in dropped.items()},
        "changed": dict(Counter(note for row in notes for note in row)),
    }


def _raise_where_asked(status: list[str], report: dict[str, Any], forbidden: dict[str, bool]) -> None:
    counts = Counter(reason for reason in status if forbidden.get(reason.partition(": ")[0]))
    if counts or not report["kept"]:
        reasons = [reason.partition(": ")[2] for reason in counts] or list(report["dropped"])
        lines = [
            f"{report['dropped'][one]} x {one} ({_row_numbers(report['dropped_rows'][one], report['dropped'][one])})"
            for one in reasons
        ]
        ways = {"bad": "bad_rows='drop' leaves them out", "long": "overlong='truncate' or 'drop' goes on"}
        hints = [way for key, way in ways.items() if any(reason.startswith(key) for reason in counts)]
        head = (
            f"{counts.total()} of {report['rows']} rows cannot be used"
            if counts
            else f"none of {report['rows']} rows is left"
        )
        tail = f"\n  ({'; '.join(hints)})" if hints and report["kept"] else ""
        raise DataError("\n  ".join([head + ":", *lines]) + tail, dict(report["dropped"]))


def _row_numbers(where: list[int], count: int) -> str:
    more = ", ..." if count > len(where) else ""
    return f"{'rows' if count > 1 else 'row'} {', '.join(str(i) for i in where)}{more}, counted from 0"


def _lengths(dataset: datasets.Dataset, column: str) -> list[int]:
    return [length for table in _tables(dataset) for length in pc.list_value_length(table[column]).to_pylist()]


def _longest_side(dataset: datasets.Dataset, sides: tuple[str, ...]) -> list[int]:
    columns = [_lengths(dataset, f"{side}_ids") for side in sides]
    return [max(lengths) for lengths in zip(*columns)] if columns else [0] * len(dataset)


def _tables(dataset: datasets.Dataset) -> Iterator[Any]:
    """The rows as Arrow tables: ids of long data sets are counted without making Python lists of them."""
    return dataset.with_format("arrow").iter(batch_size=10_000)
