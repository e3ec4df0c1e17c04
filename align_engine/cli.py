"""The command `align`. Exit codes: 0 done, 1 the run failed, 2 bad input or usage."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from align_engine import recipe as recipes
from align_engine.errors import AlignError, BadInput


class Command(NamedTuple):
    """One word after `align`."""

    run: Callable[[str, list[str]], None]
    summary: str


USAGE = """usage: align COMMAND [--flags]

{commands}

align COMMAND --help lists the flags of a command. A recipe is a YAML file of the same names, which flags override:
  align dpo --recipe recipes/demo-dpo.yaml --learning_rate 1e-5
Exit codes: 0 done, 1 the run failed, 2 bad input."""

RECIPES: dict[str, type[recipes.Recipe]] = {
    "sft": recipes.SftRecipe,
    "rm": recipes.RmRecipe,
    "dpo": recipes.DpoRecipe,
    "simpo": recipes.SimpoRecipe,
    "orpo": recipes.OrpoRecipe,
    "cpo": recipes.CpoRecipe,
    "kto": recipes.KtoRecipe,
    "direct": recipes.DirectRecipe,
    "grpo": recipes.GrpoRecipe,
    "ppo": recipes.PpoRecipe,
    "iterate": recipes.IterateRecipe,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:7} {command.summary}" for name, command in COMMANDS.items())))
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            raise BadInput(f"no command {name!r}; " + (f"did you mean {close[0]!r}?" if close else "see align --help"))
        COMMANDS[name].run(name, rest)
    except KeyboardInterrupt:
        return _complain("stopped; the same command goes on from the last checkpoint", 1)
    except Exception as error:
        if "--debug" in rest:
            raise
        if isinstance(error, AlignError):
            return _complain(str(error), error.exit_code)
        text = str(error).strip() or "no message"
        return _complain(
            f"{type(error).__name__}: {text.splitlines()[0]}\n(the same command with --debug shows where)", 1
        )
    return 0


def _complain(message: str, code: int) -> int:
    print(f"align: error: {message}", file=sys.stderr)
    return code


def train(name: str, arguments: list[str]) -> None:
    """`align sft`, `align dpo`, ...: from flags to a finished run."""
    recipe = parse(name, arguments)
    recipes.check(recipe)
    quiet_libraries()
    from accelerate import PartialState

    if isinstance(recipe, recipes.IterateRecipe):
        from align_engine.iterate import iterate

        iterate(recipe)
    else:
        from align_engine.run import train

        train(name, recipe)
    PartialState().destroy_process_group()


def parse(name: str, arguments: list[str]) -> recipes.Recipe:
    """The recipe of a command: defaults, overridden by `--recipe FILE`, overridden by flags.

    Raises:
        BadInput: from the file. SystemExit: 2 from the flags, naming the nearest known ones; 0 after --help.
    """
    import tyro

    kind = RECIPES[name]
    path = _value_of("--recipe", arguments)
    recipe = recipes.load(kind, path) if path else kind()
    for section in vars(recipe).values():
        for field in recipes.REQUIRED:
            if getattr(section, field, None) == "":
                setattr(section, field, tyro.MISSING)

    @dataclasses.dataclass
    class Flags(kind):
        recipe: Path | None = None
        """YAML file of the names below; flags override it."""
        debug: bool = False
        """Show the traceback of an error."""

    flags = tyro.cli(
        Flags,
        args=arguments,
        prog=f"align {name}",
        description=kind.__doc__,
        default=Flags(**vars(recipe)),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return kind(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(kind)})


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def quiet_libraries() -> None:
    """Leave the terminal to the run's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def environment(name: str, arguments: list[str]) -> None:
    """`align env`: what runs here."""
    import tyro

    @dataclasses.dataclass
    class Flags:
        """Versions, devices, and which backend each kernel takes on this machine, and why not another."""

        json: bool = False
        """Print JSON instead of tables."""
        debug: bool = False
        """Show the traceback of an error."""

    flags = tyro.cli(Flags, args=arguments, prog="align env")
    from align_engine.environment import show

    show(as_json=flags.json)


def demo(name: str, arguments: list[str]) -> None:
    """`align demo`: data, every method of the ladder, scores, page."""
    import tyro

    @dataclasses.dataclass
    class Flags:
        """Make data, train a small model by SFT and from there by every method, score all on held-out prompts."""

        output_dir: Path = Path("runs/demo")
        """Folder for data, runs and index.html."""
        seeds: tuple[int, ...] = (0,)
        """The whole demo runs once per seed; several give mean and spread."""
        workers: int = 2
        """Stages trained at a time, each on one thread (1: in this process, with its progress on the screen)."""
        debug: bool = False
        """Show the traceback of an error."""

    flags = tyro.cli(Flags, args=arguments, prog="align demo")
    quiet_libraries()
    from align_engine.demo.run import run

    run(flags.output_dir, flags.seeds, flags.workers)


COMMANDS = {
    "sft": Command(train, "supervised fine-tuning on prompts with completions, or on text"),
    "rm": Command(train, "reward model on pairs of a chosen and a rejected answer, for transformers to load"),
    "dpo": Command(train, "direct preference optimisation on pairs of a chosen and a rejected answer"),
    "simpo": Command(train, "SimPO on pairs, without a reference"),
    "orpo": Command(train, "ORPO on pairs: supervised fine-tuning with an odds ratio, without a reference"),
    "cpo": Command(train, "contrastive preference optimisation on pairs, without a reference"),
    "kto": Command(train, "Kahneman-Tversky optimisation on answers marked good or bad, or on pairs taken apart"),
    "direct": Command(train, "direct RL (REINFORCE, RLOO) from what people or programs say of sampled answers"),
    "grpo": Command(train, "group-relative policy optimisation on sampled answers and reward functions"),
    "ppo": Command(train, "proximal policy optimisation on sampled answers, with a critic and a KL penalty"),
    "iterate": Command(train, "rounds of sampling, scoring, pairing and preference optimisation"),
    "env": Command(environment, "versions, devices, and which backend each kernel takes here and why not another"),
    "demo": Command(demo, "make data, train a small model by every method here, score all on held-out prompts"),
}

if __name__ == "__main__":
    sys.exit(main())
