"""The demo: make data, train SFT then DPO, score every stage on held-out prompts, write one page."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align_engine import recipe as recipes
from align_engine.data import load_rows
from align_engine.demo.make import make_demo
from align_engine.demo.task import check
from align_engine.evals import Score, score
from align_engine.metrics import read
from align_engine.policy import load_tokenizer
from align_engine.recipe import DpoRecipe, Recipe, SftRecipe
from align_engine.report import Table, bar_chart, page, run_figures
from align_engine.run import train

STAGES = ("baseline", "SFT", "DPO")
SHOWN = 6  # held-out prompts whose answers stand on the page


class Outcome(NamedTuple):
    """What one seed gave."""

    seed: int
    points: dict[str, float]  # stage -> 100 x the checker's mean grade
    answers: dict[str, list[str]]  # stage -> answers to the first held-out prompts
    seconds: float


def run(output_dir: Path, seeds: Sequence[int]) -> list[Outcome]:
    """Run the demo once per seed, print the table and write index.html.

    Seeds that are already there are not trained again: their runs are finished.
    """
    import torch

    # a model this small gains nothing from a second thread, and loses tenfold when another process holds that core
    torch.set_num_threads(1)
    outcomes = [run_seed(output_dir / f"seed-{seed}", seed) for seed in seeds]
    print_table(outcomes)
    write_index(output_dir, outcomes)
    print(f"page: {output_dir / 'index.html'}")
    return outcomes


def run_seed(folder: Path, seed: int) -> Outcome:
    """Data, SFT, DPO and the scores of all stages for one seed, in one folder."""
    began, data = time.perf_counter(), folder / "data"
    if not (data / "model").exists():
        make_demo(data, seed)
    models = {"baseline": data / "model"}
    for stage, kind, rows in (("SFT", SftRecipe, "sft"), ("DPO", DpoRecipe, "preference")):
        print(f"\nseed {seed}: {stage}")
        start = list(models.values())[-1]
        recipe = demo_recipe(kind, stage.lower(), start, data / f"{rows}.jsonl", folder / stage.lower(), seed)
        models[stage] = train(stage.lower(), recipe).final
    heldout = load_rows(data / "heldout.jsonl")
    scores = {stage: score_model(path, heldout) for stage, path in models.items()}
    outcome = Outcome(
        seed,
        {stage: 100 * found.mean for stage, found in scores.items()},
        {stage: found.answers[:SHOWN] for stage, found in scores.items()},
        time.perf_counter() - began,
    )
    (folder / "scores.json").write_text(json.dumps(outcome._asdict(), indent=2))
    return outcome


def demo_recipe(kind: type[Recipe], name: str, model: Path, rows: Path, out: Path, seed: int) -> Recipe:
    """The recipe file of a stage with the paths of one seed."""
    recipe = recipes.load(kind, Path(__file__).with_name(f"{name}.yaml"))
    recipe.model.model_name_or_path = str(model)
    recipe.data.dataset_name = str(rows)
    recipe.data.eval_dataset_name = str(rows.with_name("heldout.jsonl"))
    recipe.output.output_dir = str(out)
    recipe.train.seed = seed
    return recipe


def score_model(path: Path, heldout: Any) -> Score:
    """The checker's grades of a model folder on the held-out prompts, by greedy decoding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    return score(model, load_tokenizer(str(path)), heldout, check, max_new_tokens=40, batch_size=100)


def score_rows(outcomes: Sequence[Outcome]) -> list[list[Any]]:
    """One row per seed, and the mean with the standard deviation where there are several."""
    rows: list[list[Any]] = [
        [f"seed {one.seed}", *(f"{one.points[stage]:.1f}" for stage in STAGES),
         f"{one.points['DPO'] - one.points['SFT']:+.1f}", f"{one.seconds:.0f} s"]
        for one in outcomes
    ]  # fmt: skip
    if len(outcomes) > 1:
        cells = [f"{mean:.1f} ± {spread:.1f}" for mean, spread in summary(outcomes).values()]
        gain = statistics.mean(one.points["DPO"] - one.points["SFT"] for one in outcomes)
        rows.append(["mean", *cells, f"{gain:+.1f}", f"{sum(one.seconds for one in outcomes):.0f} s"])
    return rows


def summary(outcomes: Sequence[Outcome]) -> dict[str, tuple[float, float]]:
    """stage -> (mean, standard deviation) over the seeds."""
    found = {stage: [one.points[stage] for one in outcomes] for stage in STAGES}
    return {stage: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for stage, v in found.items()}


HEADER = ("held-out points of 100", *STAGES, "DPO - SFT", "time")


def print_table(outcomes: Sequence[Outcome]) -> None:
    """The scores in the terminal."""
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(title="Checker's points on held-out prompts (greedy decoding)", title_justify="left")
    for i, name in enumerate(HEADER):
        grid.add_column(name, justify="right" if i else "left")
    for row in score_rows(outcomes):
        grid.add_row(*row)
    Console().print(grid)


def write_index(output_dir: Path, outcomes: Sequence[Outcome]) -> None:
    """One page: scores, answers, and the curves of the first seed's runs."""
    first = output_dir / f"seed-{outcomes[0].seed}"
    figures = [bar_chart("Held-out points by stage", summary(outcomes), "points of 100")]
    for name, wanted in (("sft", ("loss", "token-accuracy")), ("dpo", ("loss", "accuracies", "margins", "logps"))):
        drawn = run_figures(read(first / name / "metrics.jsonl"), f"{name.upper()}: ")
        figures += [drawn[panel] for panel in wanted]
    heldout = load_rows(first / "data" / "heldout.jsonl")
    asked = [heldout[i] for i in range(SHOWN)]
    answers = [
        [row["prompt"][-1]["content"], *(outcomes[0].answers[stage][i] for stage in STAGES)]
        for i, row in enumerate(asked)
    ]
    html = page(
        "align demo",
        "A small model from scratch, SFT on a team's mixed answers, then DPO on pairs ordered by a checker.",
        [Table("Scores", HEADER, score_rows(outcomes)), Table("Answers", ("prompt", *STAGES), answers)],
        figures,
    )
    (output_dir / "index.html").write_text(html, encoding="utf-8")
    for figure in figures[:1]:
        (output_dir / "scores.png").write_bytes(figure.png)
