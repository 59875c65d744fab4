"""The engine: a request gets the same bits whatever the others in its batch do."""

from collections.abc import Iterator

import numpy as np
import pytest
from helpers import fill

import lama
from lama.generation.decoder import SMALLEST_BUCKET, Runner
from lama.generation.engine import Engine, Request
from lama.generation.sampling import Sampling
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import ByteTokenizer

CONTEXT, VOCABULARY = 53, 97


@pytest.fixture(scope="module", params=["float32", "float16", "int8", "int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GPT:
    made = GPT(GPTConfig(VOCABULARY, CONTEXT, d_model=64, n_layers=2, n_heads=4), seed=None)
    fill(made)
    folder = tmp_path_factory.mktemp("model")
    lama.save(folder, made, ByteTokenizer())
    return lama.checkpoints.load_model(folder, dtype=request.param)


def random_requests(n: int) -> list[Request]:
    """Prompts across every border of a bucket, greedy and drawn, short and to the end of the context."""
    rng = np.random.default_rng(n)
    lengths = [1, SMALLEST_BUCKET - 1, SMALLEST_BUCKET, SMALLEST_BUCKET + 1, 32, 33, CONTEXT - 1, CONTEXT]
    requests = []
    for i in range(n):
        tokens = rng.integers(VOCABULARY, size=lengths[i % len(lengths)]).tolist()
        sampling = Sampling(temperature=0 if i % 3 else 1.0)
        requests.append(
            Request(tokens, int(rng.integers(1, 30)), sampling, seed=i, end={7}, window=i % 4 == 0)
        )
    return requests


class Recording(Runner):
    """A runner that keeps the logits that every row was given, in their order."""

    def __init__(self, model: GPT, rows: int):
        super().__init__(model, rows)
        self.seen: dict[int, list[bytes]] = {row: [] for row in range(rows)}

    def prefill_row(self, row: int, tokens: np.ndarray, start: int = 0) -> np.ndarray:
        logits = super().prefill_row(row, tokens, start)
        self.seen[row].append(logits.tobytes())
        return logits

    def decode(self, tokens: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        logits = super().decode(tokens, rows)
        for row in range(self.batch):
            if rows is None or rows[row]:
                self.seen[row].append(logits[row].tobytes())
        return logits


def alone(model: GPT, request: Request, rows: int) -> tuple[list[int], str | None, list[bytes]]:
    """Tokens, reason for the end and logits of a request that has the engine to itself."""
    runner = Recording(model, rows)
    engine = Engine(model, rows, runner=runner)
    engine.submit(request)
    events = list(drained(engine))
    return [event.token for event in events], events[-1].finish_reason, runner.seen[0]


def drained(engine: Engine) -> Iterator:
    while engine.is_busy:
        yield from engine.step()


@pytest.mark.parametrize("rows", [2, 3, 8, 9, 16])
def test_a_request_gets_the_same_bits_alone_and_among_others(model, rows):
    requests, rng = random_requests(2 * rows + 1), np.random.default_rng(rows)
    runner = Recording(model, rows)
    engine = Engine(model, rows, runner=runner)
    waiting = list(requests)
    numbers: dict[int, Request] = {}
    made: dict[int, list] = {}
    bits: dict[int, list[bytes]] = {}
    cancelled: set[int] = set()
    while waiting or engine.is_busy:
        while waiting and (rng.random() < 0.4 or not engine.is_busy):
            request = waiting.pop()
            numbers[engine.submit(request)] = request
        before = {row: len(seen) for row, seen in runner.seen.items()}
        places = {row.number: place for place, row in enumerate(engine._rows) if row is not None}
        events = engine.step()
        places |= {row.number: place for place, row in enumerate(engine._rows) if row is not None}
        for event in events:
            made.setdefault(event.request, []).append(event)
            row = places.get(event.request)
            if row is None:  # it came and went in this step
                row = next(row for row, seen in runner.seen.items() if len(seen) > before[row])
            bits.setdefault(event.request, []).append(runner.seen[row][-1])
        if rng.random() < 0.05 and made:
            number = int(rng.choice(list(made)))
            engine.cancel(number)
            cancelled.add(number)
    assert len(made) == len(requests)
    for number in rng.permutation(list(made))[:7]:  # of all, seven: an engine for each
        tokens, reason, logits = alone(model, numbers[number], rows)
        got = [event.token for event in made[number]]
        if number in cancelled and made[number][-1].finish_reason is None:
            assert got == tokens[: len(got)] and bits[number] == logits[: len(got)]
        else:
            assert (got, made[number][-1].finish_reason, bits[number]) == (tokens, reason, logits)


def test_reasons_for_the_end():
    model = GPT(GPTConfig(11, context_length=9, d_model=8, n_layers=1, n_heads=2))
    engine = Engine(model, rows=2)
    greedy = Sampling(temperature=0)
    numbers = [engine.submit(Request([1, 2, 3], n, greedy)) for n in (4, 100)]
    first = engine.submit(Request([1, 2, 3], 100, greedy, end=range(11)))
    events = list(drained(engine))
    ends = {event.request: event.finish_reason for event in events if event.finish_reason}
    assert ends == {numbers[0]: "length", numbers[1]: "context", first: "stop"}
    assert sum(event.request == numbers[1] for event in events) == 9 - 3 + 1  # the last token is not fed


def test_a_waiting_request_takes_the_row_of_a_cancelled_one():
    model = GPT(GPTConfig(11, context_length=40, d_model=8, n_layers=1, n_heads=2))
    engine = Engine(model, rows=1)
    running, waiting, dropped = (engine.submit(Request([i], 3, Sampling(temperature=0))) for i in (1, 2, 3))
    assert [event.request for event in engine.step()] == [running]
    engine.cancel(running)
    engine.cancel(dropped)
    assert {event.request for event in drained(engine)} == {waiting}


def test_only_allowed_tokens_are_drawn():
    model = GPT(GPTConfig(11, context_length=400, d_model=8, n_layers=1, n_heads=2))
    engine = Engine(model, rows=1, vocab_size=5)
    engine.submit(Request([9], 200, Sampling(temperature=5.0)))
    assert {event.token for event in drained(engine)} == {0, 1, 2, 3, 4}
