"""Mixed traffic and damaged requests for a running `lama serve`; bench_serve.py describes the checks."""

import asyncio
import copy
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from serve_client import BROKEN, Client, Server, lama_command

import lama
from lama.cli.live import say
from lama.data import default_corpus
from lama.generation import Generation
from lama.models.gpt import GPT
from lama.tokenizers import Tokenizer
from lama.tokenizers.bpe import gpt2_files

SECONDS = 60  # the longest that an answer may take
STOPS = (["\n"], ["and", "unto"], [" the "], ["."], [", "], ["LORD", "king", "thou"])
COMPLETIONS = "/v1/completions"
FLAT = 1.05  # memory at the end, beside that after the first tenth of the requests

WRONG: dict[str, Any] = {  # changes of a good request that make it wrong
    "no prompt": {"prompt": None},
    "prompt of another type": {"prompt": {"text": "In"}},
    "unknown id": {"prompt": [1, 2, 10**6]},
    "negative id": {"prompt": [-1]},
    "prompt too long": {"prompt": [5] * 5000},
    "max_tokens below 0": {"max_tokens": -1},
    "max_tokens a text": {"max_tokens": "many"},
    "temperature below 0": {"temperature": -0.5},
    "temperature a text": {"temperature": "hot"},
    "top_p above 1": {"top_p": 1.5},
    "top_k below 0": {"top_k": -3},
    "n of 0": {"n": 0},
    "n too large": {"n": 1_000_000},
    "best_of": {"n": 1, "best_of": 4},
    "stop of numbers": {"stop": [1, 2]},
    "stop empty": {"stop": [""]},
    "stream a text": {"stream": "yes"},
    "logit_bias of a text": {"logit_bias": {"x": 1}},
    "logprobs too many": {"logprobs": 10**6},
    "logprobs a list": {"logprobs": [1]},
    "seed a text": {"seed": "x"},
}
RAW: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b'{"prompt": "In the',
    "a list": b"[]",
    "a number": b"7",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "a lone surrogate": b'{"prompt": "\\ud800"}',
}


@dataclass(frozen=True)
class Case:
    """A request and its answers."""

    body: dict[str, Any]
    texts: tuple[str, ...]
    """The text of each choice."""
    reasons: tuple[str, ...]


@dataclass
class Report:
    """The course of all requests."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Time of each request that was answered completely."""

    def fault(self, what: str, body: object = "") -> None:
        self.counts["faults"] += 1
        if len(self.faults) < 20:
            self.faults.append(f"{what}: {json.dumps(body)[:500]}" if body else what)
            say(self.faults[-1])


# --- requests and their answers


def make_body(rng: random.Random, documents: Sequence[Sequence[int]], tokenizer: Tokenizer) -> dict[str, Any]:
    """A good request. Its prompt is the beginning of one of a few documents, so that many share a prefix."""
    document = rng.choice(documents)
    tokens = list(document[: rng.randint(1, len(document))])
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "seed": rng.randrange(1000)}
    body["prompt"] = tokens if rng.random() < 0.5 else tokenizer.decode(tokens)
    body["temperature"] = rng.choice([0, 0.5, 0.8, 1.0, 1.5])
    if rng.random() < 0.3:
        body["top_k"] = rng.choice([1, 5, 50])
    if rng.random() < 0.3:
        body["top_p"] = rng.choice([0.3, 0.9, 0.99])
    if rng.random() < 0.2:
        body["min_p"] = rng.choice([0.02, 0.2])
    if rng.random() < 0.2:
        body["repetition_penalty"] = rng.choice([1.1, 1.5])
    if rng.random() < 0.3:
        body["stop"] = rng.choice(STOPS)
    if rng.random() < 0.15:
        body["n"] = rng.randint(2, 3)
    elif rng.random() < 0.1:
        body["prompt"] = [tokens, list(rng.choice(documents)[: rng.randint(1, 30)])]
    if rng.random() < 0.2:
        body["logprobs"] = rng.randint(1, 3)
    if rng.random() < 0.5:
        body["stream"] = True
    return body


def answer(body: dict[str, Any], model: GPT, tokenizer: Tokenizer, context: int) -> Case:
    """A request's case. Choice i of n must equal the result of `lama.generate` for the seed plus i."""
    prompt = body["prompt"]
    prompts = prompt if isinstance(prompt, list) and isinstance(prompt[0], list) else [prompt]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
    options = {name: body[name] for name in names if name in body}
    found: list[Generation] = []
    for one in prompts:
        for i in range(body.get("n", 1)):
            seed = body["seed"] + i
            made = lama.generate(
                model,
                tokenizer,
                one,
                max_new_tokens=body["max_tokens"],
                seed=seed,
                context=context,
                **options,
            )
            str(made)
            found.append(made)
    reasons = tuple(
        "length" if made.finish_reason == "context" else str(made.finish_reason) for made in found
    )
    return Case(body, tuple(made.text for made in found), reasons)


def make_cases(model: GPT, tokenizer: Tokenizer, context: int, n: int, seed: int = 0) -> list[Case]:
    """n requests with the answers of `lama.generate`."""
    rng, text = random.Random(seed), default_corpus().text
    documents = [
        tokenizer.encode(text[at : at + 4 * context]) for at in rng.sample(range(len(text) // 2), 12)
    ]
    documents = [document[: rng.choice((30, context // 2, context - 8))] for document in documents]
    cases = []
    for i in range(n):
        cases.append(answer(make_body(rng, documents, tokenizer), model, tokenizer, context))
        if (i + 1) % 100 == 0:
            say(f"{i + 1} of {n} answers computed")
    return cases


# --- clients


class Busy(Exception):
    """The queue of the server is full; the argument is the time to wait, in seconds."""


@dataclass
class Traffic:
    """The clients of one server."""

    port: int
    cases: Sequence[Case]
    report: Report
    rng: random.Random

    async def client(self, kinds: list[str], done: Callable[[], None]) -> None:
        """Send a request of each kind, until none is left; waits where the queue is full."""
        connection = Client(self.port)
        while kinds:
            kind = kinds.pop()
            case = self.rng.choice(self.cases)
            try:
                async with asyncio.timeout(SECONDS):
                    await getattr(self, kind)(connection, case)
                self.report.counts[kind] += 1
            except Busy as busy:
                self.report.counts["429"] += 1
                kinds.append(kind)
                await asyncio.sleep(busy.args[0] * self.rng.random())
                continue
            except TimeoutError:
                self.report.fault(f"{kind}: no answer within {SECONDS} s", case.body)
                connection.close()
            except BROKEN as error:
                self.report.fault(f"{kind}: {type(error).__name__} {error}", case.body)
                connection.close()
            done()
        connection.close()

    async def good(self, connection: Client, case: Case) -> None:
        """Send a request and compare all of its answer."""
        began = time.perf_counter()
        await connection.send(COMPLETIONS, case.body)
        if await connection.head() != 200:
            text = b"".join([part async for part in connection.parts()]).decode(errors="replace")
            wait = connection.headers.get("retry-after", "")
            if connection.status == 429 and wait.isdecimal() and int(wait) < SECONDS:
                raise Busy(int(wait))
            self.report.fault(f"a good request must get 200; got {connection.status} {text[:300]}", case.body)
            return
        if case.body.get("stream"):
            await self.compare(case, [event async for event in connection.events()])
        else:
            await self.compare(case, [json.loads(b"".join([part async for part in connection.parts()]))])
        self.report.seconds.append(time.perf_counter() - began)

    async def compare(self, case: Case, events: Sequence[dict[str, Any]], whole: bool = True) -> None:
        """Compare texts and reasons; with `whole` false, only compare the beginnings."""
        texts, reasons = [""] * len(case.texts), [""] * len(case.texts)
        for event in events:
            if "error" in event:
                self.report.fault(f"a stream must not break off; got {event['error']}", case.body)
                return
            for choice in event.get("choices", ()):
                i = choice["index"]
                texts[i] += choice["text"]
                reasons[i] = choice.get("finish_reason") or reasons[i]
                scores = (choice.get("logprobs") or {}).get("token_logprobs") or ()
                if not all(score is not None and -np.inf < score <= 0 for score in scores):
                    self.report.fault(f"log-probabilities must be numbers up to 0; got {scores}", case.body)
        if not whole:
            if not all(right.startswith(text) for text, right in zip(texts, case.texts, strict=True)):
                self.report.fault(f"wrong beginning {texts}, must begin {list(case.texts)}", case.body)
        elif tuple(texts) != case.texts:
            self.report.counts["wrong texts"] += 1
            self.report.fault(f"wrong text {texts}, must be {list(case.texts)}", case.body)
        elif tuple(reasons) != case.reasons:
            self.report.fault(f"wrong finish_reason {reasons}, must be {list(case.reasons)}", case.body)

    async def leave(self, connection: Client, case: Case) -> None:
        """Leave in the middle: of a stream after some pieces, of a plain answer after a while."""
        await connection.send(COMPLETIONS, case.body)
        if case.body.get("stream"):
            if await connection.head() == 200:
                events, left = [], self.rng.randint(0, 10)
                async for event in connection.events():
                    events.append(event)
                    if len(events) > left:
                        break
                await self.compare(case, events, whole=False)
        else:
            await asyncio.sleep(self.rng.random() / 10)
        connection.close()

    async def wrong(self, connection: Client, case: Case) -> None:
        """Send a wrong request: 400 in OpenAI's form."""
        name = self.rng.choice([*WRONG, *RAW])
        changed = {
            key: value for key, value in (case.body | WRONG.get(name, {})).items() if value is not None
        }
        body: Any = RAW.get(name, changed)
        status, text = await connection.ask(COMPLETIONS, body)
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = None
        if status != 400 or not isinstance(message, str):
            self.report.fault(f"{name} must get 400 with a message; got {status} {text[:300]!r}", changed)

    async def slow(self, connection: Client, case: Case) -> None:
        """Read an answer slowly: a pause of two seconds in all."""
        await connection.send(COMPLETIONS, case.body)
        await asyncio.sleep(1)
        if await connection.head() != 200:
            connection.close()
            return
        await asyncio.sleep(1)
        parts = b"".join([part async for part in connection.parts()])
        if not case.body.get("stream"):
            await self.compare(case, [json.loads(parts)])
            return
        events = [event.removeprefix(b"data: ") for event in parts.split(b"\n\n") if event]
        await self.compare(case, [json.loads(event) for event in events if event != b"[DONE]"])

    async def half(self, connection: Client, case: Case) -> None:
        """Send half of a request, wait and leave."""
        if self.rng.random() < 0.5:
            await connection.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127")
        else:
            await connection.send(COMPLETIONS, case.body, part=self.rng.random())
        await asyncio.sleep(2)
        connection.close()


KINDS = {"good": 80, "leave": 8, "wrong": 10, "slow": 1, "half": 1}  # in a hundred


def check_load(
    name: str,
    folder: Path,
    rows: int,
    serve_args: Sequence[str],
    requests: int = 10_000,
    distinct: int = 1000,
    clients: int = 64,
    seed: int = 0,
    flat: float = FLAT,
) -> dict[str, Any]:
    """Send mixed requests to `lama serve` of a model; returns a report whose `faults` must be empty.

    Faults are also: memory at the end above `flat` times that after the first tenth of the requests, and a
    server that is busy after the last, or does not end with 0.
    """
    model, tokenizer = lama.load(name)
    context = min(model.config.context_length, 2048)
    cases = make_cases(model, tokenizer, context, distinct, seed)
    report, rng = Report(), random.Random(seed)
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=requests)
    memory: list[int] = []
    with Server(lama_command(name, rows, context, *serve_args), folder / "lama.log") as server:

        def done() -> None:
            memory.append(server.resident())
            if len(memory) % 1000 == 0:
                say(f"{len(memory)} of {requests} requests, {memory[-1] / 1e6:.0f} MB, {report.counts}")

        async def run() -> None:
            traffic = Traffic(server.port, cases, report, rng)
            await asyncio.gather(*(traffic.client(kinds, done) for _ in range(clients)))
            await asyncio.sleep(3)  # answers whose clients are gone
            status, slots = await Client(server.port).ask("/slots")
            if status != 200 or any(slot.get("is_processing") for slot in json.loads(slots)):
                report.fault(f"no slot may be busy after the last request; got {status} {slots!r:.500}")

        began = time.perf_counter()
        asyncio.run(run())
        seconds = time.perf_counter() - began
        before = server.cpu_seconds()
        time.sleep(3)
        idle = (server.cpu_seconds() - before) / 3
        if idle > 0.05:
            report.fault(f"an idle server must use no processor time; got {idle:.0%} of a core")
        first, last = memory[max(1, requests // 10) - 1], server.resident()
        if last > flat * first:
            report.fault(
                f"memory must stay within {flat - 1:.0%}; got {first / 1e6:.1f} MB, then {last / 1e6:.1f} MB"
            )
        if code := server.stop():
            report.fault(f"a server must end with 0 on SIGTERM; got {code}")
        log = server.log.read_text(errors="replace")
    if "Traceback" in log:
        report.fault(f"the log must hold no traceback; got {log[log.index('Traceback') :][:2000]}")
    return {
        "requests": requests,
        "counts": dict(report.counts),
        "seconds": round(seconds, 1),
        "answer_seconds": {p: round(float(np.percentile(report.seconds, p)), 2) for p in (50, 95, 100)},
        "memory_mb": [round(first / 1e6, 1), round(last / 1e6, 1), round(max(memory) / 1e6, 1)],
        "faults": report.faults,
    }


# --- damaged bodies

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.5, 1e308, -0.0, 2**31, 2**63, 10**30),
    *("", "x", "\0", "é🙂", "0", "x" * 100_000),
    *([], [[]], [None], [1], [[1]], ["x"], [1, "x"], [2**70], [1] * 5000, {}, {"": None}, {"type": "x"}),
    float("nan"),
    float("inf"),
)
MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who was Moses?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
SAMPLING = {
    "max_tokens": 4,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 1,
    "stream": True,
}
SAMPLING |= {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "n": 1}
SAMPLING |= {"logit_bias": {"5": 1.0}, "stop": ["\n", "x"], "stream_options": {"include_usage": True}}
GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    (COMPLETIONS, SAMPLING | {"model": "m", "prompt": "In the", "echo": True, "logprobs": 2}),
    (COMPLETIONS, {"prompt": [[5, 6, 7], [8, 9]], "max_tokens": 2, "suffix": None, "ignore_eos": True}),
    ("/v1/chat/completions", SAMPLING | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "tools": [TOOL], "tool_choice": "auto"}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "response_format": FORMAT}),
    ("/v1/embeddings", {"input": ["In the", "beginning"], "encoding_format": "float"}),
    ("/tokenize", {"prompt": "In the beginning", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/apply-template", {"messages": MESSAGES}),
    (
        "/v1/internals",
        {"prompt": "In the", "taps": ["blocks.0.*"], "layers": [0], "heads": [0], "max_tokens": 1},
    ),
    ("/v1/lens", {"prompt": "In the", "position": 1, "answer": 5, "k": 2}),
    ("/v1/attention", {"prompt": [5, 6, 7], "position": 1, "layers": [0], "heads": [0]}),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([at] if at else []), *(path for key, one in inner for path in places(one, (*at, key)))]


def damaged(rng: random.Random) -> tuple[str, bytes, str]:
    """The path, body and further headers of a damaged request."""
    path, good = rng.choice(GOOD)
    body, headers = copy.deepcopy(good), ""
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        *way, key = rng.choice(places(body) or [("x",)])
        inside: Any = body
        for step in way:
            inside = inside[step]
        match rng.randrange(5):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[f"{key}\u00e9"] = inside.pop(key)
            case 2:
                inside[key] = [copy.deepcopy(inside[key])] * rng.choice((1, 3, 300))
            case _:
                inside[key] = copy.deepcopy(rng.choice(VALUES))
        if not body:
            break
    data = bytearray(json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass"))
    match rng.randrange(12):
        case 0:
            del data[rng.randrange(len(data)) :]
        case 1:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            at, end = sorted(rng.choices(range(len(data)), k=2))
            data[at:at] = data[at:end]
        case 3:
            data = bytearray(b'{"prompt":' + b"[" * rng.choice((100, 100_000)))
        case 4:
            data = bytearray(
                b'{"max_tokens": 4, "prompt": "x", "seed": ' + b"9" * rng.choice((30, 10_000)) + b"}"
            )
        case 5:
            headers = rng.choice(
                ("Content-Encoding: gzip\r\n", "Expect: nothing\r\n", "Accept: text/html\r\n")
            )
    return path, bytes(data), headers


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant>"
SMALL = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}


def random_gpt2(folder: Path, **shape: int) -> Path:
    """A checkpoint with random weights (124M's shape by default) and GPT-2's vocabulary, written once."""
    if not folder.exists():
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        from reference.random_gpt2 import make_config, make_weights, write_folder

        folder.mkdir()
        config = make_config(bos_token_id=50256, eos_token_id=50256, **shape)
        write_folder(folder, config, make_weights(config))
        files = gpt2_files() | {"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE}).encode()}
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return folder


def check_bodies(folder: Path, n: int, serve_args: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Send n damaged requests to `lama serve`; returns a report whose `faults` must be empty.

    Every answer must be 200 or 4xx, with one line of error, and a stream without an error inside.
    """
    report, slowest = Report(), 0.0

    async def run(server: Server) -> None:
        nonlocal slowest
        for number in range(n):
            rng, connection = random.Random(f"{seed} {number}"), Client(server.port)
            path, body, headers = damaged(rng)
            shown = f"{path} {headers.strip()} {body[:300].decode(errors='replace')}"
            began = time.perf_counter()
            try:
                async with asyncio.timeout(SECONDS):
                    status, text = await connection.ask(path, body, headers)
                report.counts[f"{path} {status}"] += 1
                if status != 200 and not 400 <= status < 500:
                    report.fault(f"body {number} must get 200 or 4xx; got {status} {text[:300]!r}", shown)
                elif status != 200 and not isinstance(json.loads(text)["error"]["message"], str):
                    report.fault(f"body {number}, {status} must have a message; got {text[:300]!r}", shown)
                elif b'data: {"error"' in text:
                    report.fault(f"body {number} must not break off; got {text[-300:]!r}", shown)
            except TimeoutError:
                report.fault(f"body {number}: no answer within {SECONDS} s", shown)
            except (*BROKEN, ValueError, KeyError, TypeError) as error:
                report.fault(f"body {number}: {type(error).__name__} {error}", shown)
            slowest = max(slowest, time.perf_counter() - began)
            connection.close()
        status, _ = await Client(server.port).ask(COMPLETIONS, {"prompt": "In the", "max_tokens": 2})
        if status != 200:
            report.fault(f"a good request must get 200 afterwards; got {status}")

    model = random_gpt2(folder / "model", **SMALL)
    with Server(lama_command(model, 4, 128, *serve_args), folder / "lama.log") as server:
        asyncio.run(run(server))
        log = server.log.read_text(errors="replace")
    if "Traceback" in log:
        report.fault(f"the log must hold no traceback; got {log[log.index('Traceback') :][:2000]}")
    counts = dict(sorted(report.counts.items()))
    return {"bodies": n, "counts": counts, "slowest_s": round(slowest, 2), "faults": report.faults}
