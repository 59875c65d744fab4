"""Targets written token by token: the caches, greedy search, beams."""

import itertools

import numpy as np
import pytest
from helpers import fill
from tinygrad import Tensor

from lama.data.pairs import encode_pairs
from lama.errors import LamaError, UsageError
from lama.generation.seq2seq import Hypothesis, PairDecoder, Searcher, pair_score
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.tokenizers import CharacterTokenizer, PairTokenizer

SMALL = {
    "vocab_size": 13,
    "context_length": 64,
    "d_model": 6,
    "n_encoder_layers": 1,
    "n_decoder_layers": 2,
    "n_heads": 3,
    "d_mlp": 11,
}
SOURCES = [[3, 4, 5, 6, 2], [7, 8, 2], [9, 9, 9, 4, 11, 12, 2]]
PAD, BEGIN, END = 0, 1, 2


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(TransformerConfig(**SMALL))
    fill(model)
    return model


@pytest.fixture(scope="module")
def searcher(model) -> Searcher:
    return Searcher(model)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(float) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def uncached(model: Transformer, source: list[int], target: list[int]) -> np.ndarray:
    """The log-probabilities after each of begin and `target`, from the whole at once: (T, vocab_size)."""
    return log_softmax(model(Tensor([source]), Tensor([[BEGIN, *target]])).numpy()[0])


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_cached_steps_equal_the_whole_at_once(norm):
    model = Transformer(TransformerConfig(**SMALL, norm=norm))
    fill(model)
    decoder = PairDecoder(model, 2, 1, 5, 9)
    # Another after it.
    for sources in ([[3, 4, 5, 6, 2], [7, 8, 2, PAD, PAD]], [[9, 2, PAD, PAD, PAD], [4, 4, 4, 4, 2]]):
        targets = np.array([[BEGIN, 9, 4, 11, 12], [BEGIN, 10, 6, 7, 3]])
        decoder.start(np.array(sources))
        steps = np.stack([decoder.step(targets[:, t]) for t in range(5)], 1)
        expected = log_softmax(model(Tensor(sources), Tensor(targets.astype(np.int32))).numpy())
        np.testing.assert_allclose(steps, expected, atol=1e-4)


def test_greedy_takes_the_likeliest_token_each_time(model, searcher):
    found = searcher.greedy(SOURCES, extra=4)
    for source, hypothesis in zip(SOURCES, found, strict=True):
        target: list[int] = []
        total = 0.0
        while len(target) < len(source) - 1 + 4:
            last = uncached(model, source, target)[-1]
            last[[PAD, BEGIN]] = -np.inf
            total += last.max()
            if last.argmax() == END:
                break
            target.append(int(last.argmax()))
        assert hypothesis.tokens == target
        assert hypothesis.log_probability == pytest.approx(total, abs=1e-3)
        assert hypothesis.ended == (len(target) < len(source) - 1 + 4)


def test_each_source_gets_what_it_gets_alone(searcher):
    together, beams = searcher.greedy(SOURCES, extra=4), searcher.beam(SOURCES, 3, extra=4)
    for source, greedy, beam in zip(SOURCES, together, beams, strict=True):
        assert searcher.greedy([source], extra=4)[0].tokens == greedy.tokens
        assert [h.tokens for h in searcher.beam([source], 3, extra=4)[0]] == [h.tokens for h in beam]


@pytest.mark.parametrize("seed", range(4))
def test_beam_of_one_is_greedy(seed):
    model = Transformer(TransformerConfig(**SMALL))
    fill(model, seed=seed)
    searcher = Searcher(model)
    greedy, beam = searcher.greedy(SOURCES, extra=3), searcher.beam(SOURCES, 1, extra=3)
    assert [[h.tokens for h in found] for found in beam] == [[h.tokens] for h in greedy]


def test_beams_scores_are_those_of_the_whole_target(model, searcher):
    for source, found in zip(SOURCES, searcher.beam(SOURCES, 4, extra=4), strict=True):
        assert 1 <= len(found) <= 4 and len({tuple(h.tokens) for h in found}) == len(found)
        assert [h.score(0.6) for h in found] == sorted((h.score(0.6) for h in found), reverse=True)
        for h in found:
            tokens = [*h.tokens, END] if h.ended else h.tokens
            log_p = uncached(model, source, h.tokens)
            assert h.log_probability == pytest.approx(
                sum(log_p[t, token] for t, token in enumerate(tokens)), abs=1e-3
            )


def test_wide_beam_finds_the_best_of_all():
    """With a beam as wide as all there is: the most probable target of up to three tokens, ended or cut."""
    model = Transformer(TransformerConfig(**SMALL | {"vocab_size": 7}))
    fill(model, seed=1)
    source = [3, 2]
    best = -np.inf
    for n in range(4):
        targets = list(itertools.product((3, 4, 5, 6), repeat=n))
        whole = model(Tensor([source] * len(targets)), Tensor([[BEGIN, *target] for target in targets]))
        for target, log_p in zip(targets, log_softmax(whole.numpy()), strict=True):
            total = sum(log_p[t, token] for t, token in enumerate(target))
            best = max(best, total + log_p[n, END] if n < 3 else total)
    found = Searcher(model).beam([source], 4, alpha=0.0, extra=2)[0][0]
    assert found.log_probability <= best + 1e-4
    assert found.log_probability == pytest.approx(best, abs=1e-3)


class Tree(PairDecoder):
    """A decoder whose probabilities are read from a table: prefix -> {token: probability}; what is missing
    shares the rest.
    """

    def __init__(self, table: dict[tuple[int, ...], dict[int, float]], rows: int):
        self.table, self.rows, self.length, self.position = table, rows, 20, 0
        self.prefixes: list[tuple[int, ...]] = []

    def start(self, sources: np.ndarray) -> None:
        self.prefixes, self.position = [()] * self.rows, 0

    def step(self, tokens: np.ndarray) -> np.ndarray:
        self.prefixes = [
            p if t == BEGIN else (*p, int(t)) for p, t in zip(self.prefixes, tokens, strict=True)
        ]
        self.position += 1
        p = np.full((self.rows, 13), 1e-9)
        for row, prefix in enumerate(self.prefixes):
            for token, share in self.table.get(prefix, {}).items():
                p[row, token] = share
        return np.log(p)

    def choose(self, rows: np.ndarray) -> None:
        self.prefixes = [self.prefixes[row] for row in rows]


def searching(table: dict[tuple[int, ...], dict[int, float]], model: Transformer, beam: int) -> Searcher:
    searcher = Searcher(model)
    searcher._decoders[(1, beam, 16)] = Tree(table, beam)
    return searcher


GARDEN_PATH = {
    (): {5: 0.6, 6: 0.4},
    (5,): {7: 0.3, 8: 0.3, END: 0.2},
    (5, 7): {END: 0.9},
    (5, 8): {END: 0.9},
    (6,): {9: 0.9},
    (6, 9): {END: 0.9},
}


def test_beam_finds_what_greedy_misses(model):
    greedy = searching(GARDEN_PATH, model, 1).greedy([[3, 4, 2]])[0]
    assert greedy.tokens == [5, 7] and greedy.log_probability == pytest.approx(np.log(0.6 * 0.3 * 0.9))
    best = searching(GARDEN_PATH, model, 2).beam([[3, 4, 2]], beam=2)[0][0]
    assert best.tokens == [6, 9] and best.log_probability == pytest.approx(np.log(0.4 * 0.9 * 0.9))
    assert best.score(0.6) > greedy.score(0.6)


def test_unlikely_ends_do_not_end_the_search(model):
    """Where the model is sure, the second choice of every step is an end: after two of them the best is still
    to come.
    """
    table = {(5,) * n: {5: 0.97, END: 0.03} for n in range(4)} | {(5,) * 4: {END: 0.97}}
    assert searching(table, model, 2).beam([[3, 4, 5, 6, 2]], beam=2)[0][0].tokens == [5] * 4


def test_length_penalty_favours_the_longer_target(model):
    table = {(): {END: 0.5, 5: 0.45}, (5,): {6: 0.95}, (5, 6): {7: 0.95}, (5, 6, 7): {END: 0.95}}
    for alpha, tokens in ((0.0, []), (2.0, [5, 6, 7])):
        assert searching(table, model, 2).beam([[3, 4, 5, 2]], 2, alpha)[0][0].tokens == tokens


def test_score_is_wu_and_others_formula():
    assert Hypothesis([3, 4, 5], -2.0, True).score(0.6) == pytest.approx(-2 / ((5 + 4) / 6) ** 0.6)
    assert Hypothesis([3, 4, 5], -2.0, False).score(1) == pytest.approx(-2 / (8 / 6))
    assert Hypothesis([3, 4, 5], -2.0, True).score(0) == -2


def test_search_stops_at_the_end_token_and_at_the_limit(model):
    ends = {(): {5: 0.9}, (5,): {END: 0.9}}
    found = searching(ends, model, 1).greedy([[3, 4, 2]])[0]
    assert (found.tokens, found.ended) == ([5], True)
    searcher = searching({(5,) * n: {5: 0.9} for n in range(20)}, model, 1)
    found = searcher.greedy([[3, 4, 2]], extra=3)[0]
    assert (found.tokens, found.ended) == ([5] * 5, False)  # two of the source and three more
    assert searcher.beam([[3, 4, 2]], 1, extra=3)[0][0] == found


@pytest.mark.parametrize(("beam", "alpha"), [(0, 0.6), (2, -1.0), (2, float("inf"))])
def test_beam_refuses(searcher, beam, alpha):
    with pytest.raises(UsageError, match="beam must be at least 1 and alpha at least 0; got beam="):
        searcher.beam(SOURCES, beam, alpha)


def test_source_past_the_context_is_refused(searcher):
    with pytest.raises(
        LamaError, match="sources must not be empty and fit context_length; got 65 tokens, context_length=64"
    ):
        searcher.greedy([[3] * 65])


def test_pair_score_agrees_with_itself(model):
    """The loss is the mean over what is no padding; with a random model nothing is exact."""
    tokenizer = PairTokenizer(CharacterTokenizer("abcdefghij"))
    data = encode_pairs([("abc", "cba"), ("defgh", "h"), ("j", "jj")], tokenizer)
    score = pair_score(model, data)
    losses = []
    for source, target in zip(data.sources, data.targets, strict=True):
        log_p = uncached(model, source, target)
        losses += [-log_p[t, token] for t, token in enumerate([*target, END])]
    assert score.loss == pytest.approx(np.mean(losses), abs=1e-4)
    assert (score.forced, score.prefixes, score.own) == (0, 0, 0) and len(score.answers) == 3
