"""Every causal LM of transformers in small: its log-probs by the path that is read for it are those of its logits."""

from pathlib import Path

import architectures
import pytest

from align_engine.integrations.logits import read_logits

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore")  # each architecture has its own
def test_the_table_is_true():
    """`judge` holds each class against its own logits to 1e-5; the table must say what it found."""
    pairs = sorted(architectures.classes(), key=lambda pair: pair[1].__name__)
    rows = [architectures.judge(*pair) for pair in pairs]
    taken = sum(row.path in ("hook", "logits") for row in rows)
    assert len(rows) > 150 and taken >= 0.95 * len(rows)
    assert (ROOT / "docs" / "architectures.md").read_text() == architectures.table(rows), "run `make architectures`"


@pytest.mark.filterwarnings("ignore")
def test_ordered_embeddings_take_the_second_path():
    drafting = [
        (config, kind)
        for config, kind in architectures.classes()
        if architectures.MADE.get(kind.__name__) is architectures.drafting
    ]
    settings = dict(use_ordered_embeddings=True, num_centroids=9, centroid_intermediate_top_k=3)
    paths = {
        kind.__name__: read_logits(kind(architectures.drafting(config, kind.__name__, **settings))).path
        for config, kind in drafting
    }
    assert len(paths) == 2 and set(paths.values()) == {"logits"}
