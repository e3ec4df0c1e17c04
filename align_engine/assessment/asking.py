"""The questions of `align advise` on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.prompt import Prompt

from align_engine import recipe as recipes
from align_engine.assessment.guide import guide
from align_engine.assessment.sections import AdviseRecipe
from align_engine.assessment.situation import CHECKS
from align_engine.errors import BadInput

QUESTIONS = {
    "gpus": "GPUs (empty: those of this machine)",
    "memory": "Memory of one, as 24GB or by the card's name (empty: this machine's)",
    "assessors": "People who can read and mark answers",
    "dataset_name": "A file or folder of data to look at (empty: none)",
    "have": "What else is at hand, with commas between",
    "task": "What is the model for",
    "model_name_or_path": "Folder or hub name of the model (empty: its size alone)",
    "model_size": "Billions of its weights (empty: 7)",
    "pretrained": "Is it a pretrained model, that does not answer instructions yet",
    "best_quality": "Is the best quality needed, whatever it costs",
}


def asked(settings: AdviseRecipe) -> AdviseRecipe:
    """The settings that a person gives, question by question; an answer that cannot be is asked for again.

    Raises:
        BadInput: the terminal was closed before the last answer.
    """
    console = Console()
    for name, question in QUESTIONS.items():
        at = settings.situation
        if (name == "model_size" and at.model_name_or_path) or (name == "memory" and at.gpus == 0):
            continue
        options = guide()["data"] if name == "have" else guide()["tasks"] if name == "task" else {}
        for word, meaning in options.items():
            console.print(f"  [bold]{word}[/bold]: {meaning}", highlight=False)
        settings = answered(settings, name, question, console)
    return settings


def answered(settings: AdviseRecipe, name: str, question: str, console: Console) -> AdviseRecipe:
    """With one more field."""
    default = {"gpus": "", "memory": "", "have": "nothing", "pretrained": "no", "best_quality": "no"}
    held = default.get(name, getattr(settings.situation, name))
    while True:
        try:
            shown = "" if held is None else str(held)
            text = Prompt.ask(question, console=console, default=shown, show_default=bool(shown))
        except KeyboardInterrupt:
            console.print()
            raise
        except EOFError as error:
            raise BadInput("the questions were left without answers; flags give them: align advise --help") from error
        try:
            changes: dict[str, dict[str, Any]] = {"situation": {name: text or None}}
            found = recipes.check(recipes.typed(settings, changes, "answer"), ())
            if name in CHECKS:
                CHECKS[name](found.situation)
            return found
        except BadInput as error:
            console.print(f"[red]{str(error).removeprefix('answer: ')}[/red]", highlight=False)
