"""Items of a data set's rows.

| mode | an item of rows with `completion` | of rows with `chosen` and `rejected` |
|---|---|---|
| pair | each two different answers to one prompt | each chosen with each rejected answer |
| rank | all different answers to one prompt | the answers of the row |
| mark, score | each answer | each answer |

Which answer was called better in the rows is not looked at, but for gold items, whose right marks they tell.
"""

from __future__ import annotations

import json
import math
from typing import Any

from align_engine.assessment.rate.items import Answer, Item, of_group
from align_engine.assessment.rate.sections import ItemSection
from align_engine.data.formats import BadRow, has_several
from align_engine.errors import BadInput
from align_engine.preparation import folder, layouts
from align_engine.preparation.sections import MappedInput

Row = dict[str, Any]
SIDES = ("chosen", "rejected")
LEVELS = {"rank": -1, "score": 1, "label": 1}  # columns that tell how good an answer is, and which way


def read(section: ItemSection, name: str, mode: str) -> list[Item]:
    """The items of a data set.

    Args:
        name: of the data set.
    Raises:
        BadInput: rows that cannot be read, or hold nothing to rate in this mode.
    """
    mapped = MappedInput(dataset_name=name, bad_rows=section.bad_rows, columns=section.columns)
    if name == section.dataset_name:  # and not gold
        mapped.dataset_config, mapped.dataset_train_split = section.dataset_config, section.dataset_train_split
    rows = layouts.read(mapped)
    if not {"completion", *SIDES} & set(rows.column_names):
        raise BadInput(
            f"{name!r} holds prompts without answers (columns {', '.join(rows.column_names)}): nothing can be rated; "
            "`align generate` makes answers"
        )
    groups: dict[str, tuple[Any, list[Answer]]] = {}
    with folder.origin(mapped).named():
        read_rows = list(layouts.converted(rows, mapped, _answers))
    for number, (prompt, answers) in read_rows:
        key = json.dumps(prompt, sort_keys=True)
        if mode in ("pair", "rank") and len(answers) > 1:
            key += f" {number}"  # answers that stand in one row are rated together
        groups.setdefault(key, (prompt, []))[1].extend(answers)
    found = [item for prompt, answers in groups.values() for item in of_group(prompt, answers, mode)]
    if not found:
        raise BadInput(f"{name!r}: no prompt has two different answers, and mode = {mode!r} needs them")
    return found


def _answers(row: Row) -> tuple[Any, list[Answer]]:
    """The prompt and the answers of a row in TRL's layout. Raises BadRow where there are none."""
    prompt = row["prompt"]
    sides = [side for side in ("completion", *SIDES) if row.get(side) is not None]
    others = {name: value for name, value in row.items() if name not in ("prompt", "completion", *SIDES)}
    found = []
    for side in sides:
        values = row[side] if has_several(row[side]) else [row[side]]
        about = {name.removeprefix(f"{side}_"): value for name, value in others.items() if _belongs(name, side)}
        about = {name: value for name, value in about.items() if name not in LEVELS}  # people say that anew
        for value in values:
            text = layouts.checked(value, side, prompt)
            found.append(Answer(text, about, _level(row, side), side if side in SIDES else None))
    if not found:
        raise BadRow("there is no answer")
    return prompt, found


def _belongs(name: str, side: str) -> bool:
    """Whether a column tells about this answer, and not about the other one."""
    return not name.startswith(tuple(f"{other}_" for other in SIDES if other != side))


def _level(row: Row, side: str) -> float | None:
    if side in SIDES:
        return float(side == "chosen")
    for column, sign in LEVELS.items():
        value = row.get(column)
        if isinstance(value, int | float) and math.isfinite(value):
            return sign * float(value)
    return None
