"""The settings of `align samples` and `align report`. As those of a recipe, they bear names that are unique in a
command's tree, and nothing here imports torch or datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field

from align_engine.preparation.sections import MappedInput, Preparation, ResultSection
from align_engine.recipe.recipes import Settings
from align_engine.recipe.sections import Section
from align_engine.recipe.values import Count, NotNegative, Part


class SampledModels(Section):
    """Models."""

    model_name_or_path: list[str] = field(default_factory=list)
    """Folders or hub names of checkpoints, adapters included, in the order of the page."""
    reward_funcs: list[str] = field(default_factory=list)
    """Scorers of the answers, as those of the online methods: `module:function`, `file.py:function`, the folder of a
    reward model, `http://...` of a scorer (none: no scores)."""


class SamplingSection(Section):
    """Sampling."""

    num_prompts: Count = 20
    """Prompts that are asked, the first of the data."""
    max_completion_length: Count = 256
    """Longest answer in tokens."""
    temperature: NotNegative = 1.0
    """Of sampling; 0 takes the likeliest token."""
    top_p: Part = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    batch_size: Count = 16
    """Answers that are sampled at a time."""
    seed: int = 0
    """Of the answers: each prompt has the same random numbers with every model."""


class SamplesRecipe(Preparation):
    """Answers of several checkpoints to the same prompts, side by side."""

    optional = ("reward_funcs",)
    data: MappedInput = field(default_factory=MappedInput)
    asked: SampledModels = field(default_factory=SampledModels)
    sampling: SamplingSection = field(default_factory=SamplingSection)

    def models(self) -> dict[str, str]:
        return {f"model_name_or_path ({i})": path for i, path in enumerate(self.asked.model_name_or_path, 1)}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        paths = self.asked.model_name_or_path
        if len(set(paths)) < len(paths):
            yield "model_name_or_path", "names a model twice"
        if "human" in self.asked.reward_funcs:
            yield "reward_funcs", "takes scorers, not people"


class ReportedRuns(Section):
    """Runs."""

    runs: list[str] = field(default_factory=list)
    """Folders of runs, finished or not; they may be given without the flag."""
    results: list[str] = field(default_factory=list)
    """Folders of results that belong to them: of align samples, balance, tokens, eval, ..., or any with a report.json
    (`--with` says the same)."""


class PageSection(ResultSection):
    """Output."""

    output_dir: str = ""
    """Folder of report.json, report.md and report.html."""


class ReportRecipe(Settings):
    """One page on a run, or on several side by side: curves in words, what differs, samples, data, evaluation."""

    positional = "runs"
    reported: ReportedRuns = field(default_factory=ReportedRuns)
    output: PageSection = field(default_factory=PageSection)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        paths = self.reported.runs
        if not paths:
            yield "runs", "is required: give folders of runs"
        if len(set(paths)) < len(paths):
            yield "runs", "names a run twice"
