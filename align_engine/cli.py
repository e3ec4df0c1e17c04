"""The command `align`. Exit codes: 0 done, 1 the run failed, 2 bad input or usage."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import logging
import os
import sys
import traceback
from collections import ChainMap, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from align_engine import assessment, preparation
from align_engine import recipe as recipes
from align_engine.assessment import ASSESSMENT
from align_engine.errors import AlignError, BadInput, RunFailed, printable, shortened
from align_engine.preparation import PREPARATION
from align_engine.recipe import ALIASES, RECIPES, Recipe, Settings
from align_engine.recipe.foreign import FOREIGN, RENAMED, settle
from align_engine.recipe.secrets import masked
from align_engine.recipe.values import NO, NOTHING, YES
from align_engine.training import allocator, stops
from align_engine.version import __version__

# on a CPU it names kernels that it does without, when it is imported: here and in the processes of a demo
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
SYNONYMS = {"with": "results"}  # flags that no field of Python can be called
USAGE = """usage: align COMMAND [--flags]

{commands}

align COMMAND --help lists the flags of a command. A recipe is a YAML file of the same names, which flags override:
  align dpo --recipe recipes/demo-dpo.yaml --learning_rate 1e-5
--plugin FILE runs a Python file first, which may register a loss, a backend or a command (docs/extending.md).
--debug shows the traceback of an error, --version the version. Exit codes: 0 done, 1 the run failed, 2 bad input.
Several processes, on GPUs or a CPU: torchrun --nproc_per_node 2 -m align_engine COMMAND ..."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. One of several processes ends with it, and ends the others where it
    fails; one of them says why."""
    own = argparse.ArgumentParser(prog="align", add_help=False, allow_abbrev=False)
    own.add_argument("--recipe", "--config")
    own.add_argument("--plugin")
    own.add_argument("--debug", action="store_true")
    own.add_argument("--version", action="store_true")
    own, arguments = own.parse_known_args(argv)
    if own.version:
        print(f"align-engine {__version__}")
        return 0
    watch, code, sentence, certain = None, 0, None, True
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is said in one sentence, not in frames
            from align_engine.training.ranks import Watch

            watch = Watch()
        with stops.terminable():
            if own.plugin:
                allocator.ask_for_huge_pages()  # before its first tensor; `run` knows what the recipe says
                from align_engine.training.importing import run_file

                run_file(own.plugin, "--plugin")
            if not arguments or arguments[0] in ("-h", "--help"):
                print(usage())
                code = 0 if arguments else 2
            else:
                run(arguments[0], arguments[1:], own.recipe)
    except BaseException as error:
        if own.debug and not watch and isinstance(error, Exception):
            raise
        if own.debug:
            traceback.print_exc()
        code, sentence = explained(error)
        certain = isinstance(error, (AlignError, SystemExit))
    if watch:
        watch.end(code, sentence, certain)
    if sentence:
        print(f"align: error: {printable(shortened(sentence))}", file=sys.stderr)
    return code


def usage() -> str:
    """What the command says of itself."""
    wide = max(map(len, [*COMMANDS, *ALIASES]))
    lines = [f"  {name:{wide}} {(command.__doc__ or ' ').splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += [f"  {alias:{wide}} The same as {name}." for alias, name in ALIASES.items()]
    return USAGE.format(commands="\n".join(lines))


def explained(error: BaseException) -> tuple[int, str | None]:
    """The exit code of an error, and what to say of it."""
    if isinstance(error, SystemExit):  # of the parser of flags, which has said its own
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1, None
    if isinstance(error, KeyboardInterrupt):
        return 1, "stopped before the run began; the same command starts it"
    if isinstance(error, AlignError):
        return error.exit_code, masked(str(error))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = masked((str(error).strip() or "no message").splitlines()[0])
    place = f"{Path(frame.filename).name}, line {frame.lineno}"
    return (
        1,
        f"{type(error).__name__} in {place}: {text} (unexpected; the same command with --debug shows the way there)",
    )


def run(name: str, arguments: list[str], path: str | None) -> None:
    """One command, with the recipe at `path` (None: its defaults) overridden by flags.

    Raises:
        BadInput: no such command; from the recipe. SystemExit: 2 from the flags, naming the nearest known ones; 0 after
            --help.
    """
    name = ALIASES.get(name, name)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        raise BadInput(f"no command {name!r}; " + (f"did you mean {close[0]!r}?" if close else "see align --help"))
    if name in ("plan", "recipes"):
        COMMANDS[name](arguments, path)
        return
    if name not in RECIPES and name not in TOOLS:
        import tyro

        tyro.cli(COMMANDS[name], args=arguments, prog=f"align {name}")
        return
    recipe, others = read(name, arguments, path)
    if others:
        explain(name, recipe, others)
    if name in TOOLS:
        (preparation if name in PREPARATION else assessment).run(name, recipe)
        return
    recipe = recipes.check(recipe)
    if recipe.train.tune_malloc:
        allocator.ask_for_huge_pages()
    else:
        allocator.take_back()
    from accelerate import PartialState

    from align_engine.iterate import runner
    from align_engine.run import quiet_libraries

    quiet_libraries()
    try:
        runner(name)(recipe)
    except SystemExit as error:  # of a reward function, a callback, ...: no way to end a run well
        raise RunFailed(f"the run was left by sys.exit({error.code!r})") from error
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def plan(arguments: list[str], path: str | None = None) -> None:
    """What a run will take: memory by part, tokens, FLOPs, and the recipe that fits; only config.json is read.

    align plan METHOD takes the flags of align METHOD, and
      --memory 24GB | A100    what it has to fit into: a size, or a card by its name (default: this machine's)
      --prompt_length N       tokens of a row's prompt (default: max_prompt_length, or half of max_length)
      --json                  JSON in place of the table
    """
    own = argparse.ArgumentParser(prog="align plan", add_help=False, allow_abbrev=False)
    own.add_argument("--memory")
    own.add_argument("--prompt_length", "--prompt-length", type=int)
    own.add_argument("--json", action="store_true")
    options, arguments = own.parse_known_args(arguments)
    if not arguments or arguments[0].startswith("-"):
        print(inspect.getdoc(plan))
        if arguments and arguments[0] in ("-h", "--help"):
            return
        raise BadInput(f"align plan needs a method: one of {', '.join(RECIPES)}")
    name = ALIASES.get(arguments[0], arguments[0])
    if name not in RECIPES:
        raise BadInput(f"align plan: no method {name!r}; one of {', '.join(RECIPES)}")
    recipe, others = read(name, arguments[1:], path)
    if others:
        explain(name, recipe, others)
    from align_engine.iterate import planned
    from align_engine.planning import show
    from align_engine.run import quiet_libraries

    quiet_libraries()
    said = planned(name, recipe, options.memory, options.prompt_length)
    print(show.as_json(said)) if options.json else show.show(said)


def read(name: str, arguments: list[str], path: str | None) -> tuple[Any, list[str]]:
    """The recipe of a file and of flags, and the arguments that are none of these."""
    kind: Any = RECIPES[name] if name in RECIPES else TOOLS[name]
    note: Any = partial(print, file=sys.stderr)
    changes, others = flags(kind, arguments, note)
    if kind.positional and (values := [word for word in others if not word.startswith("-")]):
        section, _ = recipes.fields(kind)[kind.positional]
        changes.setdefault(section, {}).setdefault(kind.positional, []).extend(values)
        others = [word for word in others if word not in values]
    return recipes.typed(recipes.load(kind, path, note) if path else kind(), changes, "flags"), others


def explain(name: str, recipe: Settings, others: Sequence[str]) -> None:
    """Print the help of a command that is a recipe, for `-h` or `--help`; refuse other arguments that are no flags."""
    if strange := [word for word in others if word not in ("-h", "--help")]:
        if not strange[0].startswith("-"):
            raise BadInput(f"{strange[0]!r} belongs to no flag")
        known, name = [f"--{name}" for name in recipes.fields(type(recipe))], strange[0].replace("-", "_")
        raise BadInput(recipes.unknown("flag", strange[0], known) + recipes.elsewhere(name.strip("_")))
    import tyro

    required = getattr(recipe, "required", recipes.REQUIRED)
    for section in vars(recipe).values():
        for field, value in vars(section).items():  # they are printed as defaults
            setattr(section, field, tyro.MISSING if field in required and value == "" else masked(value))
    said = (
        f"{type(recipe).__doc__}\n\n--recipe FILE (or --config FILE): a YAML file of the names below, or the name of "
        "one that `align recipes` lists; flags override it."
    )
    flat, shared = (tyro.conf.OmitArgPrefixes,), {*Recipe.__annotations__, "limits"}
    sections = sorted(vars(recipe), key=lambda one: one in shared)  # those of the method stand first
    kind = dataclasses.make_dataclass("Help", [(one, type(getattr(recipe, one))) for one in sections])
    made = kind(**{one: getattr(recipe, one) for one in sections})
    tyro.cli(kind, args=["--help"], prog=f"align {name}", description=said, default=made, config=flat,
             use_underscores=True)  # fmt: skip


def flags(
    kind: type[Settings], arguments: Sequence[str], note: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What flags say of a recipe's fields.

    A flag is read as a line of a recipe's YAML: `--name value`, `--name=value`, values side by side for a list,
    `--name` or `--no_name` for a switch; `-` in a name is `_`. A name of TRL's that has another one here is that.

    Args:
        note: is told of flags of TRL and others that change nothing here.
    Returns:
        section -> field -> text (a list: texts), as `recipes.typed` takes it; and the arguments that are none of them.
    Raises:
        BadInput: a flag without its value; one of TRL's or others that asks for what is said otherwise here.
    """
    known, waiting, others = recipes.fields(kind), deque(arguments), list[str]()
    changes: dict[str, dict[str, Any]] = {}
    theirs: dict[str, Any] = {}

    def next_value(words: Sequence[str] = ()) -> str | None:
        """The next argument, unless it is a flag, or none of `words` where some are given."""
        is_flag = not waiting or waiting[0] == "-h" or (waiting[0].startswith("--") and waiting[0] != "--")
        return None if is_flag or (words and waiting[0].lower() not in words) else waiting.popleft()

    while waiting:
        word = waiting.popleft()
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        name = SYNONYMS.get(name, name)
        off = name.removeprefix("no_") if not equals else ""
        if word.startswith("--") and off != name and (off in FOREIGN or (off in known and known[off][1].is_switch)):
            name, equals, value = off, "=", "false"
        name = RENAMED[name] if RENAMED.get(name) in known else name
        if word.startswith("--") and name not in known and name in FOREIGN and issubclass(kind, Recipe):
            theirs[name] = value if equals else " ".join(iter(next_value, None)) or "true"
            continue
        if not word.startswith("--") or name not in known:
            others.append(word)
            continue
        section, field = known[name]
        if field.is_switch and not equals:
            value = next_value((*YES, *NO, *NOTHING, *map(str, get_args(field.kind)))) or "true"
        elif not equals and field.bare and (not waiting or waiting[0].startswith("-")):
            value = field.bare
        elif not equals:
            values = list(iter(next_value, None)) if field.is_list else [next_value()]
            if values in ([], [None]):
                raise BadInput(f"{word} needs a value")
            value = values if field.is_list else values[0]
        changes.setdefault(section, {})[name] = value
    settle(theirs, known, "flags", note)
    return changes, others


def env(json: bool = False) -> None:
    """Versions, devices, and which backend each kernel takes on this machine, and why not another.

    Args:
        json: Print JSON instead of tables.
    """
    from align_engine.reports.environment import show

    show(as_json=json)


def list_recipes(arguments: list[str], path: str | None = None) -> None:
    """The recipes that come with the package; of those that are named their YAML.

    align recipes                  the names, and where the files and the examples lie
    align recipes NAME > my.yaml   a copy to change; --recipe NAME reads it as it is
    """
    from align_engine.recipe import shipped

    if {"-h", "--help"} & {*arguments}:
        print(inspect.getdoc(list_recipes))
        return
    if arguments:
        print("\n".join(shipped.find(name).read_text(encoding="utf-8") for name in arguments), end="")
        return
    known = shipped.recipes()
    width = max(map(len, known))
    for name, file in known.items():
        print(f"{name:{width}}  {shipped.summary(file)}")
    print(f"\nfiles in {shipped.folder('recipes')}, with those of accelerate; examples in {shipped.folder('examples')}")


def demo(output_dir: Path = Path("runs/demo"), seeds: tuple[int, ...] = (0,), workers: int = 2) -> None:
    """Make data, train a small model by SFT and from there by every method, score all on held-out prompts.

    Args:
        output_dir: Folder for data, runs and index.html.
        seeds: The whole demo runs once per seed; several give mean and spread.
        workers: Stages trained at a time, each on one thread (1: in this process, with its progress on the screen).
    """
    if workers < 1 or not seeds:
        raise BadInput(f"workers = {workers} and seeds = {seeds}: give at least one of each")
    from align_engine.demo.run import run
    from align_engine.run import quiet_libraries

    quiet_libraries()
    run(output_dir, seeds, workers)


TOOLS = ChainMap[str, Any](PREPARATION, ASSESSMENT)  # commands that are settings and train nothing
COMMANDS = ChainMap[str, Any](
    {"plan": plan, "recipes": list_recipes, "env": env, "demo": demo}, *TOOLS.maps, RECIPES
)  # with those that a plugin registers

if __name__ == "__main__":
    sys.exit(main())
