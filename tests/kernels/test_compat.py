"""`align_kernels.compat` against the functions that it stands in for, as their packages ship them, on the CPU, float32.

What a peer does otherwise on purpose here is shown next to it: the peer's own result, and ours.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cut_cross_entropy
import pytest
import torch
import trl.trainer.utils as trl_utils
from accuracy import largest
from liger_kernel.chunked_loss import (
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearKTOLoss,
)
from processes import run_on_two
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.kernels import ChunkedLogProbFunction

from align_kernels import compat

B, T, V, D = 6, 7, 123, 19
LIGER = dict(compiled=False)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves(*, bias: bool = True, train: tuple[str, ...] = ("hidden", "weight", "bias")) -> dict[str, Tensor | None]:
    made = {"hidden": normal(B, T, D, seed=0), "weight": normal(V, D, seed=1) * 0.5}
    if bias:
        made["bias"] = normal(V, seed=2) * 0.3
    made = {name: x.requires_grad_(name in train) for name, x in made.items()}
    return {"bias": None} | made


def labels(*lengths: int) -> Tensor:
    targets = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
    return targets.masked_fill(torch.arange(T) >= torch.tensor(lengths)[:, None], -100)


RAGGED = labels(7, 3, 1, 5, 6, 2)
FULL = labels(*[T] * B)


def same(name: str, ours: Any, peer: Any, scale: float = 0.0) -> None:
    """Equal to 1e-5 of the largest entry, through tuples and None."""
    if isinstance(peer, tuple):
        assert len(ours) == len(peer), name
        for i, (a, b) in enumerate(zip(ours, peer)):
            same(f"{name}[{i}]", a, b, scale)
    elif peer is None or peer.dtype == torch.bool:
        assert (ours is None and peer is None) or torch.equal(ours, peer), name
    else:
        assert (ours.shape, ours.dtype) == (peer.shape, peer.dtype), name
        error, allowed = largest(ours - peer), 1e-5 * max(largest(peer), scale)
        assert error <= allowed, f"{name}: {error:.3e}, allowed {allowed:.3e}"


def same_gradients(ours: Tensor, peer: Tensor, tensors: dict[str, Tensor | None]) -> None:
    wanted = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
    for name, a, b in zip(
        wanted, *(torch.autograd.grad(0.7 * x, list(wanted.values()), retain_graph=True) for x in (ours, peer))
    ):
        same(f"gradient of {name}", a, b)


# -- TRL ----------------------------------------------------------------------------------------------------------
ours_chunked = compat.ChunkedLogProbFunction.apply


@pytest.mark.parametrize(
    "outputs", [("log_probs",), ("entropy",), ("entropy", "mean_logits"), ("is_top1", "log_sum_sq_probs"), None]
)
@pytest.mark.parametrize(
    "head", [dict(), dict(bias=False), dict(train=("hidden",)), dict(train=("weight", "bias"))], ids=str
)
@pytest.mark.parametrize("transform", [(1.0, 50, None, 1.0), (0.7, 32768, 5.0, 0.25)])
def test_trl_chunked(transform: tuple, head: dict[str, Any], outputs: tuple[str, ...] | None):
    x = leaves(**head)
    arguments = (x["hidden"].flatten(0, 1), x["weight"], x["bias"], FULL.flatten(), *transform)
    arguments += () if outputs is None else (outputs,)
    ours, peer = ours_chunked(*arguments), ChunkedLogProbFunction.apply(*arguments)
    same("outputs", ours, peer, scale=1.0)
    g, h = normal(B * T, seed=4), normal(B * T, seed=5)
    totals = [(g * out[0]).sum() + (0.0 if out[1] is None else (h * out[1]).sum()) for out in (ours, peer)]
    same_gradients(*totals, x)


@pytest.mark.parametrize("items", [None, torch.tensor(40)])
def test_trl_fused_lm_head(monkeypatch: pytest.MonkeyPatch, items: Tensor | None):
    """TRL's own hook, as every trainer adds it, runs on our function."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    models = [LlamaForCausalLM(config)]
    models.append(copy.deepcopy(models[0]))
    ids = FULL
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    results = []
    for model, function in zip(models, (compat.ChunkedLogProbFunction, ChunkedLogProbFunction)):
        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", function)
        trl_utils.add_fused_lm_head(model, temperature=0.8, outputs=fields)
        results.append(model(input_ids=ids, labels=RAGGED, fused_lm_head=True, num_items_in_batch=items))
        (results[-1].loss + 0.1 * results[-1].entropy.sum()).backward()
    ours, peer = results
    same("loss", ours.loss.detach(), peer.loss.detach())
    same("outputs", *(tuple(r[f].detach() for f in fields) for r in results), scale=1.0)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        same(f"gradient of {name}", a.grad, b.grad)


def test_trl_ignored_targets_read_zero():
    x = leaves()
    arguments = (x["hidden"].flatten(0, 1), x["weight"], x["bias"], RAGGED.flatten(), 1.0, 64)
    ignored = RAGGED.flatten() == -100
    ours, peer = ours_chunked(*arguments)[0], ChunkedLogProbFunction.apply(*arguments)[0]
    same("kept", ours[~ignored], peer[~ignored])
    assert not ours[ignored].any() and bool((peer[ignored] < -1).all())


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
def test_trl_selective_log_softmax(masked: bool, temperature: float, many: bool):
    logits = (3 * normal(B, T, V, seed=6)).requires_grad_()
    index = torch.stack((FULL, (FULL + 5) % V, FULL), -1) if many else FULL
    row_mask = torch.rand(index.shape, generator=torch.Generator().manual_seed(7)) < 0.6 if masked else None
    a = compat.selective_log_softmax(logits, index, temperature, row_mask)
    b = trl_utils.selective_log_softmax(logits, index, temperature, row_mask)
    same("log-probs", a, b)
    g = normal(*index.shape, seed=8)
    same_gradients((g * a).sum(), (g * b).sum(), {"logits": logits})


@pytest.mark.parametrize("chunk_size", [128, 3])
def test_trl_entropy_from_logits(chunk_size: int):
    logits = (3 * normal(B, T, V, seed=6)).requires_grad_()
    a, b = compat.entropy_from_logits(logits, chunk_size), trl_utils.entropy_from_logits(logits, chunk_size)
    same("entropy", a, b)
    g = normal(B, T, seed=8)
    same_gradients((g * a).sum(), (g * b).sum(), {"logits": logits})


def test_trl_logits_done_right():
    """bfloat16 keeps float32 results, and a forbidden token does not spoil the entropy."""
    logits = (3 * normal(B, T, V, seed=6)).bfloat16()
    truth = logits.double().log_softmax(-1)
    picked = truth.gather(-1, FULL[..., None])[..., 0]
    a, b = compat.selective_log_softmax(logits, FULL), trl_utils.selective_log_softmax(logits, FULL)
    assert a.dtype == torch.float32 and largest(a - picked) < 1e-5
    assert b.dtype == torch.bfloat16 and largest(b - picked) > 1e-3
    forbidden = normal(2, V, seed=9)
    forbidden[:, 5] = -torch.inf
    allowed = torch.cat((forbidden[:, :5], forbidden[:, 6:]), 1)
    assert bool(trl_utils.entropy_from_logits(forbidden).isnan().all())
    forbidden.requires_grad_()
    entropy = compat.entropy_from_logits(forbidden)
    same("entropy", entropy, trl_utils.entropy_from_logits(allowed))
    assert bool(torch.autograd.grad(entropy.sum(), forbidden)[0].isfinite().all())


def test_trl_refuses():
    x = leaves()
    arguments = (x["hidden"].flatten(0, 1), x["weight"], x["bias"], FULL.flatten(), 1.0, 64)
    with pytest.raises(ValueError, match=r"outputs may name log_probs, entropy, .*; got entropi"):
        ours_chunked(*arguments, None, 1.0, ("entropi",))
    assert ChunkedLogProbFunction.apply(*arguments, None, 1.0, ("entropi",))[1] is None
    with pytest.raises(ValueError, match=r"softcap must be a finite number above 0 or None, got 0\.0"):
        ours_chunked(*arguments, 0.0)
    same("a cap of 0", *(ChunkedLogProbFunction.apply(*arguments, cap, 1.0, ())[0] for cap in (0.0, 1.0)))
    with pytest.raises(ValueError, match=r"temperature must be .*above 0, got 0\.0"):
        compat.selective_log_softmax(normal(2, 3, V, seed=0), FULL[:2, :3], 0.0)
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0\.0"):
        compat.selective_log_softmax(normal(2, 3, V, seed=0), FULL[:2, :3, None], 0.0)


# -- Liger: DPO ---------------------------------------------------------------------------------------------------
def reference() -> dict[str, Tensor]:
    x = leaves()
    noise = {name: normal(*t.shape, seed=9 + i) for i, (name, t) in enumerate(x.items())}
    return {
        f"ref_{k}": (x[n] + 0.2 * noise[n]).detach()
        for k, n in (("input", "hidden"), ("weight", "weight"), ("bias", "bias"))
    }


def dpo(module: type, x: dict, targets: Tensor, given: dict, **options) -> tuple:
    return module(**LIGER, **options)(x["weight"], x["hidden"], targets, x["bias"], **given)


@pytest.mark.parametrize("head", [dict(), dict(bias=False), dict(train=("hidden",))], ids=str)
@pytest.mark.parametrize("use_ref_model", [True, False])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(loss_type="hinge", beta=0.5),
        dict(loss_type="robust", label_smoothing=0.2, chunk_size=2),
        dict(compute_nll_loss=True, alpha=0.3),
        dict(compute_nll_loss=True, chunk_size=3, alpha=2.0),
        dict(loss_type="exo_pair", label_smoothing=0.01),
        dict(loss_type="nca_pair"),
        dict(loss_type="bco_pair"),
        dict(loss_type="sppo_hard"),
        dict(loss_type="apo_zero"),
        dict(loss_type="apo_down"),
        dict(loss_type="discopop", discopop_tau=0.5),
    ],
    ids=str,
)
def test_liger_dpo(options: dict[str, Any], average: bool, use_ref_model: bool, head: dict[str, Any]):
    x = leaves(**head)
    options |= dict(use_ref_model=use_ref_model, average_log_prob=average)
    given = reference() if use_ref_model else {}
    ours = dpo(compat.LigerFusedLinearDPOLoss, x, RAGGED, given, **options)
    peer = dpo(LigerFusedLinearDPOLoss, x, RAGGED, given, **options)
    same("loss", ours[0], peer[0])
    for i in (0, 1, 4, 5, 6):
        same(f"outputs[{i}]", ours[1][i], peer[1][i], scale=1.0)
    same_gradients(ours[0], peer[0], x)


def test_liger_dpo_logits():
    """Mean logits are Liger's where no position is ignored, and those of the completions where some are."""
    x, given = leaves(), reference()
    ours, peer = (dpo(m, x, FULL, given) for m in (compat.LigerFusedLinearDPOLoss, LigerFusedLinearDPOLoss))
    same("loss and outputs", ours, peer, scale=1.0)
    same_gradients(ours[0], peer[0], x)
    _, ours = dpo(compat.LigerFusedLinearDPOLoss, x, RAGGED, given)
    logits = (x["hidden"] @ x["weight"].T + x["bias"]).detach().mean(-1)
    for i, half in enumerate((slice(0, B // 2), slice(B // 2, B))):
        same("mean logit", ours[2 + i], logits[half][RAGGED[half] != -100].mean(), scale=1.0)


def test_liger_dpo_done_right():
    x, given = leaves(), reference()
    # label_smoothing of the sigmoid loss: Liger drops it
    plain, smooth = (dpo(LigerFusedLinearDPOLoss, x, RAGGED, given, label_smoothing=e) for e in (0.0, 0.2))
    assert smooth[0] == plain[0]
    loss, (chosen, rejected, _, _, _, good, bad) = dpo(
        compat.LigerFusedLinearDPOLoss, x, RAGGED, given, label_smoothing=0.2
    )
    z = good - bad
    same("cDPO", loss.detach(), (-0.8 * z.sigmoid().log() - 0.2 * (-z).sigmoid().log()).mean())
    # a reference made before takes the place of its hidden states
    before = torch.cat((chosen, rejected)) - torch.cat((good, bad)) / 0.1
    module = compat.LigerFusedLinearDPOLoss(label_smoothing=0.2)
    same("precomputed", module(x["weight"], x["hidden"], RAGGED, x["bias"], ref_logps=before)[0], loss, scale=1.0)
    # an empty completion: 0 / 0 in Liger
    empty = labels(7, 0, 1, 5, 6, 2)
    assert dpo(LigerFusedLinearDPOLoss, x, empty, given, average_log_prob=True)[0].isnan()
    assert dpo(compat.LigerFusedLinearDPOLoss, x, empty, given, average_log_prob=True)[0].isfinite()


# -- Liger: KTO ---------------------------------------------------------------------------------------------------
MARKS = torch.tensor([True, False, False, True, True, False])


def kto(module: type, x: dict, targets: Tensor, given: dict, marks: Tensor = MARKS, **options) -> tuple:
    return module(**LIGER, **options)(x["hidden"], x["weight"], targets, x["bias"], preference_labels=marks, **given)


@pytest.mark.parametrize("head", [dict(), dict(bias=False), dict(train=("hidden",))], ids=str)
@pytest.mark.parametrize("use_ref_model", [True, False])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kl", [None, torch.tensor(0.8), torch.tensor([0.8])], ids=str)
@pytest.mark.parametrize("marks", [MARKS, MARKS | True], ids=["both", "desirable"])
def test_liger_kto(marks: Tensor, kl: Tensor | None, average: bool, use_ref_model: bool, head: dict[str, Any]):
    x = leaves(**head)
    options = dict(use_ref_model=use_ref_model, average_log_prob=average, beta=0.3, chunk_size=4)
    given = (reference() if use_ref_model else {}) | dict(kl=kl)
    ours = kto(compat.LigerFusedLinearKTOLoss, x, RAGGED, given, marks, **options)
    peer = kto(LigerFusedLinearKTOLoss, x, RAGGED, given, marks, **options)
    same("loss", ours[0], peer[0])
    for i in (0, 1, 4, 5):
        same(f"outputs[{i}]", ours[1][i], peer[1][i], scale=1.0)
    same_gradients(ours[0], peer[0], x)


def test_liger_kto_logits():
    x, given = leaves(), reference()
    ours, peer = (
        kto(m, x, FULL, given, use_ref_model=True) for m in (compat.LigerFusedLinearKTOLoss, LigerFusedLinearKTOLoss)
    )
    same("outputs", ours[1], peer[1], scale=V)
    same_gradients(ours[0], peer[0], x)
    _, ours = kto(compat.LigerFusedLinearKTOLoss, x, RAGGED, given, use_ref_model=True)
    logits = (x["hidden"] @ x["weight"].T + x["bias"]).detach().sum(-1)
    for i, rows in enumerate((MARKS, ~MARKS)):
        same("sum of logits", ours[2 + i], logits[rows][RAGGED[rows] != -100].sum(), scale=V)


def test_liger_kto_done_right():
    x, given = leaves(), reference()
    run = lambda module, given, **o: kto(module, x, RAGGED, given, beta=0.3, **o)  # noqa: E731
    # a reference that is passed while use_ref_model is off, its default: Liger drops it
    assert run(LigerFusedLinearKTOLoss, given)[0] == run(LigerFusedLinearKTOLoss, {})[0]
    assert run(LigerFusedLinearKTOLoss, given)[0] != run(LigerFusedLinearKTOLoss, given, use_ref_model=True)[0]
    with pytest.raises(ValueError, match="use_ref_model=False would drop ref_input and ref_weight"):
        run(compat.LigerFusedLinearKTOLoss, given)
    # kl of [B], as documented: Liger sums it over the batch once for every chunk
    scalar, each = dict(kl=torch.tensor(0.8)), dict(kl=torch.full((B,), 0.8))
    expected = run(LigerFusedLinearKTOLoss, given | scalar, use_ref_model=True)[0]
    assert run(LigerFusedLinearKTOLoss, given | each, use_ref_model=True)[0] > (B - 1) * expected
    same("kl per sequence", run(compat.LigerFusedLinearKTOLoss, given | each, use_ref_model=True)[0], expected)
    # class weights: Liger has none
    weights = dict(desirable_weight=1.3, undesirable_weight=0.4)
    loss, (*_, good, bad) = run(compat.LigerFusedLinearKTOLoss, given, use_ref_model=True, **weights)
    parts = [run(compat.LigerFusedLinearKTOLoss, given, use_ref_model=True, **{k: 0.0})[0] for k in weights]
    same("class weights", loss, 1.3 * parts[1] + 0.4 * parts[0])
    with pytest.raises(TypeError, match="desirable_weight"):
        LigerFusedLinearKTOLoss(**weights)
    # the reference of a PEFT policy: log-probs made with the adapter off
    r = reference()
    log_p = (r["ref_input"] @ r["ref_weight"].T + r["ref_bias"]).log_softmax(-1)
    before = (log_p.gather(-1, RAGGED.clamp(min=0)[..., None])[..., 0] * (RAGGED != -100)).sum(1)
    same("precomputed", run(compat.LigerFusedLinearKTOLoss, dict(ref_logps=before), **weights)[0], loss)
    assert good != bad


# -- Liger: GRPO --------------------------------------------------------------------------------------------------
MASK = (RAGGED != -100).long()


def grpo(module: type, x: dict, given: dict, **options) -> tuple:
    advantages = normal(B, seed=12)
    return module(**LIGER, **options)(x["hidden"], x["weight"], FULL, MASK, advantages, x["bias"], **given)


def policy_logps(x: dict, temperature: float, seed: int) -> Tensor:
    log_p = ((x["hidden"] @ x["weight"].T + (0.0 if x["bias"] is None else x["bias"])) / temperature).log_softmax(-1)
    return log_p.gather(-1, FULL[..., None])[..., 0].detach() + 0.3 * normal(B, T, seed=seed)


@pytest.mark.parametrize("head", [dict(), dict(bias=False), dict(train=("hidden",))], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(beta=0.0, use_ref_model=False, on_policy=True),
        dict(temperature=0.7, delta=1.2, epsilon_low=0.1, epsilon_high=0.3, chunk_size=4, items=90),
        dict(hidden_reference=True, temperature=1.4, vllm=(B, T)),
        dict(vllm=(B,)),
        dict(vllm=(B, 1), items=torch.tensor(31)),
    ],
    ids=str,
)
def test_liger_grpo(options: dict[str, Any], loss_type: str, level: str, head: dict[str, Any]):
    x, options = leaves(**head), dict(options)
    temperature = options.get("temperature", 1.0)
    given: dict[str, Any] = dict(num_items_in_batch=options.pop("items", None))
    if not options.pop("on_policy", False):
        given["old_per_token_logps"] = policy_logps(x, temperature, 13)
    if options.pop("hidden_reference", False):
        given |= reference()
    elif options.get("use_ref_model", True):
        given["ref_per_token_logps"] = policy_logps(x, temperature, 14)
    if "vllm" in options:
        given["vllm_is_ratio"] = normal(*options.pop("vllm"), seed=15).exp()
    options |= dict(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9)
    ours, peer = (grpo(m, x, given, **options) for m in (compat.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss))
    same("loss", ours[0], peer[0], scale=0.1)
    same("metrics", ours[1], peer[1])
    same_gradients(ours[0], peer[0], x)


@pytest.mark.parametrize(
    "options",
    [
        dict(loss_type="luspo", importance_sampling_level="sequence", beta=0.0),
        dict(loss_type="luspo", importance_sampling_level="sequence", beta=0.0, vllm=(B, 1), delta=1.1),
        dict(loss_type="cispo", epsilon_high=1.1, vllm=(B, T), items=40),
        dict(loss_type="cispo", epsilon_high=5.0, beta=0.0),
        dict(loss_type="sapo"),
        dict(loss_type="sapo", sapo_temperature_pos=2.0, sapo_temperature_neg=0.7, use_bias_correction_kl=True),
        dict(loss_type="vespo", items=40),
        dict(loss_type="vespo", vespo_k_pos=1.5, vespo_lambda_pos=2.0, vespo_k_neg=1.0, vespo_lambda_neg=0.5),
        dict(loss_type="dapo", use_bias_correction_kl=True, beta=0.4),
        dict(loss_type="grpo", use_bias_correction_kl=True, beta=0.4, importance_sampling_level="sequence"),
    ],
    ids=str,
)
def test_liger_grpo_family(options: dict[str, Any]):
    x, options = leaves(), dict(options)
    given: dict[str, Any] = dict(num_items_in_batch=options.pop("items", None))
    given |= dict(old_per_token_logps=policy_logps(x, 1.0, 13), ref_per_token_logps=policy_logps(x, 1.0, 14))
    if "vllm" in options:
        given["vllm_is_ratio"] = normal(*options.pop("vllm"), seed=15).exp()
    ours, peer = (grpo(m, x, given, **options) for m in (compat.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss))
    same("loss", ours[0], peer[0], scale=0.1)
    same("metrics", ours[1], peer[1])
    same_gradients(ours[0], peer[0], x)


def test_liger_grpo_done_right():
    x = leaves()
    given = dict(ref_per_token_logps=policy_logps(x, 1.0, 14))
    # a KL term without a reference: Liger takes the policy itself, also where one is passed
    for passed in ({}, given):
        kl, _ = grpo(LigerFusedLinearGRPOLoss, x, passed, beta=0.5, use_ref_model=False)[1]
        assert kl == 0
    assert grpo(LigerFusedLinearGRPOLoss, x, given, beta=0.5)[1][0] > 0
    with pytest.raises(ValueError, match=r"beta=0.5 needs a reference"):
        grpo(compat.LigerFusedLinearGRPOLoss, x, {}, beta=0.5, use_ref_model=False)
    with pytest.raises(ValueError, match="use_ref_model=False would drop ref_per_token_logps"):
        grpo(compat.LigerFusedLinearGRPOLoss, x, given, beta=0.5, use_ref_model=False)
    results = []
    for module in (compat.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss):
        with pytest.warns(UserWarning, match="ref_input"):
            results.append(grpo(module, x, given | reference()))
    same("both references", *results)


REFUSED = [
    (compat.LigerFusedLinearDPOLoss, dict(loss_type="aot"), "loss_type='aot' is not served; one of sigmoid"),
    (compat.LigerFusedLinearDPOLoss, dict(loss_type="ipo", average_log_prob=True), "average_log_prob=True is not"),
    (compat.LigerFusedLinearDPOLoss, dict(loss_type="hinge", label_smoothing=0.1), "label_smoothing=0.1 is read by"),
    (compat.LigerFusedLinearDPOLoss, dict(loss_type="exo_pair"), "exo_pair needs label_smoothing above 0"),
    (compat.LigerFusedLinearDPOLoss, dict(label_smoothing=0.5), r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
    (compat.LigerFusedLinearDPOLoss, dict(discopop_tau=0.1), "discopop_tau=0.1 is read by loss_type discopop, not"),
    (compat.LigerFusedLinearDPOLoss, dict(beta=0.0), "beta must be above 0, got 0.0"),
    (compat.LigerFusedLinearKTOLoss, dict(beta=-1.0), "beta must be above 0, got -1.0"),
    (compat.LigerFusedLinearGRPOLoss, dict(loss_type="gmpo"), "loss_type='gmpo' is not served; one of grpo, bnpo"),
    (compat.LigerFusedLinearGRPOLoss, dict(loss_type="luspo"), "importance_sampling_level='token' is not served"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "options", "message"), REFUSED)
def test_liger_refuses_options(module: type, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_liger_refuses_tensors():
    x, given = leaves(), reference()
    two = r"ref_logps and ref_input are two references"
    with pytest.raises(ValueError, match=two):
        dpo(compat.LigerFusedLinearDPOLoss, x, RAGGED, given | dict(ref_logps=torch.zeros(B)))
    with pytest.raises(ValueError, match="use_ref_model=True needs ref_input and ref_weight"):
        dpo(compat.LigerFusedLinearDPOLoss, x, RAGGED, {})
    with pytest.raises(ValueError, match=r"ref_logps must have shape \(6,\), got \(3,\)"):
        dpo(compat.LigerFusedLinearDPOLoss, x, RAGGED, dict(ref_logps=torch.zeros(3)))
    with pytest.raises(ValueError, match="pairs need an even number of sequences"):
        odd = {"weight": x["weight"], "hidden": x["hidden"][:5], "bias": None}
        dpo(compat.LigerFusedLinearDPOLoss, odd, RAGGED[:5], {}, use_ref_model=False)
    with pytest.raises(ValueError, match=r"preference_labels must be a bool tensor \[B\]"):
        kto(compat.LigerFusedLinearKTOLoss, x, RAGGED, {}, MARKS.long())
    with pytest.raises(ValueError, match=r"kl must have shape \(6,\) or \(\) or \(1,\), got \(2,\)"):
        kto(compat.LigerFusedLinearKTOLoss, x, RAGGED, dict(kl=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"vllm_is_ratio must have shape \(6,\) or \(6, 1\) or \(6, 7\), got \(7,\)"):
        grpo(compat.LigerFusedLinearGRPOLoss, x, dict(vllm_is_ratio=torch.ones(T)), beta=0.0)


# -- Cut Cross-Entropy --------------------------------------------------------------------------------------------
def cce_peer(*arguments, **options) -> Tensor:
    """The peer's torch path, not compiled: the same lines without ten seconds of compilation."""
    with torch.compiler.set_stance("force_eager"):
        return cut_cross_entropy.linear_cross_entropy(*arguments, impl="torch_compile", **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(softcap=3.0, ignore_index=7)], ids=str)
@pytest.mark.parametrize("train", [("hidden", "weight"), ("hidden",)], ids=str)
def test_cce(train: tuple[str, ...], options: dict[str, Any], shift: bool, reduction: str):
    x = leaves(bias=False, train=train)
    targets = RAGGED.where(RAGGED != -100, options.get("ignore_index", -100))
    arguments = (x["hidden"], x["weight"], targets)
    ours = compat.cce.linear_cross_entropy(*arguments, reduction=reduction, shift=shift, **options)
    peer = cce_peer(*arguments, reduction=reduction, shift=shift, **options)
    same("loss", ours, peer)
    g = normal(*peer.shape, seed=16) if peer.dim() else torch.ones(())
    same_gradients((g * ours).sum(), (g * peer).sum(), x)


def test_cce_arguments():
    """Positions of the arguments, the peer's enum, its filter, a bias, and a batch without targets."""
    x = leaves()
    arguments = (x["hidden"], x["weight"], RAGGED, -100, 5.0, "sum", True)
    expected = cce_peer(*arguments)
    same("by position", compat.cce.linear_cross_entropy(*arguments, None, "cce"), expected)
    for impl in cut_cross_entropy.LinearCrossEntropyImpl:
        same("enum", compat.cce.linear_cross_entropy(*arguments, "auto", impl), expected)
    biased = compat.cce.linear_cross_entropy(x["hidden"], x["weight"], FULL, bias=x["bias"])
    logits = x["hidden"] @ x["weight"].T + x["bias"]
    same("bias", biased, torch.nn.functional.cross_entropy(logits.flatten(0, 1), FULL.flatten()))
    nothing = (x["hidden"], x["weight"], torch.full_like(RAGGED, -100))
    assert cce_peer(*nothing).isnan() and compat.cce.linear_cross_entropy(*nothing) == 0
    for options, message in (
        (dict(reduction="max"), "reduction must be mean, sum or none, got 'max'"),
        (dict(impl="torch"), "impl must be one of cce, .*torch_compile, got 'torch'"),
        (dict(filter_eps="low"), "filter_eps must be a number, auto, high or None, got 'low'"),
    ):
        with pytest.raises(ValueError, match=message):
            compat.cce.linear_cross_entropy(*nothing, **options)


# -- verl: its kernel needs a GPU, so the lines that its own tests compare it with --------------------------------
def verl_peer(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, reduction: str = "none"):
    logits = hidden.reshape(-1, hidden.shape[-1]).float() @ weight.float().T
    logits /= temperature
    entropy = torch.logsumexp(logits, -1) - torch.sum(logits.softmax(-1) * logits, -1)
    return -torch.nn.functional.cross_entropy(logits, labels.reshape(-1), reduction=reduction), entropy


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "None"])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("train", [("hidden", "weight"), ("hidden",)], ids=str)
def test_verl(train: tuple[str, ...], flat: bool, temperature: float, reduction: str):
    x = leaves(bias=False, train=train)
    hidden, targets = (x["hidden"].flatten(0, 1), FULL.flatten()) if flat else (x["hidden"], FULL)
    ours = compat.verl.linear_cross_entropy(hidden, x["weight"], targets.int(), temperature, reduction)
    peer = verl_peer(hidden, x["weight"], targets, temperature, reduction.lower())
    same("outputs", ours, peer)
    g, h = normal(*peer[0].shape, seed=17), normal(B * T, seed=18)
    same_gradients(*((g * logp).sum() + (h * entropy).sum() for logp, entropy in (ours, peer)), x)


def test_verl_ignored_labels():
    x = leaves(bias=False)
    logps, entropy = compat.verl.linear_cross_entropy(x["hidden"], x["weight"], RAGGED)
    mean, _ = compat.verl.linear_cross_entropy(x["hidden"], x["weight"], RAGGED, 1.0, "mean")
    kept = RAGGED.flatten() != -100
    assert not logps[~kept].any() and not entropy[~kept].any()
    same("mean", mean, verl_peer(x["hidden"], x["weight"], RAGGED, 1.0, "mean")[0])
    same("entropy", entropy[kept], verl_peer(x["hidden"], x["weight"], RAGGED, 1.0)[1][kept])
    with pytest.raises(ValueError, match="reduction must be none, sum or mean, got 'max'"):
        compat.verl.linear_cross_entropy(x["hidden"], x["weight"], RAGGED, 1.0, "max")


RANK = """
import sys, torch, torch.distributed as dist
from align_kernels.compat.verl import linear_cross_entropy
path = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
x = torch.load(f"{path}/inputs.pt")
hidden, shard = x["hidden"].requires_grad_(), x["weight"].split(71)[rank].clone().requires_grad_()
logps, entropy = linear_cross_entropy(hidden, shard, x["labels"], 1.5, "none", dist.group.WORLD)
((x["g"] * logps).sum() + (x["h"] * entropy).sum()).backward()
dist.all_reduce(hidden.grad)
torch.save([logps.detach(), entropy.detach(), hidden.grad, shard.grad], f"{path}/{rank}.pt")
"""


def test_verl_vocabulary_parallel(tmp_path: Path):
    """Two ranks with uneven shards; the caller sums the gradient of hidden over the group, as verl's callers do."""
    x = leaves(bias=False)
    g, h = normal(B * T, seed=17), normal(B * T, seed=18)
    inputs = dict(hidden=x["hidden"].detach(), weight=x["weight"].detach(), labels=FULL.clone(), g=g, h=h)
    torch.save(inputs, tmp_path / "inputs.pt")
    run_on_two(RANK, tmp_path)
    logps, entropy = verl_peer(x["hidden"], x["weight"], FULL, 1.5)
    grads = torch.autograd.grad((g * logps).sum() + (h * entropy).sum(), (x["hidden"], x["weight"]))
    for rank, shard in enumerate(grads[1].split(71)):
        same(f"rank {rank}", tuple(torch.load(tmp_path / f"{rank}.pt")), (logps, entropy, grads[0], shard))


@pytest.mark.parametrize("shift", [False, True, 0, 1, 2, 7, 8])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cce_shifts_by_any_number(shift: int, reduction: str):
    """Position i predicts target i + shift, as the peer's later releases read whole numbers."""
    rng = torch.Generator().manual_seed(0)
    e, c = torch.randn(2, 8, 16, generator=rng), torch.randn(50, 16, generator=rng)
    targets = torch.randint(0, 50, (2, 8), generator=rng)
    logits = (e.double() @ c.double().T)[:, : 8 - shift]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets[:, int(shift) :], reduction="none")
    got = compat.cce.linear_cross_entropy(e, c, targets, shift=shift, reduction=reduction)
    expected = expected if reduction == "none" else expected.mean().nan_to_num(0.0)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_cce_shifts_no_further_than_the_positions():
    e, c, targets = torch.zeros(2, 8, 4), torch.zeros(5, 4), torch.zeros(2, 8, dtype=torch.int64)
    for shift in (-1, 9):
        with pytest.raises(ValueError, match=rf"shift must lie in \[0, 8\], the positions of targets, got {shift}"):
            compat.cce.linear_cross_entropy(e, c, targets, shift=shift)
    with pytest.raises(TypeError, match=r"shift must be True or False or a whole number, got 1\.5"):
        compat.cce.linear_cross_entropy(e, c, targets, shift=1.5)  # type: ignore[arg-type]
