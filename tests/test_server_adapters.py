"""Several adapters of one model in the server: requests choose by name, each has its own batch."""

from collections.abc import Iterator

import numpy as np
import pytest
from servers import CONTEXT, HERE, make_model
from tinygrad import Tensor

from lama.generation import generate
from lama.generation.engine import Engine
from lama.generation.engines import Engines
from lama.models.adapters import add_adapter, constants_of, matching, sharing_weights, trained_parameters
from lama.models.gpt import GPT
from lama.server.app import make_app
from lama.server.service import Backend, Service
from lama.server.worker import Worker
from lama.tokenizers import ByteTokenizer

TestClient = pytest.importorskip("starlette.testclient", reason="the extra serve").TestClient
NAMES = ("tiny", "tiny:law", "tiny:verse")


def adapted(model: GPT, seed: int, scale: float = 2.0) -> GPT:
    found = sharing_weights(model)
    add_adapter(found, matching(found, ["q", "v", "up"]), 2, scale, seed=1)
    rng = np.random.default_rng(seed)
    for p in trained_parameters(found).values():
        p.assign(Tensor(rng.standard_normal(p.shape).astype(np.float32))).realize()
    return found


@pytest.fixture(scope="module")
def models() -> list[GPT]:
    model = make_model()
    return [model, adapted(model, 1), adapted(model, 2)]


@pytest.fixture(scope="module")
def client(models: list[GPT]) -> Iterator[TestClient]:
    tokenizer = ByteTokenizer()
    engines = [Engine(each, 2, tokenizer.vocab_size, context=CONTEXT, reuse=True) for each in models]
    worker = Worker(Engines(engines))
    worker.start()
    service = Service()
    backends = [
        Backend(name, each, tokenizer, worker, engine=i)
        for i, (name, each) in enumerate(zip(NAMES, models, strict=True))
    ]
    service.backend, service.adapted = backends[0], backends[1:]
    with TestClient(make_app(service), base_url=HERE) as client:
        yield client
    worker.stop()


def test_adapters_are_listed_with_the_model(client):
    data = client.get("/v1/models").json()["data"]
    assert [each["id"] for each in data] == list(NAMES)
    assert client.get("/v1/models/tiny:verse").json()["id"] == "tiny:verse"
    refused = client.get("/v1/models/verse2")
    assert refused.status_code == 404 and "the model must be tiny, tiny:law, tiny:verse" in refused.text


def test_request_is_answered_by_the_adapter_that_it_names(client, models):
    found = set()
    for asked, i in (("tiny", 0), ("tiny:law", 1), ("law", 1), ("tiny:verse", 2), ("verse", 2), ("else", 0)):
        body = {"model": asked, "prompt": ["Once", "Twice"], "max_tokens": 9, "temperature": 0, "logprobs": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["model"] == NAMES[i]
        for choice, prompt in zip(answer["choices"], body["prompt"], strict=True):
            expected = generate(models[i], ByteTokenizer(), prompt, max_new_tokens=9, temperature=0)
            assert choice["text"] == str(expected)
        found.add((i, *(choice["text"] for choice in answer["choices"])))
    assert len(found) == len({texts[1:] for texts in found}) == 3


def test_requests_to_two_adapters_take_turns(models):
    from lama.generation.engine import Request

    engines = Engines([Engine(each, 2, context=CONTEXT) for each in models])
    assert engines.rows == 6 and not engines.is_busy
    numbers = [engines.submit(Request([1, 2, 3], 5, engine=i)) for i in (0, 1, 2, 1)]
    assert len(set(numbers)) == 4
    engines.cancel(numbers[2])
    ended, order = set(), []
    while engines.is_busy:
        events = engines.step()
        order.append({event.request for event in events})
        ended |= {event.request for event in events if event.finish_reason == "length"}
    assert ended == {numbers[0], numbers[1], numbers[3]}
    assert any(numbers[0] in some for some in order[:3]) and any(numbers[1] in some for some in order[:3])
    engines.close()


def test_captured_steps_of_two_scales_are_two(models):
    """Shapes and config are equal: only the name of a step tells them apart."""
    one, other = adapted(models[0], 1), adapted(models[0], 1, scale=4.0)
    assert constants_of(one) != constants_of(other)
    texts = [
        generate(each, ByteTokenizer(), "Once", max_new_tokens=9, temperature=0) for each in (one, other)
    ]
    assert str(texts[0]) != str(texts[1])
