"""`align rate` under load: 50 assessors at once, 20,000 marks, and a kill -9 of the server in the middle.

    python benches/rate_load.py [--assessors 50] [--marks 20000] [--pause 0.5]

Each assessor reads a page, thinks for a moment (`--pause` seconds on average) and sends the form, as a browser does:
POST, redirection, GET of the next item. What counts is the time from the click to the next item. After half of the
marks the server is killed and started again; whoever was in between sends the same form again, as a reload does. At the
end every mark that a server has answered for must be in the project once, with the value that was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2 as httpx
import psutil

sys.path += [str(Path(__file__).parents[1] / part) for part in ("", "kernels", "tests/helpers")]
import ratings

from align_engine.assessment.rate import people
from align_engine.assessment.rate.store import Store

FIELD = re.compile(r'name="(key|task|version)" value="([^"]*)"')
TEXT = "A sentence of an answer, as they are. " * 20


class Server:
    """The command, on one port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "align_engine", "rate", "--project_dir", str(self.folder), "--port", str(self.port)],
            text=True, stdout=subprocess.PIPE, cwd=root,
            env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"},
        )  # fmt: skip
        assert self.process.stdout is not None
        said = ""
        while not said.endswith("goes on.\n"):
            line = self.process.stdout.readline()
            assert line, said
            said += line
        self.port = int(re.findall(r":(\d+)$", said.splitlines()[0])[0])

    def seconds(self) -> float:
        """Of the processors, that it has taken so far."""
        used = psutil.Process(self.process.pid).cpu_times()
        return used.user + used.system

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Load:
    """All assessors, and what they have seen."""

    def __init__(self, server: Server, total: int, pause: float) -> None:
        self.server, self.total, self.pause = server, total, pause
        self.sent: dict[tuple[str, int], str] = {}  # (assessor, task) -> choice, of what was answered for
        self.times: list[float] = []
        self.again = 0
        self.each = 0.0  # seconds of a processor that a mark takes the server

    async def assessor(self, name: str, token: str) -> None:
        draw = random.Random(name)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.server.port}", timeout=30) as client:
            page = await client.get(f"/enter/{token}", follow_redirects=True)
            while fields := dict(FIELD.findall(page.text)):
                if "task" not in fields:
                    return
                await asyncio.sleep(draw.uniform(0, 2 * self.pause))
                choice, retried = draw.choice(["1", "2", "tie"]), False
                began = time.perf_counter()
                while True:
                    try:
                        page = await client.post("/rate", data=fields | {"choice": choice}, follow_redirects=True)
                        break
                    except httpx.TransportError:
                        self.again, retried = self.again + 1, True
                        await asyncio.sleep(0.2)
                assert page.status_code == 200, page.text
                self.sent[name, int(fields["task"])] = choice
                if not retried:
                    self.times.append(time.perf_counter() - began)

    async def run(self, tokens: dict[str, str]) -> None:
        work = asyncio.gather(*(self.assessor(name, token) for name, token in tokens.items()))
        before = None
        while len(self.sent) < self.total / 2 and not work.done():
            await asyncio.sleep(0.05)
            if before is None and len(self.sent) > self.total / 10:  # all is imported by then
                before = len(self.sent), self.server.seconds()
        if before:
            self.each = (self.server.seconds() - before[1]) / (len(self.sent) - before[0])
        self.server.kill()
        await asyncio.to_thread(self.server.start)
        await work


def check(folder: Path, sent: dict[tuple[str, int], str]) -> int:
    """Marks in the project. Fails where one was lost, doubled or changed."""
    store = Store(folder)
    with store.reading() as db:
        found = db.execute(
            "SELECT task.id, name, shown, value FROM task JOIN person ON person.id = person WHERE state = 'done'"
        ).fetchall()
        counts = dict(db.execute("SELECT task, count(*) FROM event GROUP BY task").fetchall())
    assert {(row["name"], row["id"]) for row in found} == sent.keys(), "a mark was lost, or nobody sent it"
    for row in found:
        value, shown = json.loads(row["value"]), json.loads(row["shown"])
        told = {(1, 2): "1", (2, 1): "2", (1, 1): "tie"}[value[shown[0]], value[shown[1]]]
        assert told == sent[row["name"], row["id"]], "a mark is not what was sent"
        assert counts[row["id"]] == 1, "a mark was taken twice"
    return len(found)


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--assessors", type=int, default=50)
    flags.add_argument("--marks", type=int, default=20000)
    flags.add_argument("--pause", type=float, default=0.5)
    asked = flags.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = [one._replace(prompt=f"{one.prompt} {TEXT}") for one in ratings.pairs(asked.marks)]
        store = ratings.project(Path(place), found, overlap=0.0)
        tokens = {name: people.link(store, name, 1) for name in (f"person {i}" for i in range(asked.assessors))}
        people.link(store, "lead", 1)
        store.close()
        server = Server(Path(place))
        load, began = Load(server, asked.marks, asked.pause), time.perf_counter()
        try:
            asyncio.run(load.run(tokens))
        finally:
            server.kill()
        took, times = time.perf_counter() - began, sorted(load.times)
        count = check(Path(place), load.sent)
    p50, p95, p99 = (1e3 * statistics.quantiles(times, n=100)[i] for i in (49, 94, 98))
    rate = f"{took:.0f} s ({count / took:.0f} a second)"
    print(f"{asked.assessors} assessors, {count} marks in {rate}, pause {asked.pause} s")
    spread = f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms, most {1e3 * times[-1]:.0f} ms"
    print(f"from the click to the next item: {spread}")
    print(f"the server took {1e3 * load.each:.2f} ms of a processor for each mark")
    print(f"kill -9 after half of them: {load.again} requests sent again; none lost, none doubled")


if __name__ == "__main__":
    main()
