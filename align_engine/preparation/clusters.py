"""Clusters of embeddings that are streamed, and a sample that holds something of each.

BIRCH (scikit-learn's, fed batch by batch) makes many small subclusters; those whose embeddings are alike are joined
by average linkage of their centres. A large subcluster of BIRCH swallows whatever lies nearest, for its radius hardly
grows: so what lies further from every centre than subclusters that are joined do, is clustered once more by itself.
Embeddings are of length 1, and distances are 1 - cosine, stretched so that 1 is that of texts which have nothing in
common: some encoders, as those of the e5 family, give any two texts a cosine of 0.7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Batches = Callable[[], Iterable[np.ndarray]]  # of embeddings [n, D] float32, the same whenever it is called

MOST = 4000  # subclusters: their distances take MOST^2 / 2 floats
WIDER = 1.2  # what the threshold of BIRCH is multiplied by where there are more
ROUNDS = 10  # of clustering what is left over


class Clusters(NamedTuple):
    """K clusters of N embeddings, the largest first."""

    labels: np.ndarray  # [N] int32
    similarities: np.ndarray  # [N] float32: cosine with the centre of its cluster
    sizes: np.ndarray  # [K]
    centres: np.ndarray  # [K, D]
    subclusters: int
    threshold: float  # of BIRCH, in the end


def cluster(
    batches: Batches, threshold: float, distance: float, n_clusters: int | None = None, strangers: float = 0.0
) -> Clusters:
    """Cluster embeddings.

    Args:
        threshold: largest radius of a subcluster of BIRCH; raised until there are at most MOST.
        distance: subclusters closer than this are joined.
        n_clusters: join them until so many clusters are left, whatever the distance. Default None.
        strangers: cosine of texts that have nothing in common. Default 0.
    """
    distance, threshold = distance * (1 - strangers), threshold * (1 - strangers) ** 0.5
    centres, threshold = _subclusters(batches, threshold)
    for _ in range(ROUNDS):
        more, threshold = _subclusters(partial(_far, batches, centres, distance), threshold)
        if not len(more):
            break
        centres = np.concatenate([centres, more])
    joined = _joined(centres, distance, n_clusters)
    labels = np.concatenate([joined[nearest(batch, centres)[0]] for batch in batches()])
    sizes = np.bincount(labels, minlength=joined.max() + 1)
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    places = np.empty(len(sizes), np.int32)
    places[order] = np.arange(len(order))
    labels = places[labels]
    means = np.zeros((len(order), centres.shape[1]))
    for part, batch in _beside(labels, batches()):
        np.add.at(means, part, batch)
    means = unit(means.astype(np.float32))
    similarities = [(batch * means[part]).sum(1) for part, batch in _beside(labels, batches())]
    return Clusters(labels, np.concatenate(similarities), sizes[order], means, len(centres), threshold)


def _beside(labels: np.ndarray, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches with the labels of their rows."""
    start = 0
    for batch in batches:
        yield labels[start : start + len(batch)], batch
        start += len(batch)


def _subclusters(batches: Batches, threshold: float) -> tuple[np.ndarray, float]:
    """Centres of BIRCH's subclusters, of length 1: [M, D]; and the threshold that gave no more than MOST."""
    from sklearn.cluster import Birch

    while True:
        no_joining: Any = None  # it is done here
        birch, found = Birch(threshold=threshold, n_clusters=no_joining, compute_labels=False), np.empty((0, 0))
        for batch in batches():
            if len(batch):
                found = birch.partial_fit(batch).subcluster_centers_
            if len(found) > MOST:
                break
        if len(found) <= MOST:
            return unit(np.asarray(found, np.float32)), threshold
        threshold *= WIDER


def _far(batches: Batches, centres: np.ndarray, distance: float) -> Iterator[np.ndarray]:
    """What lies further than `distance` from every centre."""
    for batch in batches():
        yield batch[nearest(batch, centres)[1] < 1 - distance]


def nearest(batch: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each embedding, and their cosine: [n] each."""
    cosines = batch @ centres.T
    found = cosines.argmax(1)
    return found, cosines[np.arange(len(batch)), found]


def _joined(centres: np.ndarray, distance: float, n_clusters: int | None) -> np.ndarray:
    """The cluster of each subcluster: [M]."""
    from scipy.cluster import hierarchy

    if len(centres) == 1:
        return np.zeros(1, np.int32)
    tree = hierarchy.linkage(centres, "average", "cosine")
    if n_clusters is None:
        return hierarchy.fcluster(tree, distance, "distance").astype(np.int32) - 1
    return hierarchy.fcluster(tree, n_clusters, "maxclust").astype(np.int32) - 1


def unit(vectors: np.ndarray) -> np.ndarray:
    """Each of length 1: [n, D]."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def kept(sizes: np.ndarray, cap: int, floor: int) -> np.ndarray:
    """How many rows of each cluster a balanced sample holds: 100, 1 and 100500 become 100, 10 and 100 at cap 100 and
    floor 10."""
    return np.minimum(np.maximum(sizes, floor), cap)


def sample(labels: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
    """Places of rows, in their order: `wanted[c]` of cluster c, drawn without replacement; where that is more than
    there are, each as often as another, or once more."""
    rng, found = np.random.default_rng(seed), []
    order = np.argsort(labels, kind="stable")
    for members, count in zip(np.split(order, np.cumsum(np.bincount(labels))[:-1]), wanted):
        whole, rest = divmod(int(count), len(members))
        found += [np.repeat(members, whole), rng.choice(members, rest, replace=False)]
    return np.sort(np.concatenate(found))


def flat(sampled: np.ndarray) -> np.ndarray:
    """The two principal components of embeddings: [n, D] -> [n, 2]."""
    centred = sampled - sampled.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    return centred @ vectors[:, :-3:-1]
