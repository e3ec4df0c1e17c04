"""What TRL 1.16 and Liger 0.8.5 refuse, drop in silence or get wrong in their losses, beside what happens here.

docs/losses.md names these tests, and those of test_compat.py and test_loss_trl.py.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest
import torch
import trl
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction
from torch import Tensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

import align_kernels as ak

from .test_compat import FULL, LIGER, RAGGED, labels, leaves, normal, same, same_gradients
from .test_loss_trl import ROWS as PAIRS
from .test_loss_trl import Bench, completion_of, hidden_of, padded, policy_trainer, rollout, targets_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("peers"))


# -- TRL ------------------------------------------------------------------------------------------------------------
def far_apart(bench: Bench, shift: float, **options: Any) -> tuple[Tensor, ak.LossOutput, list[Tensor]]:
    """TRL's loss and ours, with its gradients, where the reference is `shift` nats above the policy on the chosen."""
    trainer, batch = bench.build(DPOTrainer, DPOConfig, PAIRS, *bench.models, **options)
    ids, mask, targets = batch["input_ids"], batch["attention_mask"], targets_of(batch)
    model, trainer.precompute_ref_logps = trainer.model, True
    hidden = hidden_of(model, ids, mask)
    logps = ak.linear_logprobs(hidden, model.lm_head.weight, targets).logp.sum(1).detach()
    chosen, rejected = logps.chunk(2)
    batch |= {"ref_chosen_logps": chosen + shift, "ref_rejected_logps": rejected}
    theirs = trainer._compute_loss(model, batch, False)
    ref = torch.cat((chosen + shift, rejected))
    ours = ak.dpo_loss(hidden, model.lm_head.weight, targets, ref, **options)
    return theirs.detach(), ours, list(torch.autograd.grad(ours.loss, [p for p in model.parameters()]))


@pytest.mark.parametrize(
    "options",
    [dict(loss_type="discopop", beta=1.0), dict(f_divergence_type="forward_kl")],
    ids=str,
)
def test_trl_overflows_at_100_nats(options: dict[str, Any], bench: Bench):
    theirs, ours, grads = far_apart(bench, 100.0, **options)
    assert not theirs.isfinite()
    assert ours.loss.isfinite() and all(g.isfinite().all() for g in grads)


def test_trl_ratios_overflow(bench: Bench):
    trainer = policy_trainer(bench, GRPOTrainer, GRPOConfig)
    inputs, ids, attention = rollout(trainer.model)
    inputs["old_per_token_logps"] -= 100.0
    del inputs["sampling_per_token_logps"]
    assert not trainer._compute_loss(trainer.model, inputs).isfinite()
    targets = targets_of({"input_ids": ids, "completion_mask": completion_of(inputs["completion_mask"])})
    hidden, old = hidden_of(trainer.model, ids, attention), padded(inputs["old_per_token_logps"])
    out = ak.grpo_loss(hidden, trainer.model.lm_head.weight, targets, old, inputs["advantages"])
    (grad,) = torch.autograd.grad(out.loss, trainer.model.lm_head.weight)
    assert out.loss.isfinite() and grad.isfinite().all()


def test_trl_cispo_caps_the_ratio_at_a_fifth_by_default(bench: Bench):
    """epsilon_high=None means epsilon, 0.2, which for CISPO is the ratio's own limit."""
    losses = []
    for options in ({}, dict(epsilon_high=0.2)):
        trainer = policy_trainer(bench, GRPOTrainer, GRPOConfig, loss_type="cispo", **options)
        inputs, *_ = rollout(trainer.model)
        losses.append(float(trainer._compute_loss(trainer.model, inputs).detach()))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"cispo limits the ratio itself to epsilon_high: pass it, ScaleRL takes 5\.0"):
        ak.grpo_loss(torch.zeros(1, 1, 2), torch.zeros(3, 2), torch.zeros(1, 1).long(), None, torch.zeros(1),
                     loss_type="cispo")  # fmt: skip


def test_trl_empty_completions(bench: Bench):
    """A mean over no tokens: NaN in TRL's CPO and ORPO, 0 here."""
    logits, empty = torch.zeros(2, 3, 5), torch.full((2, 3), -100)
    assert CPOTrainer.get_batch_logps(logits, empty.clone(), average_log_prob=True).isnan().all()
    hidden, weight = normal(2, 3, 4, seed=0).requires_grad_(), normal(5, 4, seed=1)
    for loss in (ak.simpo_loss, ak.orpo_loss):
        out = loss(hidden, weight, empty)
        assert out.loss.isfinite() and torch.autograd.grad(out.loss, hidden)[0].isfinite().all()


def test_trl_options_without_effect(bench: Bench):
    """Smoothing that a loss does not have: TRL goes on (CPO with a warning), here it is an error."""
    options: dict[str, Any] = dict(loss_type="hinge", label_smoothing=0.1)
    bench.build(DPOTrainer, DPOConfig, PAIRS, *bench.models, **options)
    bench.build(CPOTrainer, CPOConfig, PAIRS, bench.models[0], **options)
    args = torch.zeros(2, 1, 2), torch.zeros(3, 2), torch.zeros(2, 1).long()
    for call in (ak.cpo_loss, lambda *x, **o: ak.dpo_loss(*x, torch.zeros(2), **o)):
        with pytest.raises(ValueError, match=r"label_smoothing=0\.1 is read by loss_type .*, not by hinge"):
            call(*args, **options)


def test_trl_has_no_ppo_and_no_bco():
    assert not hasattr(trl, "PPOTrainer")
    for name in ("ppo", "bco"):
        assert importlib.util.find_spec(f"trl.experimental.{name}") is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(loss_type=[]), "loss_type must be one of sigmoid"),
    (dict(loss_type=["sigmoid", "sfd"]), "loss_type must be one of sigmoid, .*got 'sfd'"),
    (dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0]), "loss_weights needs one per loss type: got 1 for"),
    (dict(loss_type="exo_pair"), r"exo_pair needs label_smoothing above 0, its paper takes 1e-3; got 0\.0"),
    (dict(loss_type="apo_zero", f_divergence_type="forward_kl"), "f_divergence_type=.* has no meaning for apo_"),
    (dict(f_divergence_type="chi"), "f_divergence_type must be one of reverse_kl"),
    (dict(loss_type="aot", use_weighting=True), "use_weighting weights pairs, which aot sorts apart"),
    (dict(average=False), "average=False is read by loss_type ipo, not by sigmoid"),
    (dict(discopop_tau=0.1), "discopop_tau=0.1 is read by loss_type discopop"),
    (dict(loss_type="discopop", discopop_tau=0.0), "discopop_tau must be above 0, got 0.0"),
    (dict(loss_type="dpop", dpop_lambda=-1.0), "dpop_lambda must not be negative, got -1.0"),
    (dict(ld_alpha=1.5), r"ld_alpha must lie in \[0, 1\], got 1.5"),
    (dict(ld_alpha=0.5), r"ref_logps with ld_alpha must have shape \(2, 1\), got \(2,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_dpo_refuses(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ak.dpo_loss(torch.zeros(2, 1, 2), torch.zeros(3, 2), torch.zeros(2, 1).long(), torch.zeros(2), **options)


# -- Liger ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("module", "options", "call"),
    [
        (LigerFusedLinearCPOLoss, dict(beta=0.3, alpha=0.5), lambda *x: ak.cpo_loss(*x, beta=0.3, cpo_alpha=0.5)),
        (LigerFusedLinearSimPOLoss, dict(beta=2.0, gamma=0.9, compute_nll_loss=False),
         lambda *x: ak.simpo_loss(*x, beta=2.0, simpo_gamma=0.9)),
        (LigerFusedLinearSimPOLoss, dict(label_smoothing=0.1, compute_nll_loss=False),
         lambda *x: ak.simpo_loss(*x, label_smoothing=0.1)),
        (LigerFusedLinearORPOLoss, dict(beta=0.4), lambda *x: ak.orpo_loss(*x, beta=0.4)),
    ],
)  # fmt: skip
def test_liger_reference_free(module: type, options: dict[str, Any], call: Any):
    x = leaves(bias=False)
    peer = module(**LIGER, **options)(x["weight"], x["hidden"], RAGGED, None)[0]
    ours = call(x["hidden"], x["weight"], RAGGED).loss
    same("loss", ours.detach(), peer.detach())
    same_gradients(ours, peer, x)


def test_liger_orpo_of_a_certain_answer():
    zero = torch.zeros(1, requires_grad=True)
    loss = LigerFusedLinearORPOFunction.preference_loss_fn(zero, zero - 1.0, FULL[:2])[0]
    assert torch.autograd.grad(loss, zero)[0].isnan().all()
    hidden = torch.tensor([[[50.0]], [[-1.0]]], requires_grad=True)
    out = ak.orpo_loss(hidden, torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1).long())
    assert torch.autograd.grad(out.loss, hidden)[0].isfinite().all()


def test_liger_lacks_ipo():
    x = leaves()
    with pytest.raises(ValueError, match="Unsupported loss_type: ipo"):
        LigerFusedLinearDPOLoss(loss_type="ipo")
    ours = ak.compat.LigerFusedLinearDPOLoss(loss_type="ipo", use_ref_model=False)
    loss, outputs = ours(x["weight"], x["hidden"], RAGGED, x["bias"])
    n = (RAGGED != -100).sum(1)
    chosen, rejected = outputs[0] / n[:3], outputs[1] / n[3:]
    same("ipo", loss.detach(), ((chosen - rejected - 5) ** 2).mean().detach())


def test_liger_kto_has_no_class_weights():
    assert not {"desirable_weight", "undesirable_weight"} & set(inspect.signature(LigerFusedLinearKTOLoss).parameters)


def test_liger_drops_smoothing():
    x, options = leaves(), dict(loss_type="hinge", use_ref_model=False)
    losses = [
        LigerFusedLinearDPOLoss(**LIGER, **options, label_smoothing=e)(x["weight"], x["hidden"], RAGGED, x["bias"])[0]
        for e in (0.0, 0.3)
    ]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"label_smoothing=0\.3 is read by loss_type .*, not by hinge"):
        ak.compat.LigerFusedLinearDPOLoss(**options, label_smoothing=0.3)


def test_liger_ratios_overflow():
    x, options = leaves(), dict(beta=0.0, use_ref_model=False)
    arguments = (x["hidden"], x["weight"], FULL, torch.ones_like(FULL), normal(6, seed=3), x["bias"])
    old = dict(old_per_token_logps=torch.full(FULL.shape, -200.0))
    assert not LigerFusedLinearGRPOLoss(**LIGER, **options)(*arguments, **old)[0].isfinite()
    assert ak.compat.LigerFusedLinearGRPOLoss(**options)(*arguments, **old)[0].isfinite()


MISSING = ("entropy_coef", "top_entropy_quantile", "off_policy_mask_threshold", "kl_estimator", "sampling_logps")


def test_liger_grpo_lacks_and_refuses():
    """Each works in `grpo_loss`: test_loss_formulas.py."""
    theirs = {*inspect.signature(LigerFusedLinearGRPOLoss).parameters}
    theirs |= {*inspect.signature(LigerFusedLinearGRPOLoss.forward).parameters}
    assert not theirs & set(MISSING) and set(MISSING) <= set(inspect.signature(ak.grpo_loss).parameters)
    x = leaves()
    arguments = (x["hidden"], x["weight"], FULL, torch.ones_like(FULL), normal(6, seed=3), x["bias"])
    for loss_type in ("cispo", "sapo"):
        options = dict(loss_type=loss_type, importance_sampling_level="sequence", beta=0.0)
        with pytest.raises(ValueError, match="Sequence-level importance sampling is not supported"):
            LigerFusedLinearGRPOLoss(**LIGER, **options)(*arguments)
        assert ak.compat.LigerFusedLinearGRPOLoss(**options)(*arguments)[0].isfinite()


def test_liger_luspo_counts_padding():
    """With a KL term Liger's mean runs over the padded length: longer padding, smaller loss."""
    x, targets = leaves(), labels(5, 4, 3, 2, 1, 5)
    mask = (targets != -100).long()
    options = dict(loss_type="luspo", importance_sampling_level="sequence", beta=0.1)

    def run(module: type, length: int) -> Tensor:
        cut = lambda t: t[:, :length]  # noqa: E731
        near = normal(6, 7, seed=5) * 0.1 - 5
        arguments = (cut(x["hidden"]), x["weight"], cut(targets).clamp(min=0), cut(mask), normal(6, seed=3), x["bias"])
        return module(**options, **LIGER)(*arguments, cut(near), cut(near))[0].detach()

    assert float(run(LigerFusedLinearGRPOLoss, 5)) != pytest.approx(float(run(LigerFusedLinearGRPOLoss, 7)), rel=0.05)
    ours = ak.compat.LigerFusedLinearGRPOLoss
    assert float(run(ours, 5)) == pytest.approx(float(run(ours, 7)), rel=1e-6)
