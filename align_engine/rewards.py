"""What scores completions: Python callables, a reward model, an HTTP scorer, people.

A reward function has TRL's signature, `fn(prompts, completions, completion_ids, **columns) -> list[float | None]`, and
may be async. Prompts and completions are strings, or lists of messages where the data are conversations; columns are
those of the data set. None means that it cannot score the completion.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align_engine import fingerprint as fingerprints
from align_engine import heads, importing
from align_engine.credit import nanstd
from align_engine.data.batches import collate_sft
from align_engine.data.encoder import Encoder
from align_engine.data.formats import is_conversational
from align_engine.errors import BadInput, RunFailed
from align_engine.importing import load_object
from align_engine.policy import load_tokenizer
from align_engine.recipe import ModelSection, RolloutSection
from align_engine.secrets import masked
from align_engine.server import post_all

if TYPE_CHECKING:
    from accelerate import Accelerator

    from align_engine.checkpoint import RunFolder

HUMAN, ADDRESSES = "human", ("http://", "https://")
HTTP_CHUNK = 16  # completions of one request to a scorer


class Reward(NamedTuple):
    """One scorer."""

    name: str  # in metrics
    score: Callable[..., Any]


def answers(columns: dict[str, list[Any]], ids: list[list[int]], tokenizer: Any) -> dict[str, list[Any]]:
    """What scorers see of the completions `ids` of a data set's rows: columns of equal length, prompts, completions and
    completion_ids among them. Completions are texts, or messages where the prompts are."""
    prompts, texts = columns["prompt"], tokenizer.batch_decode(ids, skip_special_tokens=True)
    said = [
        [{"role": "assistant", "content": text}] if is_conversational(prompt) else text
        for prompt, text in zip(prompts, texts)
    ]
    others = {name: values for name, values in columns.items() if name != "prompt"}
    return others | {"prompts": prompts, "completions": said, "completion_ids": ids}


def part(answers: dict[str, list[Any]], start: int, end: int) -> dict[str, list[Any]]:
    """Completions `start` to `end`."""
    return {name: values[start:end] for name, values in answers.items()}


def load_reward(spec: str, device: torch.device) -> Reward:
    """The scorer that one of the recipe's `reward_funcs` stands for.

    Args:
        spec: "package.module:function", "path/to/file.py:function", the folder or hub name of a reward model,
            "http://..." of a scorer, or "human".
        device: of reward models.
    Raises:
        BadInput: nothing of that name.
    """
    if spec == HUMAN:
        return Reward(HUMAN, human_scores)
    if spec.startswith(ADDRESSES):
        return Reward("http", partial(_ask, spec))
    if not is_function(spec):
        return Reward(Path(spec).name, reward_model(spec, device))
    function = load_object(spec, "reward_funcs")
    if not callable(function):
        raise BadInput(f"reward_funcs: {spec!r} is not a function")
    return Reward(spec.rpartition(":")[2], function)


def fingerprint(spec: str) -> str:
    """What tells whether one of the recipe's `reward_funcs` is still the same scorer: a hash of a function's source
    files, or of a reward model's folder; "human" and addresses (their secrets masked) as they stand.

    Raises:
        BadInput: nothing of that name.
    """
    if spec == HUMAN or spec.startswith(ADDRESSES):
        return masked(spec)
    if not is_function(spec):
        return fingerprints.of_model(spec)
    return importing.fingerprint(spec, "reward_funcs")


def is_function(spec: str) -> bool:
    """Whether a scorer is named as module:name or file.py:name, and not as the folder or hub name of a model."""
    return not Path(spec).is_dir() and (":" in spec or spec.endswith(".py"))


def score(rewards: Sequence[Reward], answers: dict[str, list[Any]]) -> Tensor:
    """What each scorer says of each completion, [R, F] float64; NaN where it cannot say. Async ones run together.

    Raises:
        RunFailed: a function does not give one number (or None) for each completion.
    """
    count, found = len(answers["completions"]), [reward.score(**answers) for reward in rewards]
    if waiting := [values for values in found if inspect.isawaitable(values)]:
        done = iter(asyncio.run(_together(waiting)))
        found = [next(done) if inspect.isawaitable(values) else values for values in found]
    for reward, values in zip(rewards, found):
        if len(values) != count or not all(value is None or isinstance(value, (int, float)) for value in values):
            raise RunFailed(
                f"reward {reward.name!r} gave {values!r:.200} for {count} completions: it must give a list with one "
                "number (or None) for each"
            )
    return torch.tensor(np.array(found, dtype=np.float64)).T


async def _together(waiting: list[Any]) -> list[Any]:
    return await asyncio.gather(*waiting)


def score_over_ranks(
    rewards: Sequence[Reward], answers: dict[str, list[Any]], group_size: int, accelerator: Accelerator
) -> Tensor:
    """`score`, with the groups shared out among the ranks (none is split) and the whole known to all of them."""
    from accelerate.utils import gather_object

    starts = range(0, len(answers["completions"]), group_size)
    mine = np.array_split(starts, accelerator.num_processes)[accelerator.process_index].tolist()
    scores = score(rewards, part(answers, mine[0], mine[-1] + group_size)).tolist() if mine else []
    return torch.tensor(gather_object(scores), dtype=torch.float64)


def combine(scores: Tensor, settings: RolloutSection, ended: Sequence[bool]) -> Tensor:
    """The weighted sum over scorers, those left out that could not say, less the penalty of completions cut off:
    [R, F] -> [R], NaN where none could."""
    factors = torch.tensor(settings.reward_weights or [1.0] * scores.shape[1], dtype=scores.dtype)
    total = (scores * factors).nansum(1) - (settings.missing_eos_penalty or 0.0) * ~torch.tensor(ended)
    return total.masked_fill(scores.isnan().all(1), math.nan)


def reward_metrics(rewards: Sequence[Reward], scores: Tensor, total: Tensor, group_size: int) -> dict[str, float]:
    """Means and spreads of the rewards over the rollout, and the share of the groups without any, as TRL names them."""
    found = {"reward": total.nanmean(), "reward_std": nanstd(total)}
    if group_size > 1:
        found["frac_reward_zero_std"] = (nanstd(total.view(-1, group_size)) < 1e-8).double().mean()
    for reward, column in zip(rewards, scores.T):
        found[f"rewards/{reward.name}/mean"] = column.nanmean().nan_to_num()
        found[f"rewards/{reward.name}/std"] = nanstd(column)
    return {name: float(value) for name, value in found.items()}


async def _ask(url: str, completion_ids: list[list[int]], **columns: list[Any]) -> list[float | None]:
    """POSTs {"prompts": [...], "completions": [...], ...columns}, expects {"scores": [...]}."""
    starts = range(0, len(completion_ids), HTTP_CHUNK)
    replies = await post_all(url, [part(columns, start, start + HTTP_CHUNK) for start in starts])
    try:
        return [value for reply in replies for value in reply["scores"]]
    except (KeyError, TypeError) as error:
        raise RunFailed(f"{url} answered {replies[0]!r:.200}, expected {{'scores': [...]}}") from error


def reward_model(path: str, device: torch.device, batch_size: int = 32) -> Callable[..., list[float]]:
    """The score of an AutoModelForSequenceClassification with one label, in the tokenisation that it was trained on.

    Args:
        path: its folder or hub name, with its tokenizer.
        device: where it runs.
        batch_size: completions of one forward pass.
    """
    tokenizer = load_tokenizer(path, distinct_pad=True)
    loaded: Any = heads.load_scalar_model(path, ModelSection(dtype="auto"), tokenizer.pad_token_id)
    model, encoder = loaded.to(device).eval().requires_grad_(False), Encoder(tokenizer)

    @torch.no_grad()
    def score(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        rows, found = [], []
        for prompt, completion in zip(prompts, completions):
            prompt_ids, (ids,), _notes = encoder.split(prompt, [completion], {"tools": None})
            rows.append({"prompt_ids": prompt_ids, "completion_ids": ids, "index": len(rows)})
        for start in range(0, len(rows), batch_size):
            batch = collate_sft(rows[start : start + batch_size], tokenizer.pad_token_id).to(device)
            found += heads.scores(model, batch.input_ids, batch.attention_mask).tolist()
        return found

    return score


def human_scores(folder: RunFolder, number: int, answers: dict[str, list[Any]]) -> Tensor:
    """People's marks of rollout `number`, from a file in the run's folder that they fill in: [R, 1].

    Raises:
        RunFailed: the file has just been written, or marks are missing in it; the same command goes on afterwards.
    """
    name = f"marks/rollout-{number:06d}.jsonl"
    path, completions = folder.path / name, answers["completions"]
    if not path.exists():
        pairs = zip(answers["prompts"], completions)
        folder.write_rows(name, [{"prompt": prompt, "completion": text, "score": None} for prompt, text in pairs])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if [row["completion"] for row in rows] != completions:
        raise BadInput(f"{path} holds marks of other completions than this run's; delete it")
    marks = [math.nan if row.get("score") == "skip" else row.get("score") for row in rows]
    if waiting := [mark for mark in marks if not isinstance(mark, (int, float))]:
        raise RunFailed(
            f"{len(waiting)} of {len(rows)} completions wait for marks: put a number (or 'skip') at `score` in {path}, "
            "then give the same command again"
        )
    return torch.tensor(marks, dtype=torch.float64)[:, None]
