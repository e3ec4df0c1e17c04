"""Ratios between policies, as the log has them: quantiles over all tokens of a step, however they are split."""

import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator

from align_engine.algorithms.common import with_ratios
from align_engine.data.batches import Batch
from align_engine.recipe import GrpoRecipe, RlooRecipe
from align_engine.recipe.sections import GrpoLoss
from align_engine.run import train
from align_engine.training import metrics
from align_engine.training.metrics import QUANTILES, Sums
from align_kernels import LossOutput

OF = {"min": np.min, "mean": np.mean, "max": np.max} | {
    name: lambda x, share=share: np.quantile(x, share) for name, share in QUANTILES.items()
}


def made(rows=40, longest=9):
    """Completions of every length from 1 on; some tokens have no log-prob of the sampler's."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.arange(rows) % longest + 1
    kept = torch.arange(longest) < lengths[:, None]
    logps, old, sampling = (torch.randn(rows, longest, generator=draw) for _ in range(3))
    sampling[torch.rand(rows, longest, generator=draw) < 0.1] = torch.nan
    return kept, logps, old, sampling


def logged(kept, logps, old, sampling, cuts, correction=None):
    sums = Sums()
    for part in torch.arange(len(kept)).split(cuts):
        targets = torch.where(kept, 3, -100)[part]
        batch = Batch(targets, targets, targets, part, old_logps=None if old is None else old[part],
                      sampling_logps=sampling[part])  # fmt: skip
        out = LossOutput(torch.zeros(()), {}, logps[part], {})
        out = with_ratios(out, batch, logps[part], correction)
        for name, over in out.counts.items():
            sums.add(name, out.metrics[name], over)
    return sums.reduced(Accelerator(cpu=True)).means()


def spread(prefix, values):
    return {f"{prefix}/{name}": float(of(values.numpy().astype(np.float64))) for name, of in OF.items()}


@pytest.mark.parametrize("cuts", [40, 7, 1])
def test_the_spread_is_that_of_all_tokens(cuts):
    kept, logps, old, sampling = made()
    found = logged(kept, logps, old, sampling, cuts)
    known = kept & ~sampling.isnan()
    want = spread("ratio", (logps - old).exp()[kept])
    want |= spread("sampling/importance_sampling_ratio", (old - sampling).exp()[known])
    want["sampling/sampling_logp_difference/mean"] = float((old - sampling)[known].abs().double().mean())
    assert found.keys() == want.keys()
    assert found == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_with_a_correction_the_share_outside_its_limits_is_counted(mode):
    kept, logps, _, sampling = made()
    limits = dict(vllm_importance_sampling_clip_min=0.5, vllm_importance_sampling_clip_max=2.0)
    correction = GrpoLoss(vllm_importance_sampling_mode=mode, **limits)
    found = logged(kept, logps, None, sampling, 7, correction)
    difference, known = logps - sampling, kept & ~sampling.isnan()
    ratio = difference[known].exp()
    if mode.startswith("sequence"):
        ratio = torch.stack([row[has].sum().exp() for row, has in zip(difference, known) if has.any()])
    want = spread("sampling/importance_sampling_ratio", ratio)
    want["sampling/importance_sampling_ratio/clipped"] = float(((ratio < 0.5) | (ratio > 2)).double().mean())
    assert {name: value for name, value in found.items() if "importance" in name} == pytest.approx(want, rel=1e-5)
    assert not any(name.startswith("ratio") for name in found), "the present policy has sampled"


def test_where_the_sampler_gives_no_log_probs_there_are_no_ratios():
    kept, logps, _, sampling = made()
    found = logged(kept, logps, None, torch.full_like(sampling, torch.nan), 7)
    assert found == {}


@pytest.mark.parametrize(("name", "kind"), [("grpo", GrpoRecipe), ("rloo", RlooRecipe)])
def test_a_run_logs_them(name, kind, model, tmp_path):
    """One at the first step of a rollout, where the policy has not moved; elsewhere at the second."""
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompt_rows(8))
    recipe = tiny.online(kind, model, data, tmp_path / "run", max_steps=4, num_iterations=2, learning_rate=1e-2)
    records = metrics.read(train(name, recipe).metrics)
    for i, record in enumerate(records):
        values = [record[f"ratio/{of}"] for of in OF]
        assert values == pytest.approx([1.0] * len(values), abs=1e-4) or i % 2
        assert record["ratio/min"] <= record["ratio/p01"] <= record["ratio/p50"] <= record["ratio/p99"]
        assert record["sampling/importance_sampling_ratio/p50"] == pytest.approx(1.0, abs=1e-4)
    assert records[1]["ratio/max"] - records[1]["ratio/min"] > 1e-3
