"""README and docs: the files, tests, targets, commands and settings that they name are there."""

import re
import shlex
from pathlib import Path

import pytest

from align_engine.cli import COMMANDS, SYNONYMS, TOOLS
from align_engine.recipe import RECIPES, flat

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = DOCUMENTS[0].read_text()
CURRENT = [path for path in DOCUMENTS if path.name != "LOG.md"]  # the log speaks of files as they were


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_files_and_links_are_there(path):
    text = path.read_text()
    folders = "align_engine|kernels|csrc|tests|benches|recipes|examples|docs"
    named = set(re.findall(rf"`(?:python )?((?:{folders})/[\w./-]*)`", text))
    linked = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert {link for link in linked if not (path.parent / link).exists()} == set()


def test_tests_that_documents_name_are_there():
    there = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    files = {file.stem for file in (ROOT / "tests").rglob("*.py")}
    for path in CURRENT:
        for name in set(re.findall(r"\b(test_\w+)", path.read_text())):
            assert name in files or f"def {name}(" in there, f"{path.name}: {name}"


def test_targets_that_documents_name_are_in_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in CURRENT:
        text = path.read_text()
        assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= targets, path
        assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets, path


@pytest.mark.parametrize(("path", "least"), [("README.md", 10), ("docs/data.md", 5), ("docs/report.md", 4)])
def test_commands_take_their_flags(path, least):
    text = (ROOT / path).read_text().replace("\\\n", " ")
    lines = [line.split("#")[0] for line in text.splitlines() if line.startswith("align ")]
    assert len(lines) >= least
    kinds = TOOLS | RECIPES
    for line in lines:
        _, command, *arguments = shlex.split(line)
        assert command in COMMANDS, line
        own = {"recipe", *SYNONYMS}
        if command == "plan":  # takes a method's flags besides its own
            (command, *arguments), own = arguments, own | {"memory", "prompt_length", "json"}
        known = flat(kinds[command]()).keys() | own if command in kinds else set()
        flags = {part.removeprefix("--") for part in arguments if part.startswith("--")}
        assert flags <= known, line
        for path in (part for part in arguments if part.endswith(".yaml")):
            assert (ROOT / path).is_file(), line


def test_figures_bear_date_machine_and_command():
    """Every section with a table of figures says when, on what and by which command they were measured."""
    (figures,) = re.findall(r"## Figures\n(.*?)\n## ", README, re.DOTALL)
    for table in re.split(r"\n(?:\|.*\n)+", figures)[:-1]:
        assert re.search(r"20\d\d-\d\d-\d\d", table) and re.search(r"commit [0-9a-f]{7}", table), table
        assert re.search(r"`make [\w-]+`", table), table
    assert "same machine" in figures and "AMD EPYC" in figures
