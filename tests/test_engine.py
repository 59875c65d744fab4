"""The engine: a request gets the same bits whatever the others in its batch do."""

from collections.abc import Iterator

import numpy as np
import pytest
from helpers import fill
from tinygrad import Tensor

import lama
from lama.generation.decoder import SMALLEST_BUCKET, Runner
from lama.generation.drafts import draft
from lama.generation.engine import Engine, Request
from lama.generation.sampling import Sampling, next_token
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

    def feed(self, rows: np.ndarray, *args, **options) -> np.ndarray:
        logits = super().feed(rows, *args, **options)
        for row, of_row in zip(rows.tolist(), logits, strict=True):
            self.seen[row].append(of_row.tobytes())
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
        places = {row.number: place for place, row in engine._running.items()}
        events = engine.step()
        places |= {row.number: place for place, row in engine._running.items()}
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


# --- prefixes, pieces, drafts


@pytest.fixture(scope="module")
def plain() -> GPT:
    made = GPT(GPTConfig(VOCABULARY, CONTEXT, d_model=64, n_layers=2, n_heads=4), seed=None)
    fill(made)
    return made


def texts(engine: Engine, requests: list[Request]) -> list[list[int | None]]:
    """The tokens of each request, submitted all at once."""
    found: dict[int, list[int | None]] = {engine.submit(request): [] for request in requests}
    for event in drained(engine):
        found[event.request].append(event.token)
    return list(found.values())


def shared_prompts(n: int) -> list[Request]:
    rng, begin = np.random.default_rng(n), list(range(30))
    prompts = [
        begin[: int(rng.integers(1, 31))] + rng.integers(VOCABULARY, size=i % 5 + 1).tolist()
        for i in range(n)
    ]
    return [Request(prompt, 12, Sampling(temperature=i % 2), seed=i) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(("rows", "spare", "chunk"), [(1, 0, 0), (2, 0, 5), (3, 2, 7), (4, 4, 16)])
def test_texts_do_not_depend_on_pieces_of_prompts_and_held_prefixes(plain, rows, spare, chunk):
    requests = shared_prompts(12)
    alone = [texts(Engine(plain, 1), [request])[0] for request in requests]
    engine = Engine(plain, rows, spare=spare, chunk=chunk, reuse=True)
    for _ in range(2):
        assert texts(engine, requests) == alone


def test_a_prefix_is_computed_once(plain):
    engine, begin = Engine(plain, 2, spare=1, reuse=True), list(range(20, 45))
    fed: list[int] = []
    feed = engine.runner.feed
    engine.runner.feed = lambda rows, ids, *args: fed.append(ids.shape[1]) or feed(rows, ids, *args)

    def cached(*prompts: list[int]) -> list[int]:
        fed.clear()
        numbers = [engine.submit(Request(prompt, 2)) for prompt in prompts]
        events = list(drained(engine))
        return [next(e.cached_tokens for e in events if e.request == n) for n in numbers]

    assert cached([*begin, 1]) == [0] and fed == [26, 1]
    assert cached([*begin, 1]) == [25] and fed == [1, 1]  # the last token of a prompt is always computed
    assert cached([*begin, 2], [*begin, 3]) == [25, 25]
    assert cached([*begin[:10], 5]) == [0]  # too short a prefix to copy or to give a row up for
    assert [slot.request for slot in engine.slots()] == [None] * 3
    assert sum(slot.n_tokens > 25 for slot in engine.slots()) == 2


def test_prompts_are_computed_between_the_steps_of_others(plain):
    engine = Engine(plain, 2, chunk=8)
    first = engine.submit(Request([1, 2], 40))
    assert [event.request for event in engine.step()] == [first]
    second = engine.submit(Request(list(range(33)), 3))
    order = [[event.request for event in engine.step()] for _ in range(9)]
    assert order == [[first], []] * 4 + [[first, second]]  # the prompt's last token is fed with the others'


def test_drafts_change_no_token(plain):
    requests = shared_prompts(8)
    repetitive = Request([5, 6, 7, 8] * 5, 30, seed=1)
    for request in [*requests, repetitive]:
        expected = texts(Engine(plain, 1), [request])
        assert texts(Engine(plain, 1, drafts=3), [request]) == expected
    assert texts(Engine(plain, 2, drafts=4), requests) == texts(Engine(plain, 2), requests)


def test_drafts_follow_the_last_repetition():
    assert draft([1, 2, 3, 4, 9, 1, 2, 3], 2) == [4, 9]
    assert draft([1, 2, 5, 1, 2, 6, 1, 2], 3) == [6, 1, 2]
    assert draft([1, 2, 3], 4) == [] and draft([7], 4) == [] and draft([4, 4, 4], 5) == [4]


def test_a_right_draft_saves_a_step(plain):
    class Says(Runner):
        """A model that always says the token after the last one, modulo 7."""

        def feed(self, rows, tokens, result="last", counted=None):
            super().feed(rows, tokens, result, counted)
            calls.append(tokens.shape)
            logits = np.eye(VOCABULARY, dtype=np.float32)[(tokens + 1) % 7]
            return logits if result == "every" else logits[:, -1]

    calls: list[tuple[int, ...]] = []
    engine = Engine(plain, 1, drafts=4, runner=Says(plain))
    assert texts(engine, [Request([*range(7), 0, 1], 12)]) == [[(2 + i) % 7 for i in range(12)]]
    assert calls == [(1, 9), (1, 5), (1, 5), (1, 5)]


# --- log-probabilities, penalties, bias, constraints, errors


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def test_log_probabilities_are_the_models_own(plain):
    prompt = list(range(3, 25))
    logits = plain(Tensor([prompt])).numpy()[0]
    sampling = Sampling(temperature=3.0, top_k=5, repetition_penalty=2.0)
    for chunk in (0, 5):
        engine = Engine(plain, 2, chunk=chunk, reuse=True)
        engine.submit(Request(prompt, 3, sampling, 1, logprobs=4, prompt_logprobs=2))
        first, *rest = drained(engine)
        assert first.cached_tokens == 0 and all(e.prompt_logprobs is None for e in rest)
        nothing, *scored = first.prompt_logprobs
        assert nothing is None and [s.token for s in scored] == prompt[1:]
        for i, found in enumerate(scored):
            expected = log_softmax(logits[i])
            assert found.logprob == pytest.approx(expected[prompt[i + 1]], abs=1e-5)
            assert [t for t, _ in found.top] == np.argsort(-expected, kind="stable")[:2].tolist()
        expected = log_softmax(logits[-1])
        assert first.logprob.logprob == pytest.approx(expected[first.token], abs=1e-5)
        assert [p for _, p in first.logprob.top] == pytest.approx(sorted(expected)[-4:][::-1], abs=1e-5)
        # The same number, so that equality tells a greedy token.
        best = first.logprob.top[0]
        engine.submit(Request(prompt, 1, logprobs=1))
        (greedy,) = drained(engine)
        assert (greedy.token, greedy.logprob.logprob) == greedy.logprob.top[0]
        assert greedy.token == best[0]


def test_a_prompt_alone_can_be_scored(plain):
    engine = Engine(plain, 2)
    engine.submit(Request([3, 4, 5], 0, prompt_logprobs=0))
    (event,) = drained(engine)
    assert (event.token, event.finish_reason, len(event.prompt_logprobs)) == (None, "length", 3)
    assert event.prompt_logprobs[1].top == []
    with pytest.raises(lama.errors.UsageError, match="max_new_tokens must be at least 1; got 0"):
        engine.submit(Request([3], 0))


def test_penalties_count_new_tokens_only(plain):
    greedy = texts(Engine(plain, 1), [Request([1, 2, 3], 20)])[0]
    for penalties in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        found = texts(Engine(plain, 1), [Request([1, 2, 3], 20, Sampling(temperature=0, **penalties))])[0]
        assert found[0] == greedy[0]
    logits = np.array([1.0, 0.9, 0.0], np.float32)
    rng, presence = np.random.default_rng(0), Sampling(temperature=0, presence_penalty=0.5)
    assert next_token(logits, [0, 0], presence, rng, 2) == 0
    assert next_token(logits, [0, 0], presence, rng, 1) == 1
    frequency = Sampling(temperature=0, frequency_penalty=0.06)
    assert next_token(logits, [5, 0], frequency, rng, 1) == 0
    assert next_token(logits, [5, 0, 0], frequency, rng, 1) == 1


class Alternating:
    """Even and odd tokens in turn."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> np.ndarray:
        return np.arange(VOCABULARY) % 2 == len(self.taken) % 2

    def accept(self, token: int) -> None:
        if len(self.taken) == 5:
            raise lama.errors.LamaError("five are enough")
        self.taken.append(token)


def test_bias_and_constraint_decide(plain):
    assert texts(Engine(plain, 1), [Request([1], 3, logit_bias={9: 1000.0})]) == [[9, 9, 9]]
    for sampling in (Sampling(temperature=0), Sampling(temperature=2.0, min_p=0.01, top_p=0.9)):
        constraint = Alternating()
        (found,) = texts(Engine(plain, 1, drafts=2), [Request([1], 5, sampling, constraint=constraint)])
        assert found == constraint.taken and [token % 2 for token in found] == [0, 1, 0, 1, 0]


def test_a_constraint_that_allows_nothing_ends_the_text(plain):
    class Two(Alternating):
        def allowed(self) -> np.ndarray:
            return super().allowed() & (len(self.taken) < 2)

    engine = Engine(plain, 1)
    engine.submit(Request([1], 9, constraint=Two()))
    *_, last = events = list(drained(engine))
    assert (len(events), last.token, last.finish_reason) == (3, None, "stop")


def test_an_error_ends_its_own_request_only(plain):
    engine = Engine(plain, 2)
    failing = engine.submit(Request([1], 9, constraint=Alternating()))
    other = engine.submit(Request([1, 2], 9))
    events = list(drained(engine))
    (last,) = (e for e in events if e.request == failing and e.finish_reason)
    assert (last.token, last.finish_reason, last.error) == (None, "error", "five are enough")
    assert sum(e.request == failing for e in events) == 6 and sum(e.request == other for e in events) == 9


def test_steps_of_rotary_models_are_replayed_from_the_disk():
    shape = GPTConfig(11, 64, d_model=16, n_layers=1, n_heads=2, positions="rope", norm_kind="rms")
    runner = Runner(GPT(shape), 2, sizes=(1,))
    runner.feed(np.array([0]), np.array([[1, 2, 3]]))
    runner.feed(np.array([0]), np.array([[4]]))
    runner.decode(np.array([5, 6]))
    assert len(runner._steps) == 3 and all(step._calls is not None for step in runner._steps.values())
