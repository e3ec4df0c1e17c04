"""Label Studio's JSON: its tasks with their annotations as items with marks, and back.

| mode | data | control tag, `type` of the result | value |
|---|---|---|---|
| pair | prompt, answer1, answer2 | Pairwise | {"selected": "left" or "right"} |
| | (a tie) | Choices | {"choices": ["equal"]} |
| mark | prompt, answer | Choices | {"choices": ["ok"]} or ["not ok"] |
| score | prompt, answer | Rating | {"rating": 4} |
| rank | prompt, items: [{id, title, body}] | Ranker | {"ranker": {"1": [ids], "2": [ids], ...}}, or one list in order |

A comment is a TextArea. A cancelled annotation is a skip, one of the ground truth makes a gold item. Conversations are
written as text with the roles before the turns, and beside it, under `rows`, as they are.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from align_engine.assessment.rate.items import Answer, Given, Item
from align_engine.assessment.rate.records import Mark, Record
from align_engine.assessment.rate.sections import ItemSection
from align_engine.assessment.rate.values import dense
from align_engine.data.json_text import loads
from align_engine.errors import BadInput

GOOD = ("ok", "good", "yes", "accept", "positive")
BAD = ("not ok", "bad", "no", "reject", "negative")
EQUAL = ("equal", "tie", "same")
PROMPTS = ("prompt", "question", "instruction")
INTERFACES = {
    "pair": '<Pairwise name="better" toName="answer1,answer2"/>\n  <Choices name="tie" toName="prompt" choice="single">'
    '<Choice value="equal"/></Choices>\n  <Text name="answer1" value="$answer1"/>\n'
    '  <Text name="answer2" value="$answer2"/>',
    "mark": '<Text name="answer" value="$answer"/>\n  <Choices name="mark" toName="answer" choice="single">'
    '<Choice value="ok"/><Choice value="not ok"/></Choices>',
    "score": '<Text name="answer" value="$answer"/>\n  <Rating name="score" toName="answer" maxRating="{most}"/>',
    "rank": '<List name="answers" value="$items"/>\n  <Ranker name="rank" toName="answers">{buckets}</Ranker>',
}


def is_file(path: str) -> bool:
    """Whether a file holds Label Studio's tasks."""
    if not path.endswith(".json") or not Path(path).is_file():
        return False
    try:
        found = loads(Path(path).read_bytes())
    except ValueError:
        return False
    first = found[0] if isinstance(found, list) and found else None
    return isinstance(first, dict) and isinstance(first.get("data"), dict)


def read(section: ItemSection, name: str, mode: str) -> list[Item]:
    """The items of a file of tasks, with the marks of their annotations.

    Raises:
        BadInput: a task that is of another mode, or damaged, by its number; `bad_rows` drop leaves it out.
    """
    found = []
    for number, task in enumerate(loads(Path(name).read_bytes()), 1):
        try:
            found.append(_item(task, mode))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            if section.bad_rows == "error":
                why = error if isinstance(error, BadInput) else f"{type(error).__name__} {error}"
                raise BadInput(f"{name!r} task {number} cannot be read in mode {mode}: {why} (--bad_rows drop leaves "
                               "such tasks out)") from error  # fmt: skip
    if not found:
        raise BadInput(f"{name!r} holds no task of mode {mode}")
    return found


def _item(task: dict[str, Any], mode: str) -> Item:
    data = task["data"]
    rows = data.get("rows") or {}
    prompt = rows.get("prompt") or next((data[key] for key in PROMPTS if data.get(key)), None)
    if not isinstance(prompt, str | list):
        raise BadInput(f"its data have no {', '.join(PROMPTS)}")
    if mode == "rank":
        ids = [str(one["id"]) for one in data["items"]]
        texts = rows.get("answers") or [one.get("body") or one.get("html") or one.get("title") for one in data["items"]]
    else:
        ids = ["answer1", "answer2"] if mode == "pair" else ["answer"]
        texts = rows.get("answers") or [data.get(name) for name in ids]
    if not all(isinstance(text, str | list) and text for text in texts):
        raise BadInput(f"its data have no {' and '.join(ids)}")
    answers = [Answer(text, {}) for text in texts]
    marks, gold = list[Given](), None
    for annotation in task.get("annotations") or ():
        value = None if annotation.get("was_cancelled") else _value(annotation["result"], mode, ids)
        if annotation.get("ground_truth") and value is not None:
            gold = value
        else:
            who, said = _who(annotation.get("completed_by")), _comment(annotation.get("result") or ())
            seconds, at = float(annotation.get("lead_time") or 0), _time(annotation.get("created_at"))
            marks.append(Given(who, value, said, seconds, at))
    return Item(prompt, answers, gold, marks)


def _value(result: Sequence[dict[str, Any]], mode: str, ids: Sequence[str]) -> list[int]:
    """A mark by the answers' order. Raises BadInput where the results hold none of this mode."""
    for one in result:
        kind, value = one.get("type"), one.get("value") or {}
        words = [str(word).lower() for word in value.get("choices") or ()]
        if mode == "pair" and kind == "pairwise" and value.get("selected") in ("left", "right"):
            return [1, 2] if value["selected"] == "left" else [2, 1]
        if mode == "pair" and set(words) & {*EQUAL}:
            return [1, 1]
        if mode == "mark" and set(words) & {*GOOD, *BAD}:
            return [int(bool(set(words) & {*GOOD}))]
        if mode == "score" and kind == "rating":
            return [int(value["rating"])]
        if mode == "rank" and kind == "ranker":
            return _ranks(value["ranker"], ids)
    raise BadInput(f"an annotation holds no mark of this mode, but {[one.get('type') for one in result]}")


def _ranks(buckets: dict[str, list[Any]], ids: Sequence[str]) -> list[int]:
    if all(name.isdigit() for name in buckets):
        places = {str(one): int(name) for name, held in buckets.items() for one in held}
    else:
        (order,) = buckets.values()
        places = {str(one): place for place, one in enumerate(order)}
    return dense([places[one] for one in ids])


def _who(completed_by: Any) -> str:
    if isinstance(completed_by, dict):
        completed_by = completed_by.get("email") or completed_by.get("username") or completed_by.get("id")
    text = "".join(c for c in str(completed_by if completed_by is not None else "label studio") if c.isprintable())
    return text[:40] or "label studio"


def _comment(result: Iterable[dict[str, Any]]) -> str:
    found = [(one.get("value") or {}).get("text") for one in result if one.get("type") == "textarea"]
    return "\n".join("\n".join(text) if isinstance(text, list) else str(text) for text in found if text)


def _time(text: Any) -> float:
    try:
        return datetime.datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


def tasks(records: Sequence[Record], mode: str, people: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Items as Label Studio's tasks.

    Args:
        people: whose place in it is the number of an annotation's author.
    """
    for record in records:
        texts = [_plain(text) for text in record.texts]
        ids = [f"answer{i}" for i in range(1, len(texts) + 1)] if len(texts) > 1 else ["answer"]
        shown: Any = dict(zip(ids, texts))
        if mode == "rank":
            shown = {"items": [{"id": one, "title": f"Answer {i}", "body": text}
                               for i, (one, text) in enumerate(zip(ids, texts), 1)]}  # fmt: skip
        rows = {} if isinstance(record.prompt, str) else {"rows": {"prompt": record.prompt, "answers": record.texts}}
        given = [_annotation(mark, mode, ids, people) for mark in record.marks]
        if record.gold:
            given.append({"result": _result(record.gold, mode, ids), "ground_truth": True, "was_cancelled": False})
        yield {"id": record.id, "data": {"prompt": _plain(record.prompt), **shown, **rows}, "annotations": given}


def _annotation(mark: Mark, mode: str, ids: Sequence[str], people: Sequence[str]) -> dict[str, Any]:
    result = [] if mark.value is None else _result(mark.value, mode, ids)
    if mark.comment:
        result.append({"from_name": "comment", "to_name": "prompt", "type": "textarea",
                       "value": {"text": [mark.comment]}})  # fmt: skip
    at = datetime.datetime.fromtimestamp(mark.at, datetime.UTC).isoformat()
    who = {"id": people.index(mark.person) + 1, "email": mark.person}
    return {"result": result, "was_cancelled": mark.value is None, "ground_truth": False, "completed_by": who,
            "lead_time": round(mark.seconds, 3), "created_at": at}  # fmt: skip


def _result(value: Sequence[int], mode: str, ids: Sequence[str]) -> list[dict[str, Any]]:
    if mode == "pair" and value[0] == value[1]:
        found = ("tie", "prompt", "choices", {"choices": ["equal"]})
    elif mode == "pair":
        found = ("better", "answer1", "pairwise", {"selected": "left" if value[0] == 1 else "right"})
    elif mode == "mark":
        found = ("mark", "answer", "choices", {"choices": ["ok" if value[0] else "not ok"]})
    elif mode == "score":
        found = ("score", "answer", "rating", {"rating": value[0]})
    else:
        buckets: dict[str, list[str]] = {str(rank): [] for rank in range(1, len(ids) + 1)}
        for one, rank in zip(ids, value):
            buckets[str(rank)].append(one)
        found = ("rank", "answers", "ranker", {"ranker": buckets})
    return [dict(zip(("from_name", "to_name", "type", "value"), found))]


def interface(mode: str, scale: Sequence[int], most: int) -> str:
    """The labelling interface that goes with the tasks. `most`: answers of the largest item."""
    buckets = "".join(f'<Bucket name="{rank}" title="{rank}"/>' for rank in range(1, most + 1))
    body = INTERFACES[mode].format(most=scale[1], buckets=buckets)
    comment = '<TextArea name="comment" toName="prompt" placeholder="comment"/>'
    return f'<View>\n  <Text name="prompt" value="$prompt"/>\n  {body}\n  {comment}\n</View>\n'


def _plain(text: Any) -> str:
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] in ("user", "assistant"):
        return text[0]["content"]
    return "\n\n".join(f"{message['role']}: {message.get('content') or ''}" for message in text)
