"""The project's SQLite file: its tables, and transactions that are in it whole or not at all.

In WAL mode readers and the writer do not wait for each other, and a process that is killed at any place loses nothing
that was committed. What is said to a browser as saved has been committed, and flushed to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align_engine.errors import BadInput, RunFailed

NAME, SIDE, VERSION = "ratings.sqlite", ".align-tmp", 2
PATIENCE = 10.0  # seconds that another process may hold the file
TABLES = """
CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;  -- JSON
CREATE TABLE person (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, lead INTEGER NOT NULL,
    token TEXT NOT NULL UNIQUE,  -- sha256 of the link's
    expires REAL NOT NULL, revoked INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE item (
    id INTEGER PRIMARY KEY,
    place INTEGER NOT NULL,  -- in the shuffled order
    prompt TEXT NOT NULL,  -- JSON
    source TEXT NOT NULL,  -- a file of marks, of a run
    gold TEXT,  -- the right value, of an item that everybody gets
    total INTEGER NOT NULL,  -- marks that it is to get (of gold: 0)
    wanted INTEGER NOT NULL,  -- of these, how many are still to be given out
    closed INTEGER NOT NULL DEFAULT 0  -- its marks have been handed over
    ) STRICT;
CREATE INDEX waiting ON item (place) WHERE closed = 0 AND (wanted > 0 OR gold IS NOT NULL);
CREATE INDEX of_source ON item (source, closed);
CREATE TABLE answer (
    item INTEGER NOT NULL REFERENCES item, number INTEGER NOT NULL,
    text TEXT NOT NULL, about TEXT NOT NULL,  -- JSON: the answer, other columns of its row
    PRIMARY KEY (item, number)) STRICT, WITHOUT ROWID;
CREATE TABLE task (  -- an item before an assessor
    id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES item, person INTEGER NOT NULL REFERENCES person,
    shown TEXT NOT NULL,  -- JSON: numbers of the answers as they stand on the page
    state TEXT NOT NULL DEFAULT 'open',  -- open, done, skipped, or lapsed: given to somebody else
    version INTEGER NOT NULL DEFAULT 0,  -- of the page: an older one is not taken
    value TEXT, comment TEXT NOT NULL DEFAULT '',
    begun REAL NOT NULL, ended REAL,
    UNIQUE (item, person)) STRICT;
CREATE INDEX of_person ON task (person, state, ended);
CREATE INDEX of_state ON task (state, begun);
CREATE TABLE event (  -- every click; nothing is deleted
    id INTEGER PRIMARY KEY, task INTEGER NOT NULL, at REAL NOT NULL, what TEXT NOT NULL, value TEXT,
    comment TEXT NOT NULL) STRICT;
"""
_WAITS = "({0}.closed = 0 AND ({0}.wanted > 0 OR {0}.gold IS NOT NULL))"
TALLY = (  # rows of the index `waiting`, which take a millisecond to count; since version 2
    "CREATE TABLE tally (waiting INTEGER NOT NULL) STRICT",
    f"INSERT INTO tally SELECT count(*) FROM item WHERE {_WAITS.format('item')}",
    f"""CREATE TRIGGER item_made AFTER INSERT ON item BEGIN
        UPDATE tally SET waiting = waiting + {_WAITS.format("new")}; END""",
    f"""CREATE TRIGGER item_changed AFTER UPDATE OF closed, wanted, gold ON item BEGIN
        UPDATE tally SET waiting = waiting + {_WAITS.format("new")} - {_WAITS.format("old")}; END""",
    f"PRAGMA user_version = {VERSION}",
)


class Store:
    """An open project.

    Args:
        folder: that holds its file.
    Raises:
        BadInput: there is none, or it is damaged, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        if not self.path.is_file():
            raise BadInput(f"project_dir = {str(folder)!r} holds no {NAME}: `align rate --dataset_name ...` makes one")
        self.lock = threading.RLock()
        try:
            self.connection = _connected(self.path)
            self._bring_up_to_date()
            found = self.connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise BadInput(f"{self.path} cannot be read: {error}; put back a copy of it") from error
        if found != VERSION:
            raise BadInput(f"{self.path} is of version {found}, and this program reads {VERSION}: take its own release")

    def _bring_up_to_date(self) -> None:
        """A project of version 1, whole or not at all."""
        if self.connection.execute("PRAGMA user_version").fetchone()[0] != 1:
            return
        self.connection.execute("BEGIN IMMEDIATE")
        with _ended(self.connection):
            if self.connection.execute("PRAGMA user_version").fetchone()[0] == 1:  # nobody was faster
                for statement in TALLY:
                    self.connection.execute(statement)

    def close(self) -> None:
        """Close the file; what the log beside it holds is moved into it."""
        with self.lock:
            self.connection.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that changes something, alone.

        Raises:
            RunFailed: the disk is full or refuses; nothing is changed then.
        """
        with self.lock, saying(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            with _ended(self.connection):
                yield self.connection

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A view of one moment, whatever is written meanwhile."""
        with self.lock, saying(self.path):
            self.connection.execute("BEGIN")
            with _ended(self.connection):
                yield self.connection

    @contextlib.contextmanager
    def apart(self) -> Iterator[sqlite3.Connection]:
        """A view of one moment for long reading, by which nobody is kept waiting."""
        with saying(self.path), contextlib.closing(_connected(self.path)) as db:
            db.execute("BEGIN")
            yield db

    def settings(self) -> dict[str, Any]:
        """What the project was made with."""
        with self.reading() as db:
            return {name: json.loads(value) for name, value in db.execute("SELECT name, value FROM setting")}


@contextlib.contextmanager
def making(folder: str | Path) -> Iterator[sqlite3.Connection]:
    """Inside the block a new project's tables; afterwards the file bears its name, whole, or is not there.

    Raises:
        BadInput: the folder cannot be written to. RunFailed: the disk is full.
    """
    path = Path(folder) / NAME
    side = path.with_name(f"{NAME}{SIDE}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        side.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"project_dir = {str(folder)!r} cannot be written to: {error.strerror}") from error
    try:
        with saying(path), contextlib.closing(sqlite3.connect(side, isolation_level=None)) as db:
            db.executescript(TABLES)
            db.execute("BEGIN")
            with _ended(db):
                for statement in TALLY:
                    db.execute(statement)
                yield db
        os.replace(side, path)
    finally:
        side.unlink(missing_ok=True)


@contextlib.contextmanager
def saying(path: Path) -> Iterator[None]:
    """Turn what SQLite and the disk refuse into a RunFailed that names the file."""
    try:
        yield
    except sqlite3.Error as error:
        full = "full" in str(error)
        way = "make room" if full else "look after the disk"
        raise RunFailed(f"{path} cannot be changed: {error}. Nothing was lost or half written: {way}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise RunFailed(f"{path} cannot be changed: {error.strerror}. Nothing was lost: make room") from error


def _connected(path: Path) -> sqlite3.Connection:
    found = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
    found.row_factory = sqlite3.Row
    found.execute("PRAGMA journal_mode = WAL")
    found.execute("PRAGMA synchronous = FULL")  # a mark outlives a loss of power, too
    found.execute("PRAGMA foreign_keys = ON")
    return found


@contextlib.contextmanager
def _ended(db: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
