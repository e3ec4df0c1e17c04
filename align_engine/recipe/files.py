"""Recipes as YAML, and values of any origin as the types of their fields."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from align_engine.errors import BadInput
from align_engine.recipe import foreign, shipped
from align_engine.recipe.recipes import RECIPES, Recipe, Settings, fields
from align_engine.recipe.secrets import masked
from align_engine.recipe.values import parse

R = TypeVar("R", bound=Settings)


def load(kind: type[R], path: str | Path, note: Callable[[str], None] = lambda text: None) -> R:
    """Read a recipe from YAML.

    Every value is text until its field says what it is, as that of a flag is; nothing in it is expanded: `${...}` is
    text too.

    Args:
        kind: the algorithm's recipe class; fields that the file leaves out keep its defaults.
        path: file whose keys are field names, at the top level or under their section's name; or the name of a recipe
            that comes with the package.
        note: is told of settings of TRL and others that change nothing here. Default: nobody is.
    Raises:
        BadInput: no such file, not YAML, an unknown key (with the nearest known one, or what serves instead), a value
            of the wrong type.
    """
    import yaml

    from align_engine.recipe import yaml_text

    where, path = f"recipe {path}", shipped.find(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), yaml_text.TextLoader)
    except OSError as error:
        raise BadInput(f"{where}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8 (byte {error.object[error.start]:#x} at {error.start})") from error
    except RecursionError as error:
        raise BadInput(f"{where} is not readable YAML: it is nested too deep") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{where} is not readable YAML: {yaml_text.sentence(error)}") from error
    if not isinstance(content, dict):
        raise BadInput(f"{where} holds no `name: value` lines")
    if issubclass(kind, Recipe):
        names = fields(kind).keys() | vars(kind()).keys()

        def is_other(name: Any) -> bool:
            is_value = name in foreign.FOREIGN and not isinstance(content[name], dict)  # `model: gpt2`, not a section
            return name not in names or (name not in fields(kind) and is_value)

        others = {str(name): value for name, value in content.items() if is_other(name)}
        content = {name: value for name, value in content.items() if name not in others}
        for name, value in foreign.settle(others, names, where, note).items():
            if name in content:
                raise BadInput(f"{where}: `{name}` stands there twice, once under its older name")
            content[name] = value
    return typed(kind(), _into_sections(kind, content, where), where)


def typed(recipe: R, changes: dict[str, dict[str, Any]], where: str) -> R:
    """A recipe with `changes` (section -> field -> value), every field of it as its type has it.

    Raises:
        BadInput: naming every value that is not of its field's type, and `where` they stand.
    """
    known, wrong, sections = fields(type(recipe)), [], {}
    for section, default in vars(recipe).items():
        values = vars(default) | changes.get(section, {})
        for name, value in values.items():
            if name not in known or known[name][0] != section:
                there = [one for one, (at, _) in known.items() if at == section]
                raise BadInput(f"{where}: {unknown('key', str(name), there)}")
            try:
                values[name] = parse(known[name][1], value)
            except ValueError as error:
                wrong.append(f"{name} = {reprlib.repr(value)} {error}")
        sections[section] = values
    if wrong:
        raise BadInput(f"{where}: {'; '.join(wrong)}")
    made = {section: type(getattr(recipe, section))(**values) for section, values in sections.items()}
    return type(recipe)(**made)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence on a name that is not known, with the nearest one that is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown {what} `{name:.80}`" + (
        f"; did you mean `{close[0]}`?" if close else ": --help lists all there are"
    )


def elsewhere(name: str) -> str:
    """The end of that sentence where other methods have the setting."""
    methods = [method for method, kind in RECIPES.items() if name in fields(kind)]
    return f" (`{name}` is a setting of {', '.join(methods)})" if methods else ""


def _into_sections(kind: type[Settings], content: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    known, sections = fields(kind), vars(kind())
    tree: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        is_section = key in sections
        if is_section and not isinstance(value or {}, dict):
            raise BadInput(f"{where}: `{key}` is a section: it takes `name: value` lines, not {reprlib.repr(value)}")
        for name, inner in (value or {}).items() if is_section else [(key, value)]:
            if name not in known:
                raise BadInput(f"{where}: {unknown('key', name, known)}{elsewhere(name)}")
            section = known[name][0]
            if is_section and section != key:
                raise BadInput(f"{where}: `{name}` belongs under `{section}`, not under `{key}`")
            if name in tree.setdefault(section, {}):
                raise BadInput(f"{where}: `{name}` stands at the top and under `{section}`; leave one of them out")
            tree[section][name] = inner
    return tree


def save(recipe: Settings, path: str | Path) -> None:
    """Write the whole recipe, defaults included, as YAML that `load` reads. Secrets of addresses are masked."""
    import yaml

    content = masked(dataclasses.asdict(recipe))
    Path(path).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "utf-8")
