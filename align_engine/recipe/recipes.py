"""The recipes: one tree of sections for each command, and how a tree is read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import field
from typing import Any, ClassVar, TypeVar, get_type_hints

from align_engine.recipe.sections import (
    ClippedRatio,
    CpoLoss,
    DataSection,
    DpoLoss,
    EvalSection,
    GrpoLoss,
    KernelSection,
    KlReference,
    KtoLoss,
    LimitSection,
    ModelSection,
    OnlineEval,
    OrpoLoss,
    OutputSection,
    PpoLoss,
    RlooLoss,
    RmLoss,
    RolloutSection,
    RoundsSection,
    Section,
    SftLoss,
    SimpoLoss,
    TrainSection,
)
from align_engine.recipe.values import Field, field_of

MODELS = ("model_name_or_path", "ref_model_name_or_path", "value_model_name_or_path")
S = TypeVar("S", bound=Section)


class Settings(Section):
    """Sections of settings, read from YAML and flags: what a command is asked to do."""

    optional: ClassVar[tuple[str, ...]] = ()  # fields that other commands cannot do without
    positional: ClassVar[str] = ""  # field of which values may stand without a flag

    def models(self) -> dict[str, str]:
        """Paths of the models that the tree names, by field."""
        return {name: path for name in MODELS if (path := flat(self).get(name))}

    def revision(self, field: str) -> str:
        """On the hub, of the model that a field of `models` names; a critic starts from another model's newest."""
        return "main" if field.startswith("value_") else flat(self).get("model_revision", "main")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Fields that do not go with others: (name, what it must be or needs)."""
        return iter(())


class Recipe(Settings):
    """What every algorithm has; those with settings of their own add a section `loss`."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    output: OutputSection = field(default_factory=OutputSection)
    kernels: KernelSection = field(default_factory=KernelSection)

    def section(self, kind: type[S]) -> S | None:
        """The section of a kind, where the recipe has one."""
        return next((section for section in vars(self).values() if isinstance(section, kind)), None)


class LanguageRecipe(Recipe):
    """What the methods share whose loss is one of token probabilities."""

    limits: LimitSection = field(default_factory=LimitSection)


class SftRecipe(LanguageRecipe):
    """Supervised fine-tuning: maximise the log-probability of the completions."""

    loss: SftLoss = field(default_factory=SftLoss)


class GentleRecipe(LanguageRecipe):
    """What the methods share that go on from a model which answers already."""

    train: TrainSection = field(default_factory=lambda: TrainSection(learning_rate=1e-6))


class DpoRecipe(GentleRecipe):
    """Direct preference optimisation: raise the chosen completion above the rejected one, relative to a reference."""

    loss: DpoLoss = field(default_factory=DpoLoss)


class SimpoRecipe(GentleRecipe):
    """SimPO: raise the mean log-probability of the chosen completion above the rejected one's, by a margin."""

    loss: SimpoLoss = field(default_factory=SimpoLoss)


class OrpoRecipe(GentleRecipe):
    """ORPO: supervised fine-tuning on the chosen completions with an odds ratio against the rejected ones."""

    loss: OrpoLoss = field(default_factory=OrpoLoss)


class CpoRecipe(GentleRecipe):
    """Contrastive preference optimisation: DPO with a uniform reference, and the chosen completions' likelihood."""

    loss: CpoLoss = field(default_factory=CpoLoss)


class KtoRecipe(GentleRecipe):
    """Kahneman-Tversky optimisation: raise the answers labelled desirable, lower the others, against a reference."""

    loss: KtoLoss = field(default_factory=KtoLoss)


class RmRecipe(Recipe):
    """Reward model: a score that is higher for the chosen completion than for the rejected one (Bradley-Terry)."""

    loss: RmLoss = field(default_factory=RmLoss)
    data: DataSection = field(default_factory=lambda: DataSection(overlong="drop"))
    train: TrainSection = field(default_factory=lambda: TrainSection(learning_rate=1e-4))


class OnlineRecipe(GentleRecipe):
    """What the methods share that learn from their own rollouts."""

    rollout: RolloutSection = field(default_factory=RolloutSection)
    eval: OnlineEval = field(default_factory=OnlineEval)
    kl: KlReference = field(default_factory=KlReference)

    @property
    def windows(self) -> int:
        """Steps that one pass over a rollout takes."""
        accumulation = self.train.gradient_accumulation_steps
        return (self.rollout.steps_per_generation or accumulation) // accumulation

    @property
    def passes(self) -> int:
        """Times that each rollout is learnt from."""
        raise NotImplementedError


class ClippedRecipe(OnlineRecipe):
    """What the methods share that clip the ratio to the policy which sampled."""

    loss: ClippedRatio = field(default_factory=ClippedRatio)

    @property
    def passes(self) -> int:
        return self.loss.num_iterations


class RlooRecipe(ClippedRecipe):
    """RLOO (REINFORCE, leave one out): raise the probability of completions by what people or programs say of them."""

    loss: RlooLoss = field(default_factory=RlooLoss)
    rollout: RolloutSection = field(default_factory=lambda: RolloutSection(num_generations=2))


class GrpoRecipe(ClippedRecipe):
    """Group-relative policy optimisation: completions are judged against the others of their prompt."""

    loss: GrpoLoss = field(default_factory=GrpoLoss)


class PpoRecipe(OnlineRecipe):
    """Proximal policy optimisation with a critic, a KL penalty and several passes over each rollout."""

    loss: PpoLoss = field(default_factory=PpoLoss)
    rollout: RolloutSection = field(default_factory=lambda: RolloutSection(num_generations=1, temperature=0.7))
    train: TrainSection = field(default_factory=lambda: TrainSection(learning_rate=3e-6))

    @property
    def passes(self) -> int:
        return self.loss.num_ppo_epochs


class IterateRecipe(LanguageRecipe):
    """Iterative preference optimisation: sample, score, pair the best answer with the worst, train on the pairs, again.

    The sections of training (learning_rate, num_train_epochs, ...) are those of one round.
    """

    rollout: RolloutSection = field(default_factory=RolloutSection)
    iteration: RoundsSection = field(default_factory=RoundsSection)
    train: TrainSection = field(default_factory=lambda: TrainSection(learning_rate=5e-7, num_train_epochs=1.0))


RECIPES: dict[str, type[Recipe]] = {
    "sft": SftRecipe, "rm": RmRecipe, "dpo": DpoRecipe, "simpo": SimpoRecipe, "orpo": OrpoRecipe, "cpo": CpoRecipe,
    "kto": KtoRecipe, "rloo": RlooRecipe, "grpo": GrpoRecipe, "ppo": PpoRecipe, "iterate": IterateRecipe,
}  # fmt: skip
ALIASES = {"direct": "rloo", "reward": "rm"}  # another name of a command


def flat(recipe: Settings) -> dict[str, Any]:
    """Every field of the tree by its bare name."""
    sections = dataclasses.asdict(recipe).values()
    return {name: value for section in sections for name, value in section.items()}


@functools.cache
def fields(kind: type[Settings]) -> dict[str, tuple[str, Field]]:
    """Every field of a recipe class by its bare name: (its section's name, what it takes)."""
    return {
        name: (section, field_of(annotation))
        for section, value in vars(kind()).items()
        for name, annotation in get_type_hints(type(value), include_extras=True).items()
    }
