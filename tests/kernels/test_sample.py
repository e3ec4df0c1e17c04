"""`linear_sample` against the inverse of the distribution in float64, and against the distribution itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import check, largest
from devices import there
from processes import run_on_two
from torch import Tensor

from align_kernels import linear_sample

from .oracle import Case, raw_logits, transform
from .test_logprobs import CASES, make, normal, with_rows

linear_sample = there(linear_sample)
IMPLS = ("torch", "cpu", "eager")
MORE: dict[str, Callable[[], Case]] = {
    "blocks": lambda: make((9,), 7 * 2048, 16),
    "blocks and a rest": lambda: with_rows(make((9,), 5 * 2048 + 77, 16, bias=True, rank=3, softcap=6.0)),
    "a block": lambda: make((9,), 2048, 16),
}


def all_kept(case: Case) -> Case:
    case.targets = torch.zeros(case.tensors["hidden"].shape[:-1], dtype=torch.int64)
    case.ignore_index = -100
    return case


def uniform(shape: torch.Size, seed: int = 7) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_probs(case: Case, dtype: torch.dtype | None = torch.float64) -> Tensor:
    """[N, V], of every row."""
    return transform(case, raw_logits(case, case.leaves(dtype))).double().log_softmax(1).detach()


def sampled(case: Case, u: Tensor, impl: str, **options) -> tuple[Tensor, Tensor, Tensor]:
    arguments = {k: v for k, v in case.keywords(case.tensors).items() if k not in ("ignore_index", "grad_clamp")}
    return linear_sample(case.tensors["hidden"], case.tensors["weight"], u, **arguments, impl=impl, **options)


@pytest.mark.parametrize("name", CASES | MORE)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_token_is_the_inverse_of_the_distribution(name: str, impl: str):
    verify(all_kept((CASES | MORE)[name]()), impl)


def verify(case: Case, impl: str) -> None:
    """Tokens, log-probs and entropies of every row of a case."""
    u = uniform(case.targets.shape)
    tokens, logp, entropy = sampled(case, u, impl)
    assert tokens.shape == logp.shape == entropy.shape == u.shape and tokens.dtype == torch.int64
    true = log_probs(case)
    eager = log_probs(case, None) if case.narrow else None
    sums = true.exp().cumsum(1)
    want = (sums <= u.view(-1, 1) * sums[:, -1:]).sum(1)
    got = tokens.flatten()
    off = 2e-6 if eager is None else 2e-6 + float((eager.exp().cumsum(1) - sums).abs().amax()) * 1.5
    if got.numel():
        above = sums.gather(1, got[:, None])[:, 0]
        below = above - true.gather(1, got[:, None])[:, 0].exp()
        assert bool(((below - off <= u.flatten()) & (u.flatten() <= above + off)).all())
        assert eager is not None or int((got != want).sum()) == 0
    scale = largest(raw_logits(case, case.leaves(torch.float64)))
    for field, of in ((logp.flatten(), lambda p: p.gather(1, got[:, None])[:, 0]),
                      (entropy.flatten(), lambda p: -(p.exp() * p).nansum(1))):  # fmt: skip
        check("field", field, of(true), None if eager is None else of(eager), scale=max(scale, 1.0))


def test_draws_have_the_frequencies_of_the_softmax():
    """Chi-square over the tokens that are expected five times or more, and the rest as one; two blocks and a rest."""
    vocab, draws = 2 * 2048 + 100, 20000
    hidden, weight = normal(1, 6, seed=1), normal(vocab, 6, seed=2) * 1.5
    u = uniform(torch.Size([draws]), seed=11)
    tokens, *_ = linear_sample(hidden.expand(draws, 6), weight, u, temperature=0.8)
    expected = draws * (hidden.double() @ weight.double().T / 0.8).softmax(1)[0]
    seen = torch.bincount(tokens, minlength=vocab).double()
    often = expected >= 5
    seen, expected = (torch.cat((x[often], x[~often].sum()[None])) for x in (seen, expected))
    freedom = len(expected) - 1
    chi = float(((seen - expected) ** 2 / expected).sum())
    assert freedom > 200 and abs(chi - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_the_ends_of_the_distribution_have_mass(impl: str):
    """u = 0 and the largest u below 1 give tokens that can be drawn, not the first and last column."""
    weight = torch.full((3 * 2048 + 5, 1), -5000.0)
    weight[3000], weight[5000] = 1.0, 1.0
    u = torch.tensor([0.0, 0.25, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logp, entropy = linear_sample(torch.ones(4, 1), weight, u, impl=impl)
    assert tokens.tolist() == [3000, 3000, 5000, 5000]
    torch.testing.assert_close(logp, torch.full((4,), 0.5).log())
    torch.testing.assert_close(entropy, torch.full((4,), 2.0).log())


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_a_small_workspace_gives_the_same_tokens(impl: str):
    case = all_kept(make((40,), 5 * 2048 + 9, 16))
    u = uniform(case.targets.shape)
    whole, cut = sampled(case, u, impl), sampled(case, u, impl, workspace=3 * 4 * 5 * 2048)
    assert torch.equal(whole[0], cut[0])
    torch.testing.assert_close(whole[1], cut[1])


ON_TWO = """
import torch, torch.distributed as dist
from align_kernels import linear_sample

dist.init_process_group("gloo")
draw = torch.Generator().manual_seed(0)
vocab, cut = 4 * 2048 + 100, 3 * 2048 + 7
hidden, weight, bias = (torch.randn(*size, generator=draw) for size in ((40, 8), (vocab, 8), (vocab,)))
u = torch.rand(40, generator=draw, dtype=torch.float64)
mine = slice(0, cut) if dist.get_rank() == 0 else slice(cut, vocab)
for impl in ("torch", "cpu"):
    whole = linear_sample(hidden, weight, u, bias=bias, impl=impl)
    found = linear_sample(hidden, weight[mine], u, bias=bias[mine], tp_group=dist.group.WORLD, impl=impl)
    assert {bool(token < cut) for token in whole.tokens} == {True, False}
    assert torch.equal(found.tokens, whole.tokens)
    torch.testing.assert_close(found.logp, whole.logp)
    torch.testing.assert_close(found.entropy, whole.entropy)
"""


def test_a_vocabulary_shared_out_over_two_ranks_gives_the_same():
    run_on_two(ON_TWO)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_not_numbers_say_so(impl: str):
    hidden = normal(3, 4)
    hidden[1] = torch.nan
    tokens, logp, _ = linear_sample(hidden, normal(3000, 4), torch.full((3,), 0.5), impl=impl)
    assert logp.isnan().tolist() == [False, True, False] and tokens[1] == 0


def test_what_cannot_be_is_refused():
    hidden, weight = normal(2, 4), normal(30, 4)
    with pytest.raises(ValueError, match=r"uniforms must lie in \[0, 1\), got 1.0"):
        linear_sample(hidden, weight, torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match=r"uniforms must have hidden's leading shape \(2,\), got \(3,\)"):
        linear_sample(hidden, weight, torch.zeros(3))
