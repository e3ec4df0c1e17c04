"""Values of recipes: as users write them, their ranges, what does not go together, what is written of them."""

import math
import re

import pytest

from align_engine import recipe as recipes
from align_engine.cli import flags
from align_engine.errors import BadInput
from align_engine.recipe import RECIPES, DpoRecipe, GrpoRecipe, IterateRecipe, PpoRecipe, SftRecipe, TrainSection, flat
from align_engine.run import check_schedule


def read(tmp_path, text, kind):
    (tmp_path / "r.yaml").write_text(text)
    return recipes.load(kind, tmp_path / "r.yaml")


AS_WRITTEN = [  # a field, what stands in YAML, what flags say, the value
    ("learning_rate", "5e-6", ["5e-6"], 5e-6),
    ("learning_rate", "'5.0e-6'", ["5.0e-6"], 5e-6),
    ("num_train_epochs", "1", ["1"], 1.0),
    ("save_steps", "1e3", ["1e3"], 1000),
    ("save_steps", "1000.0", ["1000.0"], 1000),
    ("seed", "007", ["007"], 7),
    ("max_steps", "-1", ["-1"], -1),
    ("max_length", "null", ["None"], None),
    ("max_length", "", ["null"], None),
    ("bf16", "true", [], True),
    ("bf16", "yes", ["True"], True),
    ("bf16", "off", ["false"], False),
    ("bf16", "none", ["None"], None),
    ("gradient_checkpointing", "False", ["0"], False),
    ("use_peft", "on", [], True),
    ("report_to", "none", ["none"], []),
    ("report_to", "[none]", ["None"], []),
    ("report_to", "[]", [""], []),
    ("report_to", "tensorboard, wandb", ["tensorboard,wandb"], ["tensorboard", "wandb"]),
    ("lora_target_modules", "all-linear", ["all-linear"], None),
    ("lora_target_modules", "[all-linear]", ["None"], None),
    ("lora_target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    ("lora_target_modules", "q_proj,v_proj", ["q_proj,v_proj"], ["q_proj", "v_proj"]),
    ("reward_weights", "[1, 5e-1]", ["1", "5e-1"], [1.0, 0.5]),
    ("reward_weights", "-1, 2", ["-1,2"], [-1.0, 2.0]),
    ("stop_strings", "[',', no]", [",", "no"], [",", "no"]),
    ("dataset_test_split", "no", ["no"], "no"),
    ("output_dir", "2026-11-28", ["2026-11-28"], "2026-11-28"),
    ("output_dir", "${oc.env:HOME}", ["${oc.env:HOME}"], "${oc.env:HOME}"),
    ("output_dir", "???", ["???"], "???"),
]


@pytest.mark.parametrize(("name", "yaml", "words", "value"), AS_WRITTEN)
def test_values_are_taken_as_users_write_them(name, yaml, words, value, tmp_path):
    made = read(tmp_path, f"{name}: {yaml}", GrpoRecipe)
    assert flat(made)[name] == value and type(flat(made)[name]) is type(value)
    said, others = flags(GrpoRecipe, [f"--{name}", *words, "--beta", "0.5"])
    made = recipes.typed(GrpoRecipe(), said, "flags")
    assert (flat(made)[name], made.loss.beta, others) == (value, 0.5, [])
    recipes.save(made, tmp_path / "again.yaml")
    assert recipes.load(GrpoRecipe, tmp_path / "again.yaml") == made


def test_switches_stand_bare_with_no_in_front_and_beside_other_words():
    said, others = flags(
        SftRecipe, "--use-peft --no-gradient_checkpointing --load_in_4bit=true left --no_bf16 -h".split()
    )
    assert said == {"model": {"use_peft": "true", "load_in_4bit": "true"},
                    "train": {"gradient_checkpointing": "false", "bf16": "false"}}  # fmt: skip
    assert others == ["left", "-h"]
    with pytest.raises(BadInput, match="--lora_r needs a value"):
        flags(SftRecipe, ["--lora_r", "--use_peft"])


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("train: 5", "`train` is a section"),
        ("train: [seed]", "`train` is a section"),
        ("seed: 1\nseed: 2", "line 2: key 'seed' stands twice"),
        ("train: {seed: 1, seed: 2}", "line 1: key 'seed' stands twice"),
        ("seed: 1\ntrain: {seed: 2}", "`seed` stands at the top and under `train`"),
        ("report_to: &a [*a]", "report_to"),
        ("a: &a {<<: *a}", "unknown key `a`"),
        ("[" * 1000, "nested too deep"),
        ("? [a, b]\n: c", "line 1: a key is not text"),
        ("5: 6", "unknown key `5`"),
        ("output_dir: \0", "special characters are not allowed"),
        (b"output_dir: caf\xe9", "not UTF-8 (byte 0xe9 at 15)"),
        ("", "no `name: value` lines"),
        ("--- 1\n--- 2", "another document"),
        ("seed: !!python/object/apply:os.getcwd []", "line 1: could not determine a constructor"),
        ("seed: 1.5", "seed = '1.5' is not a whole number"),
        ("seed: 1e30", "seed = '1e30' does not fit into 64 bits"),
        ("bf16: maybe", "bf16 = 'maybe' is neither true nor false"),
        ("overlong: cut", "overlong = 'cut' is none of truncate, drop, error"),
        ("output_dir: [a]", "output_dir = ['a'] is not text"),
        ("report_to: {a: b}", "report_to = {'a': 'b'} is not a list"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_one_sentence(content, wanted, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput) as caught:
        recipes.load(SftRecipe, path)
    assert wanted in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(BadInput, match="Is a directory"):
        recipes.load(SftRecipe, tmp_path)


def test_anchors_and_merges_are_yaml_s(tmp_path):
    made = read(tmp_path, "train: &t {seed: 3}\nlogging_steps: &n 7\nsave_steps: *n", SftRecipe)
    assert (made.train.seed, made.output.logging_steps, made.output.save_steps) == (3, 7, 7)


GIVEN = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "reward_funcs": ["m:f"]}


def refusal(kind, **settings):
    """What `check` says of a recipe with these settings."""
    made = kind()
    for section in vars(made).values():
        for name in vars(section).keys() & (GIVEN | settings).keys():
            setattr(section, name, (GIVEN | settings)[name])
    try:
        recipes.check(made)
    except BadInput as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", RECIPES.values(), ids=RECIPES)
def test_every_number_has_a_range_and_both_sides_of_it_are_checked(kind):
    for name, (_, taken) in recipes.fields(kind).items():
        inner = taken.kind.__args__[0] if taken.is_list else taken.kind
        numeric = taken.range is not None or inner in (int, float)
        assert numeric == (taken.range is not None), f"{name} has no range"
        if taken.range is None:
            continue
        (low, high), text, whole = taken.range.bounds, taken.range.interval, inner is int
        inside, outside = [], [math.nan, math.inf, -math.inf]
        for bound, closed, away in ((low, text[0] == "[", -1), (high, text[-1] == "]", 1)):
            if math.isfinite(bound):
                beyond, within = (
                    (bound + away, bound - away)
                    if whole
                    else (math.nextafter(bound, away * math.inf), math.nextafter(bound, -away * math.inf))
                )
                inside.append(bound if closed else within)
                outside.append(beyond if closed else bound)
        for value in [*inside, *outside]:
            value = int(value) if whole and math.isfinite(value) else value
            said = refusal(kind, **{name: [value] if taken.is_list else value})
            assert (re.search(rf"\b{name} = .* (must (be|lie)|is not)", said) is not None) == (value in outside), (
                name,
                value,
                said,
            )


OUTSIDE = {  # by hand
    "lam": (PpoRecipe, [-0.1, 1.1]), "gamma": (PpoRecipe, [-0.1, 1.5]), "dual_clip": (PpoRecipe, [1.0]),
    "cliprange": (PpoRecipe, [0.0]), "max_prompt_length": (SftRecipe, [0, -5]), "max_length": (SftRecipe, [1, 0]),
    "learning_rate": (SftRecipe, [0.0, -1e-5, math.inf, math.nan]), "weight_decay": (SftRecipe, [-0.1, math.inf]),
    "max_grad_norm": (SftRecipe, [-1.0, math.nan]), "seed": (SftRecipe, [-1, 2**32]), "max_steps": (SftRecipe, [0, -2]),
    "warmup_ratio": (SftRecipe, [1.01]), "lora_dropout": (SftRecipe, [1.0]), "label_smoothing": (DpoRecipe, [0.5]),
    "beta": (DpoRecipe, [0.0]), "loss_weights": (DpoRecipe, [[1.0, math.nan]]), "top_p": (GrpoRecipe, [0.0, 1.1]),
    "reward_weights": (GrpoRecipe, [[math.inf]]), "temperature": (GrpoRecipe, [0.0]),
    "sapo_temperature_pos": (GrpoRecipe, [0.0]),
    "missing_eos_penalty": (GrpoRecipe, [math.nan]), "vespo_k_pos": (GrpoRecipe, [-1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_numbers_that_no_run_can_use_are_refused(name):
    kind, values = OUTSIDE[name]
    assert refusal(kind) == ""
    for value in values:
        assert f"{name} = {value!r} must" in refusal(kind, **{name: value})


CONFLICTS = [  # (kind, what does not go together, the change that mends it, what is said)
    (SftRecipe, {"max_prompt_length": 1024}, {"max_prompt_length": 1023}, "max_prompt_length = 1024 must leave room"),
    (SftRecipe, {"max_prompt_length": 1024}, {"max_length": None}, "below max_length = 1024"),
    (SftRecipe, {"eval_steps": 5}, {"dataset_test_split": "test"}, "eval_steps = 5 needs eval_dataset_name"),
    (SftRecipe, {"load_best_model_at_end": True, "eval_dataset_name": "e"}, {"eval_steps": 5}, "needs eval_steps"),
    (
        SftRecipe,
        {"early_stopping_patience": 2, "eval_steps": 5},
        {"eval_dataset_name": "e"},
        "early_stopping_patience = 2",
    ),
    (SftRecipe, {"load_in_4bit": True}, {"use_peft": True}, "load_in_4bit = True needs --use_peft"),
    (SftRecipe, {"load_in_4bit": True, "load_in_8bit": True, "use_peft": True}, {"load_in_4bit": False}, "choose one"),
    (DpoRecipe, {"reference": "adapter-off"}, {"use_peft": True}, "reference = 'adapter-off' needs --use_peft"),
    (
        DpoRecipe,
        {"reference": "ema", "ref_model_name_or_path": "r"},
        {"reference": "frozen"},
        "'ema': leave one of them",
    ),
    (GrpoRecipe, {"reward_weights": [1.0, 1.0]}, {"reward_funcs": ["m:f", "m:g"]}, "must be 1 numbers"),
    (GrpoRecipe, {"reward_funcs": ["human", "m:f"]}, {"reward_funcs": ["human"]}, "'human' alone"),
    (
        GrpoRecipe,
        {"server_weights": "w"},
        {"server_base_url": "http://h"},
        "server_weights = 'w' needs server_base_url",
    ),
    (GrpoRecipe, {"server_model": "w"}, {"server_base_url": "http://h"}, "server_model = 'w' needs server_base_url"),
    (
        GrpoRecipe,
        {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 4},
        "multiple of",
    ),
    (GrpoRecipe, {"loss_type": "cispo"}, {"epsilon_high": 5.0}, "epsilon_high = None is the limit of cispo's ratio"),
    (GrpoRecipe, {"loss_type": "grpo", "entropy_coef": 0.1}, {"loss_type": "dapo"}, "needs a loss_type that counts"),
    (
        GrpoRecipe,
        {"vllm_importance_sampling_clip_min": 3.0},
        {"vllm_importance_sampling_clip_max": None},
        "must be below",
    ),
    (PpoRecipe, {"kl_target": 1.0, "kl_coef": 0.0}, {"kl_coef": 0.1}, "kl_target = 1.0 needs kl_coef above 0"),
    (RECIPES["kto"], {"desirable_weight": 0.0, "undesirable_weight": 0.0}, {"undesirable_weight": 1.0}, "both 0"),
]


@pytest.mark.parametrize(("kind", "settings", "change", "said"), CONFLICTS)
def test_settings_that_do_not_go_together_are_refused_and_either_goes_alone(kind, settings, change, said):
    assert said in refusal(kind, **settings)
    assert refusal(kind, **(settings | change)) == ""


def test_schedules_that_need_more_than_a_recipe_has_are_refused_with_those_that_run():
    for kind in (
        "reduce_lr_on_plateau",
        "warmup_stable_decay",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "linaer",
    ):
        with pytest.raises(
            BadInput, match=f"lr_scheduler_type = '{kind}' .*; choose one of linear, cosine, "
        ) as caught:
            check_schedule(TrainSection(lr_scheduler_type=kind, learning_rate=1e-4))
        assert "plateau" not in str(caught.value).partition("choose")[2]
    check_schedule(TrainSection(lr_scheduler_type="polynomial", learning_rate=1e-4))
    floor = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": "min_lr_rate=0.1"}
    check_schedule(TrainSection(**floor))
    with pytest.raises(BadInput, match=r"lr_end \(1e-07\) must be smaller"):
        check_schedule(TrainSection(lr_scheduler_type="polynomial", learning_rate=1e-8))


def test_what_is_written_of_a_recipe_holds_no_secret(tmp_path):
    made = GrpoRecipe()
    made.rollout.server_base_url = "https://user:hunter2@host/v1?key=hunter2"
    made.rollout.reward_funcs = ["http://host/score?token=hunter2"]
    recipes.save(made, tmp_path / "r.yaml")
    assert "hunter2" not in (tmp_path / "r.yaml").read_text() + str(recipes.identity(made))
    assert "host/score" in (tmp_path / "r.yaml").read_text()


def test_a_round_s_own_settings_are_read_as_those_of_a_recipe(tmp_path):
    from align_engine.iterate import round_recipe

    made = IterateRecipe()
    made.iteration.method_settings = ["beta=3e-1", "loss_type=sigmoid,sft", "loss_weights=1,0.5"]
    loss = round_recipe(made, "m", tmp_path, 1).loss
    assert (loss.beta, loss.loss_type, loss.loss_weights) == (0.3, "sigmoid,sft", [1.0, 0.5])
    for setting, said in {
        "beta": "not of the form name=value",
        "betta=1": "did you mean `beta`",
        "beta=x": "not a number",
    }.items():
        made.iteration.method_settings = [setting]
        with pytest.raises(BadInput, match=said):
            round_recipe(made, "m", tmp_path, 1)
