"""The family of preference losses through the engine: each type of each loss, and its likelihood term."""

import pytest
import tiny

from align_engine.algorithms import ALGORITHMS
from align_engine.errors import BadInput
from align_engine.recipe import CpoRecipe, DpoRecipe, KtoRecipe
from align_engine.run import check_loss, train
from align_engine.training import metrics
from align_kernels.losses.cpo import CPO_LOSSES
from align_kernels.losses.dpo import PAIR_LOSSES


def numbers(name, *paths, **settings):
    settings = dict(max_steps=2, learning_rate=1e-4) | settings
    return metrics.read(train(name, tiny.offline(name, *paths, **settings)).metrics)


@pytest.mark.parametrize("loss_type", sorted(PAIR_LOSSES))
def test_every_type_of_dpo_passes_the_check(loss_type):
    recipe = DpoRecipe()
    recipe.loss.loss_type, recipe.loss.label_smoothing = loss_type, 0.1 * (loss_type == "exo_pair")
    check_loss(ALGORITHMS["dpo"], recipe)
    recipe.loss.loss_type += "_"
    with pytest.raises(BadInput, match=f"'{loss_type}_'"):
        check_loss(ALGORITHMS["dpo"], recipe)


def test_what_does_not_fit_together_is_said_before_anything_is_loaded():
    for name, recipe, settings, text in (
        ("dpo", DpoRecipe(), {"loss_type": "sigmoyd"}, "loss_type must be one of sigmoid.*'sigmoyd'"),
        ("dpo", DpoRecipe(), {"loss_type": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        ("dpo", DpoRecipe(), {"loss_type": "sigmoid,sft", "loss_weights": [1.0]}, "loss_weights needs one per"),
        ("dpo", DpoRecipe(), {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ("cpo", CpoRecipe(), {"loss_type": "dpo"}, "loss_type must be one of"),
    ):
        vars(recipe.loss).update(settings)
        with pytest.raises(BadInput, match=text):
            check_loss(ALGORITHMS[name], recipe)
    assert set(CPO_LOSSES) == {"sigmoid", "hinge", "ipo", "simpo"}, "the recipe's help names them"


def test_a_mixture_is_its_parts(model, other_model, pairs, tmp_path):
    """sigmoid + 0.5 sft, over micro-batches of unequal numbers of tokens, training and evaluation."""
    settings = dict(ref_model_name_or_path=str(other_model), eval_dataset_name=str(pairs), max_steps=1,
                    learning_rate=1e-12, per_device_train_batch_size=3, gradient_accumulation_steps=3,
                    per_device_eval_batch_size=3)  # fmt: skip
    one = lambda name, **more: numbers("dpo", model, pairs, tmp_path / name, **settings, **more)  # noqa: E731
    first, second = one("a", loss_type="sigmoid"), one("b", loss_type="sft")
    both = one("c", loss_type="sigmoid,sft", loss_weights=[1.0, 0.5])
    assert both[0]["loss"] == pytest.approx(first[0]["loss"] + 0.5 * second[0]["loss"], abs=1e-5)
    sft = tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
    assert second[0]["loss"] == pytest.approx(
        numbers("sft", model, sft, tmp_path / "d", max_steps=1)[0]["loss"], abs=1e-5
    )
    assert second[1]["eval_loss"] == pytest.approx(second[0]["loss"], abs=1e-5), "the same rows, hardly a step later"


def test_losses_without_a_reference_are_related(model, pairs, tmp_path):
    """cpo of type simpo without its likelihood is simpo; cpo's likelihood is the mean over the chosen tokens."""
    settings = dict(per_device_train_batch_size=3, gradient_accumulation_steps=3, max_steps=1)
    simpo = numbers("simpo", model, pairs, tmp_path / "a", **settings, beta=2.0)[0]
    cpo = numbers("cpo", model, pairs, tmp_path / "b", **settings, loss_type="simpo", cpo_alpha=0.7, beta=2.0)[0]
    sft = tiny.write_rows(tmp_path / "sft.jsonl", tiny.sft_rows(8))
    nll = numbers("sft", model, sft, tmp_path / "c", max_steps=1)[0]["loss"]
    assert cpo["nll_loss"] == pytest.approx(nll, abs=1e-5)
    assert cpo["loss"] == pytest.approx(simpo["loss"] + 0.7 * nll, abs=1e-5)
    orpo = numbers("orpo", model, pairs, tmp_path / "d", **settings, beta=0.3)[0]
    assert orpo["loss"] == pytest.approx(nll - 0.3 * orpo["log_odds_ratio"], abs=1e-5)


def test_apo_zero_unpaired_reads_no_mismatched_completions(model, other_model, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.label_rows(8))
    paths, settings = (model, rows), dict(ref_model_name_or_path=str(other_model), max_steps=1)
    apo = numbers("kto", *paths, tmp_path / "a", loss_type="apo_zero_unpaired", **settings)[0]
    kto = numbers("kto", *paths, tmp_path / "b", **settings)[0]
    assert apo["kl"] == 0.0 < kto["kl"] and apo["loss"] != pytest.approx(kto["loss"], abs=1e-4)
    assert KtoRecipe().loss.loss_type == "kto"
