"""What the public functions are given, judged at the door: one sentence that names the function and the argument."""

from __future__ import annotations

import difflib
import inspect
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from align_kernels.head import HeadOptions

NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)
Function = TypeVar("Function", bound=Callable)


@cache
def hints(function: Callable) -> dict[str, Any]:
    """The type of each argument by name, but for `self` and `**head`."""
    kinds, parameters = get_type_hints(function), inspect.signature(function).parameters.values()
    return {p.name: kinds.get(p.name, Any) for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"}


def public(function: Function) -> Function:
    """Check the arguments of a function without `**head` against its annotations before it runs, see `check`."""
    names, name = tuple(inspect.signature(function).parameters), function.__qualname__.removesuffix(".apply")

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            check(name, hints(function), dict(zip(names, args)) | kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


HEAD = hints(HeadOptions)
OPTIONS: dict[Callable, Mapping[str, Any]] = {}  # of a function with `**head`: what that takes beside the head's


def takes(options: Mapping[str, Any]) -> Callable[[Function], Function]:
    """Note which keywords, name -> type, the `**head` of a function takes beside `HeadOptions`. The mapping may
    grow later."""

    def note(function: Function) -> Function:
        OPTIONS[function] = options
        return function

    return note


def check_call(function: Callable) -> None:
    """`check` for a function with `**head`, whose first line calls this: it stands not between that and its caller."""
    if torch.compiler.is_compiling():
        return
    defaults, given = _defaults(function), dict(sys._getframe(1).f_locals)
    head = given.pop("head")
    own = {key: value for key, value in given.items() if value is not defaults[key]}
    known = {**hints(function), **HEAD, **OPTIONS.get(function, {})}
    check(function.__qualname__, known, own | head)


@cache
def _defaults(function: Callable) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def check(name: str, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Judge the arguments of a call of `name` by the types in `known`.

    Raises:
        TypeError: an argument of another type; one that is not known.
        ValueError: tensors that lie on several devices.
    """
    first = None
    for key, value in given.items():
        if key == "self":
            continue
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.5)
            instead = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{name}() takes no argument {key!r}: {instead}")
        if not fits(value, known[key]):
            raise TypeError(f"{name}(): {key} must be {words(known[key])}, got {what(value)}{hint(value, known[key])}")
        tensors = value if isinstance(value, tuple) else (value,)
        for x in tensors:
            if isinstance(x, Tensor) and x.dim():
                first = first or (key, x.device)
                if x.device != first[1]:
                    raise ValueError(
                        f"{name}(): {key} is on {x.device}, {first[0]} on {first[1]}: move them to one device"
                    )


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def fits(value: Any, kind: Any) -> bool:
    return any(_fits(value, option) for option in _options(kind))


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Any or isinstance(origin, TypeVar):
        return True
    if origin is Literal:
        return isinstance(value, str)
    if origin is float:
        return isinstance(value, NUMBERS) or (isinstance(value, Tensor) and value.numel() == 1)
    if origin is int:
        return isinstance(value, numbers.Integral | torch.SymInt) or (isinstance(value, float) and value.is_integer())
    if origin is bool:
        return isinstance(value, bool) or (hasattr(value, "dtype") and str(value.dtype).endswith("bool"))
    if origin is tuple and Ellipsis not in inner:
        return isinstance(value, Sequence) and len(value) == len(inner) and all(map(fits, value, inner))
    if isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str:
        if issubclass(origin, tuple) and hasattr(origin, "_fields"):  # one of ours, or its fields in their order
            return isinstance(value, tuple) and all(map(fits, value, get_type_hints(origin).values()))
        return isinstance(value, Sequence) and all(fits(x, inner[0]) for x in value)
    return isinstance(value, origin)


def words(kind: Any) -> str:
    return " or ".join(_words(option) for option in _options(kind))


def _words(kind: Any) -> str:
    plain = {float: "a number", int: "a whole number", bool: "True or False", NoneType: "None", str: "a word"}
    if kind in plain:
        return plain[kind]
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is tuple and Ellipsis not in inner:
        return f"({', '.join(map(words, inner))})"
    if issubclass(origin, Mapping):
        return "a dict"
    if inner:
        return f"a list of {words(inner[0])}"
    return "a tensor" if origin is Tensor else f"a {origin.__name__}"


def what(value: Any) -> str:
    if value is None or isinstance(value, str | bool | numbers.Number):
        return repr(value)
    kind = type(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {kind.__name__} of {', '.join(type(x).__name__ for x in value[:3]) or 'nothing'}"
    return f"a {kind.__name__} of {kind.__module__.partition('.')[0]}"


def hint(value: Any, kind: Any) -> str:
    """What to pass instead, where it is known."""
    if Tensor not in _options(kind):
        return ""
    if isinstance(value, torch.nn.Module):
        return ": pass its .weight" if hasattr(value, "weight") else ": pass a tensor of it"
    if type(value).__module__ == "numpy":
        return ": pass torch.from_numpy of it"
    return ": pass torch.tensor of it" if isinstance(value, list) else ""


def check_float(name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
