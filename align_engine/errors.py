"""The errors a user can cause or must know about; the command line prints them without a traceback."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence


class AlignError(Exception):
    """A message for the user. `exit_code` is what the `align` command returns."""

    exit_code = 1


class BadInput(AlignError, ValueError):
    """A recipe, flag, file or folder that cannot be used; found before anything is computed."""

    exit_code = 2


class RunFailed(AlignError, RuntimeError):
    """A run that began and cannot go on; its last checkpoint is whole."""


def rows_named(where: Sequence[int], files: Iterable[tuple[str, int]] = ()) -> str:
    """Rows of a data set as messages name them, the first five of many: people count rows from 1, as the lines of a
    file; `where` counts from 0, as `index` does in files, and through all files.

    Args:
        files: name and number of rows of each, read as far as it is needed; rows behind them are named without a file.
    """
    named, rows, start = list[str](), list(where[:5]), 0
    for name, count in files:
        if not rows:
            break
        if here := [row for row in rows if start <= row < start + count]:
            named.append(f"{', '.join(str(row - start + 1) for row in here)} of {name}")
        rows = [row for row in rows if row not in here]
        start += count
    named += [str(row + 1) for row in rows]
    more = ", ..." if len(where) > 5 else ""
    return f"{'rows' if len(where) > 1 else 'row'} {', '.join(named)}{more}, counted from 1"


Naming = Callable[[Sequence[int]], str]  # what messages call rows, by their numbers


def among(named: Naming, numbers: Sequence[int]) -> Naming:
    """What messages call some rows, by their place among `numbers`, those that `named` knows them by."""
    return lambda where: named([numbers[i] for i in where])


LONGEST = 2000  # characters of a message


def shortened(text: str) -> str:
    """`text` without the places of objects in memory, and without its middle where it is very long: messages quote
    values, and a value may be a whole file."""
    text = re.sub(r" at 0x[0-9a-f]{6,}", "", text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 + 5 :]}"


def printable(text: str) -> str:
    """`text` for a terminal: control characters and others that would not be seen, but for line ends and tabs, as
    Python escapes them. Texts of servers and rows are quoted in messages, and must not act on the terminal."""
    hidden = ("C", "Zl", "Zp")  # Unicode's categories: control, format, surrogate, unassigned; line, paragraph
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c).startswith(hidden) and c not in "\n\t" else c
        for c in text
    )


ORDERS = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # turn round the order of what is shown


def visible(text: str) -> str:
    """`text` for people to read, on a page or a terminal: control characters, halves of surrogate pairs and orders of
    direction as Python escapes them. Line ends and tabs stay, and so do the joiners that scripts are written with."""

    def hidden(c: str) -> bool:
        return c in ORDERS or (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t")

    text = text.replace("\r\n", "\n")
    return "".join(c.encode("unicode_escape").decode() if hidden(c) else c for c in text)
