"""Whole inputs of the command line, and kinds of cases in which something about them is broken."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import broken
import mutations
import tiny
from mutations import ODD, replace, some_file

PAIRS, ONLINE = ("rm", "dpo", "simpo", "orpo", "cpo"), ("grpo", "rloo", "ppo", "iterate")
METHODS = ("sft", *PAIRS, "kto", *ONLINE)
MINE = ("notes.txt", "checkpoint-best/mine.bin", "my.tmp")  # the user's files beside a run, in its folder
TEMPLATE = (
    "{% for m in messages %}w{{ m['role'] | length }} {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w9 {% endif %}"
)
SCORERS = """def score(prompts, completions, completion_ids, **columns):
    return [float(sum(ids)) for ids in completion_ids]
"""
CALLBACKS = "from transformers import TrainerCallback\n\nclass Quiet(TrainerCallback):\n    pass\n"
# fields that make a run long or large where their value is a large number
COSTLY = {"max_steps", "num_train_epochs", "lora_r", "max_completion_length", "num_generations", "dataset_num_proc",
          "rounds", "num_iterations", "num_ppo_epochs", "gradient_accumulation_steps", "steps_per_generation",
          "per_device_generation_batch_size", "prompts_per_round", "early_stopping_patience"}  # fmt: skip


class Case(NamedTuple):
    """A command line, and what is broken about it."""

    what: str
    arguments: list[str]


# what is whole --------------------------------------------------------------------------------------------------------


class Bench:
    """Whole inputs, made once; cases work on copies of them."""

    def __init__(self, path: Path) -> None:
        from align_engine.run import quiet_libraries

        quiet_libraries()
        self.path, self.runs = path, dict[str, Path]()
        self.model = tiny.write_model(path / "model")
        (self.model / "chat_template.jinja").write_text(TEMPLATE)
        self.small = tiny.write_model(path / "small", vocab=40)  # fewer tokens than its tokenizer has
        self.scorer, self.adapter = path / "scorer", path / "adapter"
        self._derive()

    def _derive(self) -> None:
        """A reward model and an adapter of the model."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(0)
        tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
        scorer: Any = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=1)
        base: Any = AutoModelForCausalLM.from_pretrained(self.model)
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for made, folder in ((scorer, self.scorer), (adapted, self.adapter)):
            made.save_pretrained(str(folder))
            tokenizer.save_pretrained(folder)

    def run(self, method: str) -> Path:
        """A folder with a run that was stopped, `out`, and its recipe, which names it by that."""
        if method not in self.runs:
            self.runs[method] = place = self.path / "runs" / method
            place.mkdir(parents=True)
            flags = good_flags(method, self, place) | {"output_dir": "out", "max_steps": 3, "save_steps": 1}
            flags |= {"sft": {"use_peft": True}, "iterate": {"rounds": 2}}.get(method, {})
            replace(place / "recipe.yaml", json.dumps({name: plain(value) for name, value in flags.items()}))
            with contextlib.chdir(place):
                stop(method, place / "recipe.yaml")
            assert list((place / "out").rglob("checkpoint-*")), "the run was to leave a checkpoint"
        return self.runs[method]


def stop(method: str, recipe: Path) -> None:
    """Begin a run and end it as Ctrl-C would: once its first checkpoint is written, or in the second round."""
    from align_engine import iterate, run
    from align_engine import recipe as recipes
    from align_engine.training import engine, stops

    save, write_pairs = engine.Engine.save, iterate.write_pairs

    def save_then_stop(self: Any, folder: Any) -> None:
        save(self, folder)
        if method != "iterate":
            raise KeyboardInterrupt

    def stop_in_the_second(prompts: Any, number: int, *more: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write_pairs(prompts, number, *more)

    engine.Engine.save, iterate.write_pairs = save_then_stop, stop_in_the_second
    loaded: Any = recipes.load(recipes.RECIPES[method], recipe)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            iterate.iterate(loaded) if method == "iterate" else run.train(method, loaded)
    except (stops.Stopped, KeyboardInterrupt):
        pass
    finally:
        engine.Engine.save, iterate.write_pairs = save, write_pairs


def good_rows(method: str, count: int = 4) -> list[dict[str, Any]]:
    made: Any = tiny.preference_rows if method in PAIRS else tiny.prompt_rows if method in ONLINE else tiny.sft_rows
    return (tiny.label_rows if method == "kto" else made)(count)


def good_flags(method: str, bench: Bench, place: Path) -> dict[str, Any]:
    """Flags of the smallest run of a method; rows and code that it reads are written to `place`."""
    flags: dict[str, Any] = dict(
        model_name_or_path=bench.model, dataset_name=tiny.write_rows(place / "rows.jsonl", good_rows(method)),
        output_dir=place / "out", max_steps=1, per_device_train_batch_size=4, gradient_checkpointing=False,
    )  # fmt: skip
    if method in ONLINE:
        replace(place / "scorers.py", SCORERS)
        flags |= dict(reward_funcs=[f"{place / 'scorers.py'}:score"], max_completion_length=3, num_generations=2)
    return flags | (dict(rounds=1, prompts_per_round=2) if method == "iterate" else {})


def command(method: str, flags: dict[str, Any]) -> list[str]:
    """The command line that flags stand for; True and False are switches."""
    words = [method]
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def sections(method: str) -> dict[str, str]:
    """Field -> section of a method's recipe, but for the one that would reach out to the hub."""
    from align_engine.recipe import RECIPES

    tree = dataclasses.asdict(RECIPES[method]())
    return {name: section for section, fields in tree.items() for name in fields if name != "push_to_hub"}


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder of inputs, its files hard-linked: to be replaced, never written to."""
    return Path(shutil.copytree(source, target, copy_function=os.link))


def talking(row: dict[str, Any], names: list[str]) -> None:
    """Make messages of a row's texts."""
    for name in names:
        row[name] = [{"role": "user" if name == "prompt" else "assistant", "content": row[name]}]


# what is broken -------------------------------------------------------------------------------------------------------

Kind = Callable[[random.Random, Bench, Path], Case]
KINDS: dict[str, Kind] = {}


def kind(make: Kind) -> Kind:
    KINDS[make.__name__] = make
    return make


def odd_value(rng: random.Random, name: str) -> Any:
    large = [value for value in ODD if isinstance(value, (int, float)) and abs(value) > 5]
    return rng.choice([value for value in ODD if name not in COSTLY or value not in large])


def misspelt(rng: random.Random, name: str) -> str:
    at = rng.randrange(len(name))
    ways = [name[:at] + name[at + 1 :], name[: at + 1] + name[at:], name.upper(), f" {name}", name[::-1]]
    return rng.choice(ways)


@kind
def recipe(rng: random.Random, bench: Bench, place: Path) -> Case:
    """A recipe file that is no YAML, or with odd keys, sections and values."""
    import yaml

    method, path, fields = (chosen := rng.choice(METHODS)), place / "recipe.yaml", sections(chosen)
    tree: Any = {name: plain(value) for name, value in good_flags(method, bench, place).items()}
    way = rng.choice(["text", "text", "bytes", "value", "value", "value", "key", "section", "path"])
    section, name = rng.choice(sorted({*fields.values()})), rng.choice(sorted(fields))
    if way == "text":
        more = rng.choice(broken.YAMLS)
        what, data = f"{more[:60]!r}", rng.choice([b"", yaml.safe_dump(tree).encode()]) + more
    elif way == "bytes":
        what, data = mutations.some_bytes(rng, yaml.safe_dump(tree).encode())
    elif way == "path":
        what, data = rng.choice(["no file", "a folder"]), None
    else:
        if way == "value":
            value = odd_value(rng, name)
            tree.pop(name, None)
            tree |= rng.choice([{name: value}, {fields[name]: {name: value}}])
            what = f"{name}: {value!r:.60}"
        elif way == "key":
            other = rng.choice([misspelt(rng, name), misspelt(rng, name), 5, 1.5, True, None, "", "\ud800", "a.b"])
            tree |= rng.choice([{other: 1}, {section: {other: 1}}])
            what = f"key {other!r}"
        else:
            tree[section] = rng.choice(ODD)
            what = f"section {section}: {tree[section]!r:.60}"
        data = yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if what == "a folder":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    more = rng.choice([["--output_dir", str(place / "out")], ["--dataset_name", str(place / "rows.jsonl")], []])
    return Case(f"{method}: {what}", [method, "--recipe", str(path), *more])


@kind
def flags(rng: random.Random, bench: Bench, place: Path) -> Case:
    """Odd values, strange flags, flags that exclude each other, no command."""
    method = rng.choice(METHODS)
    given, fields = good_flags(method, bench, place), sections(method)
    way = rng.choice(["value", "value", "value", "strange", "conflict", "conflict", "conflict", "left out", "command"])
    if way == "value":
        name = rng.choice(sorted(fields))
        value = rng.choice([word for word in broken.WORDS if not word.isdigit() or name not in COSTLY])
        given.pop(name, None)
        more = rng.choice([[f"--{name}", value], [f"--{name}={value}"]])
        return Case(f"{method}: {name} {value!r:.40}", [*command(method, given), *more])
    if way == "strange":
        strange = rng.choice(broken.STRANGE)
        return Case(f"{method}: {strange}", [*command(method, given), *strange])
    if way == "conflict":
        one = rng.choice([one for one in broken.CONFLICTS if one.keys() <= fields.keys()])
        return Case(f"{method}: {one}", command(method, given | one))
    if way == "left out":
        gone = rng.choice(list(given))
        del given[gone]
        return Case(f"{method}: no {gone}", command(method, given))
    word = rng.choice(broken.COMMANDS)
    return Case(f"command {word!r}", rng.choice([[word], command(word, given), []]))


@kind
def rows(rng: random.Random, bench: Bench, place: Path) -> Case:
    """One row, or all, with a broken value, in one of the formats."""
    method = rng.choice(METHODS)
    given, found = good_flags(method, bench, place), good_rows(method)
    texts = [name for name in found[0] if name not in ("label", "wanted")]
    sides = [name for name in texts if name != "prompt"]
    column, some = rng.choice(texts), rng.choice([found, [rng.choice(found)]])
    ways = "odd text message talk renamed gone alike ready number tools kwargs taken few"
    way = rng.choice(ways.split())
    value: Any = None
    if way in ("talk", "tools", "kwargs"):
        for row in found:
            talking(row, texts)
    if way in ("odd", "text", "message", "talk"):
        value = rng.choice({"odd": ODD, "text": broken.STRANGE_TEXTS}.get(way, broken.BROKEN_MESSAGES))
    elif way in ("tools", "kwargs"):
        column = {"tools": "tools", "kwargs": "chat_template_kwargs"}[way]
        value = rng.choice({"tools": broken.BROKEN_TOOLS, "kwargs": broken.BROKEN_KWARGS}[way])
    elif way == "taken":
        column, value = rng.choice(broken.TAKEN_COLUMNS), rng.choice(["w1", 5, [1], None])
    elif way == "ready":
        for row in found:
            row |= {f"{name}_ids": [3, 4, 1 + i] for i, name in enumerate(["prompt", *sides])}
        column, value = f"{rng.choice(['prompt', *sides])}_ids", rng.choice(broken.BROKEN_IDS)
    elif way == "number":
        column = "label" if method == "kto" else rng.choice(["margin", "chosen_rank", "rejected_rank"])
        if method == "rm" and column != "margin":
            given["rank_margin"] = 1.0
            for row in found:
                row |= {"chosen_rank": 1, "rejected_rank": 2}
        value = rng.choice([*ODD, "yes", "true", 2, "0", [True], 0.5])
    if way == "few":
        del found[rng.choice([0, 1]) :]
        what = f"{len(found)} rows"
    elif way in ("renamed", "gone"):
        other = misspelt(rng, column)
        for row in some:
            value = row.pop(column)
            row |= {other: value} if way == "renamed" else {}
        what = f"{column} {way}"
    elif way == "alike":
        for row in some:
            row |= dict.fromkeys(texts, "w1 w2")
        what = "all texts alike"
    else:
        for row in some:
            row[column] = value
        what = f"{column} = {value!r:.50}"
    given |= {"bad_rows": "drop"} if rng.random() < 0.15 else {}
    given["dataset_name"] = write(rng, place, found)
    return Case(f"{method} {way}: {what} in {len(some)} rows", command(method, given))


def write(rng: random.Random, place: Path, found: list[dict[str, Any]]) -> Path:
    """Rows in one of the formats; in JSON lines where another one cannot hold them."""
    import datasets

    path, way = place / "rows.jsonl", rng.choice(["jsonl", "jsonl", "jsonl", "json", "parquet", "folder"])
    tiny.write_rows(path, found)
    other = place / f"rows.{way}"
    if way == "json":
        other.write_text(json.dumps(found))
    elif way != "jsonl":
        try:
            made = datasets.Dataset.from_list(found)
            made.to_parquet(other) if way == "parquet" else made.save_to_disk(str(other))
        except Exception:  # no table can be made of these rows
            return path
    return other


@kind
def files(rng: random.Random, bench: Bench, place: Path) -> Case:
    """A file or a folder of rows that cannot be read, or not all of it."""
    import datasets

    method = rng.choice(METHODS)
    given, path = good_flags(method, bench, place), place / "rows.jsonl"
    way = rng.choice(["line", "line", "line", "bytes", "bytes", "parquet", "folder", "folder", "suffix", "json"])
    if way == "line":
        lines, line = path.read_bytes().splitlines(), rng.choice(broken.LINES)
        lines.insert(at := rng.randint(0, len(lines)), line)
        path.write_bytes(b"\n".join(lines) + rng.choice([b"\n", b"", b"\r\n"]))
        what = f"line {at} is {line[:40]!r}"
    elif way == "bytes":
        what, data = mutations.some_bytes(rng, path.read_bytes())
        path.write_bytes(data)
    elif way == "json":
        path = place / "rows.json"
        what, data = mutations.some_bytes(rng, json.dumps(good_rows(method)).encode())
        path.write_bytes(data)
    elif way == "suffix":
        path = path.rename(place / f"rows{rng.choice(broken.SUFFIXES)}")
        what = f"called {path.name}"
    else:
        made, path = datasets.Dataset.from_list(good_rows(method)), place / f"rows.{way}"
        if way == "parquet":
            made.to_parquet(path)
            what = some_file(rng, path)
        else:
            (datasets.DatasetDict({"train": made}) if rng.random() < 0.3 else made).save_to_disk(str(path))
            inner = rng.choice(sorted(one for one in path.rglob("*") if one.is_file()))
            what = mutations.any_file(rng, inner)
    return Case(f"{method} {way}: {what}", command(method, given | {"dataset_name": path}))


@kind
def models(rng: random.Random, bench: Bench, place: Path) -> Case:
    """A folder of a model, an adapter or a reward model with a broken file."""
    role = rng.choice(["policy", "policy", "policy", "talking policy", "adapter", "reference", "scorer", "critic"])
    methods = {"reference": ["dpo", "kto", "grpo"], "scorer": ["grpo", "rloo", "iterate"], "critic": ["ppo"]}
    method, folder = rng.choice(methods.get(role, METHODS)), place / "model"
    given = good_flags(method, bench, place)
    linked({"adapter": bench.adapter, "scorer": bench.scorer, "critic": bench.scorer}.get(role, bench.model), folder)
    field = {"reference": "ref_model_name_or_path", "scorer": "reward_funcs", "critic": "value_model_name_or_path"}
    given[field.get(role, "model_name_or_path")] = folder
    if role == "talking policy":
        found = good_rows(method)
        for row in found:
            talking(row, [name for name in row if name not in ("label", "wanted")])
        tiny.write_rows(place / "rows.jsonl", found)
    given |= {"use_peft": True} if role == "adapter" and rng.random() < 0.8 else {}
    given |= {"beta": 0.1} if role == "reference" else {}
    names = sorted(one.name for one in folder.iterdir() if one.name != "README.md")
    name = "chat_template.jinja" if role == "talking policy" and rng.random() < 0.5 else rng.choice(names)
    path, known = folder / name, broken.IN_JSON.get(name)
    if rng.random() < 0.06:
        shutil.rmtree(folder)
        what = rng.choice(["an empty folder", "fewer tokens", "fewer tokens"])
        folder.mkdir() if what == "an empty folder" else linked(bench.small, folder)
    elif name == "chat_template.jinja" and rng.random() < 0.8:
        replace(path, text := rng.choice(broken.TEMPLATES))
        what = f"template {text[:40]!r}"
    elif known and rng.random() < 0.5:
        key = rng.choice(list(known))
        replace(path, json.dumps(json.loads(path.read_text()) | {key: (value := rng.choice(known[key]))}))
        what = f"{name}: {key} = {value!r:.60}"
    elif path.suffix == ".json" and rng.random() < 0.6:
        what = mutations.some_json(rng, path, mutations.SMALL)
    else:
        what = mutations.some_tensors(rng, path) if path.suffix == ".safetensors" else some_file(rng, path)
    return Case(f"{method}, {role}: {what}", command(method, given))


@kind
def code(rng: random.Random, bench: Bench, place: Path) -> Case:
    """Reward functions and callbacks that do not load, raise, leave, or give something else."""
    way = rng.choice(["body", "body", "body", "body", "file", "file", "callback", "spec", "bytes"])
    method, path = rng.choice(["sft", "dpo"] if way == "callback" else ONLINE), place / "scorers.py"
    given = good_flags(method, bench, place)
    if way == "body":
        what = rng.choice(broken.SCORER_BODIES)
        how = "async " if rng.random() < 0.3 and "yield" not in what else ""
        replace(path, f"{how}def score(prompts, completions, completion_ids, **columns):\n    {what}\n")
        what = how + what
    elif way == "file":
        what = rng.choice(broken.SCORER_FILES)
        replace(path, what)
    elif way == "bytes":
        what = some_file(rng, path)
    elif way == "spec":
        what = rng.choice(broken.SPECS).format(file=path, folder=place)
        given["reward_funcs"] = rng.choice([[what], [f"{path}:score", what]])
    else:
        given["callbacks"] = [f"{place / 'callbacks.py'}:Quiet"]
        what = rng.choice([CALLBACKS, *broken.CALLBACK_FILES])
        replace(place / "callbacks.py", what)
    return Case(f"{method} {way}: {what!r}", command(method, given))


@kind
def runs(rng: random.Random, bench: Bench, place: Path) -> Case:
    """The folder of a stopped run with a broken file, gone on with, overwritten, or taken for another run."""
    method = rng.choice(["sft", "dpo", "dpo", "grpo", "iterate"])
    held, out = bench.run(method), place / "out"
    shutil.copytree(held / "out", out)
    for name in MINE:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("the user's")
    own = sorted(one for one in out.rglob("*") if one.is_file() and str(one.relative_to(out)) not in MINE)
    records, states = [one for one in own if one.name == "run.json"], [one for one in own if "checkpoint-" in str(one)]
    path = rng.choice(rng.choice([records, states, states, own]))
    if path.name == "metrics.jsonl" and rng.random() < 0.5:
        line = rng.choice(broken.LINES)
        path.write_bytes(path.read_bytes() + line + b"\n")
        what = f"a line {line[:40]!r}"
    else:
        what = mutations.any_file(rng, path)
    more = rng.choice(["", "", "", "--overwrite", "--seed 1", "--max_steps 5", "--lr_scheduler_type constant"])
    arguments = [method, "--recipe", str(held / "recipe.yaml"), *more.split()]
    return Case(f"{method} {more} {path.relative_to(out)}: {what}", arguments)


@kind
def paths(rng: random.Random, bench: Bench, place: Path) -> Case:
    """A path that leads nowhere, to something else, or has an odd name."""
    field = rng.choice(["model_name_or_path", "dataset_name", "output_dir", "output_dir", "eval_dataset_name",
                        "ref_model_name_or_path", "reward_funcs", "callbacks", "recipe", "scorer"])  # fmt: skip
    methods = {"reward_funcs": ONLINE, "scorer": ["grpo"], "ref_model_name_or_path": ["dpo"]}
    method = rng.choice(methods.get(field, METHODS))
    given = good_flags(method, bench, place)
    replace(place / "scorers.py", SCORERS)
    replace(place / "callbacks.py", CALLBACKS)
    replace(place / "recipe.yaml", "seed: 1\n")
    replace(place / "full" / "thesis.txt", "the user's")
    whole = {"dataset_name": "rows.jsonl", "eval_dataset_name": "rows.jsonl", "output_dir": "full",
             "reward_funcs": "scorers.py", "callbacks": "callbacks.py", "recipe": "recipe.yaml"}.get(field)  # fmt: skip
    whole = place / whole if whole else {"scorer": bench.scorer}.get(field, bench.model)
    taken = {"the rows": place / "rows.jsonl", "the model": bench.model, "above the rows": place}
    name = rng.choice([*broken.NAMES, *broken.STRANGE_PATHS, *(taken if field == "output_dir" else ())])
    value = str(taken.get(name) or strange_path(name, place, whole))
    if field == "recipe":
        return Case(f"{method}: recipe is {name!r:.40}", [*command(method, given), "--recipe", value])
    if field in ("reward_funcs", "callbacks", "scorer"):
        value = [value + {"reward_funcs": ":score", "callbacks": ":Quiet"}.get(field, "")]
    given["reward_funcs" if field == "scorer" else field] = value
    given |= {"overwrite": True} if field == "output_dir" and rng.random() < 0.3 else {}
    return Case(f"{method}: {field} is {name!r:.40}", command(method, given))


def strange_path(name: str, place: Path, whole: Path) -> Any:
    """What is called so in `broken`, in a folder: a path that is no good, or an odd name of what `whole` holds."""
    target = place / f"{name}{whole.suffix}"
    if name in broken.STRANGE_PATHS:
        given = broken.STRANGE_PATHS[name].format(place=place, whole=whole, end=whole.suffix)
    if name == "a loop" or name == "a link to nowhere":
        target.symlink_to(target if name == "a loop" else "nowhere")
    elif name == "a pipe":
        os.mkfifo(target)
    elif name == "the other kind":
        target.write_text("w1") if whole.is_dir() else target.mkdir()
    elif name in broken.STRANGE_PATHS:
        return given
    else:
        linked(whole, target) if whole.is_dir() else os.link(whole, target)
        if name == "closed" and target.is_dir():
            target.chmod(0o500)
    return target
