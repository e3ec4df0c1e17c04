"""The fused losses against TRL 1.16's own trainers, on the same model and batch: loss and every gradient to 1e-5.

The options bear TRL's names: what goes into a trainer's config goes into the fused loss as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accuracy import largest
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import align_kernels as ak

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
disable_progress_bar()
ROWS = [row | {"prompt": row["prompt"] + " "} for row in tiny.preference_rows(5, seed=3)]


class Bench:
    """Two tiny models, their tokenizer, and trainers around them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        folders = [tiny.write_model(path / str(seed), seed=seed, tie_word_embeddings=False) for seed in (0, 7)]
        self.models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
        self.tokenizer = AutoTokenizer.from_pretrained(folders[0])

    def args(self, config: type, **options: Any) -> Any:
        common = dict(use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
        return config(str(self.path / "out"), per_device_train_batch_size=len(ROWS), **common, **options)

    def build(self, trainer: type, config: type, rows: list[dict], *models: nn.Module, **options: Any) -> Any:
        """A trainer, and its first batch."""
        made = trainer(
            *models,
            args=self.args(config, **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
        )
        made.model.train()
        return made, made.data_collator([made.train_dataset[i] for i in range(len(rows))])


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("trl"))


def hidden_of(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    return model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]


def targets_of(batch: dict[str, Tensor]) -> Tensor:
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]


def compare(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    assert abs(float(ours - theirs)) <= 1e-5 * max(1.0, abs(float(theirs))), f"loss {ours}, TRL's {theirs}"
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    pairs = zip(
        names,
        *(torch.autograd.grad(x, params, retain_graph=True, materialize_grads=True) for x in (ours, theirs)),
    )
    grads = {name: (a, b) for name, a, b in pairs}
    scale = max(largest(b) for _, b in grads.values())
    for name, (a, b) in grads.items():
        assert largest(a - b) <= 1e-5 * scale, f"gradient of {name}: {largest(a - b):.2e} of {scale:.2e}"


def measured(trainer: Any) -> dict[str, float]:
    return {name: values[-1] for name, values in trainer._metrics["train"].items()}


def same_metrics(ours: dict[str, Tensor], theirs: dict[str, float], *names: str) -> None:
    for name in names:
        assert float(ours[name]) == pytest.approx(theirs[name], abs=2e-5, rel=1e-4), name


# -- DPO ------------------------------------------------------------------------------------------------------------
DPO: list[dict[str, Any]] = [
    {},
    dict(beta=0.6),
    *(dict(loss_type=name) for name in ("hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired")),
    *(dict(loss_type=name) for name in ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")),
    *(dict(loss_type=name, label_smoothing=0.1) for name in ("exo_pair", "robust", "aot", "aot_unpaired")),
    dict(loss_type="discopop", discopop_tau=0.5),
    dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    *(
        dict(loss_type=loss_type, f_divergence_type=kind)
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
        for loss_type in ("sigmoid", "ipo", "sigmoid_norm", "hinge")
    ),
    dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.7),
    dict(ld_alpha=0.3),
    dict(ld_alpha=0.0, loss_type=["ipo", "sft"]),
    dict(use_weighting=True),
    dict(use_weighting=True, loss_type="ipo", ld_alpha=0.5),
]


def dpo_pair(
    bench: Bench, options: dict[str, Any], **ours_options: Any
) -> tuple[nn.Module, Any, ak.LossOutput, Tensor]:
    trainer, batch = bench.build(DPOTrainer, DPOConfig, ROWS, *bench.models, **options)
    theirs = trainer._compute_loss(trainer.model, batch, False)
    ids, mask, targets = batch["input_ids"], batch["attention_mask"], targets_of(batch)
    with torch.no_grad():
        reference = trainer.ref_model
        ref = ak.linear_logprobs(hidden_of(reference, ids, mask), reference.lm_head.weight, targets).logp
    ref = ref if options.get("ld_alpha") is not None else ref.sum(1)
    model = trainer.model
    ours = ak.dpo_loss(hidden_of(model, ids, mask), model.lm_head.weight, targets, ref, **options | ours_options)
    return model, trainer, ours, theirs


@pytest.mark.parametrize("options", DPO, ids=str)
def test_dpo(options: dict[str, Any], bench: Bench):
    model, trainer, ours, theirs = dpo_pair(bench, options)
    compare(model, ours.loss, theirs)
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "entropy")
    names += ("logits/chosen", "logits/rejected")
    names += () if options.get("ld_alpha") is not None else ("logps/chosen", "logps/rejected")
    same_metrics(ours.metrics, measured(trainer), *names)


def test_dpo_done_right(bench: Bench):
    """Options that TRL drops in silence or cannot carry out, beside what they are here."""
    plain, smooth = (dpo_pair(bench, dict(label_smoothing=e)) for e in (0.0, 0.2))
    assert float(plain[3]) == float(smooth[3])  # cDPO: dropped
    assert abs(float(smooth[2].loss - plain[2].loss)) > 1e-3
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        dpo_pair(bench, dict(loss_type="sft", use_weighting=True))
    with pytest.raises(NotImplementedError, match="aot"):
        dpo_pair(bench, dict(loss_type="aot", use_weighting=True))
    options: dict[str, Any] = dict(loss_type="robust", label_smoothing=0.7)  # accepted with a warning in the log
    trainer, _ = bench.build(DPOTrainer, DPOConfig, ROWS, *bench.models, **options)
    assert trainer.label_smoothing == 0.7
    trainer, _ = bench.build(DPOTrainer, DPOConfig, ROWS, *bench.models, ld_alpha=3.0)
    assert trainer.ld_alpha == 3.0


# -- KTO ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("marks", [[1, 0, 1, 1, 0], [1] * 5, [0] * 5], ids=str)
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type: str, marks: list[int], bench: Bench):
    options = dict(loss_type=loss_type, beta=0.3, desirable_weight=1.3, undesirable_weight=0.6)
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": bool(m)} for r, m in zip(ROWS, marks)]
    trainer, batch = bench.build(KTOTrainer, KTOConfig, rows, *bench.models, **options)
    theirs = trainer._compute_loss(trainer.model, batch, False)
    found = measured(trainer)
    ids, mask, targets = batch["input_ids"], batch["attention_mask"], targets_of(batch)
    with torch.no_grad():
        reference = trainer.ref_model
        ref = ak.linear_logprobs(hidden_of(reference, ids, mask), reference.lm_head.weight, targets).logp.sum(1)
    label, model = torch.as_tensor(batch["label"]).bool(), trainer.model
    hidden = hidden_of(model, ids, mask)
    ours = ak.kto_loss(hidden, model.lm_head.weight, targets, ref, label, found["kl"], **options)
    compare(model, ours.loss, theirs)
    words = [w for w in ("chosen", "rejected") if f"rewards/{w}" in found]
    same_metrics(ours.metrics, found, "entropy", "kl", *(f"{kind}/{w}" for kind in ("rewards", "logps") for w in words))


# -- CPO, ORPO ------------------------------------------------------------------------------------------------------
def pairs_of(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    cat = trainer.concatenated_inputs(batch, is_encoder_decoder=False, padding_value=1, device="cpu")
    return tuple(cat[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))  # type: ignore


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(beta=0.4, label_smoothing=0.1, cpo_alpha=0.3),
        dict(loss_type="hinge", cpo_alpha=0.0),
        dict(loss_type="ipo"),
        dict(loss_type="simpo", beta=2.0, simpo_gamma=1.0),
        dict(loss_type="simpo", alpha=0.25, label_smoothing=0.1),
    ],
    ids=str,
)
def test_cpo(options: dict[str, Any], bench: Bench):
    trainer, batch = bench.build(CPOTrainer, CPOConfig, ROWS, bench.models[0], **options)
    theirs, found = trainer.get_batch_loss_metrics(trainer.model, batch)
    ids, mask, labels = pairs_of(trainer, batch)
    model = trainer.model
    ours = ak.cpo_loss(hidden_of(model, ids, mask), model.lm_head.weight, labels[:, 1:], **options)
    compare(model, ours.loss, theirs)
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    same_metrics(ours.metrics, found, *names, *(["nll_loss"] if options.get("cpo_alpha", 1.0) else []))


def test_simpo_is_cpo_without_likelihood(bench: Bench):
    trainer, batch = bench.build(
        CPOTrainer, CPOConfig, ROWS, bench.models[0], loss_type="alphapo", alpha=0.25, beta=2.0, simpo_gamma=0.9
    )
    theirs, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    ids, mask, labels = pairs_of(trainer, batch)
    hidden, weight = hidden_of(trainer.model, ids, mask), trainer.model.lm_head.weight
    ours = ak.simpo_loss(hidden, weight, labels[:, 1:], alpha=0.25, beta=2.0, simpo_gamma=0.9)
    compare(trainer.model, ours.loss, theirs)


def test_orpo(bench: Bench):
    trainer, batch = bench.build(ORPOTrainer, ORPOConfig, ROWS, bench.models[0], beta=0.3)
    theirs, found = trainer.get_batch_loss_metrics(trainer.model, batch)
    ids, mask, labels = pairs_of(trainer, batch)
    whole = ids.masked_fill(mask == 0, -100)[: len(ROWS), 1:]  # prompt and completion
    hidden, weight = hidden_of(trainer.model, ids, mask), trainer.model.lm_head.weight
    ours = ak.orpo_loss(hidden, weight, labels[:, 1:], beta=0.3, nll_targets=whole)
    compare(trainer.model, ours.loss, theirs)
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "nll_loss")
    same_metrics(ours.metrics, found, *names, "log_odds_ratio", "log_odds_chosen")


# -- SFT, reward model ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft(loss_type: str, bench: Bench):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in ROWS]
    trainer, batch = bench.build(SFTTrainer, SFTConfig, rows, bench.models[0], loss_type=loss_type)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    hidden = hidden_of(trainer.model, batch["input_ids"], batch["attention_mask"])
    ours = ak.sft_loss(hidden, trainer.model.lm_head.weight, batch["labels"][:, 1:], loss_type=loss_type)
    compare(trainer.model, ours.loss, theirs)


@pytest.mark.parametrize("center", [None, 0.05])
@pytest.mark.parametrize("margin", [False, True])
def test_reward(margin: bool, center: float | None, bench: Bench):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    initializer_range=0.2, pad_token_id=1, num_labels=1)
    )  # fmt: skip
    rows = [row | ({"margin": 0.3 * i} if margin else {}) for i, row in enumerate(ROWS)]
    trainer, batch = bench.build(RewardTrainer, RewardConfig, rows, model, center_rewards_coefficient=center)
    given = batch.get("margin")
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    scores = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    ours = ak.reward_loss(*scores.chunk(2), margin=given, center_coef=center or 0.0)
    compare(trainer.model, ours.loss, theirs)
    same_metrics(ours.metrics, measured(trainer), "accuracy", "margin", "mean_reward")


# -- GRPO, RLOO -----------------------------------------------------------------------------------------------------
B, T, PROMPT = 5, 7, 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rollout(model: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What TRL's rollouts hand to its loss; ids and attention mask of the whole sequences."""
    rng = torch.Generator().manual_seed(5)
    mask = (torch.arange(T) < torch.tensor([7, 3, 1, 5, 6])[:, None]).long()
    inputs = {"completion_ids": torch.randint(2, 60, (B, T), generator=rng), "completion_mask": mask}
    inputs["prompt_ids"] = torch.randint(2, 60, (B, PROMPT), generator=rng)
    inputs["prompt_mask"] = torch.ones(B, PROMPT, dtype=torch.long)
    ids, attention = (torch.cat((inputs[f"prompt_{k}"], inputs[f"completion_{k}"]), 1) for k in ("ids", "mask"))
    with torch.no_grad():
        targets = targets_of({"input_ids": ids, "completion_mask": completion_of(mask)})
        hidden = hidden_of(model, ids, attention)
        near = ak.linear_logprobs(hidden, model.lm_head.weight, targets).logp[:, PROMPT - 1 :]
    for name, seed in (("old_per_token_logps", 1), ("ref_per_token_logps", 2), ("sampling_per_token_logps", 3)):
        inputs[name] = near + 0.3 * normal(B, T, seed=seed)
    inputs["old_logps"] = (inputs["old_per_token_logps"] * mask).sum(1)
    inputs["advantages"], inputs["num_items_in_batch"] = normal(B, seed=4), mask.sum()
    return inputs, ids, attention


def completion_of(mask: Tensor) -> Tensor:
    return torch.cat((torch.zeros(B, PROMPT, dtype=torch.long), mask), 1)


def padded(x: Tensor) -> Tensor:
    """[B, T] of completions in the shape of the targets."""
    return torch.cat((torch.zeros(B, PROMPT - 1), x), 1)


def policy_trainer(bench: Bench, kind: type, config: type, **options: Any) -> Any:
    args = bench.args(config, num_generations=5, max_completion_length=9, **options)
    rows = Dataset.from_list([{"prompt": "w1 w2"}] * B)
    rewards = lambda completions, **rest: [0.0] * len(completions)  # noqa: E731
    trainer = kind(bench.models[0], rewards, args=args, train_dataset=rows, processing_class=bench.tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


GRPO: list[dict[str, Any]] = [
    *(dict(loss_type=name) for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "sapo", "vespo")),
    *(dict(loss_type=n, importance_sampling_level="sequence") for n in ("grpo", "dapo", "luspo", "sapo")),
    dict(loss_type="cispo", epsilon_high=1.2),
    dict(loss_type="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=0.5),
    dict(loss_type="vespo", vespo_k_pos=1.0, vespo_lambda_neg=0.5, beta=0.1),
    dict(epsilon=0.1, epsilon_high=0.3, delta=1.2, beta=0.3),
    dict(beta=0.3, use_bias_correction_kl=True),
    dict(off_policy_mask_threshold=0.05, beta=0.1),
    dict(top_entropy_quantile=0.4, beta=0.1),
    dict(entropy_coef=0.2),
    dict(entropy_coef=0.2, top_entropy_quantile=0.4, loss_type="grpo"),
]


GMPO: list[dict[str, Any]] = [
    dict(epsilon=0.1),
    dict(epsilon=0.4, beta=0.3),
    dict(epsilon=0.1, epsilon_high=0.3, top_entropy_quantile=0.4),
]


@pytest.mark.parametrize("fresh", [False, True], ids=["rollout of before", "fresh rollout"])
@pytest.mark.parametrize("options", GMPO, ids=str)
def test_gmpo(options: dict[str, Any], fresh: bool, bench: Bench):
    trainer = policy_trainer(bench, GMPOTrainer, GMPOConfig, **options)
    check_group(trainer, options | dict(loss_type="gmpo", use_bias_correction_kl=False), fresh)


@pytest.mark.parametrize("fresh", [False, True], ids=["rollout of before", "fresh rollout"])
@pytest.mark.parametrize("options", GRPO, ids=str)
def test_grpo(options: dict[str, Any], fresh: bool, bench: Bench):
    check_group(policy_trainer(bench, GRPOTrainer, GRPOConfig, **options), options, fresh)


def check_group(trainer: Any, options: dict[str, Any], fresh: bool) -> None:
    model = trainer.model
    inputs, ids, attention = rollout(model)
    old = None if fresh else padded(inputs["old_per_token_logps"])
    if fresh:
        del inputs["old_per_token_logps"]
    if not options.get("off_policy_mask_threshold"):
        del inputs["sampling_per_token_logps"]
    sampled = inputs.get("sampling_per_token_logps")
    theirs = trainer._compute_loss(model, inputs)
    targets = targets_of({"input_ids": ids, "completion_mask": completion_of(inputs["completion_mask"])})
    if sampled is not None:  # TRL reads them for this mask without correcting for the sampler
        options = options | dict(vllm_importance_sampling_mode="token_truncate", sampling_logps=padded(sampled))
        options |= dict(vllm_importance_sampling_clip_min=1.0, vllm_importance_sampling_clip_max=1.0)
    ours = ak.grpo_loss(
        hidden_of(model, ids, attention), model.lm_head.weight, targets, old, inputs["advantages"],
        max_completion_length=9, ref_logps=padded(inputs["ref_per_token_logps"]), **options,
    )  # fmt: skip
    compare(model, ours.loss, theirs)
    names = ["entropy", *(["kl"] if "beta" in options else [])]
    if options.get("importance_sampling_level") != "sequence":  # TRL's are means over sequences there
        names += [name for name in ours.metrics if "clip" in name and "delta" not in options]
    same_metrics(ours.metrics, measured(trainer), *names)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("loss_type", ["dapo", "vespo"])
def test_grpo_with_a_foreign_sampler(loss_type: str, mode: str, bench: Bench):
    if loss_type == "vespo" and mode.startswith("sequence"):
        return
    options = dict(loss_type=loss_type, beta=0.2, off_policy_mask_threshold=0.05)
    trainer = policy_trainer(bench, GRPOTrainer, GRPOConfig, **options)
    model = trainer.model
    inputs, ids, attention = rollout(model)
    mask, old, sampled = (inputs[k] for k in ("completion_mask", "old_per_token_logps", "sampling_per_token_logps"))
    difference = (old - sampled) * mask
    found = (difference.sum(1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    found = found.clamp(0.8, 1.2) if mode.endswith("truncate") else found * ((found >= 0.8) & (found <= 1.2))
    inputs["importance_sampling_ratio"] = found
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    theirs = trainer._compute_loss(model, inputs)
    targets = targets_of({"input_ids": ids, "completion_mask": completion_of(mask)})
    bounds = dict(vllm_importance_sampling_clip_min=0.8, vllm_importance_sampling_clip_max=1.2)
    ours = ak.grpo_loss(
        hidden_of(model, ids, attention), model.lm_head.weight, targets, padded(old), inputs["advantages"],
        ref_logps=padded(inputs["ref_per_token_logps"]), sampling_logps=padded(sampled),
        vllm_importance_sampling_mode=mode, **bounds, **options,
    )  # fmt: skip
    compare(model, ours.loss, theirs)


def test_rloo(bench: Bench):
    trainer = policy_trainer(bench, RLOOTrainer, RLOOConfig, epsilon=0.1, epsilon_high=0.3)
    model = trainer.model
    inputs, ids, attention = rollout(model)
    theirs = trainer._compute_loss(model, inputs)
    targets = targets_of({"input_ids": ids, "completion_mask": completion_of(inputs["completion_mask"])})
    hidden, weight = hidden_of(model, ids, attention), model.lm_head.weight
    ours = ak.rloo_loss(
        hidden, weight, targets, inputs["old_logps"], inputs["advantages"], epsilon=0.1, epsilon_high=0.3
    )  # fmt: skip
    compare(model, ours.loss, theirs)
    same_metrics(ours.metrics, measured(trainer), *(name for name in ours.metrics if "clip" in name), "entropy")
