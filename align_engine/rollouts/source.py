"""Rollouts as a source of windows: sampled, scored and given their advantages when a step needs new ones.

A rollout is P prompts with G completions each. All ranks hold all of it, in an order that does not depend on their
number, so that advantages need no collective (groups are never split) and windows are cut as those of fixed rows are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.compute
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align_engine.data.batches import IGNORE, collate_rollouts, epoch_order
from align_engine.data.exact import read
from align_engine.data.fingerprint import content_hash
from align_engine.data.json_text import loads
from align_engine.data.shares import Weight
from align_engine.data.windows import TRIED, Clock, Source, endless_order
from align_engine.errors import BadInput, RunFailed
from align_engine.models.load import vocab_size
from align_engine.models.logps import token_logps
from align_engine.recipe import GrpoLoss, IterateRecipe, OnlineEval, OnlineRecipe
from align_engine.recipe.secrets import masked
from align_engine.rollouts import rewards as scoring
from align_engine.rollouts.advantages import Experience
from align_engine.rollouts.completion import Completion, Sampler
from align_engine.rollouts.generate import sample_all, transformers_sampler
from align_engine.rollouts.server import Adapter, check_correction, kind_of_server, reload_weights, server_sampler
from align_engine.rollouts.server_weights import ServerWeights
from align_engine.training.checkpoint import RunFolder
from align_engine.training.metrics import Sums
from align_engine.training.ranks import gathered
from align_engine.training.samples import some

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from align_engine.training.engine import Engine


pc: Any = pyarrow.compute


AGAIN = 1 << 31  # in the seeds of prompts that take others' place: no number of a rollout


class Answer(NamedTuple):
    """A completion that is scored."""

    asked: int  # row of the prompts
    completion: Completion
    reward: float  # NaN where nobody could score
    sample: dict[str, Any]  # its row of samples.jsonl


class Group(NamedTuple):
    """All completions of a prompt."""

    answers: list[Answer]

    @property
    def spread(self) -> bool:
        """Whether they have more than one reward."""
        return len({one.reward for one in self.answers if not math.isnan(one.reward)}) > 1


class Judged(NamedTuple):
    """Completions with their scores."""

    rewards: Tensor  # [R] float64, NaN where nobody could score
    answers: dict[str, list[Any]]  # what the scorers saw
    metrics: dict[str, float]
    scores: dict[str, list[float]]  # by scorer, NaN where it could not say

    def samples(self) -> list[dict[str, Any]]:
        """A row of samples.jsonl for each completion."""
        each = zip(self.answers["prompts"], self.answers["completions"], self.rewards.tolist(), *self.scores.values())
        return [
            {"prompt": written(prompt), "completion": text, "score": number(score),
             "rewards": dict(zip(self.scores, map(number, scores)))}
            for prompt, text, score, *scores in each
        ]  # fmt: skip


@dataclass
class Prompts:
    """Prompts that are answered and scored, by all ranks together.

    Args:
        rows: as `align_engine.data.tokenize.prepare` returns them.
        columns: the data set's own rows, for reward functions: as they were written, media undecoded.
        tokenizer: the policy's.
        recipe: its section `rollout` above all.
        accelerator: shares the work out among the ranks.
        folder: of the run, where people find what to mark.
    Raises:
        BadInput: no server answers where the recipe names one, or not as it asks, or there is no such scorer.
    """

    rows: Dataset
    columns: Dataset
    tokenizer: Any
    recipe: OnlineRecipe | IterateRecipe
    accelerator: Accelerator
    folder: RunFolder

    def __post_init__(self) -> None:
        self.settings, self.seed, self.server = self.recipe.rollout, self.recipe.train.seed, None
        self.server_weights: ServerWeights | None = None
        self.adapter: Adapter | None = None
        if self.settings.server_weights:
            self.server_weights = ServerWeights(self.settings.server_weights, self.recipe.model.model_name_or_path)
            self.server_weights.check()
        if url := self.settings.server_base_url:
            self.ask(url)
        if "prompt" not in self.columns.column_names:  # rows of ids: scorers read their text
            texts, ids = [""] * len(self.columns), self.rows["prompt_ids"]
            for index, text in zip(self.rows["index"], self.tokenizer.batch_decode(ids[:], skip_special_tokens=True)):
                texts[index] = text
            self.columns = self.columns.add_column("prompt", texts)
        trusted = self.recipe.model.trust_remote_code
        learnt, evaluation = self.settings.reward_funcs, self.recipe.section(OnlineEval)
        specs = [*learnt, *(evaluation.eval_reward_funcs if evaluation else ())]
        scorers = scoring.load_rewards(specs, self.accelerator.device, trusted)
        self.scorers, self.watchers = scorers[: len(learnt)], scorers[len(learnt) :]
        for scorer in scorers:
            if scorer.check is not None:
                asked: Any = self.columns.select(self.rows["index"][:]).select_columns("prompt").iter(1000)
                scorer.check(prompt for part in asked for prompt in part["prompt"])

    def ask(self, url: str) -> None:
        """Know the server there, and sample from it."""
        self.kind, name = kind_of_server(url), self.recipe.model.model_name_or_path
        self.accelerator.print(f"completions come from {masked(url)}, which shows itself as {self.kind}")
        loss = self.recipe.section(GrpoLoss)
        if loss is not None and loss.vllm_importance_sampling_correction:
            check_correction(self.settings, self.kind)
        if self.server_weights is not None and self.recipe.model.use_peft:
            if self.kind != "vllm":
                raise BadInput(
                    f"server_weights = {self.settings.server_weights!r} with use_peft: true needs vLLM, which loads "
                    f"adapters, and {masked(url)} shows itself as {self.kind}: set use_peft to false"
                )
            self.adapter = Adapter(self.settings)
        size = vocab_size(name, self.recipe.model.trust_remote_code, self.recipe.model.model_revision)
        self.server = server_sampler(self.tokenizer, self.settings, name, self.kind, size, self.adapter)

    def refresh(self, path: Path) -> None:
        """Have the server read the policy that was put into the folder at `path`."""
        if self.accelerator.is_main_process:
            self.adapter.load(path) if self.adapter is not None else reload_weights(self.settings, self.kind)
        if self.adapter is not None:
            self.adapter.name = gathered([self.adapter.name], self.accelerator)[0]
        self.accelerator.wait_for_everyone()

    def fingerprint(self) -> str:
        """Hash of the prompts' token ids, and of every column that scorers may read."""
        return f"{content_hash(self.rows)}-{content_hash(self.columns)}"

    def sampler(self, model: Any, says: bool = True) -> Sampler:
        """Of this model, or of the server that the recipe names. `says`: which way it takes."""
        say = self.accelerator.print if says else None
        around: Any = self.accelerator.autocast
        return self.server or transformers_sampler(model, self.tokenizer, self.settings, say, around)

    def asked(self, place: int, count: int) -> list[int]:
        """The rows from `place` on in an endless shuffled order: `count` of them, each num_generations times."""
        chosen = [endless_order(len(self.rows), self.seed, place + i) for i in range(count)]
        return [row for row in chosen for _ in range(self.settings.num_generations)]

    def answers(self, sampler: Sampler, asked: list[int], *seeds: int) -> list[Completion]:
        """A completion of each row asked, a function of the sampler's model and the seeds."""
        prompts, size = self.rows[asked]["prompt_ids"], self.settings.per_device_generation_batch_size
        return sample_all(sampler, prompts, size, (self.seed, *seeds), self.accelerator)

    def judge(self, asked: list[int], completions: list[Completion], group_size: int, number: int) -> Judged:
        """What the scorers, or people in the `number`-th file of theirs, say of the completions."""
        ids, ended = [one.ids for one in completions], [one.ended for one in completions]
        answers = scoring.answers(read(self.columns, self.rows[asked]["index"]), ids, self.tokenizer)
        if self.settings.reward_funcs == [scoring.HUMAN]:
            with self.accelerator.main_process_first():
                path = scoring.for_people(self.folder, number, answers)
            if self.settings.wait_for_marks:  # each process by itself: people take longer than a collective may
                scoring.wait(path, self.accelerator.print)
            scores = scoring.human_scores(path, answers)
        else:
            scores = scoring.score_over_ranks(self.scorers, answers, group_size, self.accelerator)
        total = scoring.combine(scores, self.settings, ended)
        metrics = scoring.reward_metrics(self.scorers, scores, total, group_size)
        metrics |= length_metrics([len(one) for one in ids], ended)
        by_name = {scorer.name: column for scorer, column in zip(self.scorers, scores.T.tolist())}
        return Judged(total, answers, metrics, by_name)

    def watched(self, answers: dict[str, list[Any]]) -> dict[str, float]:
        """What the scorers say that nobody learns from."""
        if not self.watchers:
            return {}
        scores = scoring.score_over_ranks(self.watchers, answers, 1, self.accelerator)
        return scoring.scorer_metrics(self.watchers, scores)


class Rollouts(Source):
    """A source whose rows the policy writes, in answer to prompts."""

    def __init__(self, prompts: Prompts, recipe: OnlineRecipe) -> None:
        self.prompts, self.settings, self.recipe = prompts, prompts.settings, recipe
        train, accelerator = recipe.train, prompts.accelerator
        accumulation, group_size = train.gradient_accumulation_steps, self.settings.num_generations
        super().__init__(
            prompts.rows, collate_rollouts, prompts.tokenizer.pad_token_id, train.per_device_train_batch_size,
            accumulation, accelerator.process_index, accelerator.num_processes, train.seed,
        )  # fmt: skip
        self.windows = recipe.windows
        self.steps_per_rollout = self.windows * recipe.passes
        self.prompts_per_rollout, left = divmod(self.window_size * self.windows, group_size)
        if left:
            raise BadInput(
                f"num_generations = {group_size} does not divide the {self.window_size * self.windows} "
                f"completions of a rollout (per_device_train_batch_size x steps_per_generation x processes)"
            )
        self.steps_per_epoch = math.ceil(len(self.rows) / self.prompts_per_rollout) * self.steps_per_rollout
        self.number, self.experience, self.state = -1, [], {}
        self.extra = 0  # prompts asked so far in others' place

    def start(self, engine: Engine, learns: bool) -> None:
        """Sample from the engine's model. What it learns from becomes part of the checkpoints, and takes over
        `engine.reference`, if any: the rows carry its log-probs."""
        self.engine, self.sampler = engine, self.prompts.sampler(engine.model, says=learns)
        if learns:
            self.reference, engine.reference = engine.reference, None
            engine.kept["rollouts"] = self

    def fingerprint(self) -> str:
        """That of the prompts."""
        return self.prompts.fingerprint()

    def window_rows(self, step: int) -> list[int]:
        """Numbers of the completions that a step sees, of this step's rollout."""
        place = step % self.steps_per_rollout
        iteration, window = divmod(place, self.windows)
        order = epoch_order(len(self.experience), self.seed, step - place + iteration)
        return order[window * self.window_size : (window + 1) * self.window_size]

    def records(self, rows: list[int]) -> list[dict[str, Any]]:
        """Completions of these numbers, with their prompts."""
        return [self.experience[i] for i in rows]

    def weights(self, rows: list[int]) -> list[Weight]:
        """What each of the completions, with its prompt, has to read."""
        held = self.records(rows)
        return [Weight(tuple(row["prompt_ids"]), len(row["prompt_ids"]), len(row["completion_ids"])) for row in held]

    def trial(self) -> list[dict[str, Any]]:
        """The first prompts, answered by other prompts: nobody has sampled yet."""
        prompts = self.rows[self.prompts.asked(0, self.prompts_per_rollout)[:TRIED]]["prompt_ids"]
        both = enumerate(zip(prompts, reversed(prompts)))
        return [{"index": i, "prompt_ids": prompt, "completion_ids": other} for i, (prompt, other) in both]

    def prepare(self, step: int, clock: Clock) -> None:
        """Have the rollout that a step learns from."""
        if self.number != (number := step // self.steps_per_rollout):
            self.collect(number, clock)

    def collect(self, number: int, clock: Clock) -> None:
        """Sample rollout `number` from the present policy, score it, and give its tokens their advantages."""
        settings, engine = self.settings, self.engine
        with clock("generate"):
            self.refresh_server()
        answers, metrics, extra = self.answered(number, clock)
        asked, completions, rewards, samples = ([getattr(one, name) for one in answers] for name in Answer._fields)
        self.samples = some(samples)
        self.experience = [
            {"index": i, "prompt_ids": ids, "completion_ids": one.ids, "sampling_logps": one.logps}
            for i, (ids, one) in enumerate(zip(self.rows[asked]["prompt_ids"], completions))
        ]
        if all(map(math.isnan, rewards)):
            raise RunFailed(f"rollout {number}: none of its {len(asked)} completions could be scored")
        with clock("measure"):
            measured = self.measure()
        masked = torch.tensor([settings.mask_truncated_completions and not one.ended for one in completions])
        lengths = torch.tensor([len(one.ids) for one in completions])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]) & ~masked[:, None]
        assert engine.algorithm.advantages is not None, "the table says how rollouts get their advantages"
        found = Experience(torch.tensor(rewards, dtype=torch.float64), settings.num_generations, mask, **measured)
        given, more = engine.algorithm.advantages(found, self.recipe, self.state)
        for i, row in enumerate(self.experience):
            tokens = {name: table[i, : lengths[i]].float().clone() for name, table in (measured | given).items()}
            row |= {**tokens, "masked": bool(masked[i])}
        self.number, self.extra = number, self.extra + extra
        for name, value in more.items():
            metrics.add(name, float(value), 1)
        engine.progress.sums.merge(metrics)

    def answered(self, number: int, clock: Clock) -> tuple[list[Answer], Sums, int]:
        """The completions that rollout `number` learns from, the metrics of all that were sampled, and how many prompts
        were asked in others' place.

        With dynamic_sample, prompts whose completions have one reward give way to the next ones of the order, as often
        as max_resample_times allows; while none is left to take their place they stay. So each rollout begins where
        the one before it has ended in the order, and as many rollouts as ever make an epoch.
        """
        settings, prompts, most = self.settings, self.prompts, self.prompts_per_rollout
        found, metrics = list[Group](), Sums()
        for again in range(1 + settings.max_resample_times * settings.dynamic_sample):
            room = most - sum(group.spread for group in found)
            if not room:
                break
            asked = prompts.asked(number * most + self.extra + len(found), room)
            seeds = (AGAIN + again, number) if again else (number,)
            with clock("generate"):
                completions = prompts.answers(self.sampler, asked, *seeds)
            with clock("score"):
                self.save_for_people()
                judged = prompts.judge(asked, completions, settings.num_generations, number)
            answers = [Answer(*one) for one in zip(asked, completions, judged.rewards.tolist(), judged.samples())]
            size = settings.num_generations
            found += [Group(answers[i : i + size]) for i in range(0, len(answers), size)]
            for name, value in judged.metrics.items() if not judged.rewards.isnan().all() else ():
                metrics.add(name, value, room / most)
        room, kept = most - sum(group.spread for group in found), list[Answer]()
        if settings.dynamic_sample:
            for name, value in (("prompts", len(found) - most), ("left", room)):
                metrics.add(f"dynamic_sample/{name}", value, 1)
        for group in found:
            if group.spread or room:
                kept += group.answers
                room -= not group.spread
        return kept, metrics, len(found) - most

    def save_for_people(self) -> None:
        """A checkpoint, where people mark completions: they take their time, and the same ones must come again."""
        folder = self.prompts.folder
        if self.settings.reward_funcs == [scoring.HUMAN] and not folder.checkpoint(self.engine.progress.step).exists():
            self.engine.save(folder)

    def refresh_server(self) -> None:
        """Hand a server that samples the present policy."""
        if (weights := self.prompts.server_weights) is not None:
            self.engine.write_model(weights.written, self.prompts.tokenizer)
            self.prompts.refresh(weights.path.resolve())

    def measure(self) -> dict[str, Tensor]:
        """Log-probs of the rollout under policy and reference, and values, where they are needed: name -> [R, T]."""
        engine, training = self.engine, self.engine.model.training
        own = self.steps_per_rollout > 1 or self.reference or not engine.algorithm.present_policy
        engine.model.eval()
        mine: list[tuple[int, str, Tensor]] = []  # (number of a row, what, of each of its tokens)
        for batch, real in self.share(list(range(len(self.experience)))):
            batch, found = batch.to(engine.accelerator.device), {}
            if own:
                tables = token_logps(engine.model, batch, engine.head_options, engine.critic)
                found |= zip(("old_logps", "values"), tables)
            if self.reference is not None:
                found["ref_logps"] = self.reference(batch)
            for name, table in found.items() if real else ():
                parts = zip(batch.index.tolist(), table, batch.targets != IGNORE)
                mine += [(row, name, values[kept].cpu()) for row, values, kept in parts]
        engine.model.train(training)
        columns: dict[str, list[Tensor]] = {}
        for _, name, values in sorted(gathered(mine, engine.accelerator), key=lambda part: part[0]):
            columns.setdefault(name, []).append(values)
        return {name: pad_sequence(parts, batch_first=True) for name, parts in columns.items()}

    def longest(self) -> int:
        """Tokens of the longest prompt, and of the longest completion that may follow it."""
        prompts, *_ = self.lengths()
        return pc.max(prompts).as_py() + self.settings.max_completion_length

    def evaluate(self, engine: Engine) -> dict[str, float]:
        """Rewards and lengths of one completion of every prompt, drawn with the same random numbers each time, and what
        `eval_reward_funcs` say of them."""
        self.refresh_server()
        asked = list(range(len(self.rows)))
        judged = self.prompts.judge(asked, self.prompts.answers(self.sampler, asked), 1, 0)
        self.samples = some(judged.samples())
        found = judged.metrics | self.prompts.watched(judged.answers)
        return {f"eval_{name}": value for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The rollout, where steps on it are left, the state of the advantages, and the place in the prompts' order."""
        left = self.engine.progress.step % self.steps_per_rollout
        kept = {"number": -1, "experience": [], "samples": []}
        if left:
            kept = {"number": self.number, "experience": self.experience, "samples": self.samples}
        return kept | {"state": self.state, "extra": self.extra}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def written(prompt: Any) -> Any:
    """A prompt as JSON can hold it: of a picture inside a message its type alone."""
    return loads(json.dumps(prompt, default=lambda value: f"<{type(value).__name__}>"))


def number(value: float) -> float | None:
    """None in place of NaN."""
    return None if math.isnan(value) else value


def length_metrics(lengths: Sequence[int], ended: Sequence[bool]) -> dict[str, float]:
    """Lengths of the completions in tokens, and the share of those cut off, as TRL names them."""
    found = {"completions/clipped_ratio": 1 - sum(ended) / len(ended)}
    terminated = [length for length, whole in zip(lengths, ended) if whole] or [0]
    for name, kept in (("length", lengths), ("terminated_length", terminated)):
        found[f"completions/mean_{name}"] = sum(kept) / len(kept)
        found |= {f"completions/min_{name}": min(kept), f"completions/max_{name}": max(kept)}
    return found
