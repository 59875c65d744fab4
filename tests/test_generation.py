"""Generation: the cache changes nothing, rows of a batch do not see each other, filters, stopping, text."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from helpers import fill
from reference import random_gpt2
from tinygrad import Tensor, TinyJit
from tinygrad.nn.state import get_parameters

import lama
from lama.checkpoints import load_model
from lama.errors import LamaError, UsageError
from lama.generation import Generation, Runner, Sampling, generate, generate_tokens, next_token, probabilities
from lama.generation import decoder as decoding
from lama.generation.decoder import bucket
from lama.generation.engine import Event
from lama.generation.sampling import penalised
from lama.generation.text import split_at_stop
from lama.models.gpt import GPT, GPTConfig
from lama.runtime.buffers import LARGE
from lama.tokenizers import ByteTokenizer, CharacterTokenizer

CONTEXT = 37  # buckets of 16, 32 and 37 tokens
VOCAB = 23
DRAWN = Sampling(repetition_penalty=1.1, temperature=0.9, top_k=13, top_p=0.95, min_p=0.01)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random, with weights so large that its logits are far from flat."""
    model = GPT(GPTConfig(VOCAB, CONTEXT, d_model=10, n_layers=2, n_heads=2, d_mlp=17), seed=None)
    fill(model)
    return model


@pytest.fixture(scope="module")
def full_forward(model: GPT):
    """Tokens to the logits after the last of them, without a cache: one padded shape, the padding hidden by
    the causal mask.
    """
    run = TinyJit(lambda tokens: model(tokens).realize())

    def logits(tokens: Sequence[int]) -> np.ndarray:
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(tokens)] = tokens
        return run(Tensor(padded).realize()).numpy()[0, len(tokens) - 1]

    return logits


def uncached(full_forward, prompt: Sequence[int], n: int, sampling: Sampling, seed: int = 0) -> list[int]:
    rng, tokens = np.random.default_rng(seed), list(prompt)
    for _ in range(n):
        tokens.append(next_token(full_forward(tokens), tokens, sampling, rng))
    return tokens[len(prompt) :]


def continued(model: GPT, prompt: Sequence[int], n: int, *args, **kwargs) -> list[int]:
    """One prompt alone."""
    return [step[0] for step in generate_tokens(model, [prompt], n, *args, **kwargs)]


def tokens(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng((seed, n)).integers(0, VOCAB, n)]


# --- the cache


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), DRAWN], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [1, 16, 17, 33])
def test_cached_generation_equals_uncached(model, full_forward, length, sampling):
    prompt, n = tokens(length), CONTEXT + 1 - length
    assert continued(model, prompt, n, sampling, seed=7) == uncached(
        full_forward, prompt, n, sampling, seed=7
    )


def test_greedy_continuation_is_not_one_token_again_and_again(model):
    assert len(set(continued(model, tokens(1), 30))) > 3  # or the test above would show little


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), DRAWN], ids=["greedy", "sampled"])
def test_generation_without_jit_gives_the_same_tokens(model, sampling):
    assert continued(model, PROMPT, 7, sampling, 3, jit=False) == continued(model, PROMPT, 7, sampling, 3)


def test_prompt_that_fills_the_context_gives_one_token(model, full_forward):
    prompt = tokens(CONTEXT)
    assert continued(model, prompt, 10) == uncached(full_forward, prompt, 1, Sampling(temperature=0))


def test_generation_ends_where_the_context_is_full(model):
    assert len(continued(model, tokens(31), 100)) == CONTEXT + 1 - 31


def test_generation_again_starts_from_an_empty_cache(model):
    first = continued(model, tokens(17), 5)
    continued(model, tokens(33), 5, seed=1)
    assert continued(model, tokens(17), 5) == first


def test_max_new_tokens_is_kept(model):
    assert continued(model, PROMPT, 0) == []
    assert continued(model, PROMPT, 1) == continued(model, PROMPT, 3)[:1]
    assert len(continued(model, PROMPT, 3)) == 3


def test_buckets_are_powers_of_two_within_the_context():
    sizes = [bucket(n, 37) for n in (1, 16, 17, 32, 33, 37)]
    assert sizes == [16, 16, 32, 32, 37, 37]
    assert bucket(1, 13) == 13


def test_a_cache_of_long_rows_moves_into_large_pages_without_a_change(monkeypatch):
    model = GPT(GPTConfig(VOCAB, 1 << 14, d_model=64, n_layers=1, n_heads=1, d_mlp=8), seed=None)
    fill(model)
    moved: list[int] = []
    move = decoding.use_large_pages_for
    monkeypatch.setattr(decoding, "use_large_pages_for", lambda *t: (moved.append(len(t)), move(*t)))
    found = []
    for long in (1 << 14, len(PROMPT) + 2):
        monkeypatch.setattr(decoding, "LONG", long)
        runner = Runner(model)
        assert runner.cache.keys[0].nbytes() >= LARGE
        found.append([runner.prefill(np.array([PROMPT])), *(runner.decode(np.array([t])) for t in range(4))])
    assert moved == [2]  # once, keys and values
    np.testing.assert_array_equal(*found)


def test_nothing_is_compiled_for_a_new_length_or_a_new_token(model, monkeypatch):
    steps: list[int] = []
    computed = Runner._computed
    monkeypatch.setattr(
        Runner,
        "_computed",
        lambda self, result, tokens, *args, **more: (
            steps.append(int(tokens.shape[1])) or computed(self, result, tokens, *args, **more)
        ),
    )
    monkeypatch.setattr("lama.runtime.replay.diskcache_get", lambda *_: None)  # no step of an earlier run
    decoder = Runner(model)
    # The steps run once, to be captured; from then on they are replayed.
    for n in range(2, 17):
        decoder.prefill(np.array([tokens(n)]))
    assert steps == [16]
    for t in range(20):
        decoder.decode(np.array([t]))
    assert steps == [16, 1]
    for n in (17, 18, 25, 32, 3, 16):
        decoder.prefill(np.array([tokens(n)]))
        decoder.decode(np.array([n % VOCAB]))
    assert steps == [16, 1, 32]
    assert sorted(decoder._steps) == [("last", 1, 1), ("last", 1, 16), ("last", 1, 32)]


def test_second_generation_compiles_nothing(model, monkeypatch):
    continued(model, PROMPT, 5)
    continued(model, PROMPT, 5)

    def fail(*args):
        raise AssertionError("a step that had been captured ran again")

    monkeypatch.setattr(Runner, "_computed", fail)
    assert len(continued(model, PROMPT[:3], 20, DRAWN, seed=5)) == 20


# --- seeds, batches


def test_seed_decides_the_text(model):
    texts = [continued(model, PROMPT, 20, DRAWN, seed) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), DRAWN], ids=["greedy", "sampled"])
def test_batch_of_unequal_prompts_equals_one_by_one(model, sampling):
    prompts = [tokens(11), tokens(3), tokens(29)]
    rows: list[list[int]] = [[], [], []]
    for step in generate_tokens(model, prompts, 9, sampling, seed=5):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    assert rows == [continued(model, prompt, 9, sampling, 5) for prompt in prompts]
    assert list(map(len, rows)) == [9, 9, 9]


def test_batch_row_ends_at_its_own_end_of_text(model):
    prompts = [tokens(11), tokens(3), tokens(29)]
    alone = [continued(model, prompt, 9, DRAWN, 5) for prompt in prompts]
    end = alone[1][4]
    rows: list[list[int]] = [[], [], []]
    for step in generate_tokens(model, prompts, 9, DRAWN, 5, end_of_text=end):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    assert rows == [row[: row.index(end) + 1] if end in row else row for row in alone]


def test_end_of_text_is_the_last_token(model):
    free = continued(model, PROMPT, 20, DRAWN, 3)
    end = free[6]
    assert continued(model, PROMPT, 20, DRAWN, 3, end_of_text=end) == free[: free.index(end) + 1]


# --- the window


def slides(full_forward, prompt: Sequence[int], n: int) -> tuple[list[int], list[int]]:
    """Greedy, by hand: when the new token has no place, the newer half of the context is all that is seen."""
    seen: list[int] = []
    made, kept = [], []
    for i in range(len(prompt) + n):
        if i >= len(prompt):
            made.append(int(full_forward(seen).argmax()))
        seen.append(prompt[i] if i < len(prompt) else made[-1])
        if len(seen) > CONTEXT:
            seen = seen[-(CONTEXT // 2) :]
            kept.append(i)
    return made, kept


@pytest.mark.parametrize("length", [31, CONTEXT, CONTEXT + 1, 2 * CONTEXT + 5])
def test_window_goes_on_with_the_newer_half(model, full_forward, length):
    prompt, told = tokens(length), []
    made = continued(model, prompt, 50, window=True, on_slide=told.append)
    expected, slid = slides(full_forward, prompt, 50)
    assert made == expected
    in_the_prompt = [i for i in slid if i < length]
    assert len(told) == len([i for i in slid if length <= i < length + 49]) + bool(in_the_prompt)
    assert told[1:] == [CONTEXT // 2] * (len(told) - 1)


def test_window_in_a_batch_equals_one_by_one(model):
    prompts = [tokens(CONTEXT + 7), tokens(3), tokens(29)]
    rows: list[list[int]] = [[], [], []]
    for step in generate_tokens(model, prompts, 20, DRAWN, 5, window=True):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    assert rows == [continued(model, prompt, 20, DRAWN, 5, window=True) for prompt in prompts]


# --- what is refused


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts must hold at least one prompt; got none"),
        ([[1], []], "prompt must hold at least one token; got an empty prompt"),
        (
            [[1] * 38],
            "prompt must have at most 37 tokens, the context; got 38. Shorten it or set window=True",
        ),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompts, message):
    with pytest.raises(UsageError, match=message):
        next(generate_tokens(model, prompts, 3))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_an_error(model, bad):
    good = model.ln_final.bias.numpy()
    try:
        model.ln_final.bias.assign(Tensor(np.where(np.arange(10) == 3, np.float32(bad), good))).realize()
        with pytest.raises(
            LamaError, match=r"logits must be finite; got .*(nan|inf).* at token 5\. Try --dtype float32"
        ):
            continued(model, PROMPT, 3)
    finally:
        model.ln_final.bias.assign(Tensor(good)).realize()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature must be 0 \(greedy\) or above; got -0.5"),
        ({"temperature": float("nan")}, "temperature must be .*; got nan"),
        ({"temperature": float("inf")}, "temperature must be .*; got inf"),
        ({"top_k": -1}, r"top_k must be 0 \(keep all\) or above; got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1; got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1; got 1.5"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1; got -0.1"),
        ({"min_p": 1.1}, "min_p must be between 0 and 1; got 1.1"),
        (
            {"repetition_penalty": 0.0},
            "repetition_penalty must be between 0.01 and 100; 1 changes nothing; got 0.0",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"seed": -1}, "seed must be 0 or above; got -1"),
        ({"stop": ("a", "")}, 'stop must be a non-empty string; got ""'),
    ],
)
def test_options_out_of_range_are_refused_at_once(model, options, message):
    with pytest.raises(UsageError, match=message):
        generate(model, CharacterTokenizer("abcdefghijklmnopqrstuvw"), "abc", **options)


# --- filters

LOGITS = np.log([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, np.array([16, 9, 4, 1]) / 30),
        ({"temperature": 2.0}, np.sqrt([4, 3, 2, 1]) / np.sqrt([4, 3, 2, 1]).sum()),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 3}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 4}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 99}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"min_p": 0.4}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),  # 4/9 is below 0.5, 7/9 is not
        ({"top_p": 0.95, "min_p": 0.3}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 0.5, "top_p": 0.8}, [16 / 25, 9 / 25, 0, 0]),
    ],
)
def test_filters_leave_the_hand_computed_distribution(options, expected):
    np.testing.assert_allclose(probabilities(LOGITS - 50, Sampling(**options)), expected, rtol=1e-9)


def test_probabilities_do_not_overflow():
    np.testing.assert_allclose(
        probabilities(np.array([1e4, 1e4, -1e4]), Sampling(temperature=0.01)), [0.5, 0.5, 0]
    )


def test_top_k_keeps_k_of_equal_tokens():
    p = probabilities(np.zeros(7), Sampling(top_k=3))
    assert sorted(p) == [0] * 4 + [1 / 3] * 3


def test_repetition_penalty_makes_seen_tokens_less_likely_once():
    rng = np.random.default_rng(0)
    logits = np.array([3.0, 2.0, -1.0, -0.5])
    choose = Sampling(temperature=0, repetition_penalty=2.0)
    assert next_token(logits, [], choose, rng) == 0
    assert next_token(logits, [0, 0, 0], choose, rng) == 1  # 1.5 for 2, however often it was there
    assert next_token(np.array([-3.0, -0.8, -1.0]), [1], choose, rng) == 2  # -1.6 for -0.8
    assert (logits == [3.0, 2.0, -1.0, -0.5]).all()  # not changed in place


def test_repetition_penalty_comes_before_the_other_filters():
    logits = np.log([0.5, 0.3, 0.2]) + 5  # the penalty halves the first logit, which puts it last
    drawn = {
        next_token(logits, [0], Sampling(repetition_penalty=2.0, top_k=2), np.random.default_rng(seed))
        for seed in range(50)
    }
    assert drawn == {1, 2}


def test_greedy_takes_the_first_of_the_largest():
    assert (
        next_token(
            np.array([1.0, 3.0, 3.0], np.float32), [], Sampling(temperature=0), np.random.default_rng(0)
        )
        == 1
    )


def test_draws_follow_the_probabilities():
    rng = np.random.default_rng(0)
    counts = np.bincount([next_token(LOGITS, [], Sampling(top_k=3), rng) for _ in range(9000)], minlength=4)
    np.testing.assert_allclose(counts / 9000, [4 / 9, 3 / 9, 2 / 9, 0], atol=0.02)


@pytest.mark.peers
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.7, "temperature": 1.5, "top_k": 17, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=lambda options: "+".join(options),
)
def test_filters_equal_those_of_transformers(options):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    process = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    ).generation.logits_process
    makers = {
        "repetition_penalty": process.RepetitionPenaltyLogitsProcessor,
        "temperature": process.TemperatureLogitsWarper,
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
        "min_p": process.MinPLogitsWarper,
    }
    for seed in range(20):
        logits, seen = 2 * np.random.default_rng(seed).standard_normal(53), tokens(11, seed)
        sampling = Sampling(**options)
        ours = probabilities(penalised(logits, seen, sampling), sampling)
        scores = torch.tensor(logits)[None]
        for name, make in makers.items():
            if name in options:
                scores = make(options[name])(torch.tensor([seen]), scores)
        np.testing.assert_allclose(ours, scores.softmax(-1)[0].numpy(), rtol=1e-6, atol=1e-12)


# --- text


class Words(ByteTokenizer):
    """A tokenizer whose tokens are given: bytes each, the last id ends a text."""

    def __init__(self, *words: bytes | str):
        self.words = [word.encode() if isinstance(word, str) else word for word in words]
        self.end_of_text = len(words)  # type: ignore[assignment]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.words[i] for i in ids)


def streamed(
    *words: bytes | str, stop: Sequence[str] = (), end: bool = False
) -> tuple[list[str], Generation]:
    """The pieces that come out when a model gives these tokens one after the other."""
    tokenizer = Words(*words)
    events = [Event(1, i) for i in range(len(words))]
    if end:
        events.append(Event(1, len(words), "stop"))
    else:
        events[-1] = Event(1, len(words) - 1, "length")
    generation = Generation([], iter(events), tokenizer, stop)
    return list(generation), generation


def test_text_streams_token_by_token():
    pieces, generation = streamed("so", " it", " ends")
    assert pieces == ["so", " it", " ends"]
    assert (generation.text, generation.tokens, generation.finish_reason) == (
        "so it ends",
        [0, 1, 2],
        "length",
    )
    assert len(generation.token_times) == 3


def test_text_never_breaks_a_character():
    pieces, generation = streamed(b"a\xe2", b"\x82", b"\xacb", b"\xf0\x9f\xa6", b"\x99")
    assert pieces == ["a", "€b", "🦙"]
    assert generation.text == "a€b🦙"


def test_text_that_ends_inside_a_character_says_so():
    assert streamed(b"a", b"\xe2\x82")[0] == ["a", "\ufffd"]


def test_end_of_text_is_not_part_of_the_text():
    pieces, generation = streamed("so", " it", end=True)
    assert pieces == ["so", " it"]
    assert (generation.tokens, generation.finish_reason) == ([0, 1], "stop")


def test_end_of_text_lets_go_what_was_held_back():
    pieces, generation = streamed("so", "\n", stop=["\n\n"], end=True)
    assert pieces == ["so", "\n"]
    assert generation.finish_reason == "stop"


def test_stop_string_across_tokens_ends_the_text_before_it():
    pieces, generation = streamed("so", " it E", "N", "D more", " and more", stop=["END"])
    assert pieces == ["so", " it "]
    assert (generation.text, generation.finish_reason) == ("so it ", "stop")
    assert generation.tokens == [0, 1, 2, 3]  # the model was not asked for more


def test_stop_string_that_was_not_one_is_shown_after_all():
    pieces, generation = streamed("so E", "N", "ormous", stop=["END"])
    assert pieces == ["so ", "ENormous"]
    assert generation.finish_reason == "length"


def test_stop_string_in_the_last_characters_held_back():
    pieces, generation = streamed("aab", b"\xe2", stop=["ab\ufffd"])
    assert pieces == ["a"]
    assert generation.finish_reason == "stop"


def test_first_of_several_stop_strings_counts():
    assert streamed("one two three", stop=["three", "two", "wo"])[1].text == "one "


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("so it ends.\n", ("\n\n",), ("so it ends.", "\n", False)),
        ("so it ends.\n\nNo", ("\n\n",), ("so it ends.", "", True)),
        ("abab", ("babc", "c"), ("a", "bab", False)),
        ("plain", (), ("plain", "", False)),
        ("", ("x",), ("", "", False)),
    ],
)
def test_split_at_stop_gives_what_can_be_shown(text, stop, expected):
    assert split_at_stop(text, stop) == expected
    if not expected[2]:
        assert split_at_stop(text, stop, last=True) == (text, "", False)


def test_stream_equals_the_text_however_it_is_cut():
    rng = np.random.default_rng(0)
    for _ in range(200):
        raw = "".join(rng.choice(list("abé€🦙\n"), size=20)).encode()
        cuts = [0, *sorted(rng.integers(0, len(raw), 6)), len(raw)]
        pieces, generation = streamed(*(raw[a:b] for a, b in itertools.pairwise(cuts)), stop=["ab", "€\n"])
        text = raw.decode()
        ends = [i for i in map(text.find, ("ab", "€\n")) if i >= 0]
        assert "".join(pieces) == generation.text == text[: min(ends, default=len(text))]
        assert generation.finish_reason == ("stop" if ends else "length")


def test_generate_is_an_iterator_and_a_string(model):
    tokenizer = CharacterTokenizer("abcdefghijklmnopqrstuvw")
    pieces = lama.generate(model, tokenizer, "cab", max_new_tokens=9, temperature=0)
    text = str(lama.generate(model, tokenizer, "cab", max_new_tokens=9, temperature=0))
    assert "".join(pieces) == text == pieces.text == str(pieces) and len(text) == 9
    assert pieces.prompt_tokens == tokenizer.encode("cab")
    assert tokenizer.decode(continued(model, tokenizer.encode("cab"), 9)) == text
    assert (pieces.tokens, pieces.finish_reason) == (tokenizer.encode(text), "length")


def test_generate_can_be_left_and_taken_up_again(model):
    tokenizer = CharacterTokenizer("abcdefghijklmnopqrstuvw")
    generation = generate(model, tokenizer, "cab", max_new_tokens=9)
    first = next(iter(generation))
    assert str(generation).startswith(first) and len(str(generation)) == 9


def test_generate_works_only_when_it_is_read(model, monkeypatch):
    monkeypatch.setattr(Runner, "prefill", lambda *args: pytest.fail("started too early"))
    generate(model, CharacterTokenizer("abcdefghijklmnopqrstuvw"), "cab")


def test_generate_refuses_bad_prompts_at_once(model):
    with pytest.raises(UsageError, match="got an empty prompt"):
        generate(model, ByteTokenizer(), "")
    with pytest.raises(UsageError, match="prompt must have at most 37 tokens, the context; got 41"):
        generate(model, ByteTokenizer(), "x" * 41)


def test_generations_of_one_model_do_not_disturb_each_other(model):
    alone = [continued(model, prompt, 7) for prompt in (tokens(5), tokens(11))]
    streams = [generate_tokens(model, [prompt], 7) for prompt in (tokens(5), tokens(11))]
    together = list(zip(*streams, strict=True))
    assert [[step[i][0] for step in together] for i in (0, 1)] == alone


def test_generation_uses_the_weights_of_now(model):
    changing = GPT(model.config, seed=1)
    before = continued(changing, PROMPT, 9)
    other = GPT(model.config, seed=2)
    for old, new in zip(get_parameters(changing), get_parameters(other), strict=True):
        old.replace(new)
    assert continued(changing, PROMPT, 9) == continued(other, PROMPT, 9) != before


def test_tokens_beyond_the_tokenizer_are_not_drawn(model):
    drawn = {
        step[0] for step in generate_tokens(model, [PROMPT], 20, Sampling(temperature=5.0), vocab_size=3)
    }
    assert drawn <= {0, 1, 2}


def plainly(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """`probabilities`, with the whole vocabulary sorted."""
    logits = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    if sampling.top_k:
        logits[np.argsort(-logits, kind="stable")[sampling.top_k :]] = -np.inf
    p = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-p, kind="stable")
    p[order[np.cumsum(p[order]) - p[order] >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("spread", [0.01, 1.0, 7.0])  # the nucleus is most of the vocabulary, or a few tokens
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 700, "top_p": 0.8, "min_p": 0.01}],
)
def test_partial_sorts_find_the_distribution_of_whole_ones(spread: float, options: dict):
    logits = (np.random.default_rng(0).standard_normal(5003) * spread).astype(np.float32)
    sampling = Sampling(temperature=0.8, **options)
    expected = plainly(logits, sampling)
    np.testing.assert_allclose(probabilities(logits, sampling), expected, rtol=1e-9)
    drawn = [next_token(logits, [], sampling, np.random.default_rng(seed)) for seed in range(20)]
    assert drawn == [np.random.default_rng(seed).choice(len(expected), p=expected) for seed in range(20)]


def test_nucleus_takes_the_first_of_equals():
    p = probabilities(np.zeros(1000, np.float32), Sampling(top_p=0.0105))
    assert np.flatnonzero(p).tolist() == list(range(11))


# --- the ends of a text


def with_ends(model: GPT, *ends: int) -> GPT:
    """The same model, with these end tokens."""
    other = GPT(dataclasses.replace(model.config, end_tokens=ends), seed=None)
    for ours, theirs in zip(get_parameters(other), get_parameters(model), strict=True):
        ours.replace(theirs)
    return other


LETTERS = CharacterTokenizer("abcdefghijklmnopqrstuvw")


def test_text_stops_at_the_models_end_tokens(model: GPT):
    whole = generate(model, LETTERS, "abc", max_new_tokens=9, temperature=0)
    assert len(str(whole)) == 9 and whole.finish_reason == "length"
    end = next(token for i, token in enumerate(whole.tokens) if i and token not in whole.tokens[:i])
    n = whole.tokens.index(end)
    for ends in ((end,), (22, end, 21)):
        text = generate(with_ends(model, *ends), LETTERS, "abc", max_new_tokens=9, temperature=0)
        first = min(i for i, token in enumerate(whole.tokens) if token in ends)
        assert (str(text), text.finish_reason) == (
            whole.text[:first],
            "stop",
        ) and text.tokens == whole.tokens[:first]
    for end_of_text in (end, [end], {22, end}):
        assert (
            continued(model, LETTERS.encode("abc"), 9, end_of_text=end_of_text)[: n + 1]
            == whole.tokens[: n + 1]
        )


def test_text_stops_at_the_tokenizers_own_end_too(model: GPT):
    whole = generate(model, LETTERS, "abc", max_new_tokens=9, temperature=0)
    str(whole)
    tokenizer = CharacterTokenizer(LETTERS.characters)
    tokenizer.end_of_text = whole.tokens[0]  # type: ignore[assignment]
    text = generate(with_ends(model, 22), tokenizer, "abc", max_new_tokens=9, temperature=0)
    assert (str(text), text.tokens, text.finish_reason) == ("", [], "stop")


@pytest.mark.peers
@pytest.mark.parametrize("in_generation_config", [True, False])
def test_text_stops_where_transformers_does(tmp_path, in_generation_config: bool):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = random_gpt2.make_config(
        vocab_size=23, n_positions=37, n_embd=10, n_layer=2, n_head=2, eos_token_id=None
    )
    folder = random_gpt2.write_folder(tmp_path, config, random_gpt2.make_weights(config, std=0.4))
    greedy = continued(load_model(folder), [3, 1, 4], 20)
    ends = [22 if 22 not in greedy else greedy[0], greedy[7]]
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"eos_token_id": greedy[0] if in_generation_config else ends})
    )
    if in_generation_config:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    prompt = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        out = theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
    text = generate(load_model(folder), LETTERS, LETTERS.decode([3, 1, 4]), max_new_tokens=20, temperature=0)
    str(text)
    made = out[0, 3:].tolist()
    assert (
        made == greedy[: len(made)]
        and made[-1] in ends
        and text.finish_reason == "stop"
        and text.tokens == made[:-1]
    )


def test_full_context_is_a_reason_of_its_own(model: GPT):
    prompt = "a" * (CONTEXT - 3)
    for n, reason in ((3, "length"), (4, "length"), (5, "context"), (50, "context")):
        text = generate(model, LETTERS, prompt, max_new_tokens=n, temperature=0)
        assert (len(str(text)), text.finish_reason) == (min(n, 4), reason)
    text = generate(model, LETTERS, prompt, max_new_tokens=9, temperature=0, window=True)
    assert (len(str(text)), text.finish_reason) == (9, "length")


def test_a_string_is_one_stop(model: GPT):
    whole = str(generate(model, LETTERS, "abc", max_new_tokens=9, temperature=0))
    for stop in (whole[3:5], [whole[3:5]], (whole[3:5], "?")):
        text = generate(model, LETTERS, "abc", max_new_tokens=9, temperature=0, stop=stop)
        assert (str(text), text.finish_reason) == (whole[: whole.index(whole[3:5])], "stop")
    for stop in ("", ["a", ""]):
        with pytest.raises(UsageError, match='stop must be a non-empty string; got ""'):
            generate(model, LETTERS, "abc", stop=stop)


def test_prompts_with_ids_that_the_model_lacks_are_refused(model: GPT):
    for ids in ([1, 23], [-1], [1, 10**9]):
        with pytest.raises(LamaError, match="ids must be from 0 to 22; got "):
            next(generate_tokens(model, [[1], ids], 3))
    with pytest.raises(
        LamaError,
        match=(
            r"the text must be made of the model's tokens; got 'x', id 120 \(vocab_size=23, and the "
            r"tokenizer"
        ),
    ):
        generate(model, ByteTokenizer(), "\x01x")


@pytest.mark.parametrize("n", [1, 255, 257, 3000, 50257])
def test_token_of_a_large_vocabulary_is_drawn_as_by_one_sum(n):
    rng, logits = np.random.default_rng(n), np.full(n, -np.inf, np.float32)
    some = rng.permutation(n)[: max(1, n // 2)]
    logits[some] = 5 * rng.standard_normal(len(some))
    for sampling in (Sampling(), Sampling(top_k=max(1, min(n // 3, 40)))):
        sums = probabilities(logits, sampling).cumsum()
        shares = np.random.default_rng(7).random(200)
        drawn = np.random.default_rng(7)
        for share in shares:
            token = next_token(logits, [], sampling, drawn)
            assert token == sums.searchsorted(share * sums[-1], side="right") and logits[token] > -np.inf
