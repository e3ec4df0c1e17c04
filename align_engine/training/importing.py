"""Code that is not ours: found by name, and run so that its failures bear its name."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from align_engine.errors import AlignError, BadInput
from align_engine.models.fingerprint import of_file

MISSING = object()
UNREADABLE = (OSError, SyntaxError, ValueError, RecursionError, MemoryError)  # of a source file; the last, of its depth
OURS = str(Path(__file__).parents[1]) + os.sep
LIBRARIES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def load_object(spec: str, field: str) -> Any:
    """The object that `module:name` or `path/to/file.py:name` stands for; `field` of the recipe is for the message.

    A file may import what lies beside it, as a script may; a module may lie in the current folder.

    Raises:
        BadInput: not of this form, nothing to import there, an error while it is imported (with file and line), or no
            such name in it.
    """
    place, _, name = spec.rpartition(":")
    path = source_file(spec, field)
    with foreign(f"{field}: cannot import {spec!r}", BadInput):
        loaded = _run_file(path) if path is not None and place.endswith(".py") else importlib.import_module(place)
        found = getattr(loaded, name, MISSING)
    if found is MISSING:
        where = f"{place} ({path})" if path is not None and not place.endswith(".py") else place
        raise BadInput(f"{field}: {where} has no {name!r}{_known(path)}")
    return found


def run_file(place: str, field: str) -> ModuleType:
    """Run a Python file for what it registers; once for each state of the file.

    Raises:
        BadInput: no such file, or an error while it runs (with file and line).
    """
    path = Path(place).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise BadInput(f"{field}: {place!r} is no Python file that is there")
    with foreign(f"{field}: cannot run {place!r}", BadInput):
        return _run_file(path)


def source_file(spec: str, field: str) -> Path | None:
    """The file that `module:name` or `path/to/file.py:name` is read from; None for a module that has no source.

    Raises:
        BadInput: not of this form, or no such file or module.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        path = Path(spec.rstrip(":"))
        if path.suffix == ".py" and path.is_file():
            raise BadInput(f"{field}: {spec!r} names no function of the file: say {path}:NAME{_known(path)}")
        raise BadInput(f"{field}: {spec!r} is not of the form module:name or file.py:name")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise BadInput(f"{field}: cannot import {spec!r}: no such file")
        return Path(place)
    if place in sys.modules:
        file = getattr(sys.modules[place], "__file__", None)
        return Path(file) if file else None
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
    with foreign(f"{field}: cannot import {spec!r}", BadInput):
        found = importlib.util.find_spec(place)  # runs the packages that it lies in
    if found is None:
        raise BadInput(f"{field}: cannot import {spec!r}: No module named {place!r}")
    return Path(found.origin) if found.has_location and found.origin else None


def fingerprint(spec: str, field: str) -> str:
    """Hash of the source file of `module:name` or `file.py:name`, and of what it imports from the files beside it.

    Raises:
        BadInput: no such file or module.
    """
    path = source_file(spec, field)
    if path is None:
        return "no source"
    return hashlib.sha256("".join(map(of_file, _sources(path))).encode()).hexdigest()[:16]


def _sources(path: Path) -> list[Path]:
    """A source file, and the modules outside libraries that it imports, and so on."""
    found, waiting = [], [path]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        with contextlib.suppress(*UNREADABLE):  # told where it is imported
            for node in ast.walk(ast.parse(path.read_bytes())):
                names = [one.name for one in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
                level = node.level if isinstance(node, ast.ImportFrom) else 0
                if isinstance(node, ast.ImportFrom):
                    names = [node.module] if node.module else names  # `from . import name`
                for name in names:
                    waiting += _files_of(name.partition(".")[0], path.parents[max(level, 1) - 1], level == 0)
    return sorted(found)


def _files_of(name: str, folder: Path, anywhere: bool) -> list[Path]:
    """Files of the module or package `name` in a folder, or wherever else Python finds it that is no library."""
    places = [folder / name]
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name) if anywhere else None
        if spec is not None and spec.has_location and spec.origin and not spec.origin.startswith((OURS, *LIBRARIES)):
            origin = Path(spec.origin)
            places.append(origin.parent if origin.stem == "__init__" else origin.with_suffix(""))
    files = [file for place in places for file in (place.with_suffix(".py"), *place.glob("**/*.py"))]
    return [file for file in files if file.is_file()]


def _run_file(path: Path) -> ModuleType:
    """The module that a file is, run once for each state of the file. Its name is nobody else's, so that it may be
    called as a module of ours or of Python's library; under it dataclasses and pickle find it again."""
    path = path.resolve()
    state = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:12]
    name = f"{path.stem}_{state}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a file whose name ends in .py"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(folder)
    if folder not in sys.path:
        sys.path.append(folder)  # behind everything else, for what its functions import later
    return module


def _known(path: Path | None) -> str:
    """The functions and classes of a source file, for a message."""
    try:
        body = ast.parse(path.read_bytes()).body if path is not None else []
    except UNREADABLE:
        return ""
    names = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    names = [name for name in names if not name.startswith("_")]
    return f"; it has {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""


class foreign:
    """Around code that is not ours: whatever it raises, SystemExit too, becomes an error of ours that names it, file
    and line. Errors that are ours already pass, and so does Ctrl-C. Gradients that it turns off are on
    again afterwards.

    Args:
        what: the code, as the message begins.
        kind: of the error.
    """

    def __init__(self, what: str, kind: type[AlignError]) -> None:
        self.what, self.kind = what, kind

    def __enter__(self) -> None:
        """Not a generator of contextlib's: that would let StopIteration through."""
        self.gradients = torch.is_grad_enabled()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        torch.set_grad_enabled(self.gradients)
        if error is None or isinstance(error, (AlignError, KeyboardInterrupt)):
            return
        raise self.kind(f"{self.what}{_place(error)}: {type(error).__name__}: {_text(error)}") from error


def _text(error: BaseException) -> str:
    """The first line of what an error says."""
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # of the error's own __str__
        text = ""
    return (text.strip() or "no message").splitlines()[0]


def _place(error: BaseException) -> str:
    """ " (file line N)" of the user's own code: the deepest frame that is neither ours nor a library's, or else the
    first one that is not ours."""
    frames = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((OURS, "<frozen"))
    ]
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        frames.append((error.filename, error.lineno))
    own = [place for place in frames if not place[0].startswith(LIBRARIES)]
    for file, line in [*own[-1:], *frames[:1]][:1]:
        here = os.path.relpath(file) if Path(file).is_relative_to(Path.cwd()) else file
        return f" ({here} line {line})"
    return ""
