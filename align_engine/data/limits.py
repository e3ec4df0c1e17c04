"""Length limits: the prompt gives way before the completion."""

from __future__ import annotations

from align_engine.data.formats import BadRow

Ids = list[int]


def fit(
    prompt: Ids, completions: list[Ids], bos: Ids, max_length: int | None, max_prompt_length: int | None, truncate: bool
) -> tuple[Ids, list[Ids], list[str]]:
    """(prompt, completions, what was cut), with every prompt + completion within the limits (None: no limit).

    All completions keep the same prompt. A prompt that starts with `bos` keeps it. Raises BadRow unless `truncate`.
    """
    longest = max(map(len, completions), default=0)
    room = len(prompt) if max_prompt_length is None else min(len(prompt), max_prompt_length)
    if max_length is not None and room + longest > max_length:
        room = min(room, max(max_length - longest, max_length // 4, 1))
    most = longest if max_length is None else max_length - room  # of a completion
    cuts = ["prompt cut on its left"] * (room < len(prompt)) + ["completion cut at its end"] * (most < longest)
    if cuts and not truncate:
        limits = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        raise BadRow("longer than " + " or ".join(f"{key}={value}" for key, value in limits.items() if value), "long")
    if room < len(prompt):
        kept = bos if bos and prompt[:1] == bos else []
        prompt = (kept + prompt[len(prompt) - room + len(kept) :])[:room]
    return prompt, [completion[:most] for completion in completions], cuts
