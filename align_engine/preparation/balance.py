"""`align balance`: prompts in clusters by meaning, and a sample that holds something of each cluster.

Embeddings are computed once, by batches, into a file of the result's folder, and read from there by batches; an
interrupted call goes on behind the last of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from align_engine import inputs
from align_engine.data.formats import is_conversational
from align_engine.data.json_text import loads
from align_engine.errors import BadInput
from align_engine.preparation import folder, report
from align_engine.preparation.clusters import Clusters, cluster, flat, kept, sample
from align_engine.preparation.embeddings import Embeddings, load_encoder, strangers
from align_engine.preparation.sections import BalanceRecipe, InputSection
from align_engine.reports.report import Figure, Table, scatter_chart

FILE = "_embeddings.f16"
DRAWN = 3000  # embeddings in the picture
SHOWN, EXAMPLES, LETTERS = 50, 3, 100  # clusters of the table, prompts of each, characters of a prompt
LOOKED_AT = 30  # prompts of a cluster, for different ones


def run(settings: BalanceRecipe) -> None:
    """The command.

    Raises:
        BadInput: from the rows and the encoder, before anything is written; a prompt without an embedding.
    """
    asked, rows = settings.balance, folder.read(settings.data)
    if asked.column not in rows.column_names:
        raise BadInput(f"column = {asked.column!r}: there is no such column, but {sorted(rows.column_names)}")
    rows = with_prompts(rows, asked.column, settings.data)
    earlier = Path(asked.encoder) / FILE
    encode = None if earlier.exists() else load_encoder(asked.encoder, asked.trust_remote_code)
    apart = 0.0 if encode is None else strangers(encode)
    if settings.data.dry_run:
        return folder.dry(map(dict, rows))
    with folder.opened("balance", settings, rows, inputs.facts(settings)) as place:
        if place is None:
            return
        if encode is None:
            found, apart = taken(place, earlier, len(rows))
        else:
            found = Embeddings(place.growing(FILE), len(rows))
            found.fill(lambda a, b: [prompt_text(one) for one in rows[a:b][asked.column]], encode, _say(len(rows)))
        clusters = cluster(found.batches, asked.threshold, asked.distance, asked.n_clusters, apart)
        wanted = kept(clusters.sizes, asked.cap, asked.floor)
        places = sample(clusters.labels, wanted, asked.seed)
        place.write_rows(folder.ROWS, balanced(rows, places, clusters.labels))
        write(place, settings, rows, clusters, wanted, found, apart)


def taken(place: folder.ResultFolder, file: Path, count: int) -> tuple[Embeddings, float]:
    """The embeddings of an earlier result, and its cosine of strangers.

    Raises:
        BadInput: they are of other rows, or not all of them.
    """
    record = folder.ResultFolder(file.parent, {}).record()
    here, there = place.identity, record["identity"]
    if changed := [name for name in ("rows", "column") if here[name] != there.get(name)]:
        raise BadInput(f"encoder = {str(file.parent)!r} holds the embeddings of other prompts ({changed[0]} differs)")
    if not record["finished"]:
        raise BadInput(f"encoder = {str(file.parent)!r} is not finished: give its own command again first")
    found = Embeddings(file, count)
    found.width = file.stat().st_size // (2 * count)
    return found, loads((file.parent / "report.json").read_bytes())["strangers"]


def with_prompts(rows: datasets.Dataset, column: str, section: InputSection) -> datasets.Dataset:
    """The rows whose prompt is a text, or has one of the user. Raises BadInput for another, unless they are dropped."""
    good = [i for i, prompt in enumerate(_column(rows, column)) if prompt_text(prompt).strip()]
    if len(good) < len(rows) and section.bad_rows == "error":
        first = next(i for i in range(len(rows)) if i >= len(good) or good[i] != i)
        named = folder.origin(section).rows([first])
        raise BadInput(
            f"{named}: its {column!r} holds no text, so it has no embedding; mend it, or give --bad_rows drop"
        )
    if not good:
        raise BadInput(f"column = {column!r}: no row holds a text there")
    return rows if len(good) == len(rows) else rows.select(good)


def _column(rows: datasets.Dataset, column: str) -> Iterator[Any]:
    for start in range(0, len(rows), 1000):
        yield from rows[start : start + 1000][column]


def prompt_text(prompt: Any) -> str:
    """What a prompt asks: the text, or the user's messages; "" for anything else."""
    if is_conversational(prompt):
        return "\n".join(str(one.get("content") or "") for one in prompt if one.get("role") == "user")
    return prompt if isinstance(prompt, str) else ""


def _say(total: int) -> Any:
    def say(done: int) -> None:
        end = "\n" if done == total else "\r" if sys.stderr.isatty() else None
        if end:
            print(f"{done:,} of {total:,} prompts have an embedding", end=end, file=sys.stderr, flush=True)

    return say


def balanced(rows: datasets.Dataset, places: np.ndarray, labels: np.ndarray) -> Iterator[dict[str, Any]]:
    """The rows at some places, with their cluster."""
    for start in range(0, len(places), 1000):
        part = places[start : start + 1000]
        unique, back = np.unique(part, return_inverse=True)
        read = list(map(dict, rows.select(unique)))
        yield from (read[i] | {"cluster": int(labels[place])} for i, place in zip(back, part))


def write(
    place: folder.ResultFolder,
    settings: BalanceRecipe,
    rows: datasets.Dataset,
    clusters: Clusters,
    wanted: np.ndarray,
    embeddings: Embeddings,
    apart: float,
) -> None:
    """The reports."""
    asked = settings.balance
    texts = examples(rows, asked.column, clusters)
    facts = {
        "prompts": len(rows),
        "kept": int(wanted.sum()),
        "subclusters": clusters.subclusters,
        "threshold": clusters.threshold,
        "strangers": apart,
        "clusters": [
            {"cluster": i, "size": int(size), "kept": int(many), "examples": some}
            for i, (size, many, some) in enumerate(zip(clusters.sizes, wanted, texts))
        ],
    }
    lead = (
        f"{len(rows):,} prompts in {len(wanted):,} clusters ({clusters.subclusters:,} subclusters of BIRCH of radius "
        f"{clusters.threshold:.3g}); {wanted.sum():,} rows are kept: at most {asked.cap:,} and at least "
        f"{asked.floor:,} of each cluster."
    )
    tables, details = cluster_tables(clusters.sizes, wanted, texts)
    report.write(place, "Prompts in balance", lead, facts, tables, [picture(clusters, embeddings)], details)


def cluster_tables(
    sizes: np.ndarray, wanted: np.ndarray, texts: Sequence[Sequence[str]]
) -> tuple[list[Table], list[Table]]:
    """Numbers of the clusters and prompts near their centres: the largest ones, and the rest."""
    numbers = [
        (i, int(size), f"{size / sizes.sum():.2%}", int(many), f"{many / wanted.sum():.2%}")
        for i, (size, many) in enumerate(zip(sizes, wanted))
    ]
    near = [(i, *some, *[""] * (EXAMPLES - len(some))) for i, some in enumerate(texts)]
    headers = ("cluster", "prompts", "share", "kept", "share of the sample"), ("cluster", *["near"] * EXAMPLES)
    largest = f" (the {SHOWN} largest)" * (len(numbers) > SHOWN)
    found = [(f"Clusters{largest}", "Smaller clusters"), ("Prompts near their centres", "Prompts of smaller clusters")]
    parts = [
        [Table(names[place], header, rows[part]) for names, header, rows in zip(found, headers, (numbers, near))]
        for place, part in enumerate((slice(SHOWN), slice(SHOWN, None)))
    ]
    return parts[0], parts[1] if len(numbers) > SHOWN else []


def examples(rows: datasets.Dataset, column: str, clusters: Clusters) -> list[list[str]]:
    """The beginnings of different prompts near each cluster's centre."""
    order, found = np.lexsort((-clusters.similarities, clusters.labels)), []
    for end, size in zip(np.cumsum(clusters.sizes), clusters.sizes):
        near = rows.select(order[end - size : end][:LOOKED_AT])[column]
        found.append(list(dict.fromkeys(" ".join(prompt_text(one).split())[:LETTERS] for one in near))[:EXAMPLES])
    return found


def picture(clusters: Clusters, embeddings: Embeddings) -> Figure:
    """Prompts in two dimensions (their principal components), the largest clusters in colours of their own. Of each
    cluster as large a share is drawn, but one at least."""
    step = max(1, len(clusters.labels) // DRAWN)
    order = np.argsort(clusters.labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(clusters.sizes)[:-1]])
    drawn = np.sort(order[np.unique(np.concatenate([np.arange(0, len(order), step), starts]))])
    x, y = flat(embeddings.some(drawn)).T.tolist()
    return scatter_chart("Prompts by their embeddings", x, y, clusters.labels[drawn].tolist())
