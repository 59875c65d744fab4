"""A server of canned answers in the forms of `lama serve`, for the tests of its page."""

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lama

FOLDER = Path(lama.__file__).parent / "server"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
LAYERS, HEADS, LONGEST = 3, 4, 512
END = "<|end|>"
ANSWER = "The cat sat on the mat,\nand the dog — a very old one — looked on."


class FakeServer(ThreadingHTTPServer):
    """Answers every chat with `answer` and every completion with `continuation`, token by token."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.words: list[str] = []
        self.requests: list[tuple[str, Any]] = []
        self.reset()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.answer, self.continuation = ANSWER, " so it went on."
        self.chat = self.internals = True
        self.legacy = self.endless = False
        self.canned: list[dict[str, Any]] | None = None  # the choices of every stream
        self.loading = 0  # times that the model is asked for before it is there
        self.key: str | None = None
        self.failure: tuple[int, str] | None = None
        self.pause = 0.0  # seconds between tokens
        self.cut = threading.Event()  # a client left in the middle of a stream
        self.requests.clear()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def of(self, path: str) -> list[Any]:
        return [body for asked, body in self.requests if asked == path]

    def id_of(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def ids(self, text: str) -> list[int]:
        return [self.id_of(word) for word in re.findall(r"\s?[^\s]+|\s", text)]

    def entry(self, token: int, place: int) -> dict[str, Any]:
        """The log-probabilities of the chat's form: the token, and ten of the most likely."""
        rank = (0, 0, 2, 0, 1)[place % 5]
        words = [f" other{i}" for i in range(10)]
        words[rank] = self.words[token]
        scale = sum(0.45**i for i in range(12))
        sharp = place % 3 == 0 and rank == 0
        p = (
            [0.97 if i == 0 else 0.02 * 0.45**i for i in range(10)]
            if sharp
            else [0.45**i / scale for i in range(10)]
        )
        top = [self.said(word, p[i]) for i, word in enumerate(words)]
        return {**top[rank], "top_logprobs": top}

    def said(self, word: str, probability: float) -> dict[str, Any]:
        found = {
            "id": self.id_of(word),
            "token": word,
            "logprob": math.log(probability),
            "bytes": list(word.encode()),
        }
        if self.legacy:
            del found["id"]
        return found

    def stream(self, chat: bool) -> Iterator[dict[str, Any]]:
        if self.canned is not None:
            yield from self.canned
            return
        tokens = self.ids(self.answer if chat else self.continuation)
        if chat:
            yield {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        place = 0
        while place < len(tokens) or self.endless:
            token = tokens[place % len(tokens)]
            yield self.choice(chat, token, self.words[token], self.entry(token, place), None)
            place += 1
        if chat:
            yield self.choice(chat, self.id_of(END), "", self.entry(self.id_of(END), 0), "stop")
        else:
            yield {"index": 0, "text": "", "finish_reason": "length"}

    def choice(
        self, chat: bool, token: int, text: str, entry: dict[str, Any], reason: str | None
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"index": 0, "token_ids": [token], "finish_reason": reason}
        if chat:
            return {**found, "delta": {"content": text}, "logprobs": {"content": [entry]}}
        top = {each["token"]: each["logprob"] for each in entry["top_logprobs"]}
        old = {
            "tokens": [entry["token"]],
            "token_logprobs": [entry["logprob"]],
            "top_logprobs": [top],
            "text_offset": [0],
        }
        return {**found, "text": text, "logprobs": old if self.legacy else {**old, "content": [entry]}}


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *about: object) -> None:
        pass

    def reply(self, body: object, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str) -> None:
        self.reply(
            {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}},
            status,
        )

    def is_allowed(self) -> bool:
        if self.server.key in (None, str(self.headers["Authorization"]).removeprefix("Bearer ")):
            return True
        self.refuse(401, "an API key is needed; got none or a wrong one")
        return False

    def do_GET(self) -> None:
        server = self.server
        if self.path in FILES:
            name, kind = FILES[self.path]
            self.reply((FOLDER / name).read_bytes(), kind=kind, **{"Content-Security-Policy": CSP})
        elif server.loading:
            server.loading -= 1
            self.refuse(503, "the model is loading; try again")
        elif self.path == "/v1/models" and self.is_allowed():
            meta = {"context": 1024, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": 50257}
            meta |= {"chat": server.chat, "internals": server.internals}
            self.reply({"object": "list", "data": [{"id": "tiny-model", "object": "model", "meta": meta}]})

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append((self.path, body))
        if not self.is_allowed():
            return
        if server.failure:
            return self.refuse(*server.failure)
        match self.path:
            case "/apply-template":
                text = "".join(f"<{each['role']}>{each['content']}\n" for each in body["messages"])
                self.reply({"prompt": text, "tokens": server.ids(text)})
            case "/tokenize":
                tokens = server.ids(body["prompt"])
                self.reply({"tokens": tokens, "count": len(tokens)})
            case "/v1/chat/completions" | "/v1/completions":
                self.stream(self.path == "/v1/chat/completions")
            case "/v1/attention" | "/v1/lens" if len(body["prompt"]) > LONGEST:
                self.refuse(
                    400, f"prompt must have at most 512 tokens; got {len(body['prompt'])}. Shorten it"
                )
            case "/v1/attention":
                self.reply(self.attention(body["prompt"]))
            case "/v1/lens":
                self.reply(self.lens(body["prompt"], body["answer"]))

    def stream(self, chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for choice in self.server.stream(chat):
                event = choice if "error" in choice else {"id": "x", "choices": [choice]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                time.sleep(self.server.pause)
            self.wfile.write(b'data: {"id": "x", "choices": [], "usage": {}}\n\ndata: [DONE]\n\n')
        except OSError:
            self.server.cut.set()

    def attention(self, tokens: list[int]) -> dict[str, Any]:
        n = len(tokens)

        def weights(layer: int, head: int) -> list[float]:
            raw = [math.exp(3 * math.sin((i + 1) * (head + 1) + layer)) for i in range(n)]
            raw[0] += 60 * (head == 1)
            return [each / sum(raw) for each in raw]

        layers = [
            {"layer": i, "heads": [{"head": h, "weights": weights(i, h)} for h in range(HEADS)]}
            for i in range(LAYERS)
        ]
        return {
            "position": n - 1,
            "tokens": tokens,
            "texts": [self.server.words[i] for i in tokens],
            "layers": layers,
        }

    def lens(self, tokens: list[int], answer: int) -> dict[str, Any]:
        names, layers = ["embed", *(f"blocks.{i}.resid_post" for i in range(LAYERS))], []
        for i, name in enumerate(names):
            p = [(0.1 + 0.2 * i) * 0.4**rank for rank in range(5)]
            words = [f" guess{rank}" for rank in range(5)]
            if i > 1:
                words[3 - i] = self.server.words[answer]
            top = [
                {"token": self.server.id_of(word), "text": word, "probability": at}
                for word, at in zip(words, p, strict=True)
            ]
            layers.append(
                {"name": name, "top": top, "answer_probability": p[max(0, 3 - i)], "answer_rank": 4 - i}
            )
        return {"position": len(tokens) - 1, "tokens": tokens, "texts": [], "layers": layers}
