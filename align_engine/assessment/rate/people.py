"""Who may come in: a link for each assessor and for the lead, of which only a hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable
from typing import NamedTuple

from align_engine.assessment.rate.sections import LEAD
from align_engine.assessment.rate.store import Store
from align_engine.errors import BadInput

DAY = 86400.0
TOKEN = 200  # characters of the longest one that is looked up


class Person(NamedTuple):
    """Somebody with a link."""

    id: int
    name: str
    lead: bool


class NotLetIn(Exception):
    """No link, or one that is wrong, has ended, or was taken back; the sentence is for whoever came with it."""


def hashed(token: str) -> str:
    """What is kept of a token: 256 random bits need no salt."""
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def same(one: str, other: str) -> bool:
    """Whether two keys are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def form_key(token: str) -> str:
    """What a form of this person's carries, and another site cannot know."""
    return hmac.new(token.encode("utf-8", "replace"), b"form", hashlib.sha256).hexdigest()


def link(store: Store, name: str, days: float) -> str:
    """A new link's token for somebody; their earlier one ends. Marks stay.

    Raises:
        RunFailed: from the disk.
    """
    token, until = secrets.token_urlsafe(32), time.time() + days * DAY
    with store.writing() as db:
        db.execute(
            "INSERT INTO person (name, lead, token, expires) VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE "
            "SET token = excluded.token, expires = excluded.expires, revoked = 0",
            (name, name == LEAD, hashed(token), until),
        )
    return token


def revoke(store: Store, name: str) -> None:
    """End somebody's link. What is open before them is given to others; their marks stay.

    Raises:
        BadInput: there is nobody of that name.
    """
    known(store, [name], "revoke")
    with store.writing() as db:
        person = db.execute("SELECT id FROM person WHERE name = ?", (name,)).fetchone()["id"]
        db.execute("UPDATE person SET revoked = 1 WHERE id = ?", (person,))
        db.execute(
            "UPDATE item SET wanted = wanted + 1 WHERE gold IS NULL AND id IN "
            "(SELECT item FROM task WHERE person = ? AND state = 'open')",
            (person,),
        )
        db.execute("UPDATE task SET state = 'lapsed' WHERE person = ? AND state = 'open'", (person,))


def names(store: Store) -> list[str]:
    """Everybody who has or had a link."""
    with store.reading() as db:
        return [row["name"] for row in db.execute("SELECT name FROM person ORDER BY id")]


def known(store: Store, wanted: Iterable[str], field: str) -> None:
    """Refuse names that have no link. Raises BadInput."""
    found = names(store)
    if strange := [name for name in wanted if name not in found]:
        raise BadInput(f"{field} = {strange[0]!r}: there is nobody of that name, but {', '.join(found)}")


def let_in(store: Store, token: str | None) -> Person:
    """Whoever holds a token.

    Raises:
        NotLetIn: nobody, or no longer.
    """
    if not token or len(token) > TOKEN:
        raise NotLetIn("This page opens with a link of your own. Ask whoever leads the rating for it.")
    with store.reading() as db:
        row = db.execute("SELECT * FROM person WHERE token = ?", (hashed(token),)).fetchone()
    if row is None:
        raise NotLetIn("This link is not known here, or a newer one has taken its place.")
    if row["revoked"]:
        raise NotLetIn("This link was taken back. Ask whoever leads the rating for a new one.")
    if row["expires"] < time.time():
        raise NotLetIn("This link has expired. Ask whoever leads the rating for a new one.")
    return Person(row["id"], row["name"], bool(row["lead"]))
