"""/v1/completions: the texts of lama.generate, and log-probabilities of the prompt too."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="lama serve needs starlette")
pytest.importorskip("uvicorn", reason="lama serve needs uvicorn")

from servers import CONTEXT, HERE, running
from starlette.testclient import TestClient
from tinygrad import Tensor

import lama
from lama.server.app import make_app
from lama.server.service import Limits, Service
from lama.tokenizers import ByteTokenizer


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return TestClient(make_app(service), base_url=HERE)


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: TestClient, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """The objects of a stream."""
    answer = client.post(path, json={"stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""]
    return [json.loads(line) for line in lines[:-2]]


def refusal(client: TestClient, status: int = 400, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 4},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "seed": 5},
    ],
)
@pytest.mark.parametrize("stop", [[], ["a"], ["zz", "\x00"]])
def test_text_is_that_of_generate(service, client, options, stop):
    given = {"temperature": 1.0, "seed": 0, **options}
    expected = lama.generate(
        service.backend.model, ByteTokenizer(), "Hi there", max_new_tokens=20, stop=stop, **given
    )
    text = str(expected)
    choice = complete(client, prompt="Hi there", max_tokens=20, stop=stop, **given)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, expected.finish_reason)
    streamed = events(client, prompt="Hi there", max_tokens=20, stop=stop, **given)
    assert "".join(each["choices"][0]["text"] for each in streamed) == text
    tokens = [token for each in streamed for token in each["choices"][0]["token_ids"]]
    assert tokens == expected.tokens
    assert streamed[-1]["choices"][0]["finish_reason"] == expected.finish_reason


def test_many_prompts_and_answers_each_with_its_seed(service, client):
    ids = ByteTokenizer().encode("To be")
    for prompts in (["To be", "or not"], [ids, ByteTokenizer().encode("or not")]):
        found = complete(client, prompt=prompts, n=2, seed=7, max_tokens=6)
        texts = [
            str(
                lama.generate(
                    service.backend.model,
                    ByteTokenizer(),
                    prompt,
                    max_new_tokens=6,
                    seed=seed,
                    temperature=1.0,
                )
            )
            for prompt in prompts
            for seed in (7, 8)
        ]
        assert [choice["text"] for choice in found["choices"]] == texts
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
        assert found["usage"]["prompt_tokens"] == 11 and found["usage"]["completion_tokens"] == 24
    assert complete(client, prompt=ids, n=1, seed=7, max_tokens=6)["choices"][0]["text"] == texts[0]


def test_without_a_seed_answers_differ(client):
    texts = {complete(client, prompt="To be", max_tokens=12)["choices"][0]["text"] for _ in range(5)}
    assert len(texts) > 1


def test_prompt_is_scored(service, client):
    text = "the cat sat"
    ids = ByteTokenizer().encode(text)
    choice = complete(client, prompt=[ids], max_tokens=1, logprobs=3, echo=True, temperature=0)["choices"][0]
    found = choice["logprobs"]
    logits = service.backend.model(Tensor([ids])).numpy()[0]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [log_p[i, token] for i, token in enumerate(ids[1:])]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    np.testing.assert_allclose(found["token_logprobs"][1 : len(ids)], expected, atol=1e-4)
    assert found["tokens"][: len(ids)] == list(text) and found["text_offset"][: len(ids)] == [
        *range(len(ids))
    ]
    assert choice["text"].startswith(text) and len(found["tokens"]) == len(ids) + 1
    for token, top in zip(found["tokens"][1:], found["top_logprobs"][1:], strict=True):
        assert 3 <= len(top) <= 4 and token in top
    # The most likely token is the next: its number is the very same as the largest.
    assert found["token_logprobs"][-1] == max(found["top_logprobs"][-1].values())
    assert math.isclose(found["token_logprobs"][-1], log_p[-1].max(), abs_tol=1e-4)


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_echo_without_new_tokens(client, logprobs):
    found = complete(client, prompt=["one", "three"], max_tokens=0, echo=True, logprobs=logprobs)
    assert [choice["text"] for choice in found["choices"]] == ["one", "three"]
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    assert found["usage"]["completion_tokens"] == 0 and found["usage"]["prompt_tokens"] == 8
    lengths = [choice["logprobs"] and len(choice["logprobs"]["tokens"]) for choice in found["choices"]]
    assert lengths == ([None, None] if logprobs is None else [3, 5])


def test_stream_has_the_same_logprobs_in_pieces(client):
    given = {"prompt": "abc", "max_tokens": 9, "logprobs": 2, "seed": 1, "echo": True}
    whole = complete(client, **given)["choices"][0]
    parts = events(client, stream_options={"include_usage": True}, **given)
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 9
    for name, value in whole["logprobs"].items():
        assert [each for part in parts[:-1] for each in part["choices"][0]["logprobs"][name]] == value
    assert "".join(part["choices"][0]["text"] for part in parts[:-1]) == whole["text"]
    assert all(each.get("usage") is None for each in parts[:-1])


def test_parts_of_characters_have_bytes(client):
    bias = {str(token): 100 for token in "é".encode()}
    choice = complete(client, prompt="a", max_tokens=30, logprobs=0, logit_bias=bias, seed=1)["choices"][0]
    assert set(choice["logprobs"]["tokens"]) == {"bytes:\\xc3", "bytes:\\xa9"}
    assert set(choice["text"]) <= {"é", "�"}
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])


def test_bias_forbids_and_demands(client):
    demanded = complete(client, prompt="a", max_tokens=5, logit_bias={"66": 100}, temperature=0)
    assert demanded["choices"][0]["text"] == "BBBBB"
    assert (
        complete(client, prompt="a", max_tokens=1, logit_bias={}, temperature=0)["choices"][0]["text"] != "B"
    )


def test_end_tokens_end_unless_ignored(service, client):
    end = ByteTokenizer().end_of_text
    if end is None:
        assert service.backend.end == frozenset()
        service.backend.__dict__["end"] = frozenset({66})
        end = 66
    given = {"prompt": "a", "max_tokens": 4, "logit_bias": {str(end): 100}, "temperature": 0, "logprobs": 1}
    found = complete(client, **given)
    choice = found["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "stop", [chr(end)])
    assert found["usage"]["completion_tokens"] == 1
    ignored = complete(client, **given, ignore_eos=True)
    assert (ignored["choices"][0]["finish_reason"], ignored["usage"]["completion_tokens"]) == ("length", 4)
    service.backend.__dict__.pop("end")


def test_full_context_is_said(client):
    given = {"prompt": "x" * (CONTEXT - 3), "max_tokens": 50, "ignore_eos": True}
    choice = complete(client, **given)["choices"][0]
    assert (choice["finish_reason"], choice["context_full"]) == ("length", True)
    assert events(client, **given)[-1]["choices"][0]["context_full"] is True
    assert "context_full" not in complete(client, prompt="x", max_tokens=2, ignore_eos=True)["choices"][0]
    error = refusal(client, prompt="x" * (CONTEXT + 1))
    assert (error["code"], error["param"], error["type"]) == (
        "context_length_exceeded",
        "prompt",
        "invalid_request_error",
    )


def test_cached_tokens_are_counted(client):
    prompt = "A prompt that is asked for a second time."
    complete(client, prompt=prompt, max_tokens=1)
    usage = complete(client, prompt=prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1


def test_token_ids_on_request(client):
    choice = complete(client, prompt="ab", max_tokens=3, return_token_ids=True, ignore_eos=True)["choices"][0]
    assert choice["prompt_token_ids"] == ByteTokenizer().encode("ab") and len(choice["token_ids"]) == 3
    assert "token_ids" not in complete(client, prompt="ab", max_tokens=3)["choices"][0]


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", {}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ["a", 1]}),
        ("prompt", {"prompt": [1, "a"]}),
        ("prompt", {"prompt": [1, True]}),
        ("prompt", {"prompt": [10**6]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": {"a": 1}}),
        ("prompt", {"prompt": ["a"] * 129}),
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("n", {"n": "2"}),
        ("prompt", {"prompt": ["a"] * 10, "n": 100}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": "hot"}),
        ("temperature", {"temperature": True}),
        ("top_p", {"top_p": 0}),
        ("top_k", {"top_k": 1.5}),
        ("min_p", {"min_p": 2}),
        ("presence_penalty", {"presence_penalty": 3}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("seed", {"seed": -2}),
        ("seed", {"seed": 1 << 64}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": [1]}),
        ("stop", {"stop": ["a"] * 65}),
        ("stream", {"stream": 1}),
        ("stream_options", {"stream_options": True}),
        ("include_usage", {"stream_options": {"include_usage": 1}}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": True}),
        ("echo", {"echo": "yes"}),
        ("best_of", {"best_of": 2}),
        ("suffix", {"suffix": "end"}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"1000000": 1}}),
        ("logit_bias", {"logit_bias": {"1": 101}}),
        ("logit_bias", {"logit_bias": [1]}),
        ("ignore_eos", {"ignore_eos": "no"}),
    ],
)
def test_wrong_values_are_named(client, param, body):
    error = refusal(client, **{"prompt": "a", **body} if param != "prompt" else body)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param in error["message"]


def test_null_is_absent_and_harmless_values_pass(client):
    nulls = dict.fromkeys(["n", "stop", "seed", "best_of", "suffix", "logprobs", "echo", "stream", "top_p"])
    complete(client, prompt="a", max_tokens=1, **nulls)
    complete(client, prompt="a", max_tokens=1, best_of=1, suffix="", top_k=-1, seed=-1, user="me", stop=[])
    complete(client, prompt="a", max_tokens=10**9, ignore_eos=True)


def test_unknown_fields_and_models_are_logged_once(client, capfd):
    for _ in range(3):
        complete(client, prompt="secret words", max_tokens=1, model="gpt-5", wibble=[1])
    lines = capfd.readouterr().err.splitlines()
    assert (
        len([line for line in lines if "gpt-5" in line])
        == len([line for line in lines if "wibble" in line])
        == 1
    )
    assert not any("secret" in line for line in lines)


def test_limits(capfd):
    limits = Limits(max_tokens=5, max_n=2)
    with running(limits=limits) as service:
        client = TestClient(make_app(service), base_url=HERE)
        assert refusal(client, prompt="a", max_tokens=6)["param"] == "max_tokens"
        assert refusal(client, prompt="a", n=3)["param"] == "n"
        found = complete(client, prompt="a", ignore_eos=True)
        assert found["usage"]["completion_tokens"] == 5
