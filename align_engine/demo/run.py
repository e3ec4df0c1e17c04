"""The demo: make data, walk the ladder of methods, score every stage on held-out prompts, write one page."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

from align_engine import recipe as recipes
from align_engine.data.sources import load_rows
from align_engine.demo.make import make_demo
from align_engine.demo.task import check
from align_engine.errors import BadInput
from align_engine.iterate import runner
from align_engine.models.load import load_tokenizer
from align_engine.recipe import RECIPES, Recipe
from align_engine.reports.evals import Score, score
from align_engine.reports.report import Table, bar_chart, page, run_figures
from align_engine.training.checkpoint import SIDE, remove, settle
from align_engine.training.metrics import read


class Stage(NamedTuple):
    """One run of the ladder."""

    name: str
    command: str  # of align, and the name of its recipe and folder
    rows: str  # what it learns from
    panels: tuple[str, ...]  # its curves on the page
    reward_model: bool = False  # whether that scores its samples
    threads: int = 1


SFT = Stage("SFT", "sft", "sft", ("loss", "token-accuracy"), threads=2)  # nothing is trained beside it
REWARD_MODEL = Stage("reward model", "rm", "ranked", ("loss",))
METHODS = (  # all from the SFT model
    Stage("DPO", "dpo", "preference", ("loss", "accuracies", "margins", "logps")),
    Stage("KTO", "kto", "preference", ("loss", "rewards")),
    Stage("RLOO", "rloo", "prompts", ("reward", "kl")),
    Stage("PPO", "ppo", "prompts", ("reward", "kl"), reward_model=True),
    Stage("GRPO", "grpo", "prompts", ("reward", "entropy")),
    Stage("iterative DPO", "iterate", "prompts", ("reward",), reward_model=True),
)
BASELINE = "baseline"
SHOWN = 6  # held-out prompts whose answers stand on the page


class Result(NamedTuple):
    """What a stage gave."""

    points: float  # 100 x the checker's mean grade; of the reward model, the per cent of held-out pairs it orders right
    answers: list[str]  # to the first held-out prompts
    rounds: list[float]  # points after each round of iterative DPO
    seconds: float


Outcome = dict[str, Result]  # of one seed, by the stage's name


def run(output_dir: Path, seeds: Sequence[int], workers: int = 2) -> dict[int, Outcome]:
    """Walk the ladder once per seed, print the table and write index.html.

    Stages that are already there are not trained again: their runs are finished.

    Args:
        workers: stages that are trained at a time, each in a process of its own. With 1 everything runs in this one.
    Raises:
        BadInput: output_dir holds something, and no demo among it.
    """
    if output_dir.exists() and (
        not output_dir.is_dir() or (any(output_dir.iterdir()) and not any(output_dir.glob("seed-*")))
    ):
        raise BadInput(f"output_dir = {str(output_dir)!r} holds files that are no demo of ours; give a new folder")
    outcomes = {}
    with executor(workers) as pool:
        for seed in seeds:
            outcomes[seed] = run_seed(output_dir / f"seed-{seed}", seed, pool, quiet=workers > 1)
    print_table(outcomes)
    write_index(output_dir, outcomes)
    print(f"page: {output_dir / 'index.html'}")
    return outcomes


@contextlib.contextmanager
def executor(workers: int) -> Iterator[Executor]:
    if workers > 1:
        made = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=start_worker)
    else:
        made = ThreadPoolExecutor(1)
    with made:
        yield made


def start_worker() -> None:
    """What several processes print at a time nobody can read: stages write logs, errors travel with their results. And
    a worker ends with its parent, or it would go on training beside the run that resumes a killed one."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    sys.stdout = sys.stderr = open(os.devnull, "w")
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_seed(folder: Path, seed: int, pool: Executor, quiet: bool) -> Outcome:
    """Data, all stages and their scores for one seed, in one folder."""
    data = folder / "data"
    if not data.exists():
        side = folder / f"data{SIDE}"
        remove(side)
        make_demo(side, seed)
        settle(side, data)
    futures: dict[str, Future[Result]] = {}

    def start(*stages: Stage) -> None:
        for stage in stages:
            futures[stage.name] = pool.submit(run_stage, stage, folder, seed, quiet)

    def wait(name: str) -> Result:
        result = futures[name].result()
        rounds = f" (rounds {', '.join(f'{points:.1f}' for points in result.rounds)})" if result.rounds else ""
        print(f"seed {seed}  {name:13s} {result.points:5.1f}{rounds}  {result.seconds:.0f} s", flush=True)
        return result

    start(SFT)
    outcome = {SFT.name: wait(SFT.name)}
    start(REWARD_MODEL)
    futures[BASELINE] = pool.submit(score_stage, data / "model", data)
    start(*(stage for stage in METHODS if not stage.reward_model))
    outcome |= {name: wait(name) for name in (BASELINE, REWARD_MODEL.name)}
    start(*(stage for stage in METHODS if stage.reward_model))
    outcome |= {stage.name: wait(stage.name) for stage in METHODS}
    scores = {name: result._asdict() for name, result in outcome.items()}
    (folder / "scores.json").write_text(json.dumps(scores, indent=2))
    return outcome


def run_stage(stage: Stage, folder: Path, seed: int, quiet: bool) -> Result:
    """Train one stage and score what it made; with `quiet` what it prints goes to a log beside its folder."""
    import torch

    torch.set_num_threads(stage.threads)
    began, out, data = time.perf_counter(), folder / stage.command, folder / "data"
    with contextlib.ExitStack() as stack:
        if quiet:
            log = stack.enter_context(out.with_suffix(".log").open("w"))
            stack.enter_context(contextlib.redirect_stdout(log))
            stack.enter_context(contextlib.redirect_stderr(log))
        else:
            print(f"\nseed {seed}: {stage.name}")
        recipe = demo_recipe(stage, folder, seed)
        runner(stage.command)(recipe)
        if stage == REWARD_MODEL:
            accuracy = [line["eval_accuracy"] for line in read(out / "metrics.jsonl") if "eval_accuracy" in line][-1]
            return Result(100 * accuracy, [], [], time.perf_counter() - began)
        made = score_stage(out / "final", data)
        rounds = [score_stage(path, data).points for path in sorted(out.glob("round-*/train/final"))[:-1]]
        if rounds:  # what it made is its last round's model
            rounds.append(made.points)
    return made._replace(rounds=rounds, seconds=time.perf_counter() - began)


def demo_recipe(stage: Stage, folder: Path, seed: int) -> Recipe:
    """The recipe file of a stage with the paths of one seed."""
    data = folder / "data"
    recipe: Any = recipes.load(RECIPES[stage.command], Path(__file__).with_name(f"{stage.command}.yaml"))
    recipe.model.model_name_or_path = str(data / "model" if stage == SFT else folder / SFT.command / "final")
    recipe.data.dataset_name = str(data / f"{stage.rows}.jsonl")
    if recipe.data.eval_dataset_name:
        recipe.data.eval_dataset_name = str(data / "heldout.jsonl")
    if stage.reward_model:
        recipe.rollout.reward_funcs = [str(folder / REWARD_MODEL.command / "final")]
    recipe.output.output_dir = str(folder / stage.command)
    recipe.train.seed = seed
    return recipe


def score_stage(model: Path, data: Path) -> Result:
    """The points of a model folder on the held-out prompts."""
    began = time.perf_counter()
    found = score_model(model, load_rows(data / "heldout.jsonl"))
    return Result(100 * found.mean, found.answers[:SHOWN], [], time.perf_counter() - began)


def score_model(path: Path, heldout: Any) -> Score:
    """The checker's grades of a model folder on the held-out prompts, by greedy decoding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    return score(model, load_tokenizer(str(path)), heldout, check, max_new_tokens=40, batch_size=100)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def gains(outcomes: Mapping[int, Outcome], name: str) -> tuple[float, float]:
    """Mean and spread of what a stage gives over SFT, seed by seed."""
    return spread([one[name].points - one[SFT.name].points for one in outcomes.values()])


def score_rows(outcomes: Mapping[int, Outcome]) -> list[list[str]]:
    """One row per stage and per round of iterative DPO: its points by seed, their mean and spread, gain over SFT."""
    stages = [BASELINE, SFT.name, *(stage.name for stage in METHODS)]
    many = len(outcomes) > 1

    def row(label: str, values: Sequence[float], gain: tuple[float, float] | None = None) -> list[str]:
        cells = [label, *(f"{value:.1f}" for value in values)]
        if many:
            cells.append("{:.1f} ± {:.1f}".format(*spread(values)))
        shown = "" if gain is None else f"{gain[0]:+.1f}" + (f" ± {gain[1]:.1f}" if many else "")
        return [*cells, shown]

    rows = []
    for name in stages:
        found = [one[name] for one in outcomes.values()]
        for i in range(min(len(result.rounds) for result in found)):
            rows.append(row(f"  after round {i + 1}", [result.rounds[i] for result in found]))
        gain = None if name in (BASELINE, SFT.name) else gains(outcomes, name)
        rows.append(row(name, [result.points for result in found], gain))
    accuracies = [one[REWARD_MODEL.name].points for one in outcomes.values()]
    return [*rows, row("reward model: pairs, %", accuracies)]


def header(outcomes: Mapping[int, Outcome]) -> list[str]:
    mean = ["mean ± spread"] if len(outcomes) > 1 else []
    return ["points of 100", *(f"seed {seed}" for seed in outcomes), *mean, "over SFT"]


def print_table(outcomes: Mapping[int, Outcome]) -> None:
    """The scores in the terminal."""
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(title="Checker's points on held-out prompts (greedy decoding)", title_justify="left")
    for i, name in enumerate(header(outcomes)):
        grid.add_column(name, justify="right" if i else "left")
    for row in score_rows(outcomes):
        grid.add_row(*row)
    Console().print(grid)


def write_index(output_dir: Path, outcomes: Mapping[int, Outcome]) -> None:
    """One page: scores, answers, and the curves of the first seed's runs."""
    seed, first = next(iter(outcomes.items()))
    folder = output_dir / f"seed-{seed}"
    stages = [BASELINE, SFT.name, *(stage.name for stage in METHODS)]
    bars = {name: spread([one[name].points for one in outcomes.values()]) for name in stages}
    figures = [bar_chart("Held-out points by stage", bars, "points of 100")]
    for stage in (SFT, REWARD_MODEL, *METHODS):
        records = read(folder / stage.command / "metrics.jsonl")
        figures += run_figures(records, f"{stage.name}: ", stage.panels).values()
    heldout = load_rows(folder / "data" / "heldout.jsonl")
    answers = [
        [heldout[i]["prompt"][-1]["content"], *(first[name].answers[i] for name in stages[1:])]
        for i in range(len(first[SFT.name].answers))
    ]
    html = page(
        "align demo",
        "A small model from scratch: SFT on a team's mixed answers, then every method from the SFT model. The checker "
        "rewards RLOO and GRPO; a reward model trained on ranked answers rewards PPO and iterative DPO.",
        [
            Table("Scores", header(outcomes), score_rows(outcomes)),
            Table(f"Answers, seed {seed}", ("prompt", *stages[1:]), answers),
        ],
        figures,
    )
    side = output_dir / "index.html.tmp"
    side.write_text(html, encoding="utf-8")
    os.replace(side, output_dir / "index.html")
    (output_dir / "scores.png").write_bytes(figures[0].png)
