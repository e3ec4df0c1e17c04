"""Families: functions that a loss chooses among by name, each with options of its own.

An option is declared once, in the signature of the function that reads it: its type, its range, and the default that
leaves it alone. What checks options, passes them on or leaves them out knows them from there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

F = TypeVar("F")
Function = TypeVar("Function", bound=Callable)


def check_taken(fn: Callable, taken: Callable | None) -> None:
    """Refuse a name that another function has; the same one again, as a reloaded module brings it, is taken."""
    place, other = (None if x is None else f"{x.__module__}.{x.__qualname__}" for x in (fn, taken))
    if other not in (None, place):
        raise ValueError(f"the loss name {fn.__name__!r} is taken by {other}: give {place} another name")


class Limit(NamedTuple):
    """The range of an option."""

    holds: Callable[[Any], bool]
    said: str  # where it does not hold, of {name} and {value}


Positive = Annotated[float, Limit(lambda x: x > 0, "{name} must be above 0, got {value}")]
NotNegative = Annotated[float, Limit(lambda x: x >= 0, "{name} must not be negative, got {value}")]
Smoothing = Annotated[float, Limit(lambda x: 0 <= x < 0.5, "{name} must lie in [0, 0.5), got {value}")]


@dataclass(frozen=True)
class Member(Generic[F]):
    """A function of a family."""

    fn: Callable[..., Any]
    needs: frozenset[str]  # keywords that the family gives to every member that names them
    options: Mapping[str, Any]  # name -> default
    limits: Mapping[str, Limit]
    facts: F  # what the family's loss must know of it


class Family(dict[str, Member[F]]):
    """Its members by name.

        TERMS = Family(Facts)

        @TERMS.add(unit="batch")
        def mine(x: Pairs, *, beta: float, tau: Positive = 0.05) -> Tensor: ...

        TERMS("mine", pairs, beta=0.1, tau=0.2, lambda=5.0)  # lambda, which another member reads, does not reach it

    Keywords of a member without a default are given by the family; the others are its options.
    """

    def __init__(self, facts: Callable[..., F]) -> None:
        super().__init__()
        self.facts = facts
        self.options: dict[str, Any] = {}  # of all members, name -> default
        self.kinds: dict[str, Any] = {}  # their types

    def add(self, **facts: Any) -> Callable[[Function], Function]:
        """Add a function by its name.

        Raises:
            ValueError: a name that is taken; an option that another member has with another type or default.
        """
        known = self.facts(**facts)

        def add(fn: Function) -> Function:
            name, hints = fn.__name__, get_type_hints(fn, include_extras=True)
            check_taken(fn, self[name].fn if name in self else None)
            keywords = [p for p in inspect.signature(fn).parameters.values() if p.kind is p.KEYWORD_ONLY]
            options = {p.name: p.default for p in keywords if p.default is not p.empty}
            kinds = {key: kind for key, kind in get_type_hints(fn).items() if key in options}
            for key in options:
                if (kinds[key], options[key]) != (self.kinds.get(key, kinds[key]), self.options.get(key, options[key])):
                    raise ValueError(f"the option {key!r} of {name!r} has another type or default than elsewhere")
            limits = {key: limit for key in options if (limit := _limit(hints[key])) is not None}
            self[name] = Member(fn, frozenset(p.name for p in keywords) - options.keys(), options, limits, known)
            self.options |= options
            self.kinds |= kinds
            return fn

        return add

    def __call__(self, name: str, *args: Any, **given: Any) -> Any:
        """What a member gives, which gets those of the keywords that it takes.

        Raises:
            TypeError: a keyword that no member takes.
        """
        member = self[name]
        for key in given:
            if key not in self.options and not any(key in other.needs for other in self.values()):
                raise TypeError(f"{name!r} takes no option {key!r}, nor does any of {', '.join(self)}")
        return member.fn(*args, **{key: x for key, x in given.items() if key in member.needs or key in member.options})

    def readers(self, option: str) -> list[str]:
        return [name for name, member in self.items() if option in member.options]

    def read(self, names: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
        """What is given, without the options that none of these members reads."""
        unread = self.options.keys() - {key for name in names for key in self[name].options}
        return {key: x for key, x in given.items() if key not in unread}

    def check_ranges(self, names: Iterable[str], given: Mapping[str, Any]) -> None:
        """Refuse an option of a call of these members, as they declare it, that is out of its range.

        Raises:
            ValueError: naming it.
        """
        for key, value in given.items():
            for name in [name for name in names if key in self[name].options] or self.readers(key)[:1]:
                limit = self[name].limits.get(key)
                if limit is not None and value is not None and not limit.holds(value):
                    raise ValueError(limit.said.format(name=key, value=value))

    def check(self, names: Iterable[str], given: Mapping[str, Any]) -> None:
        """`check_ranges`, and refuse an option that none of these members reads and that is not its default.

        Raises:
            ValueError: naming it.
        """
        self.check_ranges(names, given)
        for key, value in given.items():
            check_unread(key, value, self.options[key], self.readers(key), names)


def _limit(kind: Any) -> Limit | None:
    """Of an annotation `Annotated[.., limit]`, or one that may be None too."""
    return next((x for part in (kind, *get_args(kind)) for x in get_args(part) if isinstance(x, Limit)), None)


def check_unread(name: str, value: Any, default: Any, readers: Iterable[str], loss_types: Iterable[str]) -> None:
    """Refuse an option that is not its default where only other loss types read it."""
    if value != default and not set(readers) & set(loss_types):
        raise ValueError(
            f"{name}={value} is read by loss_type {', '.join(sorted(readers))}, not by {', '.join(loss_types)}"
        )
