"""`align chat`: a talk with one model in the terminal, or with two side by side."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from align_engine.assessment.sections import ChatRecipe
from align_engine.assessment.voice import Voice
from align_engine.errors import BadInput, printable
from align_engine.run import quiet_libraries
from align_engine.training.checkpoint import SIDE, settle

COMMANDS = "/reset begins anew, /save FILE writes the conversation, /quit ends, Ctrl-C stops an answer"


def run(settings: ChatRecipe) -> None:
    """Talk until the input ends.

    Raises:
        BadInput: a model that cannot be loaded.
    """
    quiet_libraries()
    console = Console()
    with console.status("loading") if console.is_terminal else contextlib.nullcontext():
        voices = [Voice(path, settings.talk) for path in settings.talk.model_name_or_path]
    for name, voice in zip("AB", voices):
        label = f"{name}: {voice.path}" if len(voices) > 1 else voice.path
        plain = "" if voice.templated else " (it has no chat template: messages are lines of a text)"
        console.print(Text(printable(label + plain)), soft_wrap=True)
    if sys.stdin.isatty():
        console.print(Text(COMMANDS), soft_wrap=True)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited, and earlier ones called back
    talk(lines(), voices, console)


def lines() -> Iterator[str]:
    """Messages: of a person at a terminal, or of a pipe, a line each."""
    with contextlib.suppress(AttributeError):
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a pipe may hold what is no text
    person = sys.stdin.isatty()
    while True:
        try:
            yield input("> " if person else "")
        except KeyboardInterrupt:
            if not person:
                return
            print("\n(that line is gone, the conversation stays; /quit or Ctrl-D ends)")
        except EOFError:
            print(end="\n" * person)
            return


def talk(messages: Iterator[str], voices: list[Voice], console: Console) -> None:
    """Answer each message, and do what commands say."""
    for line in messages:
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                for voice in voices:
                    voice.reset()
                console.print("the conversation begins anew")
            elif command == "/save":
                console.print(Text(printable(save(rest.strip(), voices))), soft_wrap=True)
            elif command.startswith("/"):
                console.print(Text(f"there is no command {printable(command)}: {COMMANDS}"), soft_wrap=True)
            elif command:
                answer(line, voices, console)
        except BadInput as error:
            console.print(Text(printable(str(error)), style="red"), soft_wrap=True)


def answer(line: str, voices: list[Voice], console: Console) -> None:
    """Show what the voices say to a message, as it comes; Ctrl-C stops one."""
    if len(voices) == 1:
        follow(voices[0], line, lambda piece: console.print(Text(piece), end="", soft_wrap=True))
        console.print()
    elif not console.is_terminal:
        for name, voice in zip("AB", voices):
            console.print(Text(f"{name}: {follow(voice, line, lambda piece: None)}"), soft_wrap=True)
    else:
        texts = [""] * len(voices)
        with Live(console=console, transient=True) as live:
            for i, voice in enumerate(voices):

                def grown(piece: str, i: int = i) -> None:
                    texts[i] += piece
                    live.update(beside(texts, console.height - 2))

                follow(voice, line, grown)
        console.print(beside(texts))


def follow(voice: Voice, line: str, show: Callable[[str], None]) -> str:
    """One answer, made safe for a terminal."""
    said, pieces = "", voice.answer(line)
    try:
        for piece in map(printable, pieces):
            said += piece
            show(piece)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
        said += " (stopped)"
        show(" (stopped)")
    return said


def beside(texts: list[str], height: int | None = None) -> Table:
    """Two answers beside each other, the last lines of them where there is no room for all."""
    grid = Table.grid(expand=True)
    shown = [Text("\n".join(text.splitlines()[-height + 2 :] if height else text.splitlines())) for text in texts]
    for _ in texts:
        grid.add_column(ratio=1)
    grid.add_row(*(Panel(text, title=name, height=None) for name, text in zip("AB", shown)))
    return grid


def save(name: str, voices: list[Voice]) -> str:
    """Write the conversations to a new file, a row each with the columns `model` and `messages`; what is to be said.

    Raises:
        BadInput: no name, a file that is there, a folder that is not, nothing to write.
    """
    path = Path(name).expanduser()
    if not name:
        raise BadInput("/save needs the name of a file")
    if path.exists():
        raise BadInput(f"{name} is there already: give another name")
    if all(message["role"] == "system" for voice in voices for message in voice.messages):
        raise BadInput("nothing has been said yet")
    rows = [{"model": voice.path, "messages": voice.messages} for voice in voices]
    side = path.with_name(path.name + SIDE)
    try:
        side.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        settle(side, path)
    except OSError as error:
        raise BadInput(f"{name} cannot be written: {error.strerror or error}") from error
    return f"written to {name}"
