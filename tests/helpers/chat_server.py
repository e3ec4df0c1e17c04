"""An OpenAI-compatible server in a thread: its answers are a function of what it is asked, and it fails at times."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAILURES = ("500", "429", "cut", "error", "words")  # what a failing request gets
LIMIT = 1000  # characters of a prompt that it takes


class ChatServer(ThreadingHTTPServer):
    """Counts what it is asked.

    Args:
        fails: share of the requests that fail; the same request may succeed later.
        delay: seconds of each answer.
        key: it wants (None: any).
        choices: how many answers it gives (None: as many as are asked for).
        empty: it answers nothing to prompts that hold this word.
        says: what it answers to a request's body and the number of the choice (None: words of a hash).
        reads: log-probs of a prompt that `/completions` echoes, as its answer holds them (None: it has none).
    """

    daemon_threads, request_queue_size = True, 256

    def __init__(
        self, fails: float = 0.0, delay: float = 0.0, key: str | None = None, choices: int | None = None,
        empty: str | None = None, seed: int = 0, says: Callable[[dict[str, Any], int], str] | None = None,
        reads: Callable[[str], dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.fails, self.delay, self.key, self.choices, self.empty = fails, delay, key, choices, empty
        self.says, self.reads = says or answer, reads
        self.lock, self.random = threading.Lock(), random.Random(seed)
        self.now, self.most, self.failed = 0, 0, Counter[str]()
        self.asked, self.headers, self.bodies = Counter[str](), list[dict[str, str]](), list[dict[str, Any]]()

    def handle_error(self, *_: Any) -> None:
        """A client that has gone is no matter."""

    def drawn(self) -> str | None:
        return self.random.choice(FAILURES) if self.random.random() < self.fails else None


class Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        here, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with here.lock:
            here.now += 1
            here.most = max(here.most, here.now)
            here.headers.append(dict(self.headers.items()))
            here.bodies.append(body)
            failure = here.drawn()
            here.failed.update([failure] if failure else [])
        time.sleep(here.delay)
        code, content, more = self.answer(body, failure)
        with here.lock:  # before the reply: after it the client may ask again
            here.now -= 1
        text = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        for name, value in more.items():
            self.send_header(name, value)
        self.end_headers()
        if failure == "cut":
            self.wfile.write(text[: len(text) // 2])
            self.close_connection = True
        else:
            self.wfile.write(text)

    def answer(self, body: dict[str, Any], failure: str | None) -> tuple[int, Any, dict[str, str]]:
        here, said = self.server, self.headers.get("Authorization")
        if here.key and said != f"Bearer {here.key}":
            return 401, {"error": {"message": f"Incorrect API key provided: {said}"}}, {}
        if failure in ("500", "429"):
            return int(failure), {"error": {"message": "busy"}}, {"Retry-After": "0"} if failure == "429" else {}
        if failure == "error":
            return 200, {"error": {"message": "upstream has failed", "code": 502}}, {}
        if failure == "words":
            return 200, "<html>gateway</html>", {}
        if "messages" not in body:
            if here.reads is None:
                return 404, {"error": {"message": "no completions here"}}, {}
            choice = {"index": 0, "text": body["prompt"], "finish_reason": "length"}
            choice["logprobs"] = here.reads(body["prompt"])
            return 200, {"object": "text_completion", "choices": [choice]}, {}
        prompt = body["messages"][-1]["content"]
        if len(prompt) > LIMIT and here.says is answer:
            return 400, {"error": {"message": "the prompt is too long"}}, {}
        with here.lock:
            here.asked[f"{body['model']} {prompt}"] += 1
        count = here.choices or body.get("n", 1)
        texts = ["" if here.empty and here.empty in prompt else here.says(body, i) for i in range(count)]
        choices = [{"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                   for i, text in enumerate(texts)]  # fmt: skip
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": sum(len(one.split()) for one in texts)}
        return 200, {"object": "chat.completion", "choices": choices, "usage": usage}, {}


def answer(body: dict[str, Any], choice: int) -> str:
    """What the server says: words that depend on all that it was asked."""
    digest = hashlib.sha256(json.dumps([body, choice], sort_keys=True).encode()).hexdigest()
    return f"{body['model']} says {' '.join(digest[i : i + 4] for i in range(0, 32, 4))}"


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[ChatServer]:
    """A server that runs inside the block."""
    server = ChatServer(**options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
