"""Projects of `align rate` without a data set, and a browser's part of its pages without a browser."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_engine.assessment.rate import people, serve
from align_engine.assessment.rate.items import Answer, Item
from align_engine.assessment.rate.people import Person
from align_engine.assessment.rate.sections import RateRecipe
from align_engine.assessment.rate.store import Store


def recipe(folder: Path, **settings: Any) -> RateRecipe:
    """`settings` are fields by their bare names."""
    made = RateRecipe()
    for section in vars(made).values():
        for name in set(vars(section)) & set(settings):
            setattr(section, name, settings.pop(name))
    assert not settings, settings
    made.project.project_dir = str(folder)
    return made


def pairs(count: int) -> list[Item]:
    """Prompts with a good and a bad answer, the good one first."""
    return [Item(f"prompt {i}", [Answer(f"good {i}", {"model": "big"}), Answer(f"bad {i}", {"model": "small"})])
            for i in range(count)]  # fmt: skip


def singles(count: int) -> list[Item]:
    """Prompts with one answer, every second one good."""
    return [Item(f"prompt {i}", [Answer(f"{'bad' if i % 2 else 'good'} {i}", {})]) for i in range(count)]


def ranked(count: int, size: int = 4) -> list[Item]:
    """Prompts with several answers, the best one first."""
    return [Item(f"prompt {i}", [Answer(f"answer {j} to {i}", {}) for j in range(size)]) for i in range(count)]


def project(folder: Path, found: Sequence[Item], gold: Sequence[Item] = (), **settings: Any) -> Store:
    """A project of these items, in the folder."""
    settings = {"overlap": 0.0} | settings
    serve.write(recipe(folder, **settings), found, gold)
    return Store(folder)


def join(store: Store, *names: str, days: float = 1.0) -> list[Person]:
    """People with links."""
    return [people.let_in(store, people.link(store, name, days)) for name in names]


class Browser:
    """What somebody sees of a page and sends of its forms.

    Args:
        client: of the server.
    """

    def __init__(self, client: Any) -> None:
        self.client, self.text, self.status = client, "", 0

    def enter(self, token: str) -> Browser:
        return self.saw(self.client.get(f"/enter/{token}"))

    def look(self, path: str = "/") -> Browser:
        return self.saw(self.client.get(path))

    def saw(self, response: Any) -> Browser:
        self.text, self.status = response.text, response.status_code
        return self

    def field(self, name: str) -> str:
        return html.unescape(re.findall(rf'name="{name}" value="([^"]*)"', self.text)[0])

    @property
    def fields(self) -> dict[str, str]:
        """The hidden ones of an item's form."""
        return {name: self.field(name) for name in ("key", "task", "version")}

    @property
    def answers(self) -> list[str]:
        """Texts of the answers, as they stand."""
        parts = self.text.split('<section class="answer"')[1:]
        return [re.sub(r"<[^>]+>", "", re.findall(r'<div class="text" dir="auto">(.*?)</div>', part, re.S)[0]).strip()
                for part in parts]  # fmt: skip

    @property
    def said(self) -> str:
        """The notice on the page."""
        return html.unescape("".join(re.findall(r'<p class="said" role="alert">(.*?)</p>', self.text, re.S)))

    def send(self, **fields: str) -> Browser:
        """The item's form, with these beside the hidden ones."""
        return self.saw(self.client.post("/rate", data=self.fields | fields))

    def undo(self) -> Browser:
        return self.saw(self.client.post("/undo", data={"key": self.field("key")}))

    def good(self) -> str:
        """The choice of a pair's good answer."""
        return str([text.startswith("good") for text in self.answers].index(True) + 1)
