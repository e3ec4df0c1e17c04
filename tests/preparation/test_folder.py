"""The folder of a prepared data set: written whole or not at all, and never in place of something else."""

import errno
import json
import subprocess
import sys
import types
from dataclasses import field

import pytest
import tiny

from align_engine.cli import main
from align_engine.data.sources import load_rows
from align_engine.errors import BadInput, RunFailed
from align_engine.preparation import PREPARATION, folder, report
from align_engine.preparation.sections import Preparation
from align_engine.recipe.sections import Section
from align_engine.reports.report import Table


class EchoSection(Section):
    """Echo."""

    times: int = 1
    """Each row so many times."""


class Echo(Preparation):
    """Write every row again."""

    echo: EchoSection = field(default_factory=EchoSection)


def run(settings):
    rows = folder.read(settings.data)
    made = [row for row in rows for _ in range(settings.echo.times)]
    if settings.data.dry_run:
        return folder.dry(made)
    with folder.opened("echo", settings, rows) as place:
        if place is not None:
            place.write_rows(folder.ROWS, made)
            table = Table("Rows | and more", ("what", "count"), [("in http://me:pass@host/", len(rows)), ("out", 5)])
            report.write(place, "Echo", "Of http://me:pass@host/.", {"url": "http://me:pass@host/"}, [table])


@pytest.fixture(autouse=True)
def echo(monkeypatch):
    module = types.ModuleType("align_engine.preparation.echo")
    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(PREPARATION, "echo", Echo)


@pytest.fixture
def rows(tmp_path):
    return tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "é", "n": 1}, {"prompt": "w2", "n": 2}])


def test_a_result_is_written_once_and_read_as_a_data_set(rows, tmp_path, capsys):
    flags = ["echo", "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out"), "--times", "2"]
    assert main(flags) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} - {".align.lock", ".align-list.lock"} == {
        "run.json", "recipe.yaml", "rows.jsonl", *report.NAMES,
    }  # fmt: skip
    assert "é" in (tmp_path / "out" / "rows.jsonl").read_text("utf-8")
    assert load_rows(tmp_path / "out")["n"][:] == [1, 1, 2, 2], "the folder is a data set"
    for name in report.NAMES:
        text = (tmp_path / "out" / name).read_text()
        assert "pass" not in text and "***@host" in text
    assert "| out | 5 |" in (tmp_path / "out" / "report.md").read_text()
    capsys.readouterr()
    assert main(flags) == 0 and "nothing to do" in capsys.readouterr().out
    (tmp_path / "out" / "rows.jsonl").write_text("{}\n")
    assert main(flags) == 0 and len(load_rows(tmp_path / "out" / "rows.jsonl")) == 4, "a damaged result is made again"
    assert main(["echo", "--recipe", str(tmp_path / "out" / "recipe.yaml")]) == 0
    assert main([*flags[:-1], "3"]) == 2 and "times: 2 there, 3 now" in capsys.readouterr().err
    assert main([*flags[:-1], "3", "--overwrite"]) == 0
    rows.write_text(rows.read_text() + '{"prompt": "w3", "n": 3}\n')
    assert main([*flags[:-1], "3"]) == 2 and "holds another run (rows:" in capsys.readouterr().err


def test_refusals_write_nothing(rows, tmp_path, capsys):
    def said(*flags):
        assert main(["echo", *flags]) == 2
        return capsys.readouterr().err

    out = tmp_path / "out"
    assert "dataset_name = '' is required; output_dir = '' is required" in said()
    flags = ["--dataset_name", str(rows), "--output_dir", str(out)]
    assert "did you mean `--times`" in said(*flags, "--time", "2")
    assert "times = 'x' is not a whole number" in said(*flags, "--times", "x")
    assert "is or holds dataset_name" in said("--dataset_name", str(rows), "--output_dir", str(tmp_path))
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "holds files that are no run of ours (mine.txt)" in said(*flags)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert main(["echo", *flags, "--dry_run"]) == 0 and '"prompt": "é"' in capsys.readouterr().out


def test_a_journal_loses_no_line_but_one_that_was_cut(tmp_path):
    path = tmp_path / folder.JOURNAL
    place = folder.ResultFolder(tmp_path, {})
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": "\xc3')
    with folder.Journal(path, place) as journal:
        assert journal.rows == [{"a": 1}, {"a": 2}]
        journal.add([{"a": "é"}, {"a": 4}])
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"a": 1}, {"a": 2}, {"a": "é"}, {"a": 4}
    ]  # fmt: skip
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(BadInput, match="line 2 is damaged"):
        folder.Journal(path, place)
    assert path.read_bytes().count(b"\n") == 3


def test_a_full_disk_leaves_no_half_line(tmp_path):
    class Full:
        """A file that takes ten bytes of what it should."""

        def __init__(self, file):
            self.file, self.left = file, 10

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left = 0
            return self.file.write(data[:10])

        def __getattr__(self, name):
            return getattr(self.file, name)

    with folder.Journal(tmp_path / folder.JOURNAL, folder.ResultFolder(tmp_path, {})) as journal:
        journal.add([{"a": 1}])
        file = journal.file
        journal.file = Full(file)
        with pytest.raises(RunFailed, match=r"No space left on device\. Nothing earlier was touched"):
            journal.add([{"a": "much more than that"}])
        journal.file = file
        journal.add([{"a": 2}])
    assert (tmp_path / folder.JOURNAL).read_text() == '{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize("name", [name for name in PREPARATION if name != "echo"])
def test_help_needs_no_torch(name):
    code = f"import sys; from align_engine.cli import main\ntry: main(['{name}', '--help'])\nexcept SystemExit: pass\n"
    heavy = "print(sorted({'torch', 'transformers', 'datasets', 'openai', 'sklearn'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code + heavy], capture_output=True, text=True, check=True)
    assert "--dataset_name" in done.stdout and done.stdout.splitlines()[-1] == "[]"
