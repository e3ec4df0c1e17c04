"""What imports what in the engine: rooms in one order, no circles, and a command line that is quick to start."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from imports import arrows, circles, rooms

import align_engine

PACKAGE = Path(__file__).parents[2] / "align_engine"
ORDER = (  # each imports from those to its right alone; of rooms in one line none imports the other
    ("",),  # the package's own __init__
    ("__main__",),
    ("cli",),
    ("demo",),
    ("assessment",),
    ("iterate",),
    ("run", "preparation"),
    ("planning",),
    ("inputs", "reports", "algorithms"),
    ("rollouts",),
    ("training",),
    ("models",),
    ("data", "recipe", "integrations"),
    ("errors", "version"),
)


@pytest.fixture(scope="module")
def found() -> dict[str, set[str]]:
    return arrows(PACKAGE)


def test_rooms_import_in_one_order(found):
    floor = {room: i for i, line in enumerate(ORDER) for room in line}
    levels = rooms(found)
    assert levels.keys() == floor.keys(), "a new room has its place in ORDER"
    against = [
        f"{here} -> {there}" for here, targets in levels.items() for there in targets if floor[here] >= floor[there]
    ]
    assert not against


def test_no_modules_import_each_other_in_a_circle(found):
    assert circles(found) == []


def test_a_circle_is_found():
    chain = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set[str]()}
    assert circles(chain) == [["a", "b", "c"]]
    assert circles(chain | {"e": {"d"}}) == [["d", "e"], ["a", "b", "c"]]


def test_the_type_of_an_algorithm_lies_below_the_engine(found):
    below = found["align_engine.training.algorithm"]
    assert below <= {"align_engine.data.batches"}
    assert "align_engine.training.algorithm" in found["align_engine.training.engine"]


def test_the_command_line_and_recipes_need_no_torch():
    code = "import sys, align_engine.cli; print(sorted({'torch', 'transformers', 'yaml', 'tyro'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", align_engine.MOVED)
def test_what_has_moved_is_found_where_it_was(name):
    old = importlib.import_module(f"align_engine.{name}")
    places = [importlib.import_module(f"align_engine.{place}") for place in align_engine.MOVED[name]]
    for place in places:
        own = [one for one, value in vars(place).items() if getattr(value, "__module__", None) == place.__name__]
        assert own and all(getattr(old, one) is getattr(place, one) for one in own)
    with pytest.raises(AttributeError, match=rf"align_engine\.{name} has become align_engine\."):
        assert old.nonsense
