"""`align rate`: a project made or gone on with, its links printed once, and the page served until it is stopped."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_engine.assessment.rate import people
from align_engine.assessment.rate.sections import LEAD, RateRecipe
from align_engine.assessment.rate.store import NAME, Store, making
from align_engine.assessment.rate.values import QUESTIONS
from align_engine.errors import AlignError, BadInput, printable

if TYPE_CHECKING:
    from align_engine.assessment.rate.items import Item

EVERY = 1.0  # seconds between two looks at a run's folder


def serve(recipe: RateRecipe) -> None:
    """Make the project or go on with it, and serve it until Ctrl-C or SIGTERM.

    Raises:
        BadInput: data, project or address that cannot be used.
    """
    serving = recipe.serve
    with contextlib.closing(listening(serving.host, serving.port)) as bound:
        store = opened(recipe)
        with contextlib.closing(store):
            host, port = bound.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            shown = f"http://{host}:{port}{serving.root_path}"
            announce(store, recipe, shown)
            with contextlib.suppress(KeyboardInterrupt), handing(store):
                _run(store, recipe, bound)
    print(f"stopped; all marks are in {store.path}, and align rate --project_dir {recipe.project.project_dir} goes on")


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to an address. Raises BadInput where it cannot be."""
    try:
        kind, how, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(socket.socket(kind, how, protocol))  # said to be TCP: asyncio sends at once
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(128)
            stack.pop_all()
        return found
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"host = {host!r}, port = {port}: {reason}; give another --port (0: any free one)") from error


def opened(recipe: RateRecipe) -> Store:
    """The project: the one that is there, or a new one.

    Raises:
        BadInput: there is none and no data to make it of, or it is another one than the settings ask for.
    """
    folder = recipe.project.project_dir
    if not (Path(folder) / NAME).exists():
        make(recipe)
        return Store(folder)
    store, data = Store(folder), recipe.data
    held, asked, unset = store.settings()["made of"], made_of(recipe), made_of(RateRecipe())
    given = asked if data.dataset_name or data.run_dir else {name: asked[name] for name in asked
                                                             if asked[name] != unset[name]}  # fmt: skip
    if changed := [f"{name}: {held[name]!r} there, {given[name]!r} now" for name in given if held[name] != given[name]]:
        store.close()
        raise BadInput(
            f"project_dir = {folder!r} holds another project ({'; '.join(changed)}): leave these out to go on with it, "
            "or give another folder"
        )
    return store


def made_of(recipe: RateRecipe) -> dict[str, Any]:
    """What decides which project it is."""
    data = ("dataset_name", "dataset_config", "dataset_train_split", "columns", "run_dir", "gold_name")
    project = ("mode", "k", "overlap", "scale", "question", "guideline", "max_items", "seed")
    found = {name: getattr(recipe.data, name) for name in data}
    return found | {name: getattr(recipe.project, name) for name in project}


def make(recipe: RateRecipe) -> None:
    """A new project, whole or not at all.

    Raises:
        BadInput: no data, or such that nothing can be rated.
    """
    from align_engine.assessment.rate import items, label_studio, reading  # with what reads data: it takes its time

    data, project = recipe.data, recipe.project
    if not (data.dataset_name or data.run_dir):
        raise BadInput(
            f"project_dir = {project.project_dir!r} holds no project yet: give dataset_name, the answers to rate, or "
            "run_dir"
        )
    if data.run_dir and not Path(data.run_dir).parent.is_dir():
        raise BadInput(f"run_dir = {data.run_dir!r}: there is no folder {str(Path(data.run_dir).parent)!r}")
    found: list[Item] = []
    if data.dataset_name:
        read = label_studio.read if label_studio.is_file(data.dataset_name) else reading.read
        found = read(data, data.dataset_name, project.mode)
    gold = reading.read(data, data.gold_name, project.mode) if data.gold_name else []
    gold = [items.as_gold(one, project.mode, project.scale) for one in gold]
    write(recipe, found, gold)


def write(recipe: RateRecipe, found: Sequence[Item], gold: Sequence[Item]) -> None:
    """The project's file, of these items; those of `found` that bring their right mark are gold, too."""
    from align_engine.assessment.rate import items

    data, project = recipe.data, recipe.project
    settings = {
        "id": secrets.token_hex(4), "mode": project.mode, "k": project.k, "scale": project.scale,
        "question": project.question or QUESTIONS[project.mode], "guideline": _text(project.guideline),
        "run_dir": str(Path(data.run_dir).absolute()) if data.run_dir else None, "made of": made_of(recipe),
    }  # fmt: skip
    with making(project.project_dir) as db:
        db.executemany("INSERT INTO setting VALUES (?, ?)", [(name, json.dumps(one)) for name, one in settings.items()])
        known = [one for one in found if one.gold]
        items.add(db, items.drawn([one for one in found if not one.gold], recipe), [*gold, *known])


def _text(path: str | None) -> str | None:
    """What a file of instructions holds. Raises BadInput where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"guideline = {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def announce(store: Store, recipe: RateRecipe, address: str) -> None:
    """Make the links that are asked for, and print them with what is served.

    Raises:
        BadInput: a name that is not known.
    """
    asked, there = recipe.people, people.names(store)
    people.known(store, [name for name in asked.renew if name != LEAD], "renew")
    for name in asked.revoke:
        people.revoke(store, name)
        print(f"the link of {printable(name)} has ended")
    new = [name for name in (LEAD, *asked.assessors) if name not in there or name in asked.renew]
    new += [name for name in asked.renew if name not in new]
    with store.reading() as db:
        count = db.execute("SELECT count(*) FROM item").fetchone()[0]
    settings = store.settings()
    print(f"{count:,} items (mode {settings['mode']}) in {store.path}, at {address}")
    for name in dict.fromkeys(new):
        print(f"  {printable(name)}: {address}/enter/{people.link(store, name, asked.link_days)}")
    if old := [name for name in asked.assessors if name not in new]:
        print(f"  {printable(', '.join(old))}: with the links that they have")
    if new:
        print("Each link is shown this once and is as good as a password; --renew NAME makes a new one.")
    print("Ctrl-C stops; the same command goes on.", flush=True)


@contextlib.contextmanager
def handing(store: Store) -> Iterator[None]:
    """Inside the block, rollouts of the project's run are taken and their marks handed over."""
    run, over = store.settings()["run_dir"], threading.Event()
    if run is None:
        yield
        return
    from align_engine.assessment.rate.rollouts import Desk

    desk = Desk(store, run)

    def work() -> None:
        said = None
        while not over.wait(EVERY):
            try:
                desk.work()
                said = None
            except AlignError as error:
                if str(error) != said:  # the same trouble once
                    said = str(error)
                    print(f"align: error: {printable(said)}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _run(store: Store, recipe: RateRecipe, bound: socket.socket) -> None:
    import uvicorn

    from align_engine.assessment.rate.pages import app

    made = app(store, recipe.people.link_days, recipe.serve.root_path)
    config = uvicorn.Config(made, log_level="warning", access_log=False, server_header=False, lifespan="off",
                            timeout_graceful_shutdown=5)  # fmt: skip
    uvicorn.Server(config).run(sockets=[bound])
