"""Benchmarks by lm-evaluation-harness as a library: its tasks, its reading of models, its metrics.

The score of a task is that of lm-eval's own command on that task alone: the same requests, the same seeds.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel

from align_engine.errors import AlignError, BadInput, RunFailed
from align_engine.rollouts.generate import prepared
from align_engine.training import statefile

if TYPE_CHECKING:
    from align_engine.recipe import EvalSection
    from align_engine.training.engine import Engine

NEEDED = "pip install 'align-engine[eval]'"
SEED, OTHER_SEED = 0, 1234  # lm_eval.defaults: of Python; of numpy, torch and the few-shot examples


class Unable(RunFailed):
    """A model does not have what a task asks for."""


class Benchmark(NamedTuple):
    """A task, group or tag."""

    asked: str  # as the user names it
    loaded: Any  # lm_eval's TaskDict


class Score(NamedTuple):
    """What a model reaches in a task or a group of tasks."""

    task: str
    metric: str  # the first that the task lists
    value: float
    stderr: float | None
    examples: int
    chance: float | None  # accuracy of guessing, of multiple choice
    metrics: dict[str, float]  # all of them, as lm-eval names them: "acc,none"

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, of the normal distribution."""
        half = None if self.stderr is None else 1.959964 * self.stderr
        return None if half is None else (self.value - half, self.value + half)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Inside the block random numbers begin where lm-eval's command has them begin; outside, nothing has happened."""
    states = statefile.random_states()
    random.seed(SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    try:
        yield
    finally:
        statefile.set_random_states(states)


def load(
    names: Sequence[str], include_path: Sequence[str] = (), num_fewshot: int | None = None, field: str = "tasks"
) -> list[Benchmark]:
    """Tasks with their data.

    Args:
        names: of lm-eval's tasks, groups and tags, or paths of YAML files.
        include_path: folders of further YAML files.
        num_fewshot: examples before each question. Default None: as the task has it.
        field: of the recipe, that names them.
    Raises:
        BadInput: lm-eval is not installed; no such task; data that are not there; a YAML file that is no task.
    """
    if not names:
        return []
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise BadInput(f"{field} needs lm-eval: {NEEDED}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if lost := [one for one in include_path if not Path(one).is_dir()]:
        raise BadInput(f"include_path = {lost[0]!r} is no folder")
    files = all(is_file(name) for name in names)
    manager = TaskManager(include_path=list(include_path) or None, include_defaults=not files)
    return [_loaded(manager, name, num_fewshot, field) for name in names]


def is_file(name: str) -> bool:
    """Whether a task is named by its YAML file."""
    return name.endswith((".yaml", ".yml"))


def _loaded(manager: Any, name: str, num_fewshot: int | None, field: str) -> Benchmark:
    if is_file(name) and not Path(name).is_file():
        raise BadInput(f"{field} = {name!r}: there is no such file")
    if not is_file(name) and name not in manager.task_index:
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        way = f"did you mean {close[0]!r}?" if close else "a task of your own is named by its YAML file"
        raise BadInput(f"{field} = {name!r} is no task, group or tag of lm-eval; {way}")
    try:
        with seeded():
            loaded = manager.load([str(Path(name)) if is_file(name) else name])
            for task in loaded["tasks"].values():
                _settle(task, num_fewshot)
    except Exception as error:  # whatever data, templates and functions of tasks raise
        raise BadInput(f"{field} = {name!r} cannot be read: {_why(error)}") from error
    if not loaded["tasks"]:
        raise BadInput(f"{field} = {name!r} holds no task")
    return Benchmark(name, loaded)


def _settle(task: Any, num_fewshot: int | None) -> None:
    """Few-shot examples, as lm_eval.simple_evaluate settles them: a task that says 0 itself keeps it."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=OTHER_SEED)


def _why(error: Exception) -> str:
    """In one sentence, with the way out where data are missing."""
    causes, cause = list[BaseException](), error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    said = " ".join(str(error).split()) or type(error).__name__
    kinds = {kind.__name__ for one in causes for kind in type(one).__mro__}
    if isinstance(error, ModuleNotFoundError):
        return f"it needs the package {error.name}"
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError"}:
        way = "fetch them once on a machine with the network into HF_HOME, and copy that folder here"
        return f"its data are not on this machine and cannot be fetched: {way} ({said:.200})"
    return f"{type(error).__name__}: {said:.300}"


def of_model(model: Any, tokenizer: Any, batch_size: int, progress: bool = True) -> Any:
    """A causal LM of transformers as lm-eval reads it.

    Args:
        model, tokenizer: loaded; the tokenizer's settings may be changed.
        batch_size: requests of one forward pass.
        progress: show lm-eval's bars. Default True.
    """
    from lm_eval.models.huggingface import HFLM

    base: Any = HFLM

    class Quiet(base):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not progress)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or not progress)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=disable_tqdm or not progress)

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return Quiet(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def in_training(section: EvalSection, tokenizer: Any) -> Callable[[Engine], dict[str, float]] | None:
    """What measures `eval_tasks` of a model that is being trained, as eval_TASK/METRIC; None where there are none.

    Every process measures all of them, and the main one's numbers count.

    Raises:
        BadInput: as `load`; a metric_for_best_model that speaks of one of the tasks and is none of its metrics.
    """
    loaded = load(section.eval_tasks, field="eval_tasks")
    if not loaded:
        return None
    _check_best(section.metric_for_best_model, loaded)

    def ask(engine: Engine) -> dict[str, float]:
        model, batch_size = extract_model_from_parallel(engine.model), section.per_device_eval_batch_size
        with prepared(model, model.generation_config):
            lm = of_model(model, copy.deepcopy(tokenizer), batch_size, progress=False)
            scores = [one for task in loaded for one in measure(lm, task, section.eval_tasks_limit)]
        found = {f"eval_{_named(one.task, name)}": value for one in scores for name, value in one.metrics.items()}
        return broadcast_object_list([found])[0]

    return ask


def _named(task: str, metric: str) -> str:
    """TASK/METRIC, with the name of lm-eval's filter where it has one."""
    name, _, filtered = metric.partition(",")
    return f"{task}/{name}" if filtered in ("", "none") else f"{task}/{name}/{filtered}"


def _check_best(wanted: str | None, loaded: list[Benchmark]) -> None:
    """Refuse a metric that a task does not have, before the first step."""
    task, slash, metric = (wanted or "").removeprefix("eval_").partition("/")
    tasks = {name: one for benchmark in loaded for name, one in benchmark.loaded["tasks"].items()}
    if slash and task in tasks and metric.partition("/")[0] not in (known := tasks[task].aggregation()):
        raise BadInput(f"metric_for_best_model = {wanted!r}: task {task!r} has {', '.join(known)}")


def measure(
    lm: Any, benchmark: Benchmark, limit: int | None = None, chat: bool = False, unsafe: bool = False
) -> list[Score]:
    """The scores of a model: one for a task or for a group that has one of its own, else one for each of its tasks.

    Args:
        lm: as lm-eval has models.
        benchmark: of `load`; may be measured again and again.
        limit: examples of each task. Default None: all.
        chat: ask through the model's chat template. Default False.
        unsafe: run tasks that execute what the model writes. Default False: refuse them.
    Raises:
        RunFailed: with what lm-eval says.
    """
    from lm_eval.evaluator import evaluate

    tasks = benchmark.loaded["tasks"]
    try:
        with seeded():
            for task in tasks.values():
                task.set_fewshot_seed(seed=OTHER_SEED)
            found: Any = evaluate(
                lm=lm, task_dict=benchmark.loaded, limit=limit, log_samples=False, apply_chat_template=chat,
                fewshot_as_multiturn=chat, confirm_run_unsafe_code=unsafe,
            )  # fmt: skip
    except AlignError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RunFailed(f"task {benchmark.asked!r}: {said:.400}") from error
    groups = [name for name in found.get("groups", {}) if name == benchmark.asked]
    return [_score(name, found["results"][name], tasks, limit) for name in groups or tasks]


def _score(name: str, result: dict[str, Any], tasks: dict[str, Any], limit: int | None) -> Score:
    metrics = {
        key: float(value) for key, value in result.items() if "," in key and "_stderr," not in key and _number(value)
    }
    if not metrics:
        raise RunFailed(f"task {name!r} has no metric that is a number")
    first = next(iter(metrics))
    metric, _, filtered = first.partition(",")
    stderr = result.get(f"{metric}_stderr,{filtered}")
    examples = result.get("sample_len") or result.get("sample_count", {}).get(first) or 0
    error = float(stderr) if _number(stderr) else None
    chance = _chance(tasks[name], limit) if name in tasks and metric.startswith("acc") else None
    return Score(name, metric, metrics[first], error, int(examples), chance, metrics)


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _chance(task: Any, limit: int | None) -> float | None:
    """The accuracy of guessing."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    sizes = [len(task.doc_to_choice(doc)) for _, doc in task.doc_iterator(limit=limit)]
    return float(np.mean([1 / size for size in sizes]))
