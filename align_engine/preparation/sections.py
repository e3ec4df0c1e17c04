"""The settings of the commands that prepare data. As those of a recipe, they bear names that are unique in a command's
tree, and nothing here imports torch or datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, Literal

from align_engine.preparation.models import read_models
from align_engine.recipe.recipes import Settings
from align_engine.recipe.sections import Section
from align_engine.recipe.values import Count, Finite, NotNegative, Part, Positive, Range, Share


class InputSection(Section):
    """Data."""

    dataset_name: str = ""
    """A .jsonl or .parquet file, a folder written by `datasets` or by these commands, or a hub name."""
    dataset_config: str | None = None
    """Configuration of it, the `name` of `datasets.load_dataset`, where it has several."""
    dataset_train_split: str = "train"
    """Split to read, where the dataset has splits."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that cannot be used."""
    dry_run: bool = False
    """Print the first rows of the result and write nothing."""


class MappedInput(InputSection):
    """Data."""

    columns: list[str] | None = None
    """Columns under other names than ours, as NAME=COLUMN: prompt=question completion=answer. The layouts of TRL,
    ShareGPT (conversations) and Alpaca (instruction, input, output) are known by their columns."""


class ResultSection(Section):
    """Output."""

    output_dir: str = ""
    """Folder of the result: rows.jsonl, and report.json, report.md and report.html."""
    overwrite: bool = False
    """Delete the result that output_dir holds and start afresh."""


class Preparation(Settings):
    """What every command that prepares data has."""

    data: InputSection = field(default_factory=InputSection)
    output: ResultSection = field(default_factory=ResultSection)


class AskedModels(Section):
    """Models that answer, and how they are asked."""

    models: list[str] = field(default_factory=list)
    """YAML files that list models, or models themselves as `name=...,tier=...,base_url=...` (docs/data.md)."""
    server_concurrency: Count = 16
    """Requests that each endpoint has at a time."""
    request_timeout: Positive = 600.0
    """Seconds that one request may take; after it, it is sent again."""
    batch_size: Count = 16
    """Answers that a local checkpoint writes at a time."""
    seed: int = 0
    """Of the answers: each request has a seed of its own, a function of this one, the model's name and the row."""


class GenerateRecipe(Preparation):
    """Answers to prompts from several models of known rank: endpoints, local checkpoints, people."""

    data: MappedInput = field(default_factory=MappedInput)
    ask: AskedModels = field(default_factory=AskedModels)

    def models(self) -> dict[str, str]:
        return {f"models ({one.name})": one.path for one in read_models(self.ask.models) if one.path}


class PairsSection(Section):
    """Pairs."""

    by: Literal["auto", "rank", "score", "label"] = "auto"
    """Column that orders the answers to one prompt: a rank (1 is the best), a score (more is better) or a mark (true or
    false). auto: the first of them that is there; rows that hold chosen and rejected are pairs as they stand."""
    layout: Literal["preference", "several", "unpaired"] = "preference"
    """preference: one row for each pair. several: one row for each tier and all that are worse, with lists of chosen
    and rejected answers, which train as one tree. unpaired: one row for each answer, with its mark."""
    min_gap: NotNegative = 0.0
    """Least difference between the ranks or scores of a pair."""
    margin: NotNegative = 0.0
    """Column `margin`: so much per step between ranks, or per point between scores (0: no column)."""
    max_pairs: Count | None = None
    """Pairs of one prompt at most, drawn at random (None: all)."""
    max_answers: Count | None = None
    """Answers of each tier of a prompt at most, drawn at random (None: all)."""
    desirable: Finite | None = None
    """unpaired: answers up to this rank, or from this score on, are good (None: those of the best tier of prompts that
    have two)."""
    encoder: str | None = None
    """Leave out answers that say nearly the same as a better or an earlier one to their prompt, by the embeddings of
    this model of sentence-transformers, encoder of transformers, or function as module:name or file.py:name."""
    near_threshold: Part = 0.9
    """Cosine from which two answers say nearly the same."""
    trust_remote_code: bool = False
    """Run the code that lies beside an encoder. Read it before."""
    seed: int = 0
    """Of what is drawn."""


class PairsRecipe(Preparation):
    """Pairs of better and worse answers, by the cartesian product of ranked, scored or marked ones."""

    data: MappedInput = field(default_factory=MappedInput)
    pairs: PairsSection = field(default_factory=PairsSection)

    def models(self) -> dict[str, str]:
        path = self.pairs.encoder
        return {"encoder": path} if path and ":" not in path else {}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        own = self.pairs
        if own.max_pairs and own.layout != "preference":
            yield "max_pairs", f"is not for layout = {own.layout!r}, which holds no single pairs: give max_answers"
        if own.desirable is not None and own.layout != "unpaired":
            yield "desirable", "is for layout = 'unpaired'"
        if own.margin and own.layout == "unpaired":
            yield "margin", "is not for layout = 'unpaired', which has no pairs"


class TokensSection(Section):
    """Tokens."""

    source_column: list[str] = field(default_factory=list)
    """Column with the source of an answer; with chosen and rejected one column for each (none: model, or chosen_model
    and rejected_model, where they are there; else chosen and rejected are the sources)."""
    max_words: Count = 3
    """Words of the longest phrase and n-gram."""
    min_count: Count = 5
    """Answers that must hold a phrase, over all sources."""
    min_share: Share = 0.01
    """Share of a source's answers that must hold a phrase before the reward model is asked about it."""
    top: Count = 50
    """Phrases that the reward model is asked about, those that stand out most; also lines of the tables."""


class SwaySection(Section):
    """Reward model."""

    reward_model: str | None = None
    """Folder or hub name of a reward model, or any scorer that reward_funcs takes (None: count alone)."""
    pairs_name: str | None = None
    """Preference pairs to ask it about, as dataset_name (None: those of dataset_name)."""
    num_pairs: Count = 200
    """Pairs that are drawn from them."""
    markers: list[str] = field(default_factory=list)
    """Further openings to ask about."""
    seed: int = 0
    """Of what is drawn."""
    trust_remote_code: bool = False
    """Run the code that lies beside a model. Read it before."""


class TokensRecipe(Preparation):
    """Find words that give a source of answers away, and those that sway a reward model."""

    tokens: TokensSection = field(default_factory=TokensSection)
    sway: SwaySection = field(default_factory=SwaySection)

    def models(self) -> dict[str, str]:
        path = self.sway.reward_model
        return {"reward_model": path} if path and ":" not in path else {}


class BalanceSection(Section):
    """Balance."""

    column: str = "prompt"
    """Column of the prompts: texts, or messages, whose user turns count."""
    encoder: str = ""
    """What gives embeddings: a model of sentence-transformers, any encoder of transformers (say
    Tochka-AI/ruRoPEBert-e5-base-2k), a function as module:name or file.py:name, or an earlier output_dir of this
    command on the same rows, whose embeddings are taken."""
    cap: Count = 100
    """Most rows of a cluster that are kept."""
    floor: Count = 10
    """Fewest rows of a cluster; smaller clusters are repeated."""
    threshold: Positive = 0.5
    """Radius of a subcluster of BIRCH, with embeddings of length 1."""
    distance: Annotated[float, Range("(0, 2)")] = 0.75
    """Subclusters of a smaller distance, 1 - cosine, are one cluster."""
    n_clusters: Count | None = None
    """Join the nearest subclusters until so many are left, instead of by distance."""
    seed: int = 0
    """Of the rows that are drawn."""
    trust_remote_code: bool = False
    """Run the code that lies beside an encoder. Read it before."""


class BalanceRecipe(Preparation):
    """Cluster prompts by meaning and keep something of each cluster: 100, 1 and 100500 become 100, 10 and 100."""

    balance: BalanceSection = field(default_factory=BalanceSection)

    def models(self) -> dict[str, str]:
        path = self.balance.encoder
        return {"encoder": path} if path and ":" not in path else {}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not self.balance.encoder:
            yield "encoder", "is required"
        if self.balance.floor > self.balance.cap:
            yield "floor", f"must be at most cap = {self.balance.cap}"


class MarkersSection(Section):
    """Openings of answers."""

    findings: str | None = None
    """output_dir of `align tokens`: the openings that it found to sway the reward model."""
    markers: list[str] = field(default_factory=list)
    """Openings, in place of those or besides."""


class StripSection(Section):
    """Strip."""

    undo: bool = False
    """Put back what an earlier call has taken off."""


class StripRecipe(Preparation):
    """Take openings that sway a reward model off the answers, to be put back at will; suggest limits on gradients."""

    found: MarkersSection = field(default_factory=MarkersSection)
    strip: StripSection = field(default_factory=StripSection)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.strip.undo == bool(self.found.findings or self.found.markers):
            yield (
                "undo",
                "takes neither findings nor markers" if self.strip.undo else "needs to be set, or findings, or markers",
            )


class AuditSection(Section):
    """Audit."""

    reward_models: list[str] = field(default_factory=list)
    """Reward models to look at beside each other, say before and after a repair: folders, hub names, or any scorers
    that reward_funcs takes."""
    by: list[str] = field(default_factory=list)
    """Columns that part the pairs (none: chosen_model, rejected_model, chosen_tier, rejected_tier, chosen_rank,
    rejected_rank, source and tier, where they are there)."""
    num_pairs: Count | None = None
    """Pairs that are drawn (None: all)."""
    seed: int = 0
    """Of what is drawn."""
    trust_remote_code: bool = False
    """Run the code that lies beside a model. Read it before."""


class AuditRecipe(Preparation):
    """A reward model's card: accuracy on held-out pairs, calibration, and what turns its judgement round."""

    audit: AuditSection = field(default_factory=AuditSection)
    found: MarkersSection = field(default_factory=MarkersSection)

    def models(self) -> dict[str, str]:
        return {f"reward_models ({i})": path for i, path in enumerate(self.audit.reward_models) if ":" not in path}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        paths = self.audit.reward_models
        if not paths:
            yield "reward_models", "is required"
        if len(set(paths)) < len(paths):
            yield "reward_models", "names a model twice"


class RepairSection(Section):
    """Repair."""

    model_name_or_path: str = ""
    """Folder or hub name of the reward model."""
    styles: list[str] = field(default_factory=list)
    """Biases of length, order and style to take out: longer, reversed, bold, list, heading, exclamation."""
    num_pairs: Count = 50
    """Pairs that the directions are measured on; all others test the result."""
    seed: int = 0
    """Of what is drawn."""
    trust_remote_code: bool = False
    """Run the code that lies beside the model. Read it before."""


class RepairRecipe(Preparation):
    """Take measured biases out of a reward model's head: its weight loses their directions, nothing is trained."""

    repair: RepairSection = field(default_factory=RepairSection)
    found: MarkersSection = field(default_factory=MarkersSection)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not (self.repair.styles or self.found.findings or self.found.markers):
            yield "styles", "or findings, or markers: give the biases to take out"
