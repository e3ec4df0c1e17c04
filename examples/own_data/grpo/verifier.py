"""Rewards for `align grpo`: TRL's signature; `result` is the data's column of that name."""

import re

RESULT = re.compile(r"####\s*(-?[\d,]*\d(?:\.\d+)?)\s*$")


def right(prompts, completions, result, **_):
    """1 where what stands behind #### is the result."""
    return [float(_number(said[-1]["content"]) == float(want)) for said, want in zip(completions, result)]


def form(prompts, completions, **_):
    """1 where one number stands behind ####, at the end: so that right answers can be found at all."""
    return [float(_number(said[-1]["content"]) is not None) for said in completions]


def _number(text):
    found = RESULT.search(text.strip())
    return float(found[1].replace(",", "")) if found else None
