"""Refusals come before anything is written, and leave everything as it was."""

import errno
import gc
import os
import resource
from pathlib import Path

import datasets
import pytest
import tiny
from cases import command

from align_engine.cli import main
from align_engine.data.sources import load_rows
from align_engine.errors import LONGEST, shortened


def flags(model, rows, out, **more):
    given = dict(model_name_or_path=model, dataset_name=rows, output_dir=out, max_steps=1, gradient_checkpointing=False)
    return given | more


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(capsys):
    """Run a command that is refused: what it complains."""

    def run(method, given):
        assert main(command(method, given)) == 2
        return capsys.readouterr().err

    return run


@pytest.fixture
def prompts(tmp_path):
    return tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(4))


@pytest.fixture
def scorers(tmp_path):
    (tmp_path / "scorers.py").write_text(
        "def score(completion_ids, **more):\n    return [sum(i) for i in completion_ids]\n"
    )
    return {"reward_funcs": [f"{tmp_path / 'scorers.py'}:score"], "max_completion_length": 3, "num_generations": 2}


def test_a_reference_that_cannot_be_loaded_leaves_no_folder_and_deletes_no_run(refused, model, pairs, tmp_path):
    small = tiny.write_model(tmp_path / "small", intermediate_size=40)
    (small / "config.json").write_text((model / "config.json").read_text())
    given = flags(model, pairs, tmp_path / "run")
    assert "small" in refused("dpo", given | {"ref_model_name_or_path": small})
    assert not (tmp_path / "run").exists()
    assert main(command("dpo", given)) == 0
    before = contents(tmp_path / "run")
    refused("dpo", given | {"ref_model_name_or_path": small, "overwrite": True})
    assert contents(tmp_path / "run") == before


def test_models_that_lack_tokens_are_refused(refused, model, pairs, prompts, scorers, tmp_path):
    small = tiny.write_model(tmp_path / "small", vocab=40)
    given = flags(model, pairs, tmp_path / "run", ref_model_name_or_path=small)
    for method in ("dpo", "kto"):
        assert f"outside ref_model_name_or_path = '{small}''s vocabulary of 40" in refused(method, given)
    assert "vocabulary of 40" in refused("grpo", flags(model, prompts, tmp_path / "run", **scorers) | {
        "ref_model_name_or_path": small, "beta": 0.1})  # fmt: skip
    few = tiny.write_rows(tmp_path / "few.jsonl", [{"prompt": "w1"}, {"prompt": "w2"}])
    online = flags(model, few, tmp_path / "run", ref_model_name_or_path=small, **scorers)
    assert "has 40 tokens, fewer than the policy's tokenizer (62)" in refused("rloo", online)
    assert "vocabulary of 40" in refused("iterate", flags(small, prompts, tmp_path / "run", **scorers))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay"),
        ({"eval_dataset_name": "prompts.jsonl"}, "preference data needs"),
        ({"dataset_test_split": "test"}, "needs eval_dataset_name"),
        ({"callbacks": ["json:loads"]}, "no transformers.TrainerCallback"),
        ({"method_settings": ["loss_type=sigmoyd"]}, "sigmoyd"),
        ({"attn_implementation": "nothing"}, "nothing"),
    ],
)
def test_what_the_rounds_of_iterate_cannot_use_is_refused_before_the_first(
    more, wanted, refused, model, prompts, scorers, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert wanted in refused("iterate", flags(model, prompts, tmp_path / "run", rounds=1, **scorers) | more)
    assert not (tmp_path / "run").exists()


def test_a_tilde_is_the_home_folder_of_every_path(model, completions, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    assert main(command("sft", flags("~/model", f"~/{completions.name}", "~/run"))) == 0
    assert (tmp_path / "run" / "final").is_dir() and not (tmp_path / "~").exists()


@pytest.mark.parametrize("field", ["model_name_or_path", "dataset_name", "output_dir"])
@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("x" * 300, "File name too long"),
        ("loop", "Symlink loop"),
        ("~nobody-of-that-name/x", "home directory"),
        (os.fsdecode(b"a\xff"), "is not UTF-8"),
    ],
)
def test_paths_where_the_system_cannot_look_are_named(field, value, why, refused, model, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    complaint = refused("dpo", flags(model, pairs, tmp_path / "run") | {field: value})
    assert field in complaint and why in complaint


@pytest.fixture
def read_only(monkeypatch):
    """Answer below a folder as a disk does that is mounted read-only."""

    def close(folder):
        def closed(call, writes):
            def refuse(path, *more, **options):
                if writes(*more) and Path(os.fsdecode(path)).is_relative_to(folder):
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
                return call(path, *more, **options)

            return refuse

        monkeypatch.setattr(os, "mkdir", closed(os.mkdir, lambda *_: True))
        monkeypatch.setattr(
            os, "open", closed(os.open, lambda flags, *_: flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
        )

    return close


@pytest.mark.parametrize("when", ["new", "there"])
def test_an_output_folder_on_a_read_only_disk_is_named(when, refused, read_only, model, completions, tmp_path):
    out = tmp_path / "disk" / "run"
    (out if when == "there" else out.parent).mkdir(parents=True)
    read_only(tmp_path / "disk")
    complaint = refused("sft", flags(model, completions, out))
    assert complaint == f"align: error: output_dir = '{out}' cannot be written to: Read-only file system\n"
    assert list((tmp_path / "disk").rglob("*")) == ([out] if when == "there" else [])


# of datasets, which leaves its file open
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("disk", "loaded"), [("full", False), ("full", True), ("read-only", False), ("read-only", True)]
)
def test_a_cache_of_data_that_cannot_be_written_is_named(
    disk, loaded, refused, read_only, model, tmp_path, monkeypatch
):
    """`loaded`: the rows are there already, and their tokens are to be written."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = [{"prompt": "w1 " * 500 + str(i), "completion": "w2"} for i in range(400)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    if loaded:
        load_rows(path)
    limits, why = resource.getrlimit(resource.RLIMIT_FSIZE), "Read-only file system"
    if disk == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        why = "File too large"
    else:
        read_only(cache)
    try:
        complaint = refused("sft", flags(model, path, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        gc.collect()
    assert complaint.startswith(
        f"align: error: '{path}': the cache of data at {cache} cannot be written ({why}): make room"
    )
    assert "HF_DATASETS_CACHE" in complaint and complaint.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_callback_that_gives_something_else_than_the_control_is_named(capsys, model, completions, tmp_path):
    (tmp_path / "c.py").write_text(
        "from transformers import TrainerCallback\n"
        "class Mine(TrainerCallback):\n    def on_step_end(self, args, state, control, **more):\n        return 5\n"
    )
    given = flags(model, completions, tmp_path / "run", callbacks=[f"{tmp_path / 'c.py'}:Mine"])
    assert main(command("sft", given)) == 1
    assert "callback Mine.on_step_end gave 5: it must give `control`" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["run.json", "metrics.jsonl"])
def test_files_of_a_run_that_are_nested_too_deep_are_named(file, refused, model, completions, tmp_path):
    given = flags(model, completions, tmp_path / "run", lr_scheduler_type="constant")
    assert main(command("sft", given)) == 0
    path = tmp_path / "run" / file
    path.write_bytes(b"[" * 5000 + b"\n" + path.read_bytes())
    assert str(path) in refused("sft", given | {"max_steps": 2})


def test_a_damaged_file_of_answers_is_sampled_again(tmp_path):
    from align_engine.iterate import holds

    path = tmp_path / "1.jsonl"
    assert not holds(path, [[1]])
    path.write_text('{"prompt_ids": [1], "ids": [2], "ended": true}\n')
    assert holds(path, [[1]]) and not holds(path, [[2]])
    for damage in ('{"prompt_ids": [1], "ids"', "[" * 5000, "5", '{"prompt_ids": [1]}', "\x00"):
        path.write_text(damage)
        assert not holds(path, [[1]]), damage


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--seeds"], ["--seeds", "x"], ["--nonsense"]])
def test_the_demo_refuses_what_it_cannot_run(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    assert "Traceback" not in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_long_message_keeps_its_beginning_and_its_end():
    assert shortened("x is <list_iterator object at 0x7f0000781870>") == "x is <list_iterator object>"
    text = shortened("begin" + "x" * 10**6 + "end")
    assert len(text) == LONGEST and text.startswith("begin") and text.endswith("end") and " ... " in text
