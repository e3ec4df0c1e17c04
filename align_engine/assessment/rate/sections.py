"""The settings of `align rate` and `align ratings`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, ClassVar, Literal

from align_engine.preparation.sections import ResultSection
from align_engine.recipe import Settings
from align_engine.recipe.sections import Section
from align_engine.recipe.values import Count, Positive, Range, Share

LEAD = "lead"  # whose link shows progress and agreement
NAMES = f"A name is 1 to 40 printable characters, and not {LEAD!r}."


def is_name(text: str) -> bool:
    """Whether an assessor can be called so."""
    return text != LEAD and bool(text.strip()) and text.isprintable() and len(text) <= 40


class ItemSection(Section):
    """Items."""

    dataset_name: str | None = None
    """A .jsonl or .parquet file, a folder of `align generate` or of `datasets`, a hub name, or a .json of Label Studio,
    with the marks in it. None: go on with the project, or take the rollouts of run_dir."""
    dataset_config: str | None = None
    """Configuration of it, the `name` of `datasets.load_dataset`, where it has several."""
    dataset_train_split: str = "train"
    """Split to read, where the dataset has splits."""
    columns: list[str] | None = None
    """Columns under other names than ours, as NAME=COLUMN: prompt=question completion=answer."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that cannot be used."""
    run_dir: str | None = None
    """Folder of a run with reward_funcs human and wait_for_marks: its rollouts are the items, and it goes on with their
    marks."""
    gold_name: str | None = None
    """Data whose right marks are known, as `align ratings` writes them. Every assessor meets each of them, unmarked."""


class ProjectSection(Section):
    """Project."""

    project_dir: str = ""
    """Folder of the project: ratings.sqlite with items, links and marks. A later call goes on there."""
    mode: Literal["pair", "mark", "score", "rank"] = "pair"
    """What is asked. pair: which of two answers is better. mark: ok or not ok. score: a number of scale. rank: the
    order of all answers to a prompt."""
    k: Count = 1
    """Assessors of each item."""
    overlap: Share = 0.1
    """Share of the items that at least two assessors rate, for their agreement."""
    scale: list[Annotated[int, Range("[0, 10]")]] = field(default_factory=lambda: [1, 5])
    """Lowest and highest score, at most ten steps; the highest is the best."""
    question: str | None = None
    """What stands over the answers (None: a sentence that goes with the mode)."""
    guideline: str | None = None
    """A Markdown file with instructions, which assessors can unfold."""
    max_items: Count | None = None
    """Items at most, drawn at random (None: all)."""
    seed: int = 0
    """Of what is drawn and shuffled."""


class PeopleSection(Section):
    """People."""

    assessors: list[str] = field(default_factory=list)
    """Their names. Each new one gets a link, shown once."""
    revoke: list[str] = field(default_factory=list)
    """Names whose links end now. Their marks stay."""
    renew: list[str] = field(default_factory=list)
    """Names that get a new link in place of their old one; `lead` for the lead's."""
    link_days: Positive = 30.0
    """Days that a new link is good for."""


class ServeSection(Section):
    """Server."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine's."""
    port: Annotated[int, Range("[0, 65535]")] = 8010
    """Port to listen at (0: any free one)."""
    root_path: str = ""
    """Prefix under which a proxy shows the page, as /ratings."""


class RateRecipe(Settings):
    """A web page where people rate answers: pairs, marks, scores or ranks, by a link for each assessor."""

    data: ItemSection = field(default_factory=ItemSection)
    project: ProjectSection = field(default_factory=ProjectSection)
    people: PeopleSection = field(default_factory=PeopleSection)
    serve: ServeSection = field(default_factory=ServeSection)

    optional: ClassVar[tuple[str, ...]] = ("dataset_name",)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        project, data = self.project, self.data
        if not project.project_dir:
            yield "project_dir", "is required"
        if data.dataset_name and data.run_dir:
            yield "run_dir", "does not go with dataset_name: give one of them"
        if len(project.scale) != 2 or not 0 < project.scale[1] - project.scale[0] < 10:
            yield "scale", "must be the lowest and the highest score, at most ten steps"
        for name in self.people.assessors:
            if not is_name(name):
                yield "assessors", f"holds {name!r:.60}. {NAMES}"
        if len(set(self.people.assessors)) < len(self.people.assessors):
            yield "assessors", "names somebody twice"
        root = self.serve.root_path
        if root and (not root.startswith("/") or root.endswith("/") or not root.isprintable() or " " in root):
            yield "root_path", "must begin with / and not end with it, as /ratings"


class RatingsSection(Section):
    """Ratings."""

    project_dir: str = ""
    """Folder of a project of `align rate`; it may be served meanwhile."""
    to: Literal["pairs", "marks", "scores", "ranks", "label_studio"] = "pairs"
    """pairs: prompt, chosen, rejected (dpo, rm). marks: prompt, completion, label (kto). scores and ranks: a number for
    each answer (`align pairs`). label_studio: tasks with everybody's annotations, and the labelling interface."""
    method: Literal["majority", "bradley_terry"] = "majority"
    """What several marks come to. majority: of the assessors who compared two answers (of scores: the mean).
    bradley_terry: strengths of all answers to a prompt, fitted to all comparisons, a tie being half a win each way."""


class RatingsRecipe(Settings):
    """What the assessors of `align rate` said, as pairs, marks, scores or ranks for a training; their agreement."""

    ratings: RatingsSection = field(default_factory=RatingsSection)
    output: ResultSection = field(default_factory=ResultSection)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not self.ratings.project_dir:
            yield "project_dir", "is required"
