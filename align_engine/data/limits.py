"""Length limits: the prompt gives way before the completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align_engine.errors import BadInput


class TooLong(Exception):
    """One row over a limit where nothing may be cut."""


@dataclass(frozen=True)
class Limits:
    max_length: int | None = 1024  # of prompt + completion
    max_prompt_length: int | None = None
    overlong: Literal["truncate", "drop", "error"] = "truncate"

    def __post_init__(self) -> None:
        if self.overlong not in ("truncate", "drop", "error"):
            raise BadInput(f"overlong='{self.overlong}': expected 'truncate', 'drop' or 'error'")
        for name, least in (("max_length", 2), ("max_prompt_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BadInput(f"{name}={value}: expected at least {least}, or none for no limit")


def fit(
    prompt: list[int], completions: list[list[int]], limits: Limits, bos: list[int]
) -> tuple[list[int], list[list[int]], list[str]]:
    """(prompt, completions, what was cut), with every prompt + completion within the limits.

    All completions keep the same prompt. A prompt that starts with `bos` keeps it. Raises TooLong unless
    `limits.overlong` is "truncate".
    """
    longest = max(map(len, completions), default=0)
    room = len(prompt) if limits.max_prompt_length is None else min(len(prompt), limits.max_prompt_length)
    if limits.max_length is not None and room + longest > limits.max_length:
        room = min(room, max(limits.max_length - longest, limits.max_length // 4, 1))
    most = None if limits.max_length is None else limits.max_length - room  # of a completion
    cuts = []
    if room < len(prompt):
        cuts.append("prompt cut on its left")
    if most is not None and most < longest:
        cuts.append("completion cut at its end")
    if cuts and limits.overlong != "truncate":
        names = [
            f"{key}={value}"
            for key, value in (("max_length", limits.max_length), ("max_prompt_length", limits.max_prompt_length))
            if value
        ]
        raise TooLong(f"longer than {' or '.join(names)}")
    if room < len(prompt):
        kept = bos if bos and prompt[:1] == bos else []
        prompt = (kept + prompt[len(prompt) - room + len(kept) :])[:room]
    return prompt, [completion[:most] for completion in completions], cuts
