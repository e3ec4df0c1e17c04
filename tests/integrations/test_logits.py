"""What is read of a `forward`: each thing that it may do to its logits, and each that must not be missed."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from align_engine.integrations.logits import read_logits


class Base(nn.Module):
    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**{"scale": 3.0, "cap": 5.0, "size": None} | config)
        self.config.get_text_config = lambda: self.config
        self.lm_head = nn.Linear(4, 7)

    def get_output_embeddings(self):
        return self.lm_head


class Plain(Base):
    def forward(self, hidden, labels=None):
        logits = self.lm_head(hidden[:, 1:]).float().contiguous()
        if labels is not None:
            logits = logits.view(-1, 7)
        return SimpleNamespace(logits=logits, loss=None)


class Scaled(Base):
    def forward(self, hidden):
        factor = self.config.scale
        logits = self.lm_head(hidden) * factor
        logits = logits / 2
        return SimpleNamespace(logits=logits)


class Capped(Base):
    def forward(self, hidden):
        logits = self.lm_head(hidden) * self.config.scale
        if (cap := self.config.get_text_config().cap) is not None:
            logits = logits / cap
            logits = torch.tanh(logits)
            logits = logits * cap
        return SimpleNamespace(logits=logits)


class Nested(Base):
    def __init__(self, **config):
        super().__init__(**config)
        self.cls = Inner(self.lm_head)
        del self.lm_head

    def get_output_embeddings(self):
        return self.cls.decoder

    def forward(self, hidden, return_dict=True):
        scores = self.cls(hidden)
        if not return_dict:
            return (scores,)
        return SimpleNamespace(logits=scores / self.config.scale)


class Inner(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.dense, self.decoder = nn.Linear(4, 4), decoder

    def forward(self, hidden):
        hidden = self.dense(hidden)
        return self.decoder(hidden) * 2


@pytest.mark.parametrize(
    ("model", "transform"),
    [
        (Plain(), {}),
        (Scaled(), {"logit_scale": 1.5}),
        (Capped(), {"logit_scale": 3.0, "softcap": 5.0}),
        (Capped(scale=1.0, cap=None), {}),
        (Nested(), {"logit_scale": 2 / 3}),
    ],
)
def test_read(model, transform):
    assert read_logits(model) == ("hook", "", pytest.approx(transform))


class ScaledAfter(Base):
    def forward(self, hidden):
        return SimpleNamespace(logits=torch.tanh(self.lm_head(hidden) / 5.0) * 5.0 * self.config.scale)


class Sliced(Base):
    def forward(self, hidden):
        return SimpleNamespace(logits=self.lm_head(hidden)[..., :5])


class InPlace(Base):
    def forward(self, hidden):
        logits = self.lm_head(hidden)
        logits *= self.config.scale
        return SimpleNamespace(logits=logits)


class Forbidding(Base):
    def forward(self, hidden):
        logits = self.lm_head(hidden)
        logits[..., 3] = -1e9
        return SimpleNamespace(logits=logits)


class Sometimes(Base):
    def forward(self, hidden):
        logits = self.lm_head(hidden)
        if hidden.shape[1] > 2:
            logits = logits * 2
        return SimpleNamespace(logits=logits)


class OnlyInTraining(Base):
    def forward(self, hidden):
        logits = self.lm_head(hidden)
        if self.training:
            logits = logits * 2
        return SimpleNamespace(logits=logits)


class Looped(Base):
    def forward(self, hidden):
        logits = self.lm_head(hidden)
        for _ in range(2):
            logits = logits / self.config.scale
        return SimpleNamespace(logits=logits)


class Helped(Base):
    def twice(self, x):
        return 2 * x

    def forward(self, hidden):
        return SimpleNamespace(logits=self.twice(self.lm_head(hidden)))


class Hidden(Base):
    def forward(self, hidden):
        return self.project(hidden)

    def project(self, hidden):
        return SimpleNamespace(logits=self.lm_head(hidden))


class OneOfTwo(Base):
    def forward(self, hidden, fast=False):
        logits = self.lm_head(hidden)
        if fast:
            return SimpleNamespace(logits=logits)
        return SimpleNamespace(logits=logits * 2)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (ScaledAfter, r"`\* 3\.0` after a softcap"),
        (Sliced, r"\[\.\.\., :5\]` is not understood"),
        (InPlace, r"`logits \*= self\.config\.scale` is not understood"),
        (Forbidding, r"`logits\[\.\.\., 3\] = -1.* is not understood"),
        (Sometimes, r"`if hidden\.shape\[1\] > 2:` is not understood"),
        (OnlyInTraining, r"`if self\.training:` is not understood"),
        (Looped, r"`for _ in range\(2\):` is not understood"),
        (Helped, r"`self\.twice\(.*` is not understood"),
        (Hidden, r"Hidden\.forward does not show what becomes of its lm_head"),
        (OneOfTwo, r"OneOfTwo\.forward does not show"),
    ],
)
def test_not_taken(kind, why):
    found = read_logits(kind())
    assert found.path == "logits" and found.transform == {}
    assert re.search(why, found.why), found.why


def test_without_source():
    space = dict(Base=Base, SimpleNamespace=SimpleNamespace)
    exec("class Made(Base):\n    def forward(self, hidden):\n        return SimpleNamespace(logits=0)", space)
    assert read_logits(space["Made"]()) == ("logits", "Made: the source of Made.forward is not at hand", {})


def test_no_one_head():
    class Many(Plain):
        def get_output_embeddings(self):
            return nn.ModuleList([self.lm_head, self.lm_head])

    class Without(Plain):
        def get_output_embeddings(self):
            return None

    class Elsewhere(Plain):
        def get_output_embeddings(self):
            return nn.Linear(4, 7)

    assert read_logits(Many()) == ("none", "Many has 2 heads", {})
    assert read_logits(Without()) == ("none", "Without has no output embedding", {})
    assert read_logits(Elsewhere()).path == "logits"


def test_a_forward_of_its_own_is_read():
    """Not the class's, where one instance was given another, as Liger and others do."""
    model = Plain()
    other = Scaled()
    model.forward = Scaled.forward.__get__(model)
    assert read_logits(model).transform == read_logits(other).transform == {"logit_scale": 1.5}
