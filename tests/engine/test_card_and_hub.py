"""The model card in `final`, and what is pushed to the hub: a stand-in for its API, no network."""

import json
import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny
import yaml
from huggingface_hub import ModelCard

from align_engine import recipe as recipes
from align_engine.cli import main
from align_engine.iterate import iterate
from align_engine.recipe import DpoRecipe, IterateRecipe, RlooRecipe, SftRecipe
from align_engine.run import train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
TOKEN = "hf_" + "s" * 30


@pytest.fixture
def licensed(tmp_path):
    """A model whose card names a licence and, as the hub knows it, a base."""
    path = tiny.write_model(tmp_path / "base")
    (path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/first\n---\n# Base\n")
    return path


@pytest.fixture
def rows(tmp_path):
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.preference_rows(8))


def words(card):
    """(its recipe, its figures)."""
    (block,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    return yaml.safe_load(block), dict(re.findall(r"^\| ([\w/]+) \| (\S+) \|$", card.text, re.MULTILINE))


def test_a_card_says_data_method_recipe_figures_and_licence(licensed, rows, tmp_path):
    made = tiny.dpo(licensed, rows, tmp_path / "run", beta=0.3, eval_dataset_name=str(rows), use_peft=True)
    folder = train("dpo", made)
    card = ModelCard.load(folder.final / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/first", "library_name": "peft", "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": ["align-engine", "dpo"],
    }  # fmt: skip
    recipe, figures = words(card)
    plain = recipes.flat(DpoRecipe())
    own = {name: value for name, value in recipes.flat(made).items() if value != plain[name] and name != "output_dir"}
    assert recipe == own and recipe["beta"] == 0.3
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert float(figures["loss"]) == pytest.approx([one["loss"] for one in lines if "loss" in one][-1], rel=1e-3)
    assert float(figures["eval_loss"]) == pytest.approx(lines[-1]["eval_loss"], rel=1e-3)
    assert f"apache-2.0, as the card of {licensed} says" in card.text
    assert "Direct preference optimisation: raise" in card.text and "`align dpo` of align-engine" in card.text
    assert "3 steps" in card.text and f"evaluated on {rows}" in card.text


def test_a_licence_goes_on_to_what_is_trained_further_and_may_stand_in_the_config(licensed, rows, tmp_path):
    first = train("sft", tiny.sft(licensed, sft_rows(tmp_path), tmp_path / "sft", max_steps=1))
    second = train("dpo", tiny.dpo(first.final, rows, tmp_path / "dpo", max_steps=1))
    assert ModelCard.load(second.final / "README.md").data.license == "apache-2.0"
    assert ModelCard.load(second.final / "README.md").data.base_model == "org/first"
    (licensed / "README.md").write_text("---\nlicense: [\n---\n")  # no YAML: a run is not lost over it
    config = json.loads((licensed / "config.json").read_text())
    (licensed / "config.json").write_text(json.dumps(config | {"license": "mit"}))
    third = train("sft", tiny.sft(licensed, sft_rows(tmp_path), tmp_path / "third", max_steps=1))
    assert "mit, as the config.json of" in (third.final / "README.md").read_text()


def test_a_model_that_names_no_licence_and_addresses_with_secrets(rows, tmp_path):
    model = tiny.write_model(tmp_path / "model")
    made = tiny.online(RlooRecipe, model, prompt_rows(tmp_path), tmp_path / "run", num_generations=2, max_steps=1)
    text = (train("rloo", made).final / "README.md").read_text()
    assert "which does not say" in text and "license:" not in text and "**Rewards**: tiny:word_reward" in text
    from align_engine.reports.card import card

    made.rollout.reward_funcs = ["http://me:hunter2@host/score"]
    assert "hunter2" not in card(SimpleNamespace(path=tmp_path, metrics=tmp_path / "none"), "rloo", made)  # type: ignore[arg-type]


def sft_rows(folder):
    return tiny.write_rows(folder / "sft.jsonl", tiny.sft_rows(8))


def prompt_rows(folder):
    return tiny.write_rows(folder / "prompts.jsonl", tiny.prompt_rows(8))


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    def __init__(self, error=None, private=None):
        self.error, self.private, self.repositories, self.uploads = error, private, [], []

    def create_repo(self, name, private=None, exist_ok=False):
        assert exist_ok
        self.repositories.append((name, private))
        self.private = private if self.private is None else self.private
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def model_info(self, name):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.error:
            raise self.error
        self.uploads.append((repo_id, sorted(one.name for one in folder_path.iterdir())))
        return f"https://huggingface.co/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return made


def command(folder, *more):
    model = folder / "model"
    if not model.exists():
        tiny.write_model(model)
    return ["sft", "--model_name_or_path", str(model), "--dataset_name", str(sft_rows(folder)), "--output_dir",
            str(folder / "run"), "--max_steps", "1", "--push_to_hub", *more]  # fmt: skip


def test_what_is_finished_is_pushed_once_a_command(hub, tmp_path, capsys):
    flags = command(tmp_path, "--hub_model_id", "org/mine", "--hub_private_repo")
    assert main(flags) == 0
    names = sorted(one.name for one in (tmp_path / "run" / "final").iterdir())
    assert hub.repositories == [("org/mine", True)] and hub.uploads == [("org/mine", names)]
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(names)
    assert "on the hub: https://huggingface.co/org/mine" in capsys.readouterr().out
    assert main(flags) == 0 and len(hub.uploads) == 2  # nothing is trained again
    assert "nothing to do" in capsys.readouterr().out
    assert main([one for one in flags if one != "--hub_private_repo"][:-2]) == 0  # by the name of output_dir
    assert hub.repositories[-1] == ("run", None) and hub.uploads[-1][0] == "me/run"


def test_a_push_that_fails_loses_nothing_and_shows_no_token(hub, tmp_path, capsys):
    hub.error = RuntimeError(f"401 for https://me:{TOKEN}@huggingface.co with {TOKEN}\nand more")
    assert main(command(tmp_path)) == 1
    said = capsys.readouterr()
    assert "the run is finished" in said.err and "401 for" in said.err and "tries that again" in said.err
    assert TOKEN not in said.err + said.out and TOKEN not in "".join(
        file.read_text(errors="replace") for file in (tmp_path / "run").rglob("*") if file.is_file()
    )
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    hub.error = None
    assert main(command(tmp_path)) == 0 and len(hub.uploads) == 1


def test_what_is_to_be_private_is_not_put_where_all_can_see_it(hub, tmp_path, capsys):
    hub.private = False
    assert main(command(tmp_path, "--hub_private_repo")) == 1
    assert "it is there already and public" in capsys.readouterr().err and not hub.uploads


@pytest.mark.parametrize(("flags", "said"), [
    (["--hub_model_id", "a/b/c"], "hub_model_id = 'a/b/c'"),
    (["--no-push_to_hub", "--hub_model_id", "a"], "needs --push_to_hub"),
    ([], "needs a token that may write"),
])  # fmt: skip
def test_what_could_not_be_pushed_is_refused_before(flags, said, hub, tmp_path, capsys, monkeypatch):
    if not flags:
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(command(tmp_path, *flags)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists() and not hub.repositories


def test_rounds_are_pushed_at_their_end_alone(hub, tmp_path):
    model, asked = tiny.write_model(tmp_path / "model"), {"push_to_hub": True, "hub_model_id": "me/rounds"}
    folder = iterate(tiny.online(IterateRecipe, model, prompt_rows(tmp_path), tmp_path / "run", rounds=2,
                                 prompts_per_round=4, max_steps=1, **asked))  # fmt: skip
    assert [name for name, _ in hub.uploads] == ["me/rounds"]
    card = ModelCard.load(folder.final / "README.md")
    assert card.data.tags == ["align-engine", "iterate"] and "2 rounds" in card.text
    assert "push_to_hub" not in card.text


def test_where_a_run_is_pushed_does_not_change_what_it_is():
    made = SftRecipe()
    before = recipes.identity(made)
    made.output.push_to_hub, made.output.hub_model_id = True, "a/b"
    assert recipes.identity(made) == before
