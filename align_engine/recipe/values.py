"""Fields of a recipe: what each type takes, as text or as a Python object, and the range of its numbers."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

ON, OFF = "on", "off"  # a Literal with both is a switch with a third way
YES, NO = ("true", "yes", "on", "y", "t", "1"), ("false", "no", "off", "n", "f", "0")
NOTHING = ("none", "null", "~", "")


@dataclass(frozen=True)
class Range:
    """Finite numbers in an interval.

    Args:
        interval: as it is written, e.g. "[0, 1)".
        also: a number outside it that is taken too.
        meaning: of `also`.
    """

    interval: str
    also: float | None = None
    meaning: str = ""

    @property
    def bounds(self) -> tuple[float, float]:
        """Where the interval begins and ends."""
        low, high = self.interval[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, value: float) -> bool:
        low, high = self.bounds
        above = value >= low if self.interval[0] == "[" else value > low
        below = value <= high if self.interval[-1] == "]" else value < high
        return value == self.also or (math.isfinite(value) and above and below)

    def __str__(self) -> str:
        (low, high), least = self.bounds, "at least" if self.interval[0] == "[" else "above"
        said = f"must lie in {self.interval}" if math.isfinite(high) else f"must be {least} {low:g}"
        said = said if math.isfinite(low) else "must be a finite number"
        return said if self.also is None else f"{said}, or {self.also:g} {self.meaning}"


@dataclass(frozen=True)
class Names:
    """Marks a list of names: as text they stand with commas or spaces between them.

    Args:
        nothing: a word for the empty list.
        whole: beginnings of names that may hold commas.
    """

    nothing: str
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bare:
    """Marks a field whose flag may stand without a value.

    Args:
        value: what it has then.
    """

    value: str


@dataclass(frozen=True)
class Keywords:
    """Marks text of the form name=value,name=value, which may also be given as a mapping or as JSON.

    Args:
        nothing: such text that stands for None, in lower case.
    """

    nothing: str = ""


Finite = Annotated[float, Range("(-inf, inf)")]
NotNegative = Annotated[float, Range("[0, inf)")]
Positive = Annotated[float, Range("(0, inf)")]
Share = Annotated[float, Range("[0, 1]")]
Part = Annotated[float, Range("(0, 1]")]
Count = Annotated[int, Range("[1, inf)")]


class Field(NamedTuple):
    """A type annotation taken apart."""

    kind: Any  # bool, int, float, str, a Literal or a list
    optional: bool
    marks: tuple[Any, ...]

    @property
    def is_list(self) -> bool:
        """Whether it holds several values."""
        return get_origin(self.kind) is list

    @property
    def is_switch(self) -> bool:
        """Whether its bare name turns it on."""
        return self.kind is bool or {ON, OFF} <= set(get_args(self.kind))

    @property
    def bare(self) -> str | None:
        """What the flag without a value stands for; None where it needs one."""
        marked = next((mark.value for mark in self.marks if isinstance(mark, Bare)), None)
        return "true" if self.is_switch else marked

    @property
    def range(self) -> Range | None:
        """Of its numbers, or those of its list; None where it holds none."""
        marks = (*self.marks, *(field_of(get_args(self.kind)[0]).marks if self.is_list else ()))
        return next((mark for mark in marks if isinstance(mark, Range)), None)


def field_of(annotation: Any) -> Field:
    """`Annotated[T, marks] | None`, in any order, as its parts."""
    optional, marks = False, ()
    while (origin := get_origin(annotation)) in (Annotated, Union, UnionType):
        annotation, *more = (one for one in get_args(annotation) if one is not NoneType)
        optional, marks = optional or origin is not Annotated, (*marks, *more)
    return Field(annotation, optional, marks)


def parse(field: Field, value: Any) -> Any:
    """The value as a field holds it.

    Text stands for a value of any type, as flags and YAML have it: `1e3` for an int, `yes` for a bool, `none` or `null`
    where None is allowed, numbers (or `Names`) with commas between them for a list.

    Raises:
        ValueError: the value is of another type; the message goes on after the value: "is not a whole number".
    """
    if field.is_list:
        return _list(field, value) or (None if field.optional else [])
    if field.optional and (value is None or is_nothing(value)):
        return None
    for mark in field.marks:
        if isinstance(mark, Keywords):
            value = _keywords(value)
            if field.optional and mark.nothing and str(value).lower() == mark.nothing:
                return None
    if get_origin(field.kind) is Literal:
        if field.is_switch and str(value).lower() in (*YES, *NO):
            return ON if _bool(value) else OFF
        if value not in get_args(field.kind):
            raise ValueError(f"is none of {', '.join(get_args(field.kind))}")
        return value
    return {bool: _bool, int: _int, float: _float, str: _text}[field.kind](value)


def is_nothing(value: Any, *words: str) -> bool:
    """Whether a value is text that says `none`, or one of the words."""
    return isinstance(value, str) and value.strip().lower() in (*NOTHING, *words)


def numbers(value: Any) -> Iterator[float]:
    """The numbers in a field's value: none, one, or those of a list."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int | float) and not isinstance(one, bool):
            yield one


def _list(field: Field, value: Any) -> list[Any]:
    inner = field_of(get_args(field.kind)[0])
    values = [value] if isinstance(value, str) else [] if value is None and field.optional else value
    if not isinstance(values, list | tuple):
        raise ValueError("is not a list")
    marks = [mark for mark in field.marks if isinstance(mark, Names)]
    names = [mark.nothing for mark in marks]
    if names or inner.kind is not str:
        whole = tuple(start for mark in marks for start in mark.whole)
        parts = [one.split(",") if isinstance(one, str) and not one.startswith(whole) else [one] for one in values]
        values = [one.strip() if isinstance(one, str) else one for part in parts for one in part]
        values = [one for one in values if one != ""] if len(values) > 1 else values  # `q_proj, v_proj` in a shell
    if len(values) == 1 and is_nothing(values[0], *names):
        return []
    try:
        return [parse(inner, one) for one in values]
    except ValueError as error:
        raise ValueError(f"holds what {error}") from None


def _bool(value: Any) -> bool:
    word = str(value).strip().lower()
    if isinstance(value, str | Integral) and word in (*YES, *NO):
        return word in YES
    raise ValueError("is neither true nor false")


def _int(value: Any) -> int:
    number = _number(value)
    if number is None or number % 1:
        raise ValueError("is not a whole number")
    if abs(number) >= 2**63:
        raise ValueError("does not fit into 64 bits")
    return int(number)


def _float(value: Any) -> float:
    number = _number(value)
    if number is None:
        raise ValueError("is not a number")
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _number(value: Any) -> float | None:
    """A number, exact where it is whole; None for what is none."""
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _keywords(value: Any) -> Any:
    """A mapping, or JSON of one, as name=value,name=value; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict):
        return value
    return ",".join(f"{name}={one}" for name, one in value.items())


def _text(value: Any) -> str:
    if not isinstance(value, str | os.PathLike) or not isinstance(text := os.fspath(value), str) or "\0" in text:
        raise ValueError("is not text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not UTF-8; a file or folder of such a name must be renamed")
    return text
