"""Passwords and keys in addresses: used as they are given, shown and written without."""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import urlsplit

from align_engine.errors import BadInput

MASK = "***"
ADDRESS = re.compile(r"([A-Za-z][\w+.-]{0,30}://)(\S+)")
# what stands before the @ of the host: up to the last @ in front of the path, or, where a password holds / ? or #
# unquoted (what should be a port is no number then), up to the last @ of all
USER = re.compile(r"^(?:[^/?#]*@|[^/?#@:\[]*:(?!\d*(?:[/?#]|$)).*@)")
AFTER = "'\"`,;.:)]}>"  # punctuation behind an address in a sentence


def masked(value: Any) -> Any:
    """`value` with *** in place of whatever may be secret in the addresses that it holds: user names and passwords
    before the host, the values behind ?, and what stands behind #. Strings may be whole sentences; lists and dicts are
    gone through at every depth; anything else comes back as it is. What is masked already stays so."""
    if isinstance(value, str):
        return ADDRESS.sub(_masked_address, value)
    if isinstance(value, (list, tuple)):
        return type(value)(masked(one) for one in value)
    if isinstance(value, dict):
        return {name: masked(one) for name, one in value.items()}
    return value


def _masked_address(found: re.Match[str]) -> str:
    rest = found[2].rstrip(AFTER)
    behind = found[2][len(rest) :]
    rest = USER.sub(f"{MASK}@", rest)
    place, mark, query = rest.partition("?")
    if not mark:
        place, hash_mark, _ = place.partition("#")
        return found[1] + place + (hash_mark and f"#{MASK}") + behind
    pieces = [name + equals + (value and MASK) if equals else name and MASK
              for name, equals, value in (piece.partition("=") for piece in re.split("[&;]", query))]  # fmt: skip
    return f"{found[1]}{place}?{'&'.join(pieces)}{behind}"


def check_address(address: str, field: str, variable: str) -> None:
    """Refuse what is no address of a server, and one copied from a recipe or a report in which its secret is masked.

    Args:
        field: of the recipe, for the message.
        variable: of the environment, that the key may stand in.
    Raises:
        BadInput: naming field and (masked) address.
    """
    if MASK in address:
        raise BadInput(
            f"{field} = {masked(address)!r}: its password or key is not kept in files. Give the address with it again, "
            f"or without it and the key in the environment variable {variable}"
        )
    try:
        parts = urlsplit(address)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number
        whole = False
    if not whole:
        shown = masked(address) if "://" in address else masked(f"http://{address}").removeprefix("http://")
        raise BadInput(f"{field} = {shown!r} is not of the form http://host:port (special characters of a "
                       "password are percent-encoded)")  # fmt: skip


def key_header(variable: str) -> dict[str, str]:
    """The header that carries the key which an environment variable holds; none where it is not set."""
    key = os.environ.get(variable)
    return {"Authorization": f"Bearer {key}"} if key else {}
