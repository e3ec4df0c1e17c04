"""From rows to token ids: the prompt is encoded once, completions are appended, what is dropped is counted."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import datasets
import pyarrow.compute

from align_engine.data.encoder import Encoder
from align_engine.data.formats import BadRow, Kind, detect_layout, normalise, template_arguments
from align_engine.data.limits import fit
from align_engine.errors import BadInput

pc: Any = pyarrow.compute
CARRIED = {"preference": ("margin", "chosen_rank", "rejected_rank"), "unpaired": ("label",)}  # numbers beside the texts
WAYS = {"bad": "bad_rows='drop' leaves them out", "long": "overlong='truncate' or 'drop' goes on"}
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

    Raises BadInput: missing columns, bad rows, no row left; a tokenizer without a chat template or an EOS token where
    one is needed.
    """
    sides, settings = SIDES[kind], {"max_length": max_length, "max_prompt_length": max_prompt_length}
    if kind == "unpaired" and "label" not in rows.column_names and "rejected" in rows.column_names:
        more: Any = {"overlong": overlong, "bad_rows": bad_rows, "num_proc": num_proc}
        kept, report = prepare(rows, tokenizer, "preference", **settings, **more)
        report["changed"]["pairs, each split into a desirable and an undesirable row"] = len(kept)
        return _split_pairs(kept), report
    names = ["prompt_ids", *(f"{side}_ids" for side in sides)]
    carried = [name for name in CARRIED.get(kind, ()) if name in rows.column_names]
    ready = kind != "unpaired" and set(names) <= set(rows.column_names)
    layout = () if ready else tuple(name for name in detect_layout(rows.column_names, kind) if name != "label")
    given = {"encoder": Encoder(tokenizer), "layout": layout, "sides": sides, "truncate": overlong == "truncate"}
    text, number = datasets.Value("string"), datasets.Value("int64")
    features = dict.fromkeys(names, datasets.List(datasets.Value("int32"))) | {n: rows.features[n] for n in carried}
    features |= {"index": number, "length": number, "status": text, "notes": datasets.List(text)}
    done = rows.map(
        _encode_row, with_indices=True, fn_kwargs={"names": names, "carried": carried, **given, **settings},
        remove_columns=rows.column_names, features=datasets.Features(features), num_proc=num_proc,
        desc=f"Tokenising {kind} data",
    )  # fmt: skip
    found: dict[str, list[int]] = {"": []}  # rows by what is wrong with them
    for i, status in enumerate(done["status"]):
        found.setdefault(status, []).append(i)
    kept, dropped = done.select(found.pop("")), found
    _refuse(dropped, len(rows), len(kept), {"bad": bad_rows, "long": overlong})
    report = {
        "rows": len(rows),
        "kept": len(kept),
        "longest": max(kept["length"]),
        "dropped": {status.partition(": ")[2]: where for status, where in dropped.items()},
        "changed": dict(Counter(note for notes in done["notes"] for note in notes)),
    }
    return kept.remove_columns(["length", "status", "notes"]), report


def describe(report: dict[str, Any]) -> str:
    """The report of `prepare` as lines for the terminal."""
    lines = [f"{report['kept']} of {report['rows']} rows kept, the longest of {report['longest']} tokens"]
    lines += [f"dropped {len(where)}: {reason} ({_rows(where)})" for reason, where in report["dropped"].items()]
    return "\n".join([*lines, *(f"changed {count}: {note}" for note, count in report["changed"].items())])


def check_vocab(dataset: datasets.Dataset, vocab_size: int) -> None:
    """Raise BadInput, naming the id and the row, where a token id does not fit a model with `vocab_size` tokens."""
    columns = [name for name in dataset.column_names if name.endswith("_ids")]
    table: Any
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for name in columns:
            largest = pc.max(pc.list_flatten(table[name])).as_py()
            if largest is not None and largest >= vocab_size:
                row = next(i for i, ids in enumerate(table[name].to_pylist()) if largest in ids)
                what = f"token id {largest} in '{name}' of row {table['index'][row]}"
                why = "the tokenizer belongs to another model, or the embeddings were not resized"
                raise BadInput(f"{what} is outside the model's vocabulary of {vocab_size}: {why}")


def _encode_row(
    row: dict[str, Any], index: int, *, names: list[str], carried: list[str], layout: tuple[str, ...], **given: Any
) -> dict[str, Any]:
    ids, notes, status, beside = [[] for _ in names], [], "", {name: row[name] for name in carried}
    try:
        for name, value in beside.items():
            if not isinstance(value, int | float) or value != value:
                raise BadRow(f"'{name}' is not a number")
        ids, notes = _ids(row, layout, **given) if layout else ([row[name] for name in names], [])
    except BadRow as error:
        status = f"{error.kind}: {error}"
    length = len(ids[0]) + max(map(len, ids[1:]), default=0)
    return {"index": index, **dict(zip(names, ids)), **beside, "length": length, "status": status, "notes": notes}


def _ids(
    row: dict[str, Any], layout: tuple[str, ...], encoder: Encoder, sides: tuple[str, ...], **limits: Any
) -> tuple[list[list[int]], list[str]]:
    """([ids of the prompt, of each side], what was changed); raises BadRow."""
    parts, arguments = normalise(row, layout), template_arguments(row)
    notes: list[str] = []
    if not sides:
        prompt, completions = encoder.prompt(parts["prompt"], arguments), []
    elif "prompt" in parts:
        prompt, completions, notes = encoder.split(parts["prompt"], [parts[side] for side in sides], arguments)
    else:
        prompt, completions = [], [encoder.whole(parts[layout[0]], arguments)]
    prompt, completions, cuts = fit(prompt, completions, encoder.bos, **limits)
    if any(len(completion) < 2 - bool(prompt) for completion in completions):
        raise BadRow("no completion token is left to predict", "drop")
    if len(completions) == 2 and completions[0] == completions[1]:
        raise BadRow("chosen and rejected are the same tokens" + (" after truncation" if cuts else ""), "drop")
    if not sides and not prompt:
        raise BadRow("'prompt' is empty")
    return [prompt, *completions], [*dict.fromkeys(notes), *cuts]


def _split_pairs(pairs: datasets.Dataset) -> datasets.Dataset:
    def split(pair: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            "index": [2 * i + side for i in pair["index"] for side in (0, 1)],
            "prompt_ids": [ids for ids in pair["prompt_ids"] for _ in (0, 1)],
            "completion_ids": [ids for both in zip(pair["chosen_ids"], pair["rejected_ids"]) for ids in both],
            "label": [label for _ in pair["index"] for label in (True, False)],
        }

    return pairs.map(split, batched=True, remove_columns=pairs.column_names, desc="Splitting pairs")


def _refuse(dropped: dict[str, list[int]], rows: int, kept: int, asked: dict[str, str]) -> None:
    """Raise BadInput where rows are dropped for a reason that the recipe asks an error for, or none is left."""
    kinds = [kind for kind, way in asked.items() if way == "error" and any(one.startswith(kind) for one in dropped)]
    if kept and not kinds:
        return
    refused = {status: where for status, where in dropped.items() if status.partition(":")[0] in kinds}
    count = sum(map(len, refused.values()))
    lines = [f"{count} of {rows} rows cannot be used:" if refused else f"none of {rows} rows is left:"]
    for status, where in (refused or dropped).items():
        lines.append(f"{len(where)} x {status.partition(': ')[2]} ({_rows(where)})")
    if kept:
        lines.append(f"({'; '.join(WAYS[kind] for kind in kinds)})")
    raise BadInput("\n  ".join(lines))


def _rows(where: list[int]) -> str:
    more = ", ..." if len(where) > 5 else ""
    return f"{'rows' if len(where) > 1 else 'row'} {', '.join(map(str, where[:5]))}{more}, counted from 0"
