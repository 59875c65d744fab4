"""The server's checks: bad bodies, keys, hosts and origins, limits, and its numbers about itself."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="lama serve needs starlette")

from servers import HERE, make_model, running, until
from starlette.testclient import TestClient

from lama.errors import LamaError
from lama.server.access import Access, read_keys
from lama.server.app import POLICY, make_app
from lama.server.extras import INSIDE
from lama.server.fields import BadField
from lama.server.service import Limits, Service

COMPLETE = {"prompt": "a", "max_tokens": 2}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(limits=Limits(max_body=100_000)) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return TestClient(make_app(service), base_url=HERE)


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


def test_health_and_models(service, client):
    assert client.get("/health").json() == {"status": "ok"}
    found = client.get("/v1/models").json()
    (model,) = found["data"]
    assert (found["object"], model["id"], model["object"]) == ("list", "tiny", "model")
    sizes = {"context": 64, "n_layers": 2, "n_heads": 2, "vocab_size": 256, "chat": True, "internals": True}
    assert model["meta"] == sizes
    assert client.get("/v1/models/tiny").json() == client.get("/models").json()["data"][0] == model
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_before_the_model_is_loaded():
    client = TestClient(make_app(Service()), base_url=HERE)
    for answer in (
        client.get("/health"),
        client.post("/v1/completions", json=COMPLETE),
        client.get("/metrics"),
    ):
        assert error_of(answer, 503)["code"] == "loading"


def test_while_draining():
    with running() as service:
        client = TestClient(make_app(service), base_url=HERE)
        service.drain()
        for answer in (client.get("/health"), client.post("/v1/completions", json=COMPLETE)):
            assert error_of(answer, 503)["type"] == "unavailable_error"
        assert client.get("/slots").status_code == 200


def test_unknown_paths_and_methods(client):
    error_of(client.get("/v1/nothing"), 404)
    answer = client.get("/v1/completions")
    error_of(answer, 405)
    assert answer.headers["allow"] == "POST"
    error_of(client.post("/health"), 405)
    error_of(client.put("/v1/completions", json=COMPLETE), 405)


def test_headers_of_all_answers(client):
    for answer in (
        client.get("/health"),
        client.get("/nothing"),
        client.post("/v1/completions", content="{"),
    ):
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["date"].endswith("GMT")
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "max_tokens": ' + b"9" * 39 + b".5}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ["\\udc00"]}',
        b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"prompt": "a", "x": ' + b'{"a":' * 90_000 + b"1" + b"}",
        b'{"prompt": "a", "logit_bias": {"\xc2\xb2": 1}}',
        b'{"prompt": "a", "logit_bias": {"1": 1e300}}',
        b'{"prompt": "a" "b"}',
    ],
)
def test_bad_bodies(client, body):
    assert error_of(client.post("/v1/completions", content=body), 400 if len(body) < 100_000 else 413)


def test_wide_numbers_are_accepted_where_they_fit(client):
    body = (
        b'{"prompt": "a", "prompt": "b", "max_tokens": '
        + b"9" * 18
        + b', "temperature": 1'
        + b"0" * 30
        + b"}"
    )
    assert client.post("/v1/completions", content=body).status_code == 200


def mutated(body: dict[str, Any], rng: random.Random) -> bytes:
    """A body with a few fields replaced, renamed or left out, or with bytes changed."""
    values = [
        None,
        True,
        0,
        -1,
        1.5,
        10**30,
        "",
        "a",
        "\0",
        [],
        {},
        [[]],
        [None],
        {"a": {}},
        ["x"] * 300,
        [10**9],
    ]
    body = json.loads(json.dumps(body))
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(
            [*body, "n", "stop", "seed", "logprobs", "stream", "stream_options", "logit_bias", "tools"]
        )
        match rng.randrange(5):
            case 0:
                body.pop(name, None)
            case 1:
                body[rng.choice(["x", "max_tokens", "prompt", "messages", "input"])] = body.get(name)
            case _:
                body[name] = rng.choice(values)
    raw = bytearray(json.dumps(body).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw[: rng.randrange(len(raw))]) if rng.random() < 0.1 else bytes(raw)


def test_mutated_bodies(client):
    rng = random.Random(1)
    messages = [{"role": "user", "content": "Hi"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "ab", "max_tokens": 2, "temperature": 0.5, "echo": True, "logprobs": 1},
        "/v1/chat/completions": {"messages": messages, "max_tokens": 2, "logprobs": True, "top_logprobs": 2},
        "/tokenize": {"prompt": "ab", "messages": messages, "add_special_tokens": True},
        "/detokenize": {"tokens": [1, 2]},
        "/apply-template": {"messages": messages, "chat_template_kwargs": {"a": 1}},
    }
    for i in range(500):
        path = list(bodies)[i % len(bodies)]
        raw = mutated(bodies[path], rng)
        answer = client.post(path, content=raw)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, raw
        if answer.status_code != 200:
            error_of(answer, answer.status_code)


def test_large_bodies(client):
    assert error_of(client.post("/v1/completions", json={"prompt": "x" * 200_000}), 413)

    def parts() -> Iterator[bytes]:  # without a Content-Length
        for _ in range(30):
            yield b" " * 10_000

    assert error_of(client.post("/v1/completions", content=parts()), 413)["code"] == "body_too_large"


def test_keys(service):
    client = TestClient(make_app(service, Access(keys=frozenset({"secret", "other"}))), base_url=HERE)
    assert client.get("/health").status_code == 200
    for headers in (
        {},
        {"Authorization": "Bearer secre"},
        {"Authorization": "Basic secret"},
        {"X-API-Key": "é"},
    ):
        raw = {name: value.encode() for name, value in headers.items()}
        error = error_of(client.post("/v1/completions", json=COMPLETE, headers=raw), 401)
        assert error["code"] == "invalid_api_key"
    for headers in ({"Authorization": "Bearer other"}, {"X-API-Key": "secret"}):
        assert client.post("/v1/completions", json=COMPLETE, headers=headers).status_code == 200
    error_of(client.get("/metrics"), 401)


@pytest.mark.parametrize(
    ("host", "access", "known"),
    [
        ("127.0.0.1:8080", Access(), True),
        ("localhost", Access(), True),
        ("LOCALHOST:1", Access(), True),
        ("[::1]:8080", Access(), True),
        ("evil.example", Access(), False),
        ("localhost.evil.example", Access(), False),
        ("", Access(), False),
        ("192.0.2.1", Access(), False),
        ("192.0.2.1:80", Access("0.0.0.0"), True),
        ("evil.example", Access("0.0.0.0"), False),
        ("lama.example", Access("0.0.0.0", frozenset("k")), True),
        ("lama.example", Access("lama.example"), True),
    ],
)
def test_hosts(service, host, access, known):
    headers = {"Host": host, "X-API-Key": "k"}
    answer = TestClient(make_app(service, access), base_url=HERE).get("/health", headers=headers)
    assert answer.status_code == (200 if known else 403)
    if not known:
        assert error_of(answer, 403)["code"] == "host_not_allowed"


def test_origins(service):
    client = TestClient(make_app(service), base_url=HERE)
    for origin in ("http://127.0.0.1:3000", "null", "https://evil.example", "http://localhost"):
        answer = client.post("/v1/completions", json=COMPLETE, headers={"Origin": origin})
        assert error_of(answer, 403)["code"] == "origin_not_allowed"
    same = client.post("/v1/completions", json=COMPLETE, headers={"Origin": HERE})
    assert same.status_code == 200 and "access-control-allow-origin" not in same.headers
    origin = "https://app.example"
    open_client = TestClient(make_app(service, Access(origins=frozenset({origin}))), base_url=HERE)
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    for answer in (
        open_client.post("/v1/completions", json=COMPLETE, headers={"Origin": origin}),
        open_client.options("/v1/completions", headers=asked),
    ):
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    error_of(open_client.get("/health", headers={"Origin": "https://evil.example"}), 403)


def test_too_many_at_once():
    with running(limits=Limits(max_active=0)) as service:
        answer = TestClient(make_app(service), base_url=HERE).get("/health")
        assert error_of(answer, 429) and answer.headers["retry-after"] == "1" and service.n_active == 0


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    path.chmod(0o600)
    assert read_keys(path) == {"one", "two"}
    path.chmod(0o640)
    with pytest.raises(LamaError, match=r"got mode 640. Run: chmod 600"):
        read_keys(path)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(LamaError, match="one key a line; got none"):
        read_keys(path)
    path.write_text("é")
    with pytest.raises(LamaError, match="printable ASCII"):
        read_keys(path)
    with pytest.raises(LamaError, match="cannot be read"):
        read_keys(tmp_path / "missing")


def test_metrics_and_slots_tell_numbers_only():
    with running() as service:
        client = TestClient(make_app(service), base_url=HERE)
        client.post("/v1/completions", json={"prompt": "hidden words", "max_tokens": 3, "ignore_eos": True})
        client.post("/v1/completions", json={"prompt": "hidden words", "max_tokens": 3, "ignore_eos": True})
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        found = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        assert found["lama:prompt_tokens_total"] == "24" and found["lama:tokens_predicted_total"] == "6"
        assert found["lama:prompt_tokens_cached_total"] == "11"
        assert found["lama:requests_processing"] == found["lama:requests_deferred"] == "0"
        assert found['lama:requests_total{status="200"}'] == "2"
        assert 0 < float(found["lama:n_busy_slots_per_decode"]) <= 3
        slots = client.get("/slots").json()
        assert len(slots) == 4 and {each["is_processing"] for each in slots} == {False}
        assert all(each.keys() == {"id", "n_ctx", "is_processing", "n_tokens"} for each in slots)
        assert "hidden" not in answer.text


def test_embeddings(client, service, monkeypatch):
    seen: list[list[int]] = []

    def embed(model, tokens):
        seen.append(list(tokens))
        return np.array([len(tokens), 0.5], np.float32)

    monkeypatch.setattr("lama.server.extras.embed", embed)
    found = client.post("/v1/embeddings", json={"input": ["ab", [1, 2, 3]]}).json()
    assert [each["embedding"] for each in found["data"]] == [[2, 0.5], [3, 0.5]] and seen == [
        [97, 98],
        [1, 2, 3],
    ]
    assert found["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    one = client.post("/v1/embeddings", json={"input": "ab", "encoding_format": "base64"}).json()
    assert one["data"][0]["embedding"] == "AAAAQAAAAD8="
    for param, body in (
        ("input", {"input": ""}),
        ("input", {"input": []}),
        ("input", {"input": "x" * 65}),
        ("dimensions", {"input": "a", "dimensions": 3}),
        ("encoding_format", {"input": "a", "encoding_format": "int8"}),
    ):
        assert error_of(client.post("/v1/embeddings", json=body), 400)["param"] == param


def test_inside_of_the_model(service, monkeypatch):
    def lens(model, tokenizer, body):
        if "prompt" not in body:
            raise BadField("prompt", "prompt must be there")
        return {"prompt": body["prompt"]}

    monkeypatch.setattr("lama.server.extras.to_npz", lambda answer: b"npz")
    for name in ("lens", "internals"):
        monkeypatch.setitem(INSIDE, name, lens)
    client = TestClient(make_app(service), base_url=HERE)
    assert client.post("/v1/lens", json={"prompt": "a"}).json() == {"prompt": "a"}
    assert client.post("/v1/internals", json={"prompt": "a", "format": "npz"}).content == b"npz"
    assert error_of(client.post("/v1/lens", json={}), 400)["param"] == "prompt"
    with running(internals=False) as closed:
        client = TestClient(make_app(closed), base_url=HERE)
        assert error_of(client.post("/v1/lens", json={"prompt": "a"}), 403)["code"] == "no_internals"
        assert client.get("/v1/models").json()["data"][0]["meta"]["internals"] is False


def test_inside_of_a_continued_prompt(service):
    client = TestClient(make_app(service), base_url=HERE)
    body = {"prompt": "Why?", "temperature": 0, "max_tokens": 4, "logprobs": 0, "return_token_ids": True}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    asked = {"prompt": "Why?", "taps": ["logits"], "max_tokens": 4, "positions": [-2]}
    found = client.post("/v1/internals", json=asked).json()
    assert found["tokens"] == [*b"Why?", *choice["token_ids"]]
    logits = np.array(found["taps"]["logits"]["data"][0])
    scores = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    last = found["tokens"][-1]
    assert last == scores[:256].argmax()
    assert scores[last] == pytest.approx(choice["logprobs"]["token_logprobs"][-1], abs=1e-4)
    assert (
        error_of(client.post("/v1/internals", json={**asked, "max_tokens": 99}), 400)["param"] == "max_tokens"
    )


def test_failed_steps_and_functions_end_alone(monkeypatch, capfd):
    model = make_model()
    with running(model) as service:
        client = TestClient(make_app(service), base_url=HERE)
        engine, step = service.backend.worker.engine, service.backend.worker.engine.step

        def fails() -> Any:
            raise RuntimeError("broken")

        engine.step = fails
        assert error_of(client.post("/v1/completions", json=COMPLETE), 500)["type"] == "server_error"
        engine.step = step
        assert client.post("/v1/completions", json=COMPLETE).status_code == 200
        monkeypatch.setitem(INSIDE, "lens", lambda *_: 1 / 0)
        assert error_of(client.post("/v1/lens", json={}), 500)
        assert client.post("/v1/completions", json=COMPLETE).status_code == 200
        assert service.backend.worker.n_admitted == service.n_active == 0
        assert "broken" in capfd.readouterr().err


def test_a_long_request_ends_with_its_time():
    with running(limits=Limits(timeout=0.3), slow=0.05) as service:
        client = TestClient(make_app(service), base_url=HERE)
        body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}
        assert error_of(client.post("/v1/completions", json=body), 408)["code"] == "timeout"
        streamed = client.post("/v1/completions", json={**body, "stream": True})
        lines = streamed.text.split("\n\n")
        assert streamed.status_code == 200 and json.loads(lines[-2][6:])["error"]["code"] == "timeout"
        until(lambda: service.backend.worker.engine.n_running == 0)


def test_an_idle_worker_uses_no_processor():
    with running() as service:
        steps = service.backend.worker.counts.steps
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.25 and service.backend.worker.counts.steps == steps
