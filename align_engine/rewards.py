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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align_engine import heads
from align_engine.credit import nanstd
from align_engine.data.formats import is_conversational
from align_engine.errors import BadInput, RunFailed
from align_engine.http import post_all
from align_engine.importing import load_object

if TYPE_CHECKING:
    from accelerate import Accelerator

    from align_engine.recipe import RolloutSection

HUMAN = "human"
HTTP_CHUNK = 16  # completions of one request to a scorer


class Reward(NamedTuple):
    """One scorer."""

    name: str  # in metrics
    score: Callable[..., Any]


class Answers(NamedTuple):
    """Completions with all that a scorer may look at, one entry each."""

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]

    @classmethod
    def of(cls, columns: dict[str, list[Any]], ids: list[list[int]], tokenizer: Any) -> Answers:
        """The answers `ids` to the prompts of a data set's rows: texts, or messages where the prompts are."""
        columns = dict(columns)
        prompts, texts = columns.pop("prompt"), tokenizer.batch_decode(ids, skip_special_tokens=True)
        said = [
            [{"role": "assistant", "content": text}] if is_conversational(prompt) else text
            for prompt, text in zip(prompts, texts)
        ]
        return cls(prompts, said, ids, columns)

    def __getitem__(self, part: Any) -> Any:
        """A slice of the completions."""
        columns = {name: values[part] for name, values in self.columns.items()}
        return Answers(self.prompts[part], self.completions[part], self.completion_ids[part], columns)


def load_rewards(specs: Sequence[str], device: torch.device) -> list[Reward]:
    """A scorer for each of the recipe's `reward_funcs`.

    Args:
        specs: "package.module:function", "path/to/file.py:function", the folder or hub name of a reward model,
            "http://..." of a scorer, or "human".
        device: of reward models.
    Raises:
        BadInput: nothing of that name.
    """
    return [_load(spec, device) for spec in specs]


def _load(spec: str, device: torch.device) -> Reward:
    if spec == HUMAN:
        return Reward(HUMAN, _people)
    if spec.startswith(("http://", "https://")):
        return Reward("http", _http_scorer(spec))
    if ":" not in spec:
        return Reward(Path(spec).name, RewardModel(spec, device))
    function = load_object(spec, "reward_funcs")
    if not callable(function):
        raise BadInput(f"reward_funcs: {spec!r} is not a function")
    return Reward(spec.rpartition(":")[2], function)


def _people(**_: Any) -> None:
    raise BadInput("reward_funcs: 'human' stands alone, without other scorers")


def score(rewards: Sequence[Reward], answers: Answers) -> Tensor:
    """What each scorer says of each completion, [R, F] float64; NaN where it cannot say. Async ones run together.

    Raises:
        RunFailed: a function does not give one number (or None) for each completion.
    """
    arguments = {**answers._asdict(), **answers.columns}
    del arguments["columns"]

    async def all_of_them() -> list[Any]:
        waiting = [reward.score(**arguments) for reward in rewards]
        later = [value for value in waiting if inspect.isawaitable(value)]
        done = iter(await asyncio.gather(*later))
        return [next(done) if inspect.isawaitable(value) else value for value in waiting]

    asynchronous = any(inspect.iscoroutinefunction(reward.score) for reward in rewards)
    found = asyncio.run(all_of_them()) if asynchronous else [reward.score(**arguments) for reward in rewards]
    columns = []
    for reward, values in zip(rewards, found):
        values = [math.nan if value is None else value for value in values]
        if len(values) != len(answers.completions) or not all(isinstance(value, (int, float)) for value in values):
            raise RunFailed(
                f"reward {reward.name!r} gave {values!r:.200} for {len(answers.completions)} completions: it must give "
                "a list with one number (or None) for each"
            )
        columns.append(torch.tensor(values, dtype=torch.float64))
    return torch.stack(columns, 1)


def score_over_ranks(rewards: Sequence[Reward], answers: Answers, group_size: int, accelerator: Accelerator) -> Tensor:
    """`score`, with the groups shared out among the ranks (none is split) and the whole known to all of them."""
    from accelerate.utils import gather_object

    starts = range(0, len(answers.completions), group_size)
    mine = np.array_split(starts, accelerator.num_processes)[accelerator.process_index].tolist()
    part = score(rewards, answers[slice(mine[0], mine[-1] + group_size)]).tolist() if mine else []
    return torch.tensor(gather_object(part), dtype=torch.float64)


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


def _http_scorer(url: str) -> Callable[..., list[float | None]]:
    """POSTs {"prompts": [...], "completions": [...], ...columns}, expects {"scores": [...]}."""

    def fn(prompts: list[Any], completions: list[Any], completion_ids: Any, **columns: list[Any]) -> list[float | None]:
        every = {"prompts": prompts, "completions": completions, **columns}
        starts = range(0, len(completions), HTTP_CHUNK)
        payloads = [{name: values[start : start + HTTP_CHUNK] for name, values in every.items()} for start in starts]
        answers = post_all(url, payloads, concurrency=16)
        try:
            return [value for answer in answers for value in answer["scores"]]
        except (KeyError, TypeError) as error:
            raise RunFailed(f"{url} answered {answers[0]!r:.200}, expected {{'scores': [...]}}") from error

    return fn


class RewardModel:
    """The score of an AutoModelForSequenceClassification with one label, in the tokenisation that it was trained on.

    Args:
        path: its folder or hub name, with its tokenizer.
        device: where it runs.
        batch_size: completions of one forward pass.
    """

    def __init__(self, path: str, device: torch.device, batch_size: int = 32) -> None:
        from align_engine.data.encoder import Encoder
        from align_engine.policy import load_tokenizer
        from align_engine.recipe import ModelSection

        tokenizer = load_tokenizer(path, distinct_pad=True)
        model: Any = heads.load_scalar_model(path, ModelSection(dtype="auto"), tokenizer.pad_token_id)
        self.model = model.to(device).eval().requires_grad_(False)
        self.encoder, self.pad_id = Encoder(tokenizer), tokenizer.pad_token_id
        self.device, self.batch_size = device, batch_size

    @torch.no_grad()
    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        from align_engine.data import collate_sft

        rows = []
        for prompt, completion in zip(prompts, completions):
            prompt_ids, (ids,), _notes = self.encoder.split(prompt, [completion], {"tools": None})
            rows.append({"prompt_ids": prompt_ids, "completion_ids": ids, "index": len(rows)})
        found: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            batch = collate_sft(rows[start : start + self.batch_size], self.pad_id).to(self.device)
            found += heads.scores(self.model, batch.input_ids, batch.attention_mask).tolist()
        return found


def human_scores(folder: Path, number: int, answers: Answers) -> Tensor:
    """People's marks of rollout `number`, from a file that they fill in: [R, 1].

    Raises:
        RunFailed: the file has just been written, or marks are missing in it; the same command goes on afterwards.
    """
    path = folder / f"rollout-{number:06d}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = zip(answers.prompts, answers.completions)
        lines = [json.dumps({"prompt": prompt, "completion": completion, "score": None}) for prompt, completion in rows]
        side = path.with_suffix(".tmp")
        side.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        side.rename(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if [row["completion"] for row in rows] != answers.completions:
        raise BadInput(f"{path} holds marks of other completions than this run's; delete it")
    waiting = [
        i for i, row in enumerate(rows) if not isinstance(row.get("score"), (int, float)) and row.get("score") != "skip"
    ]
    if waiting:
        raise RunFailed(
            f"{len(waiting)} of {len(rows)} completions wait for marks: put a number (or 'skip') at `score` in {path}, "
            "then give the same command again"
        )
    return torch.tensor([[math.nan if row["score"] == "skip" else row["score"]] for row in rows], dtype=torch.float64)
