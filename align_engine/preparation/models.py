"""The models that `align generate` asks: what a YAML file or a flag says of each."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_type_hints

from align_engine.errors import BadInput
from align_engine.recipe.files import unknown
from align_engine.recipe.secrets import check_address
from align_engine.recipe.sections import Section
from align_engine.recipe.values import Count, NotNegative, Part, field_of, numbers, parse

TIERS = {"truth": 1, "best": 2, "hard": 3, "easy": 4}  # of the answers to one prompt; rank 1 is the best
PLACES = ("base_url", "path", "column")
ELSEWHERE = ("base_url", "api_key_env", "input_price", "output_price")  # decide nothing of the answers
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


class ModelSpec(Section):
    """One model, or the people whose answers stand in a column."""

    name: str = ""
    """Of the model in the result; no two have the same."""
    tier: str = ""
    """truth, best, hard, easy (ranks 1 to 4), or a rank: 1 is the best."""
    base_url: str | None = None
    """Of an OpenAI-compatible endpoint, as https://host/v1."""
    path: str | None = None
    """Folder or hub name of a checkpoint, which answers in this process."""
    column: str | None = None
    """Column of the data in which the answers stand already."""
    model: str | None = None
    """Its name at the endpoint (None: name)."""
    api_key_env: str | None = None
    """Environment variable that holds the endpoint's key."""
    temperature: NotNegative = 1.0
    """Of sampling; 0 takes the likeliest token."""
    top_p: Part = 1.0
    """Sample from the likeliest tokens that hold this share."""
    max_tokens: Count = 512
    """Longest answer."""
    n: Count = 1
    """Answers to each prompt."""
    input_price: NotNegative = 0.0
    """Of a million tokens of prompts."""
    output_price: NotNegative = 0.0
    """Of a million tokens of answers."""

    @property
    def rank(self) -> int:
        """1 is the best."""
        return TIERS.get(self.tier) or int(self.tier)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what it answers: it may have moved to another address."""
        return {name: value for name, value in vars(self).items() if name not in ELSEWHERE}

    def key(self, seed: int) -> str:
        """Short hash of its settings and the seed."""
        return hashlib.sha256(json.dumps([self.settings, seed], sort_keys=True).encode()).hexdigest()[:12]


@dataclass
class Question:
    """One request."""

    spec: ModelSpec
    row: int
    messages: list[dict[str, Any]]
    seed: int


@dataclass
class Reply:
    """What came back: (text, why it ended) of each answer, and tokens of the prompt and of all answers; or why there is
    none to this prompt."""

    seed: int

    answers: list[tuple[str, str]] = field(default_factory=list)
    tokens: tuple[int, int] = (0, 0)
    refused: str | None = None


def read_models(given: list[str], usual: Mapping[str, Any] = MappingProxyType({})) -> list[ModelSpec]:
    """The models of YAML files and flags, in their order.

    Args:
        usual: what is said of each model that says nothing else.
    Raises:
        BadInput: a file that cannot be read, an unknown key, a value out of range, two models of one name.
    """
    found = []
    for one in given:
        is_file = "=" not in one or Path(one).expanduser().is_file()
        entries = _entries(one) if is_file else [dict(_pairs(one))]
        found += [_spec({**usual, **entry}, one if is_file else "models") for entry in entries]
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"models: two of them have the name {twice[0]!r}")
    return found


def key_of(spec: ModelSpec) -> str | None:
    """The key of a model's endpoint. Raises BadInput where the variable that should hold it is not set."""
    if spec.api_key_env and not os.environ.get(spec.api_key_env):
        raise BadInput(f"model {spec.name!r}: the environment variable {spec.api_key_env} holds no key: export it")
    return os.environ[spec.api_key_env] if spec.api_key_env else None


def _pairs(text: str) -> list[tuple[str, str]]:
    """`name=x,tier=y` as pairs. A comma parts them where a name and = follow it."""
    pieces = re.split(r",(?=\s*[a-z_]+=)", text)
    found = [(name.strip(), value) for name, _, value in (piece.partition("=") for piece in pieces)]
    if twice := [name for name, _ in found if [key for key, _ in found].count(name) > 1]:
        raise BadInput(f"models: {twice[0]} stands twice in one model")
    return found


def _entries(path: str) -> list[dict[str, Any]]:
    import yaml

    from align_engine.recipe import yaml_text

    where = f"models = {path!r}"
    try:
        content = yaml.load(Path(path).expanduser().read_text(encoding="utf-8-sig"), yaml_text.TextLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{where} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    except (yaml.YAMLError, RecursionError) as error:
        said = yaml_text.sentence(error) if isinstance(error, yaml.YAMLError) else "it is nested too deep"
        raise BadInput(f"{where} is not readable YAML: {said}") from error
    content = content.get("models") if isinstance(content, dict) else content
    if not isinstance(content, list) or not content or not all(isinstance(one, dict) for one in content):
        raise BadInput(f"{where} holds no list of models, each with name, tier, and base_url, path or column")
    return content


def _spec(entry: dict[str, Any], where: str) -> ModelSpec:
    known = {name: field_of(kind) for name, kind in get_type_hints(ModelSpec, include_extras=True).items()}
    values: dict[str, Any] = {}
    label = f"{where}: model {str(entry.get('name') or '?')!r:.80}"
    for name, value in entry.items():
        if name not in known:
            raise BadInput(f"{label}: {unknown('key', name, known)}")
        try:
            values[name] = parse(known[name], value)
        except ValueError as error:
            raise BadInput(f"{label}: {name} {error}") from None
        taken = known[name].range
        if taken is not None and any(number not in taken for number in numbers(values[name])):
            raise BadInput(f"{label}: {name} = {values[name]!r} {taken}")
    spec = ModelSpec(**values)
    _check(spec, label)
    return dataclasses.replace(spec, path=spec.path and os.path.expanduser(spec.path))


def _check(spec: ModelSpec, label: str) -> None:
    if not spec.name:
        raise BadInput(f"{label}: a model needs a name")
    if spec.tier not in TIERS and not re.fullmatch(r"[1-9][0-9]{0,8}", spec.tier):
        raise BadInput(f"{label}: tier = {spec.tier!r:.80} is none of {', '.join(TIERS)}, and no rank from 1 on")
    if len(places := [name for name in PLACES if getattr(spec, name)]) != 1:
        said = f"{' and '.join(places)} are given" if places else "none is given"
        raise BadInput(f"{label}: it answers at one of {', '.join(PLACES)}, and {said}")
    if spec.api_key_env and not VARIABLE.fullmatch(spec.api_key_env):  # perhaps the key itself, which is not shown
        raise BadInput(f"{label}: api_key_env must be the name of a variable of the environment, of A-Z, 0-9 and _")
    if spec.base_url:
        check_address(spec.base_url, f"{label}: base_url", spec.api_key_env or "that api_key_env names")
