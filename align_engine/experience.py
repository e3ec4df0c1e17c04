"""Rollouts as a source of windows: sampled, scored and given their credit when a step needs new ones.

A rollout is P prompts with G completions each. All ranks hold all of it, in an order that does not depend on their
number, so that credit needs no collective (groups are never split) and windows are cut as those of fixed rows are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align_engine import rewards as scoring
from align_engine.checkpoint import RunFolder
from align_engine.data import Batch, collate_rollouts, epoch_order
from align_engine.data.batches import IGNORE
from align_engine.errors import BadInput, RunFailed
from align_engine.recipe import OnlineRecipe, flat
from align_engine.reference import token_logps
from align_engine.rollout import Completion, Sampler, sample_all
from align_engine.server import reload_weights
from align_engine.source import Source, endless_order

if TYPE_CHECKING:
    from datasets import Dataset

    from align_engine.engine import Engine
    from align_engine.metrics import Clock


class Experience(NamedTuple):
    """What credit is computed from. R completions, groups of equal size side by side; T tokens of the longest."""

    rewards: Tensor  # [R] float64, NaN where nobody could score
    group_size: int
    mask: Tensor  # [R, T] bool, from the left
    old_logps: Tensor | None  # [R, T] float32, as those below; None: the present policy's, which nobody asked for
    ref_logps: Tensor | None
    values: Tensor | None


class Rollouts(Source):
    """A source whose rows the policy writes.

    Args:
        rows: prompts, as `align_engine.data.prepare` returns them.
        columns: the data set's own rows, for reward functions.
        tokenizer: the policy's.
        recipe: its section `rollout`, and the credit's settings.
        rewards: what scores completions.
        rank, world: this process, and how many there are.
    """

    def __init__(
        self,
        rows: Dataset,
        columns: Dataset,
        tokenizer: Any,
        recipe: OnlineRecipe,
        rewards: list[scoring.Reward],
        rank: int,
        world: int,
    ) -> None:
        train, settings, values = recipe.train, recipe.rollout, flat(recipe)
        accumulation, batch_size = train.gradient_accumulation_steps, train.per_device_train_batch_size
        super().__init__(
            rows, collate_rollouts, tokenizer.pad_token_id, batch_size, accumulation, rank, world, train.seed
        )
        self.columns, self.tokenizer, self.recipe, self.rewards = columns, tokenizer, recipe, rewards
        self.settings = settings
        self.windows = (settings.steps_per_generation or accumulation) // accumulation
        self.steps_per_rollout = self.windows * (values.get("num_iterations") or values["num_ppo_epochs"])
        self.prompts_per_rollout = self.window_size * self.windows // settings.num_generations
        if self.window_size * self.windows % settings.num_generations:
            raise BadInput(
                f"num_generations = {settings.num_generations} does not divide the {self.window_size * self.windows} "
                f"completions of a rollout (per_device_train_batch_size x steps_per_generation x processes)"
            )
        self.steps_per_epoch = math.ceil(len(rows) / self.prompts_per_rollout) * self.steps_per_rollout
        self.number, self.experience, self.state = -1, [], {}

    def start(self, engine: Engine, sampler: Sampler, folder: RunFolder) -> None:
        """Give it what it needs to sample and score."""
        self.engine, self.sampler, self.folder = engine, sampler, folder

    def learn_from(self) -> None:
        """Become part of the checkpoints, and take over `engine.reference`, if any: the rows carry its log-probs."""
        self.reference, self.engine.reference = self.engine.reference, None
        self.engine.accelerator.register_for_checkpointing(self)

    def window_rows(self, step: int) -> list[int]:
        """Numbers of the completions that a step sees, of this step's rollout."""
        place = step % self.steps_per_rollout
        iteration, window = divmod(place, self.windows)
        order = epoch_order(len(self.experience), self.seed, step - place + iteration)
        return order[window * self.window_size : (window + 1) * self.window_size]

    def batch(self, rows: list[int]) -> Batch:
        """Completions of these numbers, collated."""
        return self.collate([self.experience[i] for i in rows])

    def prepare(self, step: int, clock: Clock) -> None:
        """Have the rollout that a step learns from."""
        if self.number != (number := step // self.steps_per_rollout):
            self.collect(number, clock)

    def collect(self, number: int, clock: Clock) -> None:
        """Sample rollout `number` from the present policy, score it, and give its tokens their credit."""
        settings, engine = self.settings, self.engine
        first, count = number * self.prompts_per_rollout, self.prompts_per_rollout
        chosen = [endless_order(len(self.rows), self.seed, place) for place in range(first, first + count)]
        asked = [row for row in chosen for _ in range(settings.num_generations)]
        prompts = self.rows[asked]["prompt_ids"]
        batch_size, seeds = settings.per_device_generation_batch_size, (self.seed, number)
        with clock("generate"):
            self.refresh_server()
            completions = sample_all(self.sampler, prompts, batch_size, seeds, engine.accelerator)
        self.experience = [
            {"index": i, "prompt_ids": ids, "completion_ids": one.ids, "sampling_logps": one.logps,
             "masked": settings.mask_truncated_completions and not one.ended}
            for i, (ids, one) in enumerate(zip(prompts, completions))
        ]  # fmt: skip
        with clock("score"):
            scores = self.score(number, asked, completions, settings.num_generations)
        rewards = scoring.combine(scores, settings, [one.ended for one in completions])
        if rewards.isnan().all():
            raise RunFailed(f"rollout {number}: none of its {len(rewards)} completions could be scored")
        with clock("measure"):
            measured = self.measure()
        lengths = torch.tensor([len(one.ids) for one in completions])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        parts = [measured.get(name) for name in ("old_logps", "ref_logps", "values")]
        assert engine.algorithm.credit is not None, "the table says how rollouts get their credit"
        found = Experience(rewards, settings.num_generations, mask, *parts)
        given, metrics = engine.algorithm.credit(found, self.recipe, self.state)
        for name, table in {**measured, **given}.items():
            for row, values, length in zip(self.experience, table, lengths.tolist()):
                row[name] = values[:length].float().clone()
        self.number = number
        metrics |= length_metrics([len(one.ids) for one in completions], [one.ended for one in completions])
        metrics |= scoring.reward_metrics(self.rewards, scores, rewards, settings.num_generations)
        for name, value in metrics.items():
            engine.progress.sums.add(name, float(value), 1)

    def refresh_server(self) -> None:
        """Hand a server that samples the present policy."""
        if self.settings.server_weights:
            path = Path(self.settings.server_weights)
            self.engine.save_model(RunFolder(path.parent, {}), self.tokenizer, path.name)
            if self.engine.accelerator.is_main_process:
                reload_weights(self.settings)
            self.engine.accelerator.wait_for_everyone()

    def score(self, number: int, asked: list[int], completions: list[Completion], group_size: int) -> Tensor:
        """[R, F] float64: what each scorer says. Ranks share the groups out."""
        columns = self.columns[self.rows[asked]["index"]]
        answers = scoring.Answers.of(columns, [one.ids for one in completions], self.tokenizer)
        accelerator = self.engine.accelerator
        if self.settings.reward_funcs != [scoring.HUMAN]:
            return scoring.score_over_ranks(self.rewards, answers, group_size, accelerator)
        if not self.folder.checkpoint(self.engine.progress.step).exists():
            self.engine.save(self.folder)
        with accelerator.main_process_first():
            return scoring.human_scores(self.folder.path / "marks", number, answers)

    def measure(self) -> dict[str, Tensor]:
        """Log-probs of the rollout under policy and reference, and values, where they are needed: name -> [R, T]."""
        engine = self.engine
        found: dict[str, Tensor] = {}
        if self.steps_per_rollout > 1 or self.reference or not engine.algorithm.present_policy:
            tables = self.table(lambda batch: token_logps(engine.model, batch, engine.head_options, engine.critic))
            found |= zip(("old_logps", "values"), tables)
        if self.reference is not None:
            reference = self.reference
            (found["ref_logps"],) = self.table(lambda batch: reference(batch)[None])
        return found

    def table(self, fn: Callable[[Batch], Tensor]) -> Tensor:
        """What fn says of each token ([B, T] batch -> [C, B, T]), over the whole rollout and all ranks: [C, R, T]."""
        accelerator, training = self.engine.accelerator, self.engine.model.training
        self.engine.model.eval()
        rows, columns = [], []
        for batch, real in self.share(list(range(len(self.experience)))):
            found = fn(batch.to(accelerator.device)).cpu()
            if real:
                rows += batch.index.tolist()
                columns += [values[:, kept].T for values, kept in zip(found.unbind(1), batch.targets != IGNORE)]
        self.engine.model.train(training)
        parts = sorted(gather_object(list(zip(rows, columns))), key=lambda part: part[0])
        return pad_sequence([column for _, column in parts], batch_first=True).permute(2, 0, 1)

    def evaluate(self) -> dict[str, float]:
        """Rewards and lengths of one completion of every prompt, drawn with the same random numbers each time."""
        settings, asked = self.settings, list(range(len(self.rows)))
        prompts, size = self.rows["prompt_ids"][:], settings.per_device_generation_batch_size
        completions = sample_all(self.sampler, prompts, size, (self.seed,), self.engine.accelerator)
        scores, ended = self.score(0, asked, completions, 1), [one.ended for one in completions]
        found = scoring.reward_metrics(self.rewards, scores, scoring.combine(scores, settings, ended), 1)
        found |= length_metrics([len(one.ids) for one in completions], ended)
        return {f"eval_{name}": value for name, value in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The rollout, where steps on it are left, and the credit's state."""
        done = (self.engine.progress.step % self.steps_per_rollout) == 0
        return {
            "number": -1 if done else self.number,
            "experience": [] if done else self.experience,
            "state": self.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number, self.experience, self.state = state["number"], state["experience"], state["state"]


def length_metrics(lengths: Sequence[int], ended: Sequence[bool]) -> dict[str, float]:
    """Lengths of the completions in tokens, and the share of those cut off, as TRL names them."""
    found = {"completions/clipped_ratio": 1 - sum(ended) / len(ended)}
    terminated = [length for length, whole in zip(lengths, ended) if whole] or [0]
    for name, kept in (("length", lengths), ("terminated_length", terminated)):
        found[f"completions/mean_{name}"] = sum(kept) / len(kept)
        found |= {f"completions/min_{name}": min(kept), f"completions/max_{name}": max(kept)}
    return found
