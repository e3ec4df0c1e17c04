"""Logits that nobody has made, for TRL's releases before 1.15, beside the logits that they stand for.

The trainers of such releases are run by tests/trl_window.py, which installs them.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config
from trl.trainer import utils

from align_engine.integrations.trl_hook import Bound
from align_engine.integrations.trl_logits import Logits, LogitsForward, reader

B, T, V = 4, 9, 67
read_logps = reader("selective_log_softmax", utils.selective_log_softmax)
read_entropy = reader("entropy_from_logits", utils.entropy_from_logits)


@pytest.fixture(scope="module", params=["llama", "capped"])
def models(request, tmp_path_factory):
    """A model, and the same with `Logits` in place of its logits."""
    if request.param == "llama":
        plain = AutoModelForCausalLM.from_pretrained(tiny.write_model(tmp_path_factory.mktemp("model"), vocab=V))
    else:
        torch.manual_seed(4)
        settings = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
                        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.4)  # fmt: skip
        plain = AutoModelForCausalLM.from_config(Gemma2Config(**settings, final_logit_softcapping=3.0))
    plain.eval()
    ours = copy.deepcopy(plain)
    ours.forward = Bound(LogitsForward(type(ours), None, None), ours)
    return ours, plain


@pytest.fixture
def ids():
    return torch.randint(2, V, (B, T), generator=torch.Generator().manual_seed(0))


def test_what_trainers_do_with_logits(models, ids):
    ours, plain = models
    ours.zero_grad(), plain.zero_grad()
    targets, mask = ids[:, 1:], ids[:, 1:] % 3 > 0
    totals = []
    for model in models:
        logits = model(input_ids=ids, use_cache=False).logits
        assert logits.shape == (B, T, V) and len(logits) == B and logits.device == ids.device
        assert isinstance(logits, Logits) == (model is ours)
        shifted = (logits if model is ours else logits.clone())[..., :-1, :][:, -5:, :]
        shifted.div_(0.7)
        logps = read_logps(shifted, targets[:, -5:])
        logps[~mask[:, -5:]] = 0.0
        later = logits[:, :-1, :]
        kept = read_logps(later, targets)
        kept[~mask] = 0.0
        half = later.detach().chunk(2, dim=0)[1]
        rows = torch.tensor([0, 2])
        facts = [logps.sum(1), kept, read_entropy(later.detach()), half[mask[2:]].mean(-1).sum(),
                 (half.argmax(dim=-1) == targets[2:]) & mask[2:], logits.index_select(0, rows).nansum(),
                 logits[:, -1, :].softmax(-1), cross_entropy(later[mask], targets[mask]), torch.logsumexp(later, -1),
                 read_entropy(logits)]  # fmt: skip
        total = facts[0].sum() + (kept**2).sum() + facts[-1].sum()
        total.backward()
        totals.append([total, *facts])
    for a, b in zip(*totals):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_padding_does_not_count_and_labels_give_the_loss(models, ids):
    ours, plain = models
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    logits = ours(input_ids=ids, attention_mask=mask).logits
    logps = read_logps(logits[:, :-1, :], ids[:, 1:])
    assert not logps[0, 5:].any() and bool((logps[0, :5] < 0).all())
    labels = ids.masked_fill(ids % 4 == 0, -100)
    for items in (None, torch.tensor(11)):
        out = ours(input_ids=ids, labels=labels, num_items_in_batch=items, use_cache=False)
        theirs = plain(input_ids=ids).logits[:, :-1].flatten(0, 1)
        wanted = cross_entropy(theirs, labels[:, 1:].flatten(), reduction="sum") / (
            (labels[:, 1:] != -100).sum() if items is None else items
        )
        torch.testing.assert_close(out.loss, wanted)
        assert isinstance(out.logits, Logits)


def test_it_generates_as_it_did(tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(tiny.write_model(tmp_path, vocab=V)).eval()
    ours = copy.deepcopy(plain)
    ours.forward = Bound(LogitsForward(type(ours), None, None), ours)
    prompt = AutoTokenizer.from_pretrained(tmp_path)("w1 w2 w3", return_tensors="pt")["input_ids"]
    for cached in (True, False):
        options = dict(max_new_tokens=6, do_sample=False, use_cache=cached, eos_token_id=None)
        assert torch.equal(*(model.generate(prompt, **options) for model in (ours, plain)))
