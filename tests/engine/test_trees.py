"""Packed rows of trees: the same losses and gradients as padded batches, from fewer tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from align_engine.data.batches import IGNORE, Batch, collate_labels, collate_pairs, collate_rollouts, collate_sft
from align_engine.data.trees import Place, Segment, Trees, pack, rows_at
from align_engine.errors import RunFailed
from align_engine.integrations.hook import fused_head
from align_engine.models import load, tree_attention
from align_engine.models.tree_attention import Rule, by_segment, in_one_call, reading, why_not
from align_engine.recipe import ModelSection
from align_kernels import dpo_loss, grpo_loss, kto_loss, sft_loss

V = 40
SIZES = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=0)  # fmt: skip
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
# architecture -> its own settings, precision of the comparison: transformers' products of experts are float32 at most,
# and so is its softmax of capped scores
ARCHITECTURES: dict[str, tuple[dict[str, Any], float]] = {
    "Llama": ({}, 1e-9),
    "Qwen2": ({}, 1e-9),
    "Qwen3": ({}, 1e-9),
    "Mistral": (dict(sliding_window=4), 1e-9),
    "Gemma2": (dict(sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8), 1e-5),
    "Mixtral": (EXPERTS, 1e-5),
    "Qwen3Moe": (EXPERTS, 1e-5),
    "GptOss": (EXPERTS | dict(sliding_window=4), 1e-5),
    "Llama4": (EXPERTS | dict(no_rope_layers=[1, 0], attention_chunk_size=4, floor_scale=3, attn_scale=0.5), 1e-5),
}


def make(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    settings, tolerance = ARCHITECTURES[name]
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = kind(kind.config_class(**SIZES | settings | more)).train()
    if tolerance > 1e-6:
        return model
    for part in model.modules():
        if type(part).__name__ == f"{name}RMSNorm":  # transformers' own are float32 inside
            part.forward = functools.partial(exact_norm, part)
    return model.double()


def exact_norm(norm: Any, x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight


def ids(seed: int, count: int) -> list[int]:
    return torch.randint(1, V, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [ids(1, 7), ids(2, 1), ids(3, 4)]
PAIRS = [
    {"index": i, "prompt_ids": prompt, "chosen_ids": ids(10 + i, 5 - i), "rejected_ids": ids(20 + i, 2 + 3 * i)}
    for i, prompt in enumerate(PROMPTS)
]
TEXTS = [
    {"index": i, "prompt_ids": prompt, "completion_ids": ids(30 + i, 6 - i)}
    for i, prompt in enumerate([*PROMPTS, [], PROMPTS[0]])  # one without a prompt, two with the same
]
LABELS = [row | {"label": row["index"] % 2 == 0, "kl_completion_ids": ids(40 + row["index"], 3)} for row in TEXTS[:3]]
SAMPLES = [
    {"index": i, "prompt_ids": PROMPTS[i // 4], "completion_ids": ids(50 + i, 1 + i % 5),
     "advantages": torch.full((1 + i % 5,), (-1.0) ** i * (1 + i)), "old_logps": -3.0 - torch.arange(1.0 + i % 5) / 10}
    for i in range(8)
]  # fmt: skip
Loss = Callable[[Tensor, dict[str, Any], Any], Tensor]
REF = -9.0 - torch.arange(6.0)
KINDS: dict[str, tuple[Callable[..., Batch], list[dict[str, Any]], Loss]] = {
    "pairs": (collate_pairs, PAIRS, lambda h, head, b: dpo_loss(h, targets=b.targets, ref_logps=REF, **head).loss),
    "labels": (
        collate_labels, LABELS,
        lambda h, head, b: kto_loss(
            h, targets=b.targets, ref_logps=REF[:3], desirable=b.desirable, kl=torch.tensor(0.3), **head
        ).loss,
    ),
    "texts": (collate_sft, TEXTS, lambda h, head, b: sft_loss(h, targets=b.targets, **head).loss),
    "samples": (
        collate_rollouts, SAMPLES,
        lambda h, head, b: grpo_loss(
            h, targets=b.targets, old_logps=b.old_logps, advantages=b.advantages, **head
        ).loss,
    ),
}  # fmt: skip


def learn(model: nn.Module, batch: Batch, loss: Loss) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradient of every trained weight."""
    model.zero_grad()
    with reading(model, batch) as inputs:
        with fused_head(model, lambda hidden, head: loss(batch.predicting(hidden), head, batch)):
            value = model(**inputs, use_cache=False).logits
        value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: nn.Module, kind: str, tolerance: float) -> None:
    collate, rows, loss = KINDS[kind]
    value, gradients = learn(model, collate(rows, pad_id=None), loss)
    wanted, oracle = learn(model, collate(rows, pad_id=0), loss)
    assert value == pytest.approx(wanted, rel=tolerance)
    assert gradients.keys() == oracle.keys() and len(oracle) > 3
    most = max(float(gradient.abs().max()) for gradient in oracle.values())
    for name, gradient in gradients.items():
        allowed = tolerance * max(float(oracle[name].abs().max()), 1e-3 * most)
        assert float((gradient - oracle[name]).abs().max()) <= allowed, name


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["pairs", "samples"])
def test_architectures(name, kind):
    model = make(name)
    assert why_not(model) is None
    assert_equal(model, kind, ARCHITECTURES[name][1])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["full", "full, checkpointed", "lora", "lora, checkpointed"])
def test_kinds_of_rows_and_ways_to_train(kind, way):
    model: Any = make("Mistral")
    if "lora" in way:
        model = load.add_adapters(model, ModelSection(lora_r=2), dropout=0.0).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(0, 0.3) if "lora_B" in name else None
    if "checkpointed" in way:
        load.checkpoint_activations(model)
    assert_equal(model.train(), kind, 1e-9)


def test_tokens_per_batch_are_those_of_the_arithmetic():
    """A prompt is there once; a completion's targets begin behind it, whatever comes before it in the row."""
    batch = collate_pairs(PAIRS, pad_id=None)
    prompts = sum(len(row["prompt_ids"]) for row in PAIRS)
    answers = [len(row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in PAIRS]
    assert batch.input_ids.shape == (1, prompts + sum(answers))
    assert batch.targets.shape == (6, max(answers))
    padded = collate_pairs(PAIRS, pad_id=0)
    assert batch.num_read == padded.num_read == 2 * prompts + sum(answers)
    assert batch.num_tokens == padded.num_tokens == sum(answers)
    assert batch.predicting(torch.zeros(1, batch.input_ids.numel(), 3)).shape == (sum(answers), 3), "none is padding"
    for packed, row in zip(batch.targets, padded.targets):
        assert packed[packed != IGNORE].tolist() == row[row != IGNORE].tolist()
    assert batch.trees is not None and padded.input_ids.numel() > 1.5 * batch.input_ids.numel()
    assert [len(path) for path in batch.trees.paths] == [1, 2, 2] * 3


def test_the_layout_of_a_small_row():
    packed = pack([([5, 6], [7, 8, 9]), ([4], [3]), ([], [1, 2]), ([5, 6], [7])])
    trees = packed.trees
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 7, 4, 3, 1, 2]]
    assert trees.segments == ((0, 2, -1), (2, 5, 0), (5, 6, 0), (6, 8, -1), (8, 10, -1))
    assert trees.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 0, 1]]
    assert packed.targets.tolist() == [[7, 8, 9], [3, -100, -100], [2, -100, -100], [7, -100, -100]]
    assert trees.index[0].tolist() == [1, 2, 3] and trees.index[:, 0].tolist() == [1, 6, 8, 1]
    assert int(trees.index.min()) >= 0 and int(trees.index.max()) < 10
    assert trees.last.tolist() == [4, 7, 9, 5]
    assert trees.reads.tolist() == [[2, 2, 1, 1, 1, 1, 1, 1, 1, 1]]
    assert trees.cu_queries.tolist() == [0, 2, 5, 6, 8, 10] and trees.cu_keys.tolist() == [0, 2, 7, 10, 12, 14]
    assert trees.keys.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9]


# a root with two branches, one of which branches again, and a root alone
DEEP = tuple(Segment(*one) for one in [(0, 3, -1), (3, 7, 0), (7, 8, 1), (8, 13, 1), (13, 15, 0), (15, 19, -1)])


def dense(query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
    """Every token asks which tokens lie on its path: softmax over those alone."""
    owner = [i for i, (begin, end, _) in enumerate(DEEP) for _ in range(begin, end)]

    def path(token: int) -> list[int]:
        found, segment = [], owner[token]
        begin, end = DEEP[segment].begin, token + 1
        while True:
            found = [*range(begin, end), *found]
            segment = DEEP[segment].parent
            if segment < 0:
                first = max(len(found) - rule.window, 0) if rule.window else 0
                return found[max(first, (len(found) - 1) // rule.chunk * rule.chunk if rule.chunk else 0) :]
            begin, end = DEEP[segment].begin, DEEP[segment].end

    out = torch.zeros(1, len(owner), query.shape[1], value.shape[-1], dtype=query.dtype)
    for token in range(len(owner)):
        seen = path(token)
        for head in range(query.shape[1]):
            group = head * key.shape[1] // query.shape[1]
            scores = key[0, group, seen] @ query[0, head, token] * rule.scale
            if rule.softcap:
                scores = rule.softcap * torch.tanh(scores / rule.softcap)
            sink = rule.sinks[head].exp() if rule.sinks is not None else 0.0
            out[0, token, head] = scores.exp() / (scores.exp().sum() + sink) @ value[0, group, seen]
    return out


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (1, None), (3, None), (6, None), (50, None), (None, 1),
                                               (None, 4), (3, 5), (None, 50)])  # fmt: skip
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)])
def test_attention_in_deep_trees(window, chunk, softcap, sinks):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 19, 4, dtype=torch.float64) for heads in (4, 2, 2))
    rule, trees = Rule(0.7, window, softcap, 0.0, chunk, sinks), Trees.of(DEEP, [Place(12, 13, 15)])
    torch.testing.assert_close(by_segment(query, key, value, trees, rule), dense(query, key, value, rule))


def test_the_one_call_of_a_gpu_is_given_what_it_needs(monkeypatch):
    """The call itself is played on a CPU by its documented meaning: causal at the lower right."""

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa and cu_q.dtype == cu_k.dtype == torch.int32 and window_size[1] == 0
        assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max()) and q.is_contiguous()
        out = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=q.dtype)
        for i, (n, m) in enumerate(zip(cu_q.diff().tolist(), cu_k.diff().tolist())):
            keys, values = k[int(cu_k[i]) : int(cu_k[i + 1])], v[int(cu_k[i]) : int(cu_k[i + 1])]
            for j in range(n):
                last = m - n + j
                first = 0 if window_size[0] < 0 else max(last - window_size[0], 0)
                for head in range(q.shape[1]):
                    group = head * k.shape[1] // q.shape[1]
                    weights = (keys[first : last + 1, group] @ q[int(cu_q[i]) + j, head] * scale).softmax(0)
                    out[int(cu_q[i]) + j, head] = weights @ values[first : last + 1, group]
        return out

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 19, 4, dtype=torch.float64) for heads in (4, 2, 2))
    trees = Trees.of(DEEP, [Place(12, 13, 15)])
    for window in (None, 3):
        rule = Rule(0.7, window, None, 0.0)
        torch.testing.assert_close(in_one_call(query, key, value, trees, rule), dense(query, key, value, rule))


def test_models_are_as_they_were_behind_the_block():
    model, batch = make("Llama"), collate_pairs(PAIRS, pad_id=None)
    before = model.config._attn_implementation
    with reading(model, batch):
        assert model.config._attn_implementation == tree_attention.NAME
    assert model.config._attn_implementation == before
    with reading(model, batch), pytest.raises(RunFailed, match="LlamaAttention calls attention without the layout"):
        model(torch.ones(1, 3, dtype=torch.int64))


def test_who_cannot_is_told_why():
    small = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    reasons = {
        "Mamba": ("mixes tokens in other ways than attention: linear_attention layers", dict(state_size=4)),
        "Bloom": ("takes no position_ids", {}),
        "GPTNeoX": (None, dict(intermediate_size=16)),
        "StableLm": ("keeps the layout of a row from its attention", dict(intermediate_size=16, num_key_value_heads=2)),
        "Qwen2Moe": ("knows its sliding window from a mask alone", dict(use_sliding_window=True, max_window_layers=0)),
        "GPTJ": ("does not call transformers' attention interface", dict(rotary_dim=4)),
    }
    for name, (reason, more) in reasons.items():
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**small | more))
        found = why_not(model)
        assert (found is None) if reason is None else (found is not None and reason in found), (name, found)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_experts_count_a_token_as_often_as_it_is_read(name):
    """Also inside of another block, as that around the backward pass, and of a batch of its own."""
    model, found = make(name, router_aux_loss_coef=1.0), []
    own = tree_attention.balancing_loss(model)
    for pad_id in (0, None):
        batch, other = (collate_rollouts(rows, pad_id=pad_id) for rows in (SAMPLES, SAMPLES[:2]))
        with reading(model, other), reading(model, batch) as inputs:
            out = model(**inputs, output_router_logits=True)
        found.append(out.aux_loss.item())
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert own(out.router_logits, 4, 2).item() != pytest.approx(found[0], rel=1e-3), "each token once is another loss"
    assert getattr(inspect.getmodule(type(model)), tree_attention.BALANCING) is own, "it is put back"


def test_reads_of_a_deeper_tree():
    ends = [(12, 13, 13), (7, 8, 8), (14, 15, 15), (18, 19, 19)]  # of the leaves, and of the root alone
    trees = Trees.of(DEEP, [Place(before, first, end) for before, first, end in ends])
    assert trees.reads[0].tolist() == [3] * 3 + [2] * 4 + [1] + [1] * 5 + [1] * 2 + [1] * 4


def test_a_row_that_is_read_often_gets_its_gradient_in_one_order():
    """On two threads: indexing gives another sum each time."""
    torch.manual_seed(0)
    hidden, gradient = torch.randn(1, 4000, 256, requires_grad=True), torch.randn(64, 300, 256)
    index, threads = torch.randint(0, 40, (64, 300)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sums = [torch.autograd.grad(rows_at(hidden, index), hidden, gradient)[0] for _ in range(6)]
    finally:
        torch.set_num_threads(threads)
    assert all(one.equal(sums[0]) for one in sums)


def test_a_layout_moves_with_its_batch():
    here = collate_pairs(PAIRS, pad_id=None)
    there = here.to("meta")
    assert here.trees is not None and there.trees is not None
    assert there.trees.index.is_meta and there.trees.keys.is_meta and not here.trees.index.is_meta
    assert there.trees.segments == here.trees.segments
