"""Recipes from YAML: sections or not, what is refused, what identifies a run."""

import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
import torch

import align_kernels as ak
from align_engine import recipe as recipes
from align_engine.algorithms import ALGORITHMS
from align_engine.data.batches import Batch
from align_engine.errors import BadInput
from align_engine.recipe import RECIPES, DpoRecipe, SftRecipe, flat
from align_engine.training.algorithm import keywords
from align_kernels.arguments import OPTIONS, hints

FOLDER = Path(__file__).parents[2] / "recipes"


def read(tmp_path, text, kind=DpoRecipe):
    (tmp_path / "r.yaml").write_text(text)
    return recipes.load(kind, tmp_path / "r.yaml")


def test_names_are_unique_so_that_flags_need_no_prefix():
    for kind in (SftRecipe, DpoRecipe):
        assert len(flat(kind())) == sum(len(vars(section)) for section in vars(kind()).values())


def test_sections_and_bare_names_are_the_same(tmp_path):
    nested = read(
        tmp_path, "loss: {beta: 0.3}\ntrain: {learning_rate: 1e-4, bf16: true}\noutput:\n  report_to: [tensorboard]"
    )
    bare = read(tmp_path, "beta: 0.3\nlearning_rate: 1e-4\nbf16: true\nreport_to: [tensorboard]")
    assert nested == bare
    assert (bare.loss.beta, bare.train.learning_rate, bare.output.report_to) == (0.3, 1e-4, ["tensorboard"])


TRL_CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig", "kto": "KTOConfig", "rm": "RewardConfig", "grpo": "GRPOConfig",
               "rloo": "RLOOConfig", "cpo": "cpo.CPOConfig", "orpo": "orpo.ORPOConfig"}  # fmt: skip
# not given; one or several; a choice in place of a switch; no evaluation where there are no data for one
SAME_MEANING = [("", None), ([], "none"), ("sigmoid", ["sigmoid"]), (0.0, None), ("off", False), (None, "no")]
TRL_DIFFERS = {"dataset_test_split": (None, "test"), "vllm_importance_sampling_correction": (False, True)}


def defaults(kind):
    fields = [field for field in dataclasses.fields(kind) if field.default_factory is dataclasses.MISSING]
    made = [field for field in dataclasses.fields(kind) if field.default_factory is not dataclasses.MISSING]
    return {field.name: field.default for field in fields} | {field.name: field.default_factory() for field in made}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of TRL's experimental part
def test_a_setting_that_trl_has_bears_its_default():
    """Read from TRL 1.16's own dataclasses; docs/from-trl.md names the defaults that differ."""
    import trl

    common = defaults(trl.ScriptArguments) | defaults(trl.ModelConfig)
    differing = {}
    for name, path in TRL_CONFIGS.items():
        module, _, config = path.rpartition(".")
        where = importlib.import_module(f"trl.experimental.{module}") if module else trl
        theirs, ours = common | defaults(getattr(where, config)), flat(RECIPES[name]())
        shared = theirs.keys() & ours.keys()
        assert len(shared) >= 35, name
        pairs = {key: (ours[key], theirs[key]) for key in shared if ours[key] != theirs[key]}
        differing |= {key: pair for key, pair in pairs.items() if pair not in SAME_MEANING}
    assert differing == TRL_DIFFERS
    page = (FOLDER.parent / "docs" / "from-trl.md").read_text()
    assert all(name in page for name in TRL_DIFFERS)


def test_a_saved_recipe_reads_back(tmp_path):
    made = read(tmp_path, "beta: 0.3\nlora_target_modules: [q_proj]\nmodel_name_or_path: m")
    recipes.save(made, tmp_path / "again.yaml")
    assert recipes.load(DpoRecipe, tmp_path / "again.yaml") == made


def test_all_that_is_wrong_is_said_at_once():
    made = DpoRecipe()
    made.loss.beta, made.train.max_steps, made.data.max_prompt_length = 0.0, 0, 2000
    with pytest.raises(BadInput) as caught:
        recipes.check(made)
    for text in ("model_name_or_path = '' is required", "beta = 0.0 must be above 0", "max_steps = 0", "2000"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("max_length", 1), ("max_prompt_length", 0), ("overlong", "cut"), ("bad_rows", "x")]
)
def test_a_recipe_made_in_python_is_held_to_the_same(name, value):
    made = DpoRecipe()
    setattr(made.data, name, value)
    with pytest.raises(BadInput, match=f"{name}.*{value}"):
        recipes.check(made)


@pytest.mark.parametrize("kind", [kind for name, kind in RECIPES.items() if name != "rm"])
def test_limits_of_gradients_are_numbers_that_limit(kind):
    made = kind()
    made.limits.grad_clamp, made.limits.prob_gate = 0.0, 1.0
    with pytest.raises(BadInput) as caught:
        recipes.check(made)
    for text in ("grad_clamp = 0.0 must be above 0", "prob_gate = 1.0 must lie in (0, 1)"):
        assert text in str(caught.value)
    assert not hasattr(RECIPES["rm"](), "limits"), "scores have no logits"


def test_where_a_run_writes_does_not_change_what_it_is():
    one, two = DpoRecipe(), DpoRecipe()
    two.output.output_dir, two.output.overwrite = "elsewhere", True
    assert recipes.identity(one) == recipes.identity(two)
    two.loss.beta = 0.2
    assert recipes.identity(one) != recipes.identity(two)


def test_recipes_of_the_demo_are_the_packages_own():
    """Copies and not links: an archive without links, or Windows, holds them too."""
    own = FOLDER.parent / "align_engine" / "demo"
    copies = {path.name.removeprefix("demo-"): path for path in FOLDER.glob("demo-*.yaml")}
    assert copies.keys() == {path.name for path in own.glob("*.yaml")} and copies
    for name, path in copies.items():
        assert not path.is_symlink() and path.read_text() == (own / name).read_text()


def test_online_recipes_say_how_long_they_run():
    """An epoch over the prompts of a hub dataset is thousands of rollouts."""
    for path in (path for path in FOLDER.glob("*.yaml") if path.stem.endswith(("-grpo", "-ppo", "-rloo"))):
        made = recipes.load(RECIPES[path.stem.rpartition("-")[2]], path)
        forward_passes = made.rollout.steps_per_generation or made.train.gradient_accumulation_steps
        completions = made.train.per_device_train_batch_size * forward_passes
        assert made.train.max_steps > 0 and completions >= 128, path
        assert completions % made.rollout.num_generations == 0, path


def test_critics_of_real_models_learn_faster_than_their_policies():
    """They start from a zero head."""
    for path in (paths := sorted(FOLDER.glob("qwen*-ppo.yaml"))):
        made = recipes.load(RECIPES["ppo"], path)
        assert made.loss.value_learning_rate > made.train.learning_rate, path
    assert len(paths) == 2


def test_recipes_that_hold_all_weights_in_bfloat16_say_what_it_costs():
    for path in (paths := sorted(FOLDER.glob("*-full-*.yaml"))):
        made, text = recipes.load(RECIPES[path.stem.rpartition("-")[2]], path), path.read_text()
        assert (made.model.dtype == "bfloat16") == ("are rounded away" in text), path
    assert any("are rounded away" in path.read_text() for path in paths)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_whole(path):
    """A recipe's name ends in its algorithm's."""
    made = recipes.load(kind := RECIPES[path.stem.rpartition("-")[2]], path)
    assert recipes.check(made) == made != kind()


@pytest.mark.parametrize("kind, weight", [(recipes.GrpoRecipe, "beta"), (recipes.PpoRecipe, "kl_coef")])
def test_a_reference_that_nobody_reads_is_refused(kind, weight):
    changes = {"loss": {weight: 0.0}, "kl": {"ref_model_name_or_path": "another"}}
    with pytest.raises(BadInput, match=f"ref_model_name_or_path = 'another' is not read where {weight} = 0"):
        recipes.check(recipes.typed(kind(), changes, "here"))


def test_a_learning_rate_beyond_float32_is_refused():
    with pytest.raises(BadInput, match=r"learning_rate = 1e\+39 must lie in \(0, 1e30\]"):
        recipes.check(recipes.typed(recipes.SftRecipe(), {"train": {"learning_rate": "1e39"}}, "here"))


FUSED = {"sft": [ak.sft_loss], "rm": [ak.reward_loss], "dpo": [ak.dpo_loss], "simpo": [ak.simpo_loss],
         "orpo": [ak.orpo_loss], "cpo": [ak.cpo_loss], "kto": [ak.kto_loss], "rloo": [ak.rloo_loss],
         "grpo": [ak.grpo_loss], "ppo": [ak.ppo_clip_loss, ak.value_loss]}  # fmt: skip
OF_THE_BATCH = {"hidden", "weight", "targets", "chosen", "rejected", "margin", "ref_logps", "desirable", "kl",
                "old_logps", "sampling_logps", "advantages", "values", "old_values", "returns", "mask", "num_items",
                "num_tokens", "pairs"}  # fmt: skip
OTHERWISE = {  # keyword -> the setting that says it, or why there is none
    "center_coef": "center_rewards_coefficient",
    "average": "ipo scores by the mean, as its paper does",
    "ld_alpha": "needs the reference's log-prob of each token; a precomputed one has the sum",
    "nll_targets": "the likelihood is that of the completion",
}


@pytest.mark.parametrize("name", FUSED)
def test_every_keyword_of_a_loss_is_a_setting_or_has_a_reason(name):
    settings = flat(RECIPES[name]())
    for fused in FUSED[name]:
        for keyword in (*hints(fused), *OPTIONS.get(fused, ())):
            if keyword not in OF_THE_BATCH | OTHERWISE.keys():
                assert keyword in settings, f"{keyword} cannot be reached"
    assert FUSED.keys() == ALGORITHMS.keys()


@pytest.mark.parametrize(
    ("name", "kind", "given", "row"),
    [
        ("dpo", DpoRecipe, dict(loss_type="discopop", discopop_tau=0.2), ak.dpo_loss),
        ("dpo", DpoRecipe, dict(loss_type="dpop", dpop_lambda=5.0), ak.dpo_loss),
        ("sft", SftRecipe, dict(loss_type="dft"), ak.sft_loss),
        ("simpo", recipes.SimpoRecipe, dict(alpha=0.3), ak.simpo_loss),
        ("cpo", recipes.CpoRecipe, dict(loss_type="simpo", alpha=0.3), ak.cpo_loss),
    ],
)
def test_a_setting_reaches_its_loss(name, kind, given, row):
    """The algorithm's loss with the setting is the kernels' own with the keyword."""
    made = kind()
    vars(made.loss).update(given)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4, 3, 8, generator=generator), torch.randn(11, 8, generator=generator)
    targets = torch.randint(11, (4, 3), generator=generator)
    batch = Batch(targets, torch.ones_like(targets), targets, torch.arange(4), ref_logps=torch.full((4,), -9.0))
    loss = ALGORITHMS[name].loss
    got = loss(hidden, **keywords(loss, {"weight": weight}, batch, made, 2.0)).loss
    own = {"ref_logps": batch.ref_logps} if name == "dpo" else {}
    shared = {key: value for key, value in vars(made.loss).items() if key in inspect.signature(row).parameters}
    assert got.equal(row(hidden, weight, targets, num_items=2.0, **own, **shared).loss)
    vars(made.loss).update({key: getattr(kind().loss, key) for key in list(given)[-1:]})
    assert not got.equal(loss(hidden, **keywords(loss, {"weight": weight}, batch, made, 2.0)).loss), "it is read"
