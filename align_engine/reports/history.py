"""What the folder of a run says of it: finished, stopped in the middle, or not yet begun to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from align_engine.data.json_text import loads
from align_engine.errors import BadInput
from align_engine.recipe import ALIASES
from align_engine.training.checkpoint import RECORD, RunFolder, read_metrics
from align_engine.training.health import MOVING, warnings
from align_engine.training.samples import FILE

Record = dict[str, Any]  # a line of metrics.jsonl


class History(NamedTuple):
    """A run."""

    name: str
    path: Path
    method: str
    identity: dict[str, Any]  # settings, and what was found while loading
    settings: dict[str, Any]  # of recipe.yaml, by their bare names
    finished: bool
    checkpoint: str | None  # the last one
    records: list[Record]
    samples: list[Record]
    rounds: list[History]  # of iterate: the training of each
    of_rounds: list[list[Record]]  # of iterate: the samples of each

    @property
    def step(self) -> int:
        """The last one that was logged; of iterate the last round."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def steps(self) -> int | None:
        """Those of the whole run, where they are known; of iterate its rounds."""
        return self.settings.get("rounds") if self.method == "iterate" else self.identity.get("steps")

    @property
    def state(self) -> str:
        """Where it stands, in words."""
        unit = "round" if self.method == "iterate" else "step"
        if self.finished:
            return f"finished after {unit} {self.step:,}"
        of = f" of {self.steps:,}" if self.steps else ""
        at = f"not finished: logged up to {unit} {self.step:,}{of}" if self.step else "not finished: nothing logged yet"
        return f"{at}, last checkpoint {self.checkpoint}" if self.checkpoint else at

    @property
    def training(self) -> list[Record]:
        """The lines of its steps, without those of evaluations; of iterate those of all rounds, one behind the
        other."""
        if self.method != "iterate":
            return [one for one in self.records if not evaluated(one)]
        found, before = list[Record](), 0
        for part in self.rounds:
            found += [one | {"step": one["step"] + before} for one in part.training]
            before += part.step
        return found

    @property
    def evaluations(self) -> list[Record]:
        """The lines of its evaluations."""
        return [one for one in self.records if evaluated(one)]

    def warned(self) -> list[tuple[int, str]]:
        """What the run has said, or would have said with what is known now, of metrics out of bounds: (step, text)."""
        found = []
        for lines, watches_moving in ((self.training, False), (self.evaluations, True)):
            watched, said = dict[str, float](), list[str]()
            for one in lines:
                known = {name.removeprefix("eval_"): value for name, value in one.items() if value is not None}
                means = {name: value for name, value in known.items() if (name in MOVING) == watches_moving}
                found += [(one["step"], text) for text in warnings(watched, said, means)]
        return sorted(found)


def evaluated(record: Record) -> bool:
    """Whether a line of metrics.jsonl is an evaluation's."""
    return any(name.startswith("eval_") for name in record)


def read_run(path: Path, name: str) -> History:
    """The run in a folder.

    Raises:
        BadInput: there is none; a file of it is damaged.
    """
    if not (path / RECORD).is_file():
        raise BadInput(f"{str(path)!r} holds no run: there is no {RECORD} in it")
    folder = RunFolder(path, {})
    record = folder.record()
    identity = record["identity"]
    if "algorithm" not in identity:
        what = f"the result of align {identity['command']}: give it as --with" if "command" in identity else "no run"
        raise BadInput(f"{str(path)!r} holds {what}")
    method = str(identity["algorithm"])
    method = ALIASES.get(method, method)
    inner = sorted(path.glob("round-*"), key=lambda one: int(one.name.partition("-")[2]) if _numbered(one) else 0)
    rounds = [one for one in inner if _numbered(one)] if method == "iterate" else []
    trained = [read_run(one / "train", one.name) for one in rounds if (one / "train" / RECORD).is_file()]
    checkpoints = folder.checkpoints()
    return History(
        name, path, method, identity, _settings(path / "recipe.yaml"), record["finished"],
        checkpoints[-1].name if checkpoints else None, _lines(folder.metrics), _lines(path / FILE), trained,
        [_rows(one / FILE) for one in rounds],
    )  # fmt: skip


def _numbered(path: Path) -> bool:
    return path.name.partition("-")[2].isdigit()


def _lines(path: Path) -> list[Record]:
    return read_metrics(path) if path.is_file() else []


def _rows(path: Path) -> list[Record]:
    """The lines of a file that is written whole or not at all."""
    try:
        return [loads(text) for text in path.read_bytes().splitlines()] if path.is_file() else []
    except ValueError as error:
        raise BadInput(f"{path} is damaged: {error}") from error


def _settings(path: Path) -> dict[str, Any]:
    """Every setting of a recipe by its bare name, also of a method that this installation does not know."""
    import yaml

    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {name: value for section in sections.values() for name, value in section.items()}
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        raise BadInput(f"{path} is no recipe that a run has written") from error
