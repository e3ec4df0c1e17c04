"""The command `align`. Exit codes: 0 done, 1 the run failed, 2 bad input or usage."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from align_engine import recipe as recipes
from align_engine import stops
from align_engine.errors import AlignError, BadInput
from align_engine.recipe import RECIPES

USAGE = """usage: align COMMAND [--flags]

{commands}

align COMMAND --help lists the flags of a command. A recipe is a YAML file of the same names, which flags override:
  align dpo --recipe recipes/demo-dpo.yaml --learning_rate 1e-5
--debug shows the traceback of an error. Exit codes: 0 done, 1 the run failed, 2 bad input."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; one of several processes ends with it."""
    code = _attempt(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread of gloo still freeing the last collective's tensors would abort Python's own way out
    return code


def _attempt(argv: Sequence[str] | None) -> int:
    own = argparse.ArgumentParser(prog="align", add_help=False, allow_abbrev=False)
    own.add_argument("--recipe")
    own.add_argument("--debug", action="store_true")
    own, arguments = own.parse_known_args(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:7} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
        print(USAGE.format(commands="\n".join(lines)))
        return 0 if arguments else 2
    try:
        with stops.terminable():
            run(arguments[0], arguments[1:], own.recipe)
    except KeyboardInterrupt:
        return _complain("stopped before the run began; the same command starts it", 1)
    except Exception as error:
        if own.debug:
            raise
        if isinstance(error, AlignError):
            return _complain(str(error), error.exit_code)
        text = (str(error).strip() or "no message").splitlines()[0]
        return _complain(f"{type(error).__name__}: {text}\n(the same command with --debug shows where)", 1)
    return 0


def _complain(message: str, code: int) -> int:
    print(f"align: error: {message}", file=sys.stderr)
    return code


def run(name: str, arguments: list[str], path: str | None) -> None:
    """One command, with the recipe at `path` (None: its defaults) overridden by flags.

    Raises:
        BadInput: no such command; from the recipe. SystemExit: 2 from the flags, naming the nearest known ones; 0 after
            --help.
    """
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        raise BadInput(f"no command {name!r}; " + (f"did you mean {close[0]!r}?" if close else "see align --help"))
    import tyro

    if name not in RECIPES:
        tyro.cli(COMMANDS[name], args=arguments, prog=f"align {name}")
        return
    kind = RECIPES[name]
    recipe = recipes.load(kind, path) if path else kind()
    for section in vars(recipe).values():
        for field in recipes.REQUIRED:
            if getattr(section, field, None) == "":
                setattr(section, field, tyro.MISSING)
    said = f"{kind.__doc__}\n\n--recipe FILE: a YAML file of the names below; flags override it."
    flat = (tyro.conf.OmitArgPrefixes,)
    recipe = tyro.cli(kind, args=arguments, prog=f"align {name}", description=said, default=recipe, config=flat)
    recipes.check(recipe)
    quiet_libraries()
    from accelerate import PartialState

    if isinstance(recipe, recipes.IterateRecipe):
        from align_engine.iterate import iterate

        iterate(recipe)
    else:
        from align_engine.run import train

        train(name, recipe)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def quiet_libraries() -> None:
    """Leave the terminal to the run's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def env(json: bool = False) -> None:
    """Versions, devices, and which backend each kernel takes on this machine, and why not another.

    Args:
        json: Print JSON instead of tables.
    """
    from align_engine.environment import show

    show(as_json=json)


def demo(output_dir: Path = Path("runs/demo"), seeds: tuple[int, ...] = (0,), workers: int = 2) -> None:
    """Make data, train a small model by SFT and from there by every method, score all on held-out prompts.

    Args:
        output_dir: Folder for data, runs and index.html.
        seeds: The whole demo runs once per seed; several give mean and spread.
        workers: Stages trained at a time, each on one thread (1: in this process, with its progress on the screen).
    """
    quiet_libraries()
    from align_engine.demo.run import run

    run(output_dir, seeds, workers)


COMMANDS = {**RECIPES, "env": env, "demo": demo}

if __name__ == "__main__":
    sys.exit(main())
