"""What scores completions: Python callables, a reward model, an HTTP scorer, people.

A reward function has TRL's signature, `fn(prompts, completions, completion_ids, **columns) -> list[float | None]`, and
may be async. Prompts and completions are strings, or lists of messages where the data are conversations; columns are
those of the data set. None means that it cannot score the completion. Each function gets copies of its own, and may
give numbers of any kind: Python's, NumPy's, torch's, and arrays or tensors of them.

An HTTP scorer gets POSTs of {"prompts": [...], "completions": [...], ...columns}, at most 16 completions in each, and
answers {"scores": [...]}. The environment variable ALIGN_SCORER_API_KEY, where it is set, is its bearer token.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from align_engine.data.batches import collate_sft
from align_engine.data.encoder import Encoder
from align_engine.data.formats import BadRow, is_conversational
from align_engine.data.json_text import loads
from align_engine.errors import BadInput, RunFailed
from align_engine.models import fingerprint as fingerprints
from align_engine.models import score_head
from align_engine.models.load import check_positions, load_tokenizer, vocabulary
from align_engine.recipe import ModelSection, RolloutSection
from align_engine.recipe.names import distinct
from align_engine.recipe.secrets import check_address, masked
from align_engine.rollouts.advantages import nanstd
from align_engine.rollouts.server import post_all
from align_engine.training import importing, stops
from align_engine.training.importing import foreign, load_object

if TYPE_CHECKING:
    from accelerate import Accelerator

    from align_engine.training.checkpoint import RunFolder

HUMAN, ADDRESSES = "human", ("http://", "https://")
HTTP_CHUNK = 16  # completions of one request to a scorer
PATIENCE = 120.0  # seconds that one request to a scorer may take
KEY = "ALIGN_SCORER_API_KEY"  # environment variable
LARGEST = 1e18  # of a reward: its square, which spreads are computed from, is far from the limit of float32
SETTLED = 0.5  # seconds without a change after which a file of marks is read
ATOMS = (str, bytes, int, float, type(None))  # what cannot be changed in place


class Reward(NamedTuple):
    """One scorer."""

    name: str  # in metrics
    score: Callable[..., Any]
    check: Callable[[Iterable[Any]], None] | None = None  # raises BadInput for prompts that it cannot read


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


def load_rewards(specs: Sequence[str], device: torch.device, trust_remote_code: bool = False) -> list[Reward]:
    """The scorers of the recipe's `reward_funcs`, each under a name of its own: its last part (of the path, the module
    or the address), with as many of those before it as tell it from the others."""
    names = distinct([_parts(spec) for spec in specs])
    return [load_reward(spec, device, trust_remote_code)._replace(name=name) for name, spec in zip(names, specs)]


def load_reward(spec: str, device: torch.device, trust_remote_code: bool = False) -> Reward:
    """The scorer that one of the recipe's `reward_funcs` stands for.

    Args:
        spec: "package.module:function", "path/to/file.py:function", the folder or hub name of a reward model,
            "http://..." of a scorer, or "human".
        device: of reward models.
        trust_remote_code: run code that lies beside them. Default False: refuse it.
    Raises:
        BadInput: nothing of that name.
    """
    name = _parts(spec)[-1]
    if spec == HUMAN:
        return Reward(name, _nobody)
    if spec.startswith(ADDRESSES):
        return Reward(name, partial(_ask, spec))
    if not is_function(spec):
        return reward_model(spec, device, trust_remote_code=trust_remote_code)
    function = load_object(spec, "reward_funcs")
    if not callable(function):
        raise BadInput(f"reward_funcs: {spec!r} is not a function")
    return Reward(name, function)


def _nobody(**_: Any) -> None:
    """People answer in a file: see `for_people`."""
    raise AssertionError("people are not called")


def _parts(spec: str) -> list[str]:
    """What a scorer can be called by: parts of its path, module or address, the most telling one last."""
    if spec.startswith(ADDRESSES):
        check_address(spec, "reward_funcs", KEY)
        place = urlsplit(masked(spec))
        return [*filter(None, (place.netloc, *place.path.split("/"))), "http"]
    if not is_function(spec):
        return [*Path(os.path.abspath(spec)).parts] if spec != HUMAN else [spec]
    place, _, name = spec.rpartition(":")
    in_file = place.endswith(".py")
    return [*(Path(os.path.abspath(place)).with_suffix("").parts if in_file else place.split(".")), name]


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


def is_model(spec: str) -> bool:
    """Whether a scorer is named as the folder or hub name of a reward model."""
    return spec != HUMAN and not spec.startswith(ADDRESSES) and not is_function(spec)


@contextlib.contextmanager
def no_model(path: str) -> Iterator[None]:
    """Around the loading of a reward model: a BadInput says what scorers are called, too."""
    try:
        yield
    except BadInput as error:
        functions = "a function is named module:function or file.py:function"
        raise BadInput(f"reward_funcs: {path!r} is no reward model ({functions}): {error}") from error


def is_function(spec: str) -> bool:
    """Whether a scorer is named as module:name or file.py:name, and not as the folder or hub name of a model."""
    return not os.path.isdir(spec) and (":" in spec or spec.endswith(".py"))  # False for names that are too long


def score(rewards: Sequence[Reward], answers: dict[str, list[Any]]) -> Tensor:
    """What each scorer says of each completion, [R, F] float64; NaN where it cannot say. Async ones run together.

    Raises:
        RunFailed: a function raises anything (SystemExit too), or does not give one finite number (or None) for each
            completion; it bears the function's name, and file and line of what was raised.
    """
    count, found = len(answers["completions"]), []
    try:
        for reward in rewards:
            with foreign(f"reward {reward.name!r}", RunFailed):
                found.append(reward.score(**copied(answers)))
        if any(map(inspect.isawaitable, found)):
            found = asyncio.run(_together(rewards, found))
    finally:
        for waiting in filter(inspect.iscoroutine, found):
            waiting.close()  # nothing happens to those that have run
    columns = [_numbers(reward.name, values, count) for reward, values in zip(rewards, found)]
    return torch.tensor(columns, dtype=torch.float64).T


async def _together(rewards: Sequence[Reward], found: list[Any]) -> list[Any]:
    async def one(reward: Reward, values: Any) -> Any:
        with foreign(f"reward {reward.name!r}", RunFailed):
            return await values if inspect.isawaitable(values) else values

    return await asyncio.gather(*map(one, rewards, found))


def copied(value: Any) -> Any:
    """Lists and dicts anew at every depth, and whatever else can be changed in place."""
    if isinstance(value, ATOMS):
        return value
    if type(value) is list:
        return [copied(one) for one in value]
    if type(value) is dict:
        return {name: copied(one) for name, one in value.items()}
    return copy.deepcopy(value)


def _numbers(name: str, values: Any, count: int) -> list[float]:
    """What a function gave as floats, NaN for None. Raises RunFailed where that is not one number a completion."""
    wanted = "it must give a list with one number (or None) for each"
    with foreign(f"reward {name!r}", RunFailed):  # objects of its own may fail when they are looked at
        given = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(given, (list, tuple)) or len(given) != count:
            raise RunFailed(f"reward {name!r} gave {values!r:.200} for {count} completions: {wanted}")
        found = []
        for i, value in enumerate(given):
            value = value.item() if getattr(value, "ndim", None) == 0 else value  # a scalar of NumPy or torch
            if not (value is None or isinstance(value, Real)):
                raise RunFailed(f"reward {name!r} gave {value!r:.200} for completion {i + 1} of {count}: {wanted}")
            found.append(math.nan if value is None else _float(value))
            if abs(found[-1]) > LARGEST:
                limit = f"rewards are finite, and at most {LARGEST:.0e}; None says that there is none"
                raise RunFailed(f"reward {name!r} gave {value!r:.200} for completion {i + 1} of {count}: {limit}")
        return found


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def score_over_ranks(
    rewards: Sequence[Reward], answers: dict[str, list[Any]], group_size: int, accelerator: Accelerator
) -> Tensor:
    """`score`, with the groups shared out among the ranks (none is split) and the whole known to all of them."""
    from accelerate.utils import gather_object

    starts = range(0, len(answers["completions"]), group_size)
    state = accelerator.state  # all ranks, those too that are one process of the run
    mine = np.array_split(starts, state.num_processes)[state.process_index].tolist()
    scores = score(rewards, part(answers, mine[0], mine[-1] + group_size)).tolist() if mine else []
    return torch.tensor(gather_object(scores), dtype=torch.float64)


def combine(scores: Tensor, settings: RolloutSection, ended: Sequence[bool]) -> Tensor:
    """The weighted sum over scorers, those left out that could not say, less the penalty of completions cut off:
    [R, F] -> [R], NaN where none could. Raises RunFailed for sums that are no rewards for their size."""
    factors = torch.tensor(settings.reward_weights or [1.0] * scores.shape[1], dtype=scores.dtype)
    total = (scores * factors).nansum(1) - (settings.missing_eos_penalty or 0.0) * ~torch.tensor(ended)
    if (total.abs() > LARGEST).any():
        raise RunFailed(f"rewards times reward_weights = {settings.reward_weights} exceed {LARGEST:.0e}: lower them")
    return total.masked_fill(scores.isnan().all(1), math.nan)


def reward_metrics(rewards: Sequence[Reward], scores: Tensor, total: Tensor, group_size: int) -> dict[str, float]:
    """Means and spreads of the rewards over the rollout, and the share of the groups without any, as TRL names them."""
    found = {"reward": total.nanmean(), "reward_std": nanstd(total)}
    if group_size > 1:
        found["frac_reward_zero_std"] = (nanstd(total.view(-1, group_size)) < 1e-8).double().mean()
    return {name: float(value) for name, value in found.items()} | scorer_metrics(rewards, scores)


def scorer_metrics(rewards: Sequence[Reward], scores: Tensor) -> dict[str, float]:
    """Mean and spread of what each scorer says, scores [R, F], as TRL names them."""
    found: dict[str, float] = {}
    for reward, column in zip(rewards, scores.T):
        found[f"rewards/{reward.name}/mean"] = float(column.nanmean().nan_to_num())
        found[f"rewards/{reward.name}/std"] = float(nanstd(column))
    return found


async def _ask(url: str, completion_ids: list[list[int]], **columns: list[Any]) -> list[float | None]:
    """POSTs {"prompts": [...], "completions": [...], ...columns}, expects {"scores": [...]}."""
    starts = range(0, len(completion_ids), HTTP_CHUNK)
    replies = await post_all(url, [part(columns, start, start + HTTP_CHUNK) for start in starts], KEY, PATIENCE)
    found = []
    for start, reply in zip(starts, replies):
        count = len(completion_ids[start : start + HTTP_CHUNK])
        scores = reply.get("scores") if isinstance(reply, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            wanted = f"expected {{'scores': [...]}} with {count} numbers"
            raise RunFailed(f"{masked(url)} answered {reply!r:.200}, {wanted}")
        found += scores
    return found


def reward_model(path: str, device: torch.device, batch_size: int = 32, trust_remote_code: bool = False) -> Reward:
    """An AutoModelForSequenceClassification with one label, which scores in the tokenisation that it was trained on.

    Args:
        path: its folder or hub name, with its tokenizer.
        device: where it runs.
        batch_size: completions of one forward pass.
        trust_remote_code: run code that lies beside it. Default False: refuse it.
    Raises:
        BadInput: there is no such model. By the scorer's `check`: its chat template, or the lack of one, refuses
            prompts.
    """
    return reward_of(path, *load_reward_model(path, device, trust_remote_code), batch_size)


def load_reward_model(path: str, device: torch.device, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a reward model, in eval mode and without gradients. Raises BadInput as `reward_model`."""
    with no_model(path):
        tokenizer = load_tokenizer(path, True, trust_remote_code, "reward_funcs")
        section = ModelSection(dtype="auto", trust_remote_code=trust_remote_code)
        loaded: Any = score_head.load_scalar_model(path, section, tokenizer.pad_token_id)
    return loaded.to(device).eval().requires_grad_(False), tokenizer


def reward_of(path: str, model: Any, tokenizer: Any, batch_size: int = 32) -> Reward:
    """The scorer that a loaded reward model is, under the name of its path."""
    encoder, held, device = Encoder(tokenizer), vocabulary(model), next(model.parameters()).device

    def encoded(prompt: Any, completion: Any) -> dict[str, Any]:
        prompt_ids, (ids,), _notes = encoder.split(prompt, [completion], {"tools": None})
        if (largest := max(*prompt_ids, *ids)) >= held:
            raise BadInput(f"its tokenizer gives the id {largest}, and its embeddings hold {held} tokens")
        return {"prompt_ids": prompt_ids, "completion_ids": ids}

    def check(prompts: Iterable[Any]) -> None:
        seen = set()  # templates look at the roles: one prompt of each sequence of them will do
        for prompt in prompts:
            chat = is_conversational(prompt)
            roles = tuple(message["role"] for message in prompt) if chat else None
            if roles not in seen:
                seen.add(roles)
                try:
                    encoded(prompt, [{"role": "assistant", "content": "a"}] if chat else "a")
                except (BadRow, BadInput) as error:
                    kind = ", ".join(roles) if roles else "text"
                    raise BadInput(f"reward_funcs: {path!r} cannot read the prompts ({kind}): {error}") from error

    @torch.no_grad()
    def score(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        rows, found = [encoded(*pair) | {"index": i} for i, pair in enumerate(zip(prompts, completions))], []
        for start in range(0, len(rows), batch_size):
            batch = collate_sft(rows[start : start + batch_size], tokenizer.pad_token_id).to(device)
            with no_model(path):
                check_positions(model, batch.input_ids.shape[1])
            found += score_head.batch_scores(model, batch).tolist()
        if any(map(math.isnan, found)):
            raise RunFailed(f"the reward model {path!r} gives NaN: its weights, or its dtype, are broken")
        return found

    return Reward(Path(path).name, score, check)


def for_people(folder: RunFolder, number: int, answers: dict[str, list[Any]]) -> Path:
    """The file in the run's folder where people put their marks of rollout `number`, made where it is not there."""
    name = f"marks/rollout-{number:06d}.jsonl"
    path, pairs = folder.path / name, zip(answers["prompts"], answers["completions"])
    if not path.exists():
        folder.write_rows(name, [{"prompt": prompt, "completion": text, "score": None} for prompt, text in pairs])
    return path


def wait(path: Path, say: Callable[[str], None]) -> None:
    """Until every completion in a file of marks has one.

    Args:
        say: shows a sentence.
    Raises:
        BadInput: from a file that is damaged, once nobody writes in it. StopNow: the run has been told to stop.
    """
    said, seen = False, 0.0
    while True:
        stops.pause()
        changed = path.stat().st_mtime
        if changed != seen and time.time() - changed > SETTLED:  # an editor may write in pieces
            rows, seen = _marks(path), changed
            if not (waiting := sum(row.get("score") is None for row in rows)):
                return
            if not said:
                say(f"{waiting} completions wait for marks in {path}: the run goes on when they are in")
            said = True
        time.sleep(SETTLED / 2)


def human_scores(path: Path, answers: dict[str, list[Any]]) -> Tensor:
    """People's marks of a rollout, from the file that they fill in: [R, 1].

    Raises:
        RunFailed: marks are missing in it; the same command goes on afterwards.
    """
    rows = _marks(path)
    if [row["completion"] for row in rows] != answers["completions"]:
        raise BadInput(f"{path} holds marks of other completions than this run's; delete it")
    marks = [math.nan if row.get("score") == "skip" else row.get("score") for row in rows]
    if waiting := [mark for mark in marks if mark is None]:
        raise RunFailed(
            f"{len(waiting)} of {len(rows)} completions wait for marks: put a number (or 'skip') at `score` in {path}, "
            "then give the same command again; or give --wait_for_marks, and `align rate --run_dir` asks on a web page"
        )
    return torch.tensor(marks, dtype=torch.float64)[:, None]


def _marks(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of marks. Raises BadInput, naming the line, for one that is damaged or no mark."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = loads(line)
        except ValueError as error:  # of the encoding, too
            raise BadInput(f"{path} line {number} is not JSON: {error}; mend it, or delete the file") from error
        if not isinstance(row, dict) or "completion" not in row:
            raise BadInput(f"{path} line {number} has no `completion`; mend it, or delete the file")
        mark = row.get("score")
        number_of_it = isinstance(mark, (int, float)) and abs(mark) <= LARGEST
        if not (mark is None or mark == "skip" or number_of_it):
            raise BadInput(f"{path} line {number}: score = {mark!r:.60} is no finite number, 'skip' or null")
        found.append(row)
    return found
