"""Rollouts as a source of windows: sampled, scored and given their advantages when a step needs new ones.

A rollout is P prompts with G completions each. All ranks hold all of it, in an order that does not depend on their
number, so that advantages need no collective (groups are never split) and windows are cut as those of fixed rows are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow.compute
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align_engine.data.batches import IGNORE, collate_rollouts, epoch_order
from align_engine.data.exact import read
from align_engine.data.fingerprint import content_hash
from align_engine.data.windows import TRIED, Clock, Source, endless_order
from align_engine.errors import BadInput, RunFailed
from align_engine.models.load import vocab_size
from align_engine.models.logps import token_logps
from align_engine.recipe import GrpoLoss, IterateRecipe, OnlineEval, OnlineRecipe
from align_engine.recipe.secrets import masked
from align_engine.rollouts import rewards as scoring
from align_engine.rollouts.advantages import Experience
from align_engine.rollouts.generate import Completion, Sampler, sample_all, transformers_sampler
from align_engine.rollouts.server import check_correction, kind_of_server, reload_weights, server_sampler
from align_engine.rollouts.server_weights import ServerWeights
from align_engine.training.checkpoint import RunFolder

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset

    from align_engine.training.engine import Engine


pc: Any = pyarrow.compute


class Judged(NamedTuple):
    """Completions with their scores."""

    rewards: Tensor  # [R] float64, NaN where nobody could score
    answers: dict[str, list[Any]]  # what the scorers saw
    metrics: dict[str, float]


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
        if url := self.settings.server_base_url:
            self.kind, name = kind_of_server(url), self.recipe.model.model_name_or_path
            self.accelerator.print(f"completions come from {masked(url)}, which shows itself as {self.kind}")
            loss = self.recipe.section(GrpoLoss)
            if loss is not None and loss.vllm_importance_sampling_correction:
                check_correction(self.settings, self.kind)
            size = vocab_size(name, self.recipe.model.trust_remote_code)
            self.server = server_sampler(self.tokenizer, self.settings, name, self.kind, size)
        self.server_weights: ServerWeights | None = None
        if self.settings.server_weights:
            self.server_weights = ServerWeights(self.settings.server_weights, self.recipe.model.model_name_or_path)
            self.server_weights.check()
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

    def fingerprint(self) -> str:
        """Hash of the prompts' token ids, and of every column that scorers may read."""
        return f"{content_hash(self.rows)}-{content_hash(self.columns)}"

    def sampler(self, model: Any) -> Sampler:
        """Of this model, or of the server that the recipe names."""
        return self.server or transformers_sampler(model, self.tokenizer, self.settings)

    def asked(self, number: int, count: int) -> list[int]:
        """The rows that time `number` asks: `count` of an endless shuffled order, each num_generations times."""
        chosen = [endless_order(len(self.rows), self.seed, number * count + i) for i in range(count)]
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
                scores = scoring.human_scores(self.folder, number, answers)
        else:
            scores = scoring.score_over_ranks(self.scorers, answers, group_size, self.accelerator)
        total = scoring.combine(scores, self.settings, ended)
        metrics = scoring.reward_metrics(self.scorers, scores, total, group_size)
        return Judged(total, answers, metrics | length_metrics([len(one) for one in ids], ended))

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
        self.windows = (self.settings.steps_per_generation or accumulation) // accumulation
        self.steps_per_rollout = self.windows * recipe.passes
        self.prompts_per_rollout, left = divmod(self.window_size * self.windows, group_size)
        if left:
            raise BadInput(
                f"num_generations = {group_size} does not divide the {self.window_size * self.windows} "
                f"completions of a rollout (per_device_train_batch_size x steps_per_generation x processes)"
            )
        self.steps_per_epoch = math.ceil(len(self.rows) / self.prompts_per_rollout) * self.steps_per_rollout
        self.number, self.experience, self.state = -1, [], {}

    def start(self, engine: Engine, learns: bool) -> None:
        """Sample from the engine's model. What it learns from becomes part of the checkpoints, and takes over
        `engine.reference`, if any: the rows carry its log-probs."""
        self.engine, self.sampler = engine, self.prompts.sampler(engine.model)
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
        settings, engine, prompts = self.settings, self.engine, self.prompts
        asked = prompts.asked(number, self.prompts_per_rollout)
        with clock("generate"):
            self.refresh_server()
            completions = prompts.answers(self.sampler, asked, number)
        self.experience = [
            {"index": i, "prompt_ids": ids, "completion_ids": one.ids, "sampling_logps": one.logps}
            for i, (ids, one) in enumerate(zip(self.rows[asked]["prompt_ids"], completions))
        ]
        with clock("score"):
            place = prompts.folder.checkpoint(engine.progress.step)
            if settings.reward_funcs == [scoring.HUMAN] and not place.exists():
                engine.save(prompts.folder)  # people take their time: the same completions must come again
            judged = prompts.judge(asked, completions, settings.num_generations, number)
        if judged.rewards.isnan().all():
            raise RunFailed(f"rollout {number}: none of its {len(asked)} completions could be scored")
        with clock("measure"):
            measured = self.measure()
        masked = torch.tensor([settings.mask_truncated_completions and not one.ended for one in completions])
        lengths = torch.tensor([len(one.ids) for one in completions])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]) & ~masked[:, None]
        assert engine.algorithm.advantages is not None, "the table says how rollouts get their advantages"
        found = Experience(judged.rewards, settings.num_generations, mask, **measured)
        given, metrics = engine.algorithm.advantages(found, self.recipe, self.state)
        for i, row in enumerate(self.experience):
            tokens = {name: table[i, : lengths[i]].float().clone() for name, table in (measured | given).items()}
            row |= {**tokens, "masked": bool(masked[i])}
        self.number = number
        for name, value in (metrics | judged.metrics).items():
            engine.progress.sums.add(name, float(value), 1)

    def refresh_server(self) -> None:
        """Hand a server that samples the present policy."""
        if (weights := self.prompts.server_weights) is not None:
            self.engine.write_model(weights.written, self.prompts.tokenizer)
            if self.engine.accelerator.is_main_process:
                reload_weights(self.settings, self.prompts.kind)
            self.engine.accelerator.wait_for_everyone()

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
        for _, name, values in sorted(gather_object(mine), key=lambda part: part[0]):
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
        found = judged.metrics | self.prompts.watched(judged.answers)
        return {f"eval_{name}": value for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The rollout, where steps on it are left, and the state of the advantages."""
        left = self.engine.progress.step % self.steps_per_rollout
        number, experience = (self.number, self.experience) if left else (-1, [])
        return {"number": number, "experience": experience, "state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def length_metrics(lengths: Sequence[int], ended: Sequence[bool]) -> dict[str, float]:
    """Lengths of the completions in tokens, and the share of those cut off, as TRL names them."""
    found = {"completions/clipped_ratio": 1 - sum(ended) / len(ended)}
    terminated = [length for length, whole in zip(lengths, ended) if whole] or [0]
    for name, kept in (("length", lengths), ("terminated_length", terminated)):
        found[f"completions/mean_{name}"] = sum(kept) / len(kept)
        found |= {f"completions/min_{name}": min(kept), f"completions/max_{name}": max(kept)}
    return found
