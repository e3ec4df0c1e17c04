"""The settings of this room's commands. As those of a recipe, they bear names that are unique in a command's tree, and
nothing here imports torch or datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, ClassVar, Literal

from align_engine.recipe import Settings
from align_engine.recipe.sections import Section
from align_engine.recipe.values import Count, Names, NotNegative, Part, Positive, Range


class SituationSection(Section):
    """Situation."""

    gpus: Annotated[int, Range("[0, inf)")] | None = None
    """GPUs (None: those of this machine)."""
    memory: str | None = None
    """Memory of one of them: a size (24GB) or a card by its name (None: this machine's)."""
    assessors: Annotated[int, Range("[0, inf)")] = 0
    """People who can read and mark answers."""
    have: Annotated[
        list[Literal["prompts", "answers", "pairs", "ranks", "marks", "scores", "reward-model", "verifier"]],
        Names("nothing"),
    ] = field(default_factory=list)
    """Data at hand: prompts; answers (good ones); pairs (one above another); ranks (1, 2, 3); marks (ok, not ok);
    scores (numbers); reward-model; verifier (a program that can tell whether an answer is right)."""
    dataset_name: str | None = None
    """Data to look at: a .jsonl or .parquet file, a folder or a hub name; what its columns hold counts as at hand."""
    task: Literal["chat", "safety", "reasoning", "summarisation", "question-answering", "translation", "science"] = (
        "chat"
    )
    """What the model is for. reasoning: logic, mathematics, code. science: small or scientific tasks."""
    model_name_or_path: str | None = None
    """Folder or hub name of the model to train."""
    model_size: Positive | None = None
    """Billions of its weights, where no model is named (None: 7)."""
    pretrained: bool = False
    """The model does not answer instructions yet."""
    best_quality: bool = False
    """The best quality is needed, whatever it costs."""


class AdviceSection(Section):
    """Output."""

    json: str | None = None
    """File for the same as JSON."""


class AdviseRecipe(Settings):
    """Which method to begin with, by the talk's guide: GPUs, people, data, task; it asks on a terminal."""

    required: ClassVar[tuple[str, ...]] = ()
    situation: SituationSection = field(default_factory=SituationSection)
    output: AdviceSection = field(default_factory=AdviceSection)


class TalkSection(Section):
    """Talk."""

    model_name_or_path: list[str] = field(default_factory=list)
    """Folder or hub name of a model, or of adapters (their base model is loaded); or of two, side by side."""
    system_prompt: str | None = None
    """What the conversation begins with."""
    max_new_tokens: Count = 512
    """Longest answer in tokens."""
    temperature: NotNegative = 0.7
    """Of sampling (0: always the likeliest token)."""
    top_p: Part = 1.0
    """Sample from the likeliest tokens that hold this share of the probability."""
    top_k: Annotated[int, Range("[0, inf)")] = 0
    """Sample from so many likeliest tokens (0: all)."""
    seed: Annotated[int, Range("[0, 4294967295]")] = 42
    """Of the answers: each is a function of it, the model and what was said before."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type of the weights in memory; `auto` keeps what the checkpoint says."""
    trust_remote_code: bool = False
    """Run the code that lies beside a model of another architecture than transformers has. Read it before."""


class ChatRecipe(Settings):
    """A talk with a model in the terminal, or with two side by side; one message a line, from a pipe too.

    /reset begins anew, /save FILE writes the conversation as JSON Lines that `align sft` reads, /quit ends. Ctrl-C
    stops an answer."""

    required: ClassVar[tuple[str, ...]] = ("model_name_or_path",)
    talk: TalkSection = field(default_factory=TalkSection)

    def models(self) -> dict[str, str]:
        return {f"model_name_or_path ({i})": path for i, path in enumerate(self.talk.model_name_or_path, 1)}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if len(self.talk.model_name_or_path) > 2:
            yield "model_name_or_path", "names more than two models"


class AdaptersSection(Section):
    """Adapters."""

    model_name_or_path: str = ""
    """Folder or hub name of the adapters, such as the `final` of a run with use_peft."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Type of the weights that are written; `auto` keeps that of the base model."""
    trust_remote_code: bool = False
    """Run the code that lies beside the base model. Read it before."""


class MergedSection(Section):
    """Output."""

    output_dir: str = ""
    """New folder of the merged model."""


class MergeRecipe(Settings):
    """Put LoRA adapters into the weights of their base model: a folder that loads without peft."""

    adapters: AdaptersSection = field(default_factory=AdaptersSection)
    output: MergedSection = field(default_factory=MergedSection)
