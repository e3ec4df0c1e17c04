"""Coefficients fused into the CUDA kernels, emulated on the CPU, against the losses' own definitions in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align_kernels.backends.cuda import losses as fused
from align_kernels.losses import LOSSES

from .test_cuda_kernels import Case, check_gradient, check_state, inside, untouched
from .tiles import empty_state

pytestmark = pytest.mark.usefixtures("emulator")

FACTOR = torch.tensor(0.37, dtype=torch.float64)
RATIO, REF = ("old_logps", "advantages"), ("old_logps", "advantages", "ref_logps", "weights")
TOKEN_LOSSES = [  # name, options, side tensors
    ("sft", {}, ()),
    ("ppo_clip", dict(cliprange=0.2), RATIO),
    ("ppo_clip", dict(cliprange=0.1, dual_clip=1.4, entropy_coef=0.3), RATIO),
    ("grpo", dict(epsilon=0.2, epsilon_high=0.3, delta=1.4, beta=0.0), (*RATIO, "weights")),
    ("grpo", dict(epsilon=0.2, epsilon_high=0.2, delta=None, beta=0.2), REF),
    ("grpo", dict(epsilon=0.2, epsilon_high=0.2, beta=0.2, use_bias_correction_kl=True), REF),
    ("grpo", dict(epsilon=0.2, epsilon_high=0.2, delta=None, beta=0.2), ("advantages", "ref_logps", "weights")),
]
UNIT_LOSSES = [
    ("dpo", dict(beta=0.1, loss_type=("sigmoid",), label_smoothing=0.0)),
    ("dpo", dict(beta=0.5, loss_type="sigmoid", label_smoothing=0.2)),
    ("dpo", dict(beta=0.2, loss_type="robust", label_smoothing=0.3)),
    ("dpo", dict(beta=0.1, loss_type="hinge", label_smoothing=0.0)),
    ("dpo", dict(beta=0.3, loss_type="ipo", label_smoothing=0.0)),
    ("kto", dict(beta=0.1)),
    ("kto", dict(beta=0.7, desirable_weight=0.4, undesirable_weight=1.7)),
]


def definition(name: str, hyper: dict, logp: Tensor, entropy: Tensor, **side: Tensor):
    """Values, metrics and FACTOR times the derivatives by log-prob and entropy, of the loss as it is defined."""
    spec = LOSSES[name]
    leaves = [logp.clone().requires_grad_(), entropy.clone().requires_grad_()]
    if name == "ppo_clip":
        side["entropy"] = leaves[1]
    side = {k: v.double() if v.is_floating_point() else v for k, v in side.items()}
    values, metrics = spec.fn(leaves[0], **side, **hyper)
    g, h = torch.autograd.grad(values.sum() * FACTOR, leaves, allow_unused=True, materialize_grads=True)
    return values.detach(), [metrics[key] for key in spec.metrics[: len(metrics)]], g, h


def sides(names: tuple[str, ...], logp: Tensor, spread: float) -> dict[str, Tensor]:
    """Side tensors of a token loss: ratios on both sides of every limit, advantages of both signs and none."""
    rng, n = torch.Generator().manual_seed(3), len(logp)
    made = dict(
        old_logps=logp.float() + spread * torch.randn(n, generator=rng),
        ref_logps=logp.float() + spread * torch.randn(n, generator=rng),
        advantages=torch.randn(n, generator=rng).where(torch.arange(n) % 5 > 0, 0.0),
        weights=torch.rand(n, generator=rng),
    )
    return {key: made[key] for key in names}


def close(got: Tensor, true: Tensor, rtol: float = 2e-6) -> None:
    torch.testing.assert_close(got.double(), true.double(), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("spread", [0.1, 1.0, 40.0])
@pytest.mark.parametrize(("name", "hyper", "given"), TOKEN_LOSSES)
def test_coefficients_of_tokens(name: str, hyper: dict, given: tuple, spread: float):
    """Two columns of p = 1/2, so that dL/dz of the target is half of dL/dlogp, and the entropy has no gradient."""
    n = 400
    z, state, targets = torch.zeros(n, 2), empty_state(n), torch.arange(n) % 2
    logp = torch.full((n,), 0.5, dtype=torch.float64).log()
    side, out = sides(given, logp, spread), torch.full((n, 2), torch.nan)
    options = dict(offset=0, vocab=2, bias=None, scale=1.0, softcap=None, temperature=1.0, clamp=None)
    made = fused.token_loss(name, hyper, z, state, targets, side, FACTOR, out=out, **options)
    values, metrics, g, _ = definition(name, hyper, logp, -logp, **side)
    if name != "sft" and not hyper.get("beta"):
        assert g.count_nonzero() < n, "no token is clipped"
    finite = values.abs() < 1e38  # beyond, float32 is infinite
    close(made.values[finite], values[finite])
    close(2 * out[range(n), targets], g.float())
    close(-2 * out[range(n), 1 - targets], g.float())
    for mine, true in zip(made.metrics, metrics):
        close(mine, true.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [0, 4000, -1], ids=["nothing kept", "a part kept", "all kept"])
@pytest.mark.parametrize("place", ["apart", "in z", "16 bits"])
@pytest.mark.parametrize(("name", "hyper", "given"), TOKEN_LOSSES[2:6])
def test_rows_of_a_token_loss(name: str, hyper: dict, given: tuple, shared: int, dtype: torch.dtype, place: str):
    """The one kernel equals statistics, the loss's definition and the gradient, one after the other."""
    case = Case(6, 3501, dtype=dtype, softcap=9.0 if shared else None, temperature="rows", shift=3, spread=1.0)
    clamp = (0.3, 0.01, "residual") if place == "apart" else None
    true = case.true_state()
    log_s = true[:, 1].log()
    logp, entropy = true[:, 5] - true[:, 0] - log_s, log_s - true[:, 2] / true[:, 1]
    side = sides(given, logp, 0.2)
    values, metrics, g, h = definition(name, hyper, logp, entropy, **side)
    case.g, case.h = g, h
    expected = case.true_gradient(entropy=True, clamp=clamp)
    out = case.z
    if place != "in z":
        out = inside(torch.full(case.z.shape, torch.nan), dtype if place == "apart" else torch.bfloat16, 1)
    if place == "16 bits" and dtype == torch.float16:
        return
    state = empty_state(case.n)
    untouched_twin = Case(6, 3501, dtype=dtype, softcap=case.softcap, temperature="rows", shift=3, spread=1.0)
    made = fused.token_loss(
        name, hyper, case.z, state, case.targets, side, FACTOR, clamp=clamp, out=out, shared=shared, **case.options()
    )
    untouched(out)
    check_state(untouched_twin, state)
    check_gradient(case, out, expected, least=1e-2)  # g is a difference of terms
    close(made.values, values, rtol=1e-5)
    for mine, want in zip(made.metrics, metrics):
        close(mine, want, rtol=1e-5)


@pytest.mark.parametrize("spread", [0.5, 60.0])
@pytest.mark.parametrize(("name", "hyper"), UNIT_LOSSES)
def test_sums_and_coefficients_of_sequences(name: str, hyper: dict, spread: float):
    units, rng = 9, torch.Generator().manual_seed(5)
    sequences = units * 2 if name == "dpo" else units
    place = torch.cat([torch.full((k * 67 % 311,), k) for k in range(sequences)])  # sequence 0 is empty
    place = place[torch.randperm(len(place), generator=rng)]
    case = Case(len(place), 13)
    state = case.true_state()
    logp = (state[:, 5] - state[:, 0] - state[:, 1].log()).double()
    total = torch.zeros(sequences, dtype=torch.float64).index_add(0, place, logp)
    side = dict(ref_logps=(total + spread * torch.randn(sequences, generator=rng)).float())
    if name == "kto":
        side |= dict(desirable=torch.arange(units) % 3 > 0, kl=torch.rand(units, generator=rng))
    made = fused.unit_loss(name, hyper, state, place, units, side, FACTOR)
    lengths = dict(lengths=torch.bincount(place, minlength=sequences).double()) if name == "dpo" else {}
    values, metrics, g, _ = definition(name, hyper, total, total, **side, **lengths)
    close(made.values, values, rtol=1e-5)
    close(made.g, g[place].float(), rtol=1e-5)
    for mine, true in zip(made.metrics, metrics):
        close(mine, true, rtol=1e-5)
    again = fused.unit_loss(name, hyper, state, place, units, side, FACTOR)
    assert all(map(torch.equal, made, again))


def test_what_is_not_known_whole_is_not_served():
    dpo, side = dict(UNIT_LOSSES[0][1]), dict(ref_logps=torch.zeros(2))
    assert fused.serves("dpo", dpo, side)
    assert not fused.serves("dpo", dpo | dict(loss_type="another"), side)
    assert not fused.serves("dpo", dpo | dict(loss_type=("sigmoid", "hinge")), side)
    assert not fused.serves("dpo", dpo | dict(use_weighting=True), side)
    assert not fused.serves("grpo", dict(beta=0.1), ("advantages", "weights"))
    assert not fused.serves("grpo", dict(term="sapo"), ("advantages", "weights"))
    assert not fused.serves("grpo", dict(vespo_k_pos=3.0), ("advantages", "weights"))
    clip = LOSSES["grpo"].read(dict(term="clip", vespo_k_pos=3.0, epsilon=0.2))  # which does not read it
    assert clip == dict(term="clip", epsilon=0.2) and fused.serves("grpo", clip, ("advantages", "weights"))
    assert not fused.serves("dpo", dpo | dict(another=1.0), side)
    assert not fused.serves("dpo", dpo, side | dict(another=torch.zeros(2)))
    assert not fused.serves("gspo", {}, ())
    with pytest.raises(ValueError, match=r"no fused coefficient of sequences for dpo with .*another"):
        fused.unit_loss("dpo", dpo | dict(another=1.0), empty_state(1), torch.zeros(1).long(), 1, side, FACTOR)
    z, state = torch.zeros(2, 3), empty_state(2)
    options = dict(vocab=6, bias=None, scale=1.0, softcap=None, temperature=1.0, clamp=None)
    with pytest.raises(ValueError, match=r"needs whole rows, got columns 3 \.\. 6 of 6"):
        fused.token_loss("sft", {}, z, state, torch.zeros(2).long(), {}, FACTOR, offset=3, out=z, **options)


@pytest.mark.parametrize("name", sorted(fused.LOSSES))
def test_the_table_knows_the_losses_as_they_are(name: str):
    """Each served loss has the side tensors and the number of metrics that the kernels take."""
    spec, known = LOSSES[name], fused.LOSSES[name]
    assert known.side | known.optional <= set(spec.side)
    defaults, others = spec.keywords
    assert not others
    for key, value in (known.taken | known.neutral).items():
        assert defaults[key] == value, key
