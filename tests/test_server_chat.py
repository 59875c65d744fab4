"""/v1/chat/completions, and conversations as texts and tokens."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="lama serve needs starlette")

from servers import HERE, running
from starlette.testclient import TestClient
from test_server_completions import events

import lama
from lama.server.app import make_app
from lama.server.fields import BadField
from lama.server.service import Service
from lama.tokenizers import ByteTokenizer

PATH = "/v1/chat/completions"
ASKED = [{"role": "user", "content": "Why?"}]
PROMPT = "User: Why?\nAssistant:"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return TestClient(make_app(service), base_url=HERE)


def chat(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post(PATH, json={"messages": ASKED, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post(PATH, json={"messages": ASKED, **body})
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_answer_is_that_of_generate(service, client):
    given = {"temperature": 0.9, "seed": 2}
    expected = lama.generate(service.backend.model, ByteTokenizer(), PROMPT, max_new_tokens=9, **given)
    found = chat(client, max_completion_tokens=9, **given)
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": str(expected)}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert found["usage"] | {"prompt_tokens_details": 0} == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 9,
        "total_tokens": len(PROMPT) + 9,
        "prompt_tokens_details": 0,
    }


def test_without_a_limit_the_context_is_filled(client):
    choice = chat(client, ignore_eos=True)["choices"][0]
    assert (choice["finish_reason"], choice["context_full"]) == ("length", True)


def test_stream(client):
    given = {"messages": ASKED, "max_tokens": 8, "seed": 5, "n": 2, "logprobs": True, "top_logprobs": 10}
    whole = chat(client, **given)
    *parts, last = events(client, PATH, stream_options={"include_usage": True}, **given)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 16
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    assert len({part["id"] for part in parts}) == 1
    for choice in whole["choices"]:
        mine = [c for part in parts for c in part["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert (mine[-1]["delta"], mine[-1]["finish_reason"]) == ({}, choice["finish_reason"])
        assert {c["finish_reason"] for c in mine[:-1]} == {None}
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == choice["message"]["content"]
        scores = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert scores == choice["logprobs"]["content"] and len(scores) == 8
        tokens = [token for c in mine for token in c.get("token_ids", ())]
        assert bytes(tokens) == b"".join(bytes(entry["bytes"]) for entry in scores)
        for entry in scores:
            assert entry.keys() == {"id", "token", "logprob", "bytes", "top_logprobs"}
            assert len(entry["top_logprobs"]) == 10
            tops = [top["logprob"] for top in entry["top_logprobs"]]
            assert tops == sorted(tops, reverse=True) and entry["logprob"] <= tops[0] <= 0


def test_end_token_stands_with_the_end(service, client, monkeypatch):
    monkeypatch.setitem(service.backend.__dict__, "end", frozenset({66}))
    given = {"messages": ASKED, "logit_bias": {"66": 100}, "temperature": 0, "logprobs": True}
    *_, last = events(client, PATH, **given)
    (choice,) = last["choices"]
    assert (choice["delta"], choice["finish_reason"], choice["token_ids"]) == ({}, "stop", [66])
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == ["B"]
    whole = chat(client, **given)["choices"][0]
    assert (whole["message"]["content"], len(whole["logprobs"]["content"])) == ("", 1)


def test_contents_in_parts_and_the_developer(client):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    found = client.post("/apply-template", json={"messages": messages}).json()
    assert found["prompt"] == "System: Be brief.\nUser: one\ntwo\nAssistant:"
    assert found["tokens"] == ByteTokenizer().encode(found["prompt"])
    count = client.post("/tokenize", json={"messages": messages}).json()["count"]
    assert count == len(found["tokens"])


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("messages", {"messages": None}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "Hi"}),
        ("messages[0]", {"messages": ["Hi"]}),
        ("messages[0]", {"messages": [{"content": "Hi"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        (
            "messages[0].tool_calls",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": {"a": 1}}]},
        ),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logprobs", {"logprobs": 2}),
        ("functions", {"functions": [{}]}),
        ("response_format", {"response_format": "json"}),
        ("max_tokens", {"max_completion_tokens": 0}),
        ("chat_template_kwargs", {"chat_template_kwargs": [1]}),
    ],
)
def test_wrong_values_are_named(client, param, body):
    assert refusal(client, **body)["param"] == param


def test_long_conversation(client):
    error = refusal(client, messages=[{"role": "user", "content": "x" * 100}])
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_model_without_a_template():
    with running(template=None) as service:
        error = refusal(TestClient(make_app(service), base_url=HERE))
        assert error["param"] == "messages" and "/v1/completions" in error["message"]


def test_template_that_refuses():
    with running(template="{{ raise_exception('no system message') }}") as service:
        error = refusal(TestClient(make_app(service), base_url=HERE))
        assert error["param"] == "messages" and "no system message" in error["message"]


def test_constraint_shapes_the_text(client, monkeypatch):
    made = []

    def constraint_of(tokenizer, response_format, end_tokens):
        if response_format in (None, {"type": "text"}):
            return None
        if response_format["type"] != "json_object":
            raise BadField("response_format", "unknown")
        state = SimpleNamespace(accepted=[])
        state.allowed = lambda: np.isin(np.arange(256), list(b"[" if not state.accepted else b"1,"))
        state.accept = state.accepted.append
        made.append(state)
        return state

    monkeypatch.setattr("lama.server.chat.constraint_of", constraint_of)
    found = chat(client, response_format={"type": "json_object"}, n=2, max_tokens=6, ignore_eos=True)
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert all(text[0] == "[" and set(text[1:]) <= set("1,") for text in texts)
    assert sorted(bytes(state.accepted).decode() for state in made if state.accepted) == sorted(texts)
    assert refusal(client, response_format={"type": "xml"})["param"] == "response_format"
    assert chat(client, response_format={"type": "text"}, max_tokens=1)


TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
    "{% for message in messages %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments.a }}{% endfor %}"
    "{% endfor %}"
)


def test_calls_of_tools(monkeypatch):
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    wanted, state = f"Look: {call}", SimpleNamespace(n=0)

    def constraint_of(tokenizer, response_format, end_tokens):
        state.n = 0
        return SimpleNamespace(
            allowed=lambda: np.arange(256) == wanted.encode()[state.n],
            accept=lambda token: setattr(state, "n", state.n + 1),
        )

    monkeypatch.setattr("lama.server.chat.constraint_of", constraint_of)
    tool = {"type": "function", "function": {"name": "f"}}
    given = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [tool],
        "response_format": {"type": "json_object"},
    }
    with running(template=TOOL_TEMPLATE, context=128) as service:
        client = TestClient(make_app(service), base_url=HERE)
        given["max_tokens"] = len(wanted)
        choice = chat(client, **given)["choices"][0]
        (made,) = choice["message"]["tool_calls"]
        assert made.keys() == {"id", "type", "function"}
        assert made["function"] == {"name": "f", "arguments": "{}"}
        assert choice["message"]["content"] == "Look:"
        parts = [part["choices"][0] for part in events(client, PATH, **given)]
        assert "".join(part["delta"].get("content", "") for part in parts) == "Look:"
        calls = [part["delta"]["tool_calls"] for part in parts if "tool_calls" in part["delta"]]
        assert [[each["index"] for each in some] for some in calls] == [[0]]
        cut = chat(client, **{**given, "max_tokens": 20})["choices"][0]  # cut short, it is only text
        assert cut["message"] == {"role": "assistant", "content": wanted[:20]}
        assert refusal(client, tools=[tool], tool_choice="g")["param"] == "tool_choice"
        earlier = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        messages = [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": [earlier]},
        ]
        body = {"messages": messages}
        assert client.post("/apply-template", json=body).json()["prompt"] == "u<tool_call>1"
        earlier["function"] = {"name": "f", "arguments": "{"}
        error = refusal(client, messages=messages)
        assert error["param"] == "messages[1].tool_calls[0].function.arguments"


def test_tokens_and_back(service, client):
    found = client.post("/tokenize", json={"prompt": "né", "add_special_tokens": False}).json()
    assert found["tokens"] == [*"né".encode()] and found["count"] == 3
    texts = client.post("/tokenize", json={"prompt": "né", "return_token_strs": True}).json()["token_strs"]
    assert texts == ["n", "bytes:\\xc3", "bytes:\\xa9"]
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "né"}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    for body in ({"tokens": [256]}, {"tokens": "a"}, {"tokens": [True]}, {}):
        answer = client.post("/detokenize", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")
    assert client.post("/tokenize", json={"prompt": [1]}).json()["error"]["param"] == "prompt"
    info = client.get("/tokenizer_info").json()
    assert info["model_max_length"] == service.backend.context and info["eos_token"] is None
    assert "capitalize" in info["chat_template"]
