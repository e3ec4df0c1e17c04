"""What the lead sees: how far everybody is, how far they agree, and whose links are good."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from align_engine.assessment.rate.agreement import Agreement, Doing, agreement, people
from align_engine.assessment.rate.records import Record, read
from align_engine.assessment.rate.store import Store

FRESH = 5.0  # seconds that an overview is shown again: it reads the whole project


class Link(NamedTuple):
    """Of an assessor."""

    name: str
    until: float  # seconds since 1970
    revoked: bool

    @property
    def standing(self) -> str:
        """Whether it is good, and how long."""
        if self.revoked:
            return "ended"
        days = (self.until - time.time()) / 86400
        return f"{days:.0f} days" if days >= 1 else f"{24 * days:.0f} hours" if days > 0 else "expired"


class Overview(NamedTuple):
    """A project at one moment."""

    items: int  # gold ones left out
    finished: int  # items that have all the marks that they are to get
    gold: int
    marks: int
    missing: int
    people: dict[str, Doing]
    agreement: Agreement


def overview(records: Sequence[Record], mode: str) -> Overview:
    """Of all items and marks."""
    asked = [record for record in records if not record.gold]
    # what is open before somebody is missing, too
    missing = [max(record.total - len(record.values), 0) for record in asked]
    return Overview(
        len(asked), missing.count(0), len(records) - len(asked), sum(len(record.values) for record in records),
        sum(missing), people(records, mode), agreement(records, mode),
    )  # fmt: skip


class Overviews:
    """Of a project, made anew when the last one is no longer fresh."""

    def __init__(self, store: Store) -> None:
        self.store, self.mode = store, store.settings()["mode"]
        self.lock, self.at = threading.Lock(), -FRESH
        self.found: Overview | None = None

    def now(self) -> Overview:
        """The latest."""
        with self.lock:
            if self.found is None or time.monotonic() - self.at > FRESH:
                self.found = overview(read(self.store, texts=False), self.mode)
                self.at = time.monotonic()
            return self.found


def links(store: Store) -> list[Link]:
    """Of all assessors."""
    with store.reading() as db:
        rows = db.execute("SELECT name, expires, revoked FROM person WHERE lead = 0 ORDER BY id").fetchall()
    return [Link(row["name"], row["expires"], bool(row["revoked"])) for row in rows]
