"""The settings of `align diagnose`. As those of a recipe, they bear unique names, and nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import field, replace
from typing import Annotated

from align_engine.assessment.eval_settings import USUAL, FindingSection, named
from align_engine.preparation.models import ModelSpec, read_models
from align_engine.preparation.sections import MappedInput
from align_engine.recipe.recipes import Settings
from align_engine.recipe.sections import Section
from align_engine.recipe.values import Count, NotNegative, Positive, Range

MODEL, BASELINE = "model", "baseline"


class PatientSection(Section):
    """Model."""

    model_name_or_path: str = ""
    """Folder or hub name of the model that is looked at, or one at an endpoint, as name=...,base_url=..."""
    baseline: str | None = None
    """Another model, known to be good, that calibrates the limits (None: limits of their own)."""


class PromptSection(MappedInput):
    """Data."""

    num_prompts: Count = 100
    """The first so many prompts of dataset_name. A column `completion` holds reference answers."""


class SampleSection(Section):
    """Answers."""

    num_samples: Annotated[int, Range("[2, inf)")] = 4
    """Answers to each prompt."""
    temperature: NotNegative = 1.0
    """Of sampling; 1 is the model's own distribution, which is what variance and log-probs speak of."""
    max_tokens: Count = 256
    """Longest answer."""
    batch_size: Count = 16
    """Answers that a checkpoint writes at a time."""
    server_concurrency: Count = 16
    """Requests that an endpoint has at a time."""
    request_timeout: Positive = 600.0
    """Seconds that one request may take; after it, it is sent again."""
    seed: int = 0
    """Of the answers, and of what is drawn."""


class SignSection(Section):
    """Signs: what is not given is not measured."""

    evaluation: str | None = None
    """Sign 1: output_dir of an `align eval` that holds this model's benchmarks, and checkers or a judge."""
    tasks: list[str] = field(default_factory=list)
    """Sign 1: or tasks of lm-evaluation-harness, by name or YAML file, with checkers."""
    checkers: list[str] = field(default_factory=list)
    """Sign 1: scorers of the model's own answers, from 0 (bad) to 1 (good), as reward_funcs takes them."""
    limit: Count | None = None
    """Sign 1: examples of each task (None: all)."""
    classifier: str | None = None
    """Sign 2: folder or hub name of a sequence classifier of transformers that finds bad answers."""
    label: str | None = None
    """Sign 2: its label that means bad (None: the one whose name speaks of toxicity)."""
    encoder: str | None = None
    """Signs 3 and 4: encoder of texts, as `align balance` takes it."""
    run: str | None = None
    """Sign 5: output_dir of a training whose evaluations hold quality beside the loss."""
    quality: str | None = None
    """Sign 5: the metric of quality (None: the reward of eval_reward_funcs, else a metric of eval_tasks)."""
    trust_remote_code: bool = False
    """Run the code that lies beside an encoder. Read it before."""


class DiagnoseRecipe(Settings):
    """Do you need preference optimisation? Five signs, each a number with its interval, and a verdict with reasons."""

    patient: PatientSection = field(default_factory=PatientSection)
    data: PromptSection = field(default_factory=PromptSection)
    ask: SampleSection = field(default_factory=SampleSection)
    signs: SignSection = field(default_factory=SignSection)
    output: FindingSection = field(default_factory=FindingSection)

    def specs(self) -> list[ModelSpec]:
        """The model, and the baseline where there is one; they bear these names. Raises BadInput as `read_models`."""
        given = {MODEL: self.patient.model_name_or_path, BASELINE: self.patient.baseline}
        own = {"n": self.ask.num_samples, "temperature": self.ask.temperature, "max_tokens": self.ask.max_tokens}
        found = []
        for name, text in given.items():
            if text:
                (spec,) = read_models([named(os.path.expanduser(text))], {**USUAL, **own})
                found.append(replace(spec, name=name, model=spec.model or spec.name))
        return found

    def models(self) -> dict[str, str]:
        found = {one.name: one.path for one in self.specs() if one.path}
        others = {"classifier": self.signs.classifier, "encoder": self.signs.encoder}
        return found | {name: path for name, path in others.items() if path and ":" not in path}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        own = self.signs
        if own.tasks and own.evaluation:
            yield "tasks", "or evaluation: an earlier result holds its tasks already"
        if own.tasks and not own.checkers:
            yield "tasks", "needs checkers, which grade the model's own answers beside the benchmarks"
        if own.label and not own.classifier:
            yield "label", "is one of a classifier: give --classifier"
        if own.quality and not own.run:
            yield "quality", "is a metric of a run: give --run"
