"""What is measured of answers: log-probabilities by their model, what a classifier says, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from align_engine.assessment.eval import device
from align_engine.assessment.signs import Likelihood
from align_engine.data.batches import IGNORE, collate_sft, split_order
from align_engine.data.formats import Messages
from align_engine.data.tokenize import prepare
from align_engine.errors import BadInput, Naming, among
from align_engine.models import load
from align_engine.models.logps import token_logps
from align_engine.models.modelfiles import check_path
from align_engine.preparation.clusters import unit
from align_engine.preparation.embeddings import Encode
from align_engine.preparation.local import as_read
from align_engine.recipe import ModelSection

BAD = ("toxic", "hate", "offensive", "unsafe", "profan", "danger", "harm", "nsfw", "abus")


def likelihoods(
    path: str, prompts: Sequence[Messages], answers: Sequence[Sequence[str]], batch_size: int, named: Naming
) -> list[Likelihood]:
    """Log-probabilities of answers by a checkpoint, at temperature 1, without the token that ends them.

    Args:
        path: of the checkpoint.
        prompts: N of them.
        answers: lists of N answers to them; empty ones have no tokens and 0 nats.
        batch_size: sequences of a forward pass.
        named: of prompts, by their place.
    Returns:
        one for each list.
    Raises:
        BadInput: no such model; a conversation where it has no chat template.
    """
    tokenizer = load.load_tokenizer(path)
    texts = as_read(list(prompts), tokenizer, f"model {path!r}")
    model = load.load_model(path, ModelSection(model_name_or_path=path, dtype="auto")).to(device()).eval()
    return [_likelihood(model, tokenizer, texts, found, batch_size, named) for found in answers]


def _likelihood(
    model: Any, tokenizer: Any, texts: list[Any], answers: Sequence[str], batch_size: int, named: Naming
) -> Likelihood:
    rows = [
        {"prompt": text, "completion": one if isinstance(text, str) else [{"role": "assistant", "content": one}]}
        for text, one in zip(texts, answers)
        if one.strip()
    ]
    logps, tokens = np.zeros(len(answers)), np.zeros(len(answers))
    if not rows:
        return Likelihood(logps, tokens)
    places = [i for i, one in enumerate(answers) if one.strip()]
    table = datasets.Dataset.from_list(rows)
    kept, _ = prepare(table, tokenizer, "sft", max_length=None, named=among(named, places))
    order = sorted(range(len(kept)), key=lambda i: len(kept[i]["prompt_ids"]) + len(kept[i]["completion_ids"]))
    for part in split_order(order, batch_size):
        batch = collate_sft([kept[i] for i in part], tokenizer.pad_token_id).to(device())
        (found,) = token_logps(model, batch, {})
        for i, line, targets in zip(part, found.cpu(), batch.targets.cpu()):
            own = line[targets != IGNORE]
            own = own[:-1] if len(own) > 1 else own  # the end of an answer is nobody's words
            place = places[kept[i]["index"]]
            logps[place], tokens[place] = float(own.mean()), len(own)
    return Likelihood(logps, tokens)


def classifier(path: str, label: str | None) -> tuple[Any, str]:
    """A sequence classifier of transformers: (texts -> probabilities of the label [N], the label).

    Raises:
        BadInput: no such model; no such label, or none that speaks of bad answers.
    """
    from transformers import pipeline

    check_path(path, "classifier")
    try:
        made: Any = pipeline("text-classification", model=path, device=device(), top_k=None)
    except Exception as error:
        raise BadInput(f"classifier = {path!r} cannot be loaded: {' '.join(str(error).split()):.300}") from error
    known = list(made.model.config.id2label.values())
    if label is not None and label not in known:
        raise BadInput(f"label = {label!r} is none of the classifier's: {', '.join(map(str, known))}")
    telling = [one for one in known if any(word in str(one).lower() for word in BAD)]
    telling = [one for one in telling if not str(one).lower().startswith(("not", "non", "no_", "un", "neutral"))]
    if label is None and len(telling) != 1:
        raise BadInput(f"label: say which of the classifier's means bad: {', '.join(map(str, known))}")
    wanted = label or str(telling[0])

    def ask(texts: list[str]) -> np.ndarray:
        found = made(texts, batch_size=16, truncation=True)
        return np.array([next(one["score"] for one in labels if one["label"] == wanted) for labels in found])

    return ask, wanted


def embedded(encode: Encode, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of length 1, [N, D]; an empty text has that of a space."""
    once, places = np.unique(np.array([text or " " for text in texts], object), return_inverse=True)
    found = np.asarray(encode(once.tolist()), np.float32)
    if found.ndim != 2 or len(found) != len(once) or not np.isfinite(found).all():
        raise BadInput(f"the encoder gives {found.shape} numbers for {len(once)} texts, expected finite rows")
    return unit(found + 1e-12)[places]
