"""README and docs: files, tests, targets, commands, settings and figures that they name are there."""

import functools
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from documents import COMMAND, CURRENT, FENCE, PAGES, ROOT, blocks, commands, lines, name_of, write_files
from markdown.extensions.toc import slugify

from align_engine import cli
from align_engine.recipe.foreign import FOREIGN

README = (ROOT / "README.md").read_text()
LONGEST_CELL = 300  # characters of a README's cell
MADE = ("architectures.md", "gpu_registers.md", "gpu_plans.md")
FIGURED = [page for page in CURRENT if page.name not in MADE]
UNITS = r"%|times|seconds|s\b|min\b|minutes|hours|ms\b|MB|MiB|GB\b|GiB|GFLOP/s|points|prompts a second"
FIGURE = re.compile(rf"(\d[\d,.]*\d|\d)(?: to \d[\d.]*)?\s?(?:{UNITS})")
RUN_BY = r"(?m)(?:`|^ {4})(?:\w+=\S+ )*(?:nice -n \d+ )?(?:python|pytest|make|align|tests/\w+\.sh)\b"
OTHERS = {  # lines of blocks of bash that are no command of `align`: what tries them
    r"pip install \.|python3 -m venv \.venv && .*": "tests/release_check.py",
    r"make (demo|test|test-quick|docs|bench)": "test_targets_that_documents_name_are_in_the_makefile",
    r"cd examples/own_data/dpo|python (prepare|compare)\.py.*": "tests/integrations/test_examples.py",
    r"python examples/story/(run|table)\.py.*": "tests/preparation/test_story.py, tests/assessment/test_story_table.py",
    r"python benches/compare\.py .*": "tests/kernels/test_benches.py",
    r"(head|tail) -n .*|python -c \".*make_demo.*": "test_the_first_page_from_its_first_line_to_its_last",
    r"cp -r runs/sft/final serving|transformers serve --port 8000": "tests/engine/test_transformers_serve.py",
    r"(VLLM_\w+=\w+ )?vllm serve .*": "nothing: vLLM was not run, as the page says",
}
NOT_MEASURED = {  # sizes of cards and examples, limits, arithmetic that stands beside it
    *("24GB", "80GiB", "40GB", "5 GB", "2 GiB", "1 MiB", "40 s", "120 seconds", "10 seconds", "95 %", "100 %", "2 %"),
}


@pytest.mark.parametrize("path", CURRENT, ids=name_of)
def test_files_and_links_are_there(path):
    text = path.read_text()
    folders = "align_engine|kernels|csrc|tests|benches|recipes|examples|docs"
    named = set(re.findall(rf"`(?:python )?((?:{folders})/[\w./-]*)`", text))
    linked = {link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link}
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert {link for link in linked if not (path.parent / link).exists()} == set()


def test_links_elsewhere_are_papers():
    """Nothing else is linked: whether it is still there could not be tested."""
    for path in PAGES:
        for link in re.findall(r"https?://[^\s)\"'`,}]+", path.read_text()):
            local = re.match(r"https?://(\.\.\.|127\.0\.0\.1|localhost|[\w.]*example\.(com|org)|HOST)", link)
            assert local or re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link), f"{name_of(path)}: {link}"


def test_tests_that_documents_name_are_there():
    there = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    files = {file.stem for file in (ROOT / "tests").rglob("*.py")}
    for path in CURRENT:
        text = path.read_text()
        for name in set(re.findall(r"\b(test_\w+)", text)) - {"test_rdpo"} - FOREIGN.keys():  # the reader's own
            assert name in files or f"def {name}(" in there + text, f"{path.name}: {name}"


def test_targets_that_documents_name_are_in_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in CURRENT:
        text = path.read_text()
        assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= targets, path
        assert set(re.findall(r"`make ([\w-]+)`", text)) <= targets, path


def test_commands_are_taken(monkeypatch, tmp_path, capsys):
    """Every `align ...` of a block goes through the command line itself, up to where work begins."""
    from align_engine import assessment, iterate, preparation, recipe
    from align_engine.planning import show

    check, parsed = recipe.check, []
    monkeypatch.setattr(recipe, "check", lambda given: parsed.append(given) or check(given, required=()))
    monkeypatch.setattr(iterate, "runner", lambda name: lambda given: None)
    monkeypatch.setattr(iterate, "planned", lambda name, given, *more: {"checked": bool(recipe.check(given))})
    monkeypatch.setattr(show, "show", lambda said: None)
    for room in (preparation, assessment):
        monkeypatch.setattr(room, "run", lambda name, given: parsed.append(given))
    for name, command in cli.COMMANDS.maps[0].items():
        if name != "plan":
            stub = functools.wraps(command)(lambda *_, name=name, **__: parsed.append(name))
            monkeypatch.setitem(cli.COMMANDS.maps[0], name, stub)
    for folder in ("recipes", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    for page in CURRENT:
        write_files(page, tmp_path)
        for folder, command in commands(page):
            if "--plugin" in command or command[:1] == ["--help"]:  # tests/cli/test_extending.py runs such files
                continue
            before = len(parsed)
            monkeypatch.chdir(tmp_path / folder)
            code = cli.main(command)
            said = capsys.readouterr()
            assert code == 0, f"{name_of(page)}: align {' '.join(command)}\n{said.err}"
            assert len(parsed) > before or "usage:" in said.out or "--help" in command, command
    assert len(parsed) > 50


def test_every_block_is_of_a_kind_that_is_tried():
    """Python and whole pages run in test_pages.py, test_extending.py and test_examples.py; rows, JSON and YAML are read
    there; commands go through test_commands_are_taken, and what a shell is given besides is named above. A console is
    what a bench wrote (benches/bench_fit.py)."""
    used = set()
    for page in CURRENT:
        for block in blocks(page):
            where = f"{name_of(page)}:{block.line}"
            assert block.language in {"bash", "python", "jsonl", "json", "yaml", "math", "text", "console"}, where
            for line in lines(block.code) if block.language == "bash" else ():
                other = {kind for kind in OTHERS if re.fullmatch(kind, line)}
                assert other or COMMAND.match(line), f"{where}: {line}"
                used |= other
        plain = re.sub(r"(?m)^::: .*(\n +.*)*", "", FENCE.sub("", page.read_text()))
        assert re.findall(r"(?m)^ {4}\S.*", plain) == [], f"{name_of(page)}: a block without a fence"
    assert used == OTHERS.keys()


@pytest.mark.parametrize("page", [page for page in CURRENT if "```text" in page.read_text()], ids=name_of)
def test_a_command_prints_what_the_page_shows(page, capsys):
    for block in blocks(page):
        if block.language == "text":
            command, *printed = block.code.splitlines()
            assert command.startswith("$ align ") and cli.main(command.split()[2:]) == 2
            assert capsys.readouterr().err.splitlines() == printed


def test_every_page_is_in_the_nav():
    text = re.sub(r"!!python/name:\S+", "", (ROOT / "mkdocs.yml").read_text())

    def pages(node):
        if isinstance(node, str):
            return {node}
        return set().union(*map(pages, node.values() if isinstance(node, dict) else node))

    assert {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]} <= pages(yaml.safe_load(text)["nav"])


def test_tables_of_settings_say_what_the_code_says():
    done = subprocess.run([sys.executable, ROOT / "docs/tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site_builds_without_a_warning(tmp_path):
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    start = (tmp_path / "site" / "methods" / "dpo.html").read_text()
    assert "<math" in start and "linear_logprobs" in (tmp_path / "site" / "reference" / "kernels.html").read_text()
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r'(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert {link for link in fetched if "arxiv.org" not in link and "squidfunk" not in link} == set(), page


def test_pictures_are_drawn_by_the_script():
    drawn = set(re.findall(r'^    "(\w+)": \w+,|"(\w+)": (?:\w+)[,}]', (ROOT / "docs/pictures.py").read_text(), re.M))
    names = {name for pair in drawn for name in pair if name}
    shown = {name for page in CURRENT for name in re.findall(r"pictures/([\w-]+)\.svg", page.read_text())}
    assert shown <= names and shown == {path.stem for path in (ROOT / "docs/pictures").glob("*.svg")}


def test_cells_of_the_readme_are_short():
    for line in README.splitlines():
        if line.startswith("|"):
            assert max(map(len, line.split("|"))) <= LONGEST_CELL, line


@functools.cache
def measured() -> str:
    """The log, and what benches have written."""
    results = "".join(json.dumps(json.loads(path.read_text())) for path in (ROOT / "benches/results").glob("*.json"))
    return (ROOT / "docs/LOG.md").read_text() + results


@functools.cache
def sections() -> dict[str, str]:
    """Those of the log, by the anchors that pages link."""
    parts = re.split(r"^## ", (ROOT / "docs/LOG.md").read_text(), flags=re.MULTILINE)[1:]
    return {slugify(part.partition("\n")[0], "-"): part for part in parts}


def paragraphs(page) -> list[str]:
    """Without blocks, and without tables that docs/tables.py writes and holds to what was measured; another belongs
    to what stands above it."""
    written = re.sub(r"<!-- table bench .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
    return re.split(r"\n\s*\n(?!\|)", FENCE.sub("", written))


@pytest.mark.parametrize("page", FIGURED, ids=name_of)
def test_a_measured_figure_stands_in_the_log_beside_its_command(page):
    """Numbers with a unit of time, speed or memory, in paragraphs that give a date or link the log: they stand in the
    sections that are linked, where a command stands too; or anywhere in the log and in benches/results, and the
    paragraph has the command. All others are none that were measured."""
    for paragraph in paragraphs(page):
        found = [one for one in FIGURE.finditer(paragraph) if " ".join(one[0].split()) not in NOT_MEASURED]
        if not re.search(r"LOG\.md|20\d\d-\d\d-\d\d", paragraph):
            assert not found, f"{[figure[0] for figure in found]} in: {paragraph}"
        elif found:
            linked = "".join(sections()[anchor] for anchor in re.findall(r"LOG\.md#([\w-]+)", paragraph))
            assert re.search(RUN_BY, paragraph) or re.search(RUN_BY, linked), f"no command: {paragraph}"
            for figure in found:
                stands = rf"(?<![\d.]){re.escape(figure[1])}(?![\d])"
                assert re.search(stands, linked or measured()), f"{figure[1]} in: {paragraph}"


def test_figures_bear_date_commit_and_command():
    """The README's, which docs/tables.py takes out of the JSON of the last `make bench`."""
    (figures,) = re.findall(r"## Figures\n(.*?)\n## ", README, re.DOTALL)
    before = figures.partition("<!-- table bench in short -->\n|")
    assert before[1] and re.search(r"20\d\d-\d\d-\d\d, commit [0-9a-f]{7}", before[0]) and "`make bench`" in before[0]
    assert not re.findall(r"(?m)^\|", before[2].partition("<!-- end -->")[2])
    assert "GPU: not yet measured" in README.replace("\n", " ")
