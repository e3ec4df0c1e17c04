"""The web pages: an item to rate, the lead's overview, and the doors to both.

Everything needs the link of an assessor or of the lead, which leaves its token in a cookie that scripts cannot read.
Forms carry a key made of that token, and none is taken that another site has sent. Pages hold no script of their own
(Content-Security-Policy), so that no answer can bring one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

import jinja2
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse

from align_engine.assessment.rate import markup, overview, people, tasks, values
from align_engine.assessment.rate.people import NotLetIn, Person
from align_engine.assessment.rate.sections import LEAD, NAMES, is_name
from align_engine.assessment.rate.store import Store
from align_engine.errors import AlignError, printable

LARGEST = 100_000  # bytes of a form
COOKIE_DAYS = 90
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
ASSETS = {"rate.css": "text/css", "rate.js": "text/javascript"}
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("align_engine.assessment.rate"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined, auto_reload=False,
)  # fmt: skip
TEMPLATES.filters.update(answer=markup.answer, turns=markup.turns)


class Sealed:
    """Every response's headers, by which nothing is kept by a browser but the style and the script; and the prefix, of
    a proxy that takes it off as of one that does not."""

    def __init__(self, app: Callable[..., Any], root_path: str) -> None:
        self.app, self.root = app, root_path

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.root:
            bare = scope["path"].removeprefix(self.root) if scope["path"].startswith(f"{self.root}/") else scope["path"]
            scope = scope | {"root_path": self.root, "path": self.root + bare}

        async def sealed(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = any(name == b"cache-control" for name, _ in message["headers"])
                more = HEADERS if kept else HEADERS | {"Cache-Control": "no-store"}
                lines = [(name.lower().encode(), value.encode()) for name, value in more.items()]
                message = message | {"headers": [*message["headers"], *lines]}
            await send(message)

        await self.app(scope, receive, sealed)


class Refusal(Exception):
    """A request that is answered with a page of one sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Site:
    """The pages of one project.

    Args:
        store: the project.
        link_days: that links made on the lead's page are good for.
    """

    def __init__(self, store: Store, link_days: float) -> None:
        self.store, self.link_days, self.settings = store, link_days, store.settings()
        self.cookie = f"rate_{self.settings['id']}"  # of this project: ports do not part cookies
        self.overviews = overview.Overviews(store)

    def person(self, request: Request) -> Person:
        """Whoever asks. Raises NotLetIn."""
        return people.let_in(self.store, request.cookies.get(self.cookie))

    def lead(self, request: Request) -> Person:
        """The lead. Raises NotLetIn for an assessor, too."""
        found = self.person(request)
        if not found.lead:
            raise NotLetIn("This page is for whoever leads the rating.")
        return found

    def form(self, request: Request, body: bytes) -> dict[str, str]:
        """The fields of a form that a page of ours sent.

        Raises:
            Refusal: it comes from elsewhere, or is no form.
        """
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Refusal(403, "This form was sent by another site; nothing was changed.")
        try:
            fields = dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=50))
        except ValueError as error:  # of the encoding, too
            raise Refusal(400, "This is no form of this page; nothing was changed.") from error
        token = request.cookies.get(self.cookie, "")
        if not people.same(fields.get("key", ""), people.form_key(token)):
            raise Refusal(403, "This form is not from a page of yours; nothing was changed. Go back and reload it.")
        return fields

    def page(self, request: Request, name: str, status: int = 200, **shown: Any) -> HTMLResponse:
        """A template as a response."""
        key = people.form_key(request.cookies.get(self.cookie, ""))
        root = request.scope.get("root_path", "")
        text = TEMPLATES.get_template(f"{name}.html.jinja").render(
            root=root, key=key, mode=self.settings["mode"], **shown
        )
        return HTMLResponse(text, status)

    # assessors

    def enter(self, request: Request, token: str) -> Response:
        """A link: remember whose it is."""
        person = people.let_in(self.store, token)
        root = request.scope.get("root_path", "")
        response = RedirectResponse(f"{root}/lead" if person.lead else f"{root}/", 303)
        response.set_cookie(
            self.cookie, token, max_age=COOKIE_DAYS * 86400, path=f"{root}/", httponly=True, samesite="lax",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return response

    def rate(self, request: Request, said: str | None = None, status: int = 200) -> Response:
        """The item that is before an assessor."""
        person = self.person(request)
        if person.lead:
            return RedirectResponse(f"{request.scope.get('root_path', '')}/lead", 303)
        task, settings = tasks.current(self.store, person), self.settings
        low, high = settings["scale"]
        guideline = markup.rendered(settings["guideline"]) if settings["guideline"] else None
        return self.page(
            request, "rate" if task else "done", status, person=person, task=task, said=said, guideline=guideline,
            standing=tasks.standing(self.store, person), question=settings["question"], scores=range(low, high + 1),
            before=_as_shown(task) if task else None, longest=tasks.LONGEST_COMMENT,
        )  # fmt: skip

    def take(self, request: Request, body: bytes) -> Response:
        """A form of the item's page."""
        person, fields = self.person(request), self.form(request, body)
        try:
            task, version = int(fields.get("task", "")), int(fields.get("version", ""))
        except ValueError as error:
            raise Refusal(400, "This form names no item; nothing was changed.") from error
        if max(task, version) >= 2**63:
            raise Refusal(400, "This form names no item; nothing was changed.")
        comment = fields.get("comment", "").strip()
        if len(comment) > tasks.LONGEST_COMMENT:
            raise Refusal(413, f"A comment has at most {tasks.LONGEST_COMMENT} characters; nothing was changed.")
        try:
            value = None
            if fields.get("choice") != "skip":
                shown = tasks.shown(self.store, person, task)
                value = values.read(self.settings["mode"], fields, shown, self.settings["scale"])
            tasks.answered(self.store, person, task, version, value, comment)
        except (tasks.Refused, values.NoMark) as error:
            return self.rate(request, str(error), 409 if isinstance(error, tasks.Refused) else 422)
        return RedirectResponse(f"{request.scope.get('root_path', '')}/", 303)

    def undo(self, request: Request, body: bytes) -> Response:
        """The button that opens the last item again."""
        person, _ = self.person(request), self.form(request, body)
        try:
            tasks.undo(self.store, person)
        except tasks.Refused as error:
            return self.rate(request, str(error), 409)
        return RedirectResponse(f"{request.scope.get('root_path', '')}/", 303)

    # the lead

    def lead_page(self, request: Request, links: dict[str, str] | None = None, said: str | None = None) -> Response:
        """Progress, agreement, people."""
        self.lead(request)
        root = f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}"
        shown = {name: f"{root}/enter/{token}" for name, token in (links or {}).items()}
        return self.page(
            request, "lead", found=self.overviews.now(), people=overview.links(self.store), new=shown, said=said
        )

    def change_people(self, request: Request, body: bytes) -> Response:
        """The lead's buttons: add, renew, revoke. A new link is on the page that answers, and never again."""
        self.lead(request)
        fields = self.form(request, body)
        name, what = fields.get("name", "").strip(), fields.get("what")
        existing = people.names(self.store)
        if what == "revoke" and name in existing and name != LEAD:
            people.revoke(self.store, name)
            return self.lead_page(request, said=f"The link of {name} has ended.")
        if what == "add":
            if name in existing or not is_name(name):
                sentence = "There is somebody of that name." if name in existing else NAMES
                return self.lead_page(request, said=sentence)
        elif what != "renew" or name not in existing or name == LEAD:
            raise Refusal(400, "There is nobody of that name; nothing was changed.")
        token = people.link(self.store, name, self.link_days)
        return self.lead_page(request, {name: token}, f"The new link of {name} is shown this once:")


def _as_shown(task: tasks.Task) -> list[int] | None:
    """What was marked before it was undone, in the order of the page."""
    return [task.value[number] for number in task.shown] if task.value else None


async def _body(request: Request) -> bytes:
    """A form's bytes. Raises Refusal for more than anybody would send."""
    found = b""
    async for part in request.stream():
        found += part
        if len(found) > LARGEST:
            raise Refusal(413, "That is more than this page takes; nothing was changed.")
    return found


@cache
def _asset(name: str) -> str:
    from importlib.resources import files

    return str(files("align_engine.assessment.rate") / "static" / name)


def app(store: Store, link_days: float = 30.0, root_path: str = "") -> FastAPI:
    """The web application of a project.

    Args:
        store: the project.
        link_days: that links made on the lead's page are good for.
        root_path: under which a proxy shows it.
    """
    site = Site(store, link_days)
    made = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    made.add_middleware(Sealed, root_path=root_path)
    _refusals(made, site)
    _pages(made, site)
    return made


def _refusals(made: FastAPI, site: Site) -> None:
    """Every error that a request can come to, as a page."""

    @made.exception_handler(NotLetIn)
    def closed(request: Request, error: Exception) -> Response:
        return site.page(request, "message", 403, title="No entry", sentence=str(error), let_in=False)

    @made.exception_handler(Refusal)
    def refused(request: Request, error: Any) -> Response:
        return site.page(request, "message", error.status, title="Not taken", sentence=error.sentence, let_in=True)

    @made.exception_handler(AlignError)
    def failed(request: Request, error: Exception) -> Response:
        print(f"align: {printable(str(error))}", flush=True)
        sentence = "Your last click was not saved; all earlier ones are. Tell whoever leads the rating, then try again."
        return site.page(request, "message", 507, title="The server's disk refuses", sentence=sentence, let_in=True)

    @made.exception_handler(404)
    @made.exception_handler(405)
    def nothing(request: Request, error: Exception) -> Response:
        return site.page(request, "message", 404, title="Nothing here", sentence="There is no such page.", let_in=False)


def _pages(made: FastAPI, site: Site) -> None:
    """What can be asked for, and sent."""

    @made.get("/enter/{token}")
    def enter(request: Request, token: str) -> Response:
        return site.enter(request, token)

    @made.get("/")
    def rate(request: Request) -> Response:
        return site.rate(request)

    @made.get("/lead")
    def lead(request: Request) -> Response:
        return site.lead_page(request)

    @made.get("/static/{name}")
    def asset(name: str) -> Response:
        if name not in ASSETS:
            raise Refusal(404, "There is no such page.")
        return FileResponse(_asset(name), media_type=ASSETS[name], headers={"Cache-Control": "max-age=60"})

    for path, take in {"/rate": site.take, "/undo": site.undo, "/people": site.change_people}.items():

        async def post(request: Request, take: Callable[..., Response] = take) -> Response:
            return await run_in_threadpool(take, request, await _body(request))

        made.router.add_route(path, post, methods=["POST"])

    @made.get("/rate")
    @made.get("/undo")
    @made.get("/people")
    def back(request: Request) -> Response:
        return RedirectResponse(f"{request.scope.get('root_path', '')}/", 303)
