"""The web application: routes, and the checks of each request."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import aclosing, suppress
from email.utils import formatdate
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, TypeVar

from lama.errors import LamaError, first_line, note
from lama.server.access import Access
from lama.server.chat import chat_completions
from lama.server.completions import completions
from lama.server.errors import ErrorAnswer, Refused, answer_to
from lama.server.extras import Content, embeddings, inside
from lama.server.fields import Body
from lama.server.metrics import metrics, models, slots
from lama.server.schema import parse_body
from lama.server.service import Limits, Service
from lama.server.tokens import apply_template, detokenize, tokenize, tokenizer_info
from lama.server.worker import QueueFull

if TYPE_CHECKING:
    from starlette.applications import Starlette

T = TypeVar("T")
Message = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Handler = Callable[[Service, Body], Awaitable[object]]
"""An endpoint: it maps a request's JSON object to the answer's, to a stream of objects, or to Content."""

SMALL = 1 << 16  # bytes of JSON that are parsed without a thread
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


class ClientGone(Exception):
    """The client has closed the connection."""


def make_app(service: Service, access: Access | None = None) -> "Starlette":
    """The web application. Raises LamaError where Starlette is not installed."""
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.middleware.cors import CORSMiddleware
        from starlette.routing import Route
    except ImportError:
        raise LamaError("lama serve needs starlette; pip install 'lama[serve]'") from None

    access = access or Access()
    routes: list[Route] = []

    def add(method: str, path: str, handler: Handler, public: bool = False) -> None:
        endpoint = Endpoint(service, None if public else access, handler)
        routes.append(Route(path, endpoint, methods=[method]))

    for path, (file, kind) in PAGE.items():
        if (content := resources.files("lama.server").joinpath(file)).is_file():
            add("GET", path, partial(_file, content=Content(content.read_bytes(), kind)), public=True)
    add("GET", "/health", _health, public=True)
    add("GET", "/metrics", _metrics)
    add("GET", "/slots", slots)
    add("GET", "/tokenizer_info", tokenizer_info)
    for path, handler in {
        "/tokenize": tokenize,
        "/detokenize": detokenize,
        "/apply-template": apply_template,
    }.items():
        add("POST", path, handler)
    for prefix in ("/v1", ""):  # the latter as llama.cpp's server
        add("GET", f"{prefix}/models", models)
        add("GET", f"{prefix}/models/{{name:path}}", _model)
        add("POST", f"{prefix}/completions", completions)
        add("POST", f"{prefix}/chat/completions", chat_completions)
        add("POST", f"{prefix}/embeddings", embeddings)
    for name in ("internals", "lens", "attention"):
        add("POST", f"/v1/{name}", partial(inside, name=name))

    async def http_error(request: object, error: Exception) -> "JSON":
        assert isinstance(error, HTTPException)
        what = {404: "there is no such path", 405: "the path has no such method"}.get(error.status_code)
        found = ErrorAnswer(error.status_code, f"{what or error.detail}; docs/serving.md lists all")
        return JSON(found.to_json(), found.status, dict(error.headers or {}))

    cors = Middleware(
        CORSMiddleware, allow_origins=[*access.origins], allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    guard = Middleware(Guard, service, access)
    return Starlette(
        routes=routes,
        middleware=[guard, cors] if access.origins else [guard],
        exception_handlers={HTTPException: http_error},  # type: ignore[dict-item]
    )


class JSON:
    """An answer of one JSON value, or of content."""

    def __init__(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None):
        if isinstance(value, Content):
            self._content, self._type = value.content, value.media_type
        else:
            self._content, self._type = _json(value), "application/json"
        self._status, self._headers = status, headers or {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        length = str(len(self._content))
        await _begin(
            send, self._status, {"Content-Type": self._type, "Content-Length": length, **self._headers}
        )
        await send({"type": "http.response.body", "body": self._content, "more_body": False})


class Endpoint:
    """A handler as a web application: it reads the body, watches the client, and sends OpenAI's errors."""

    def __init__(self, service: Service, access: Access | None, handler: Handler):
        """`access` checks the key; None makes the endpoint public."""
        self.service, self.access, self.handler = service, access, handler

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            if self.access is not None and not self.access.opens(headers_of(scope)):
                message = "send an API key as Authorization: Bearer KEY; got no valid key"
                raise Refused(401, message, code="invalid_api_key")
            body: Body = {"name": path_of(scope)}
            if scope["method"] == "POST":
                if self.service.draining:
                    raise Refused(503, "the server is shutting down", type="unavailable_error")
                raw = await _body(receive)
                body = parse_body(raw) if len(raw) < SMALL else await asyncio.to_thread(parse_body, raw)
            await until_gone(receive, self._answer(body, scope, receive, send))
        except ClientGone:
            return
        except Exception as error:
            found = answer_to(error)
            if found.status == 500:
                note(f"{scope['path']} failed with {type(error).__name__}: {first_line(error)}")
            await JSON(found.to_json(), found.status, found.headers)(scope, receive, send)

    async def _answer(self, body: Body, scope: Message, receive: Receive, send: Send) -> None:
        found = await self.handler(self.service, body)
        if not isinstance(found, AsyncGenerator):
            await JSON(found)(scope, receive, send)
            return
        async with aclosing(found) as parts:
            part = await anext(parts)  # an error before the first part has its own status
            await _begin(send, 200, {"Content-Type": "text/event-stream; charset=utf-8"})
            try:
                await _event(send, part)
                async for part in parts:
                    await _event(send, part)
                last = b"data: [DONE]\n\n"
            except Exception as error:
                last = error_event(answer_to(error))
        await send({"type": "http.response.body", "body": last, "more_body": False})


class Guard:
    """Checks before routing, limits of time and size, and the headers of all answers."""

    def __init__(self, app: App, service: Service, access: Access):
        self.app, self.service, self.access = app, service, access

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        limits, kind, is_over = self.service.limits, "", False

        async def guarded(message: Message) -> None:
            nonlocal kind, is_over
            if message["type"] == "http.response.start":
                kind = self._started(message)
            is_over = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            part = message.get("body")
            received += len(part) if isinstance(part, bytes) else 0
            if received > limits.max_body:
                raise _too_large(limits)
            return message

        self.service.n_active += 1
        try:
            headers = headers_of(scope)
            refusal = self.access.refusal(headers)
            length = headers.get("content-length", "")
            if refusal is None and length.isdecimal() and int(length[:20]) > limits.max_body:
                refusal = _too_large(limits).answer
            if refusal is None and self.service.n_active > limits.max_active:
                refusal = answer_to(QueueFull(f"at most {limits.max_active} requests at a time"))
            if refusal is not None:
                await JSON(refusal.to_json(), refusal.status, refusal.headers)(scope, receive, guarded)
                return
            async with asyncio.timeout(limits.timeout):
                await self.app(scope, limited, guarded)
        except TimeoutError:
            found = ErrorAnswer(408, f"a request may take at most {limits.timeout:g} s", code="timeout")
            if not kind:
                await JSON(found.to_json(), found.status, {"Connection": "close"})(scope, receive, guarded)
            elif not is_over:
                last = error_event(found) if kind.startswith("text/event-stream") else b""
                with suppress(TimeoutError):  # the client may not read
                    async with asyncio.timeout(1):
                        await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            self.service.n_active -= 1

    def _started(self, message: Message) -> str:
        """Add headers to the beginning of an answer; returns its content type."""
        self.service.statuses[int(str(message["status"]))] += 1
        found = message["headers"]
        assert isinstance(found, list)
        names = {name.lower() for name, _ in found}
        more = {**HEADERS, "Date": formatdate(usegmt=True)}
        found += [
            (name.lower().encode(), value.encode())
            for name, value in more.items()
            if name.lower().encode() not in names
        ]
        return next((value.decode() for name, value in found if name.lower() == b"content-type"), "none")


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of some work. If the client leaves, the work is cancelled and ClientGone is raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        assert isinstance(part, bytes)
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


async def _begin(send: Send, status: int, headers: Mapping[str, str]) -> None:
    found = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": found})


async def _event(send: Send, value: object) -> None:
    await send({"type": "http.response.body", "body": b"data: %b\n\n" % _json(value), "more_body": True})


def error_event(error: ErrorAnswer) -> bytes:
    """An error as the last event of a stream that has begun."""
    return b"data: %b\n\n" % _json(error.to_json())


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def headers_of(scope: Message) -> dict[str, str]:
    """The headers of a request, by name in lower case; of repeated headers, the last."""
    found = scope["headers"]
    assert isinstance(found, list)
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in found}


def path_of(scope: Message) -> str:
    """The variable part of a request's path."""
    found = scope.get("path_params")
    return str(found.get("name", "")) if isinstance(found, dict) else ""


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"a body may have at most {limits.max_body:,} bytes; got more", code="body_too_large")


async def _file(service: Service, body: Body, content: Content) -> Content:
    return content


async def _health(service: Service, body: Body) -> dict[str, object]:
    _ = service.backend
    if service.draining:
        raise Refused(503, "the server is shutting down", type="unavailable_error")
    return {"status": "ok"}


async def _metrics(service: Service, body: Body) -> Content:
    return Content(metrics(service).encode(), "text/plain; version=0.0.4; charset=utf-8")


async def _model(service: Service, body: Body) -> object:
    found = await models(service, body)
    data = found["data"]
    assert isinstance(data, list)
    for model in data:
        if body["name"] == model["id"]:
            return model
    names = ", ".join(model["id"] for model in data)
    message = f"the model must be {names}; got another name"
    raise Refused(404, message, param="model", code="model_not_found")
