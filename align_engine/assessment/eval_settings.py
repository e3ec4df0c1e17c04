"""The settings of `align eval`. As those of a recipe, they bear unique names, and nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar

from align_engine.preparation.models import ModelSpec, read_models
from align_engine.preparation.sections import AskedModels, MappedInput, ResultSection
from align_engine.recipe.recipes import Settings
from align_engine.recipe.sections import Section
from align_engine.recipe.values import Count, Range

USUAL = MappingProxyType({"tier": "1", "temperature": 0.0})  # of the models that are measured
OF_JUDGES = MappingProxyType({"tier": "1", "temperature": 0.0, "max_tokens": 1024})


class EvalModels(AskedModels):
    """Models that are measured, and how they are asked."""

    models: list[str] = field(default_factory=list)
    """Folders or hub names of checkpoints and adapters, YAML files that list models, or models themselves as
    `name=...,base_url=...` (docs/data.md; here temperature is 0 unless it is given, and a tier says nothing)."""


class BenchmarkSection(Section):
    """Benchmarks."""

    tasks: list[str] = field(default_factory=list)
    """Tasks, groups and tags of lm-evaluation-harness by name, and YAML files of tasks."""
    include_path: list[str] = field(default_factory=list)
    """Folders with further YAML files of tasks, which are then known by their names."""
    num_fewshot: Annotated[int, Range("[0, inf)")] | None = None
    """Examples before each question (None: as the task has it)."""
    limit: Count | None = None
    """Only the first so many examples of each task, and prompts of dataset_name (None: all)."""
    apply_chat_template: bool = False
    """Ask checkpoints through their chat template; endpoints always apply their own."""
    confirm_run_unsafe_code: bool = False
    """Run tasks that execute code which the model has written."""


class EvalInput(MappedInput):
    """Prompts that every model answers, for judge and checkers."""


class JudgeSection(Section):
    """Judge and checkers of the answers."""

    judge: str | None = None
    """Model at an OpenAI-compatible endpoint that compares answers, as one of `models`: name=...,base_url=..."""
    baseline: str | None = None
    """Name of the model that all others are compared with (None: the first of models)."""
    checkers: list[str] = field(default_factory=list)
    """Scorers of the answers, as reward_funcs takes them: functions, reward models, addresses."""


class FindingSection(ResultSection):
    """Output."""

    output_dir: str = ""
    """Folder of the result: report.json, report.md, report.html, and the answers behind them."""


class EvalRecipe(Settings):
    """Benchmarks, a judge's win rates and checkers, of several models beside each other in one table."""

    required: ClassVar[tuple[str, ...]] = ("models", "output_dir")

    ask: EvalModels = field(default_factory=EvalModels)
    benchmarks: BenchmarkSection = field(default_factory=BenchmarkSection)
    data: EvalInput = field(default_factory=EvalInput)
    judging: JudgeSection = field(default_factory=JudgeSection)
    output: FindingSection = field(default_factory=FindingSection)

    def specs(self) -> list[ModelSpec]:
        """The models that are measured. Raises BadInput as `read_models`."""
        return read_models([named(one) for one in self.ask.models], USUAL)

    def models(self) -> dict[str, str]:
        return {f"models ({one.name})": one.path for one in self.specs() if one.path}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        answered = self.judging.judge or self.judging.checkers
        if answered and not self.data.dataset_name:
            yield "dataset_name", "is required by judge and checkers: they look at answers to its prompts"
        if self.data.dataset_name and not answered:
            yield "dataset_name", "holds prompts for a judge or checkers: give --judge, --checkers, or both"
        if not (answered or self.benchmarks.tasks):
            yield "tasks", "or judge, or checkers: say what to measure"
        if self.judging.baseline and not self.judging.judge:
            yield "baseline", "is what a judge compares with: give --judge"
        if len(set(self.benchmarks.tasks)) < len(self.benchmarks.tasks):
            yield "tasks", "names a task twice"


def judge_of(given: Sequence[str]) -> ModelSpec:
    """The judge. Raises BadInput as `read_models`."""
    return read_models(list(given), OF_JUDGES)[0]


def named(one: str) -> str:
    """What `read_models` takes: a checkpoint's path is its name too."""
    if "=" in one or Path(one).expanduser().is_file():
        return one
    return f"name={one},path={one}"
