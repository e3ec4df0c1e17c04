"""Ways to break values, texts, JSON and tensor files. Each draws from the random numbers that it is given."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = 5000  # levels of a document that no reader's stack holds
TEXTS = ["", " ", "\n", "many", "nan", "None", "é" * 300, "a\x00b", "\x1b[31m", "\ud800", "${oc.env:HOME}", "${x", "~",
         "..", "<eos>"]  # fmt: skip
NUMBERS = [0, -1, 2, 1.5, -0.0, 1e30, -1e30, math.nan, math.inf, 2**31, 2**63, 2**70, -(2**70)]
OTHERS = [None, True, False, [], [1], [None], ["a", 1], [[[]]], {}, {"a": 1}, {"": None}, {"role": "user"}]
ODD: list[Any] = TEXTS + NUMBERS + OTHERS
SMALL = [value for value in ODD if not (isinstance(value, (int, float)) and abs(value) > 100)]
NO_TEXTS = [
    b"", b"\x00", b"\xff\xfe\x00\x01", b"\x80\x04\x95.", b"\n\n", b"PK\x03\x04", b"caf\xe9", b"<html>404</html>",
    b"null", b"[]", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"5", b'"x"', b"{", b"{}",
    b"[" * DEEP, b'{"a":' * DEEP, "{}".encode("utf-16"), b"\xef\xbb\xbf{}",
]  # fmt: skip


def replace(path: Path, data: bytes | str) -> None:
    """Write a file anew: what it was hard-linked to stays as it is."""
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def some_bytes(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """What was done to a file's bytes, and the result."""
    at = rng.randrange(len(data)) if data else 0
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: data[:at],
        "a byte flipped": lambda: (
            data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :] if data else b"x"
        ),
        "bytes put in": lambda: data[:at] + rng.choice([b"\xff\xfe", b"\x00\x00", b"{", b'"', b"\n"]) + data[at:],
        "doubled": lambda: data + data,
        "other bytes": lambda: rng.choice(NO_TEXTS),
        "zeros": lambda: bytes(len(data)),
    }
    way = rng.choice(list(ways))
    return way, ways[way]()


def some_file(rng: random.Random, path: Path) -> str:
    """Break a file as a whole: gone, a folder, a link to nowhere, other bytes. What was done."""
    way = rng.choice(["gone", "a folder", "a link to nowhere", "bytes", "bytes", "bytes", "bytes"])
    if way == "bytes":
        way, data = some_bytes(rng, path.read_bytes())
        replace(path, data)
        return f"{path.name}: {way}"
    path.unlink()
    if way == "a folder":
        path.mkdir()
    elif way == "a link to nowhere":
        path.symlink_to("nowhere")
    return f"{path.name}: {way}"


def places(tree: Any, here: list[Any] | None = None) -> list[list[Any]]:
    """The path of keys to every value of a JSON document."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = [[*(here or []), key] for key, _ in inner]
    return found + [deeper for at in found for deeper in places(tree[at[-1]], at)]


def some_json(rng: random.Random, path: Path, values: list[Any] = ODD) -> str:
    """Break one value of a JSON file: another one, none, or under another name. What was done."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    if not (found := places(tree)):
        return some_file(rng, path)
    # few of those below a long list (a vocabulary), which would be nearly all
    shallow = [one for one in found if len(one) <= 2] or found
    at = rng.choice(shallow if rng.random() < 0.5 else found)
    parent, key = tree, at[-1]
    for step in at[:-1]:
        parent = parent[step]
    what, name = rng.choice(["gone", "renamed", "odd", "odd", "odd", "odd"]), ".".join(map(str, at))
    if what == "odd":
        parent[key] = rng.choice(values)
        what = f"= {parent[key]!r:.60}"
    elif isinstance(parent, list):
        parent.insert(key, rng.choice(values))
        what = "has a neighbour"
    else:
        value = parent.pop(key)
        if what == "renamed":
            parent[f"{key}_"] = value
    replace(path, json.dumps(tree))
    return f"{path.name}: {name} {what}"


def some_tensors(rng: random.Random, path: Path) -> str:
    """Break a safetensors file in its header, its names or its values. What was done."""
    import torch
    from safetensors.torch import load_file, save_file

    way = rng.choice(["file", "header", "header", "length", "tensors", "tensors", "tensors", "tensors"])
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if way == "file" or not load_file(path):
        return some_file(rng, path)
    if way == "header":
        header = json.loads(data[8 : 8 + length])
        name = rng.choice(sorted(header.keys() - {"__metadata__"}))
        entry = rng.choice(["dtype", "shape", "data_offsets"])
        header[name][entry] = rng.choice([None, "F8", "BOOL", [], [1], [-1, 5], [0, 2**62], {}, 7])
        packed = json.dumps(header).encode()
        replace(path, len(packed).to_bytes(8, "little") + packed + data[8 + length :])
        return f"{path.name}: {name} has {entry} {header[name][entry]!r}"
    if way == "length":
        other = rng.choice([0, 1, length - 1, length + 1, 2**40, 2**63])
        replace(path, other.to_bytes(8, "little") + data[8:])
        return f"{path.name}: a header of {other} bytes"
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    ways: dict[str, Callable[[], Any]] = {
        "gone": lambda: tensors.pop(name),
        "renamed": lambda: tensors.update({f"{name}_": tensors.pop(name)}),
        "beside a stranger": lambda: tensors.update(stranger=torch.zeros(2)),
        "of another shape": lambda: tensors.update({name: torch.zeros(3, 5)}),
        "without values": lambda: tensors.update({name: torch.zeros(0)}),
        "in float16": lambda: tensors.update({key: value.half() for key, value in tensors.items()}),
        "in int64": lambda: tensors.update({name: tensors[name].long()}),
        "nan": lambda: tensors.update({name: torch.full(tensors[name].shape, math.nan)}),
        "all gone": lambda: tensors.clear(),
    }
    how = rng.choice(list(ways))
    ways[how]()
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{path.name}: {name} {how}"


def any_file(rng: random.Random, path: Path) -> str:
    """Break a file in a way that suits what it holds. What was done."""
    if path.suffix == ".json" and rng.random() < 0.7:
        return some_json(rng, path)
    if path.suffix == ".safetensors":
        return some_tensors(rng, path)
    return some_file(rng, path)
