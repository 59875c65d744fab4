"""Windows and n-gram baselines."""

import math
from pathlib import Path

import numpy as np
import pytest

from lama.data import batch, encode_corpus, evaluation_windows, ngram_baselines, ngram_loss, split_tail
from lama.data.ngrams import witten_bell_loss
from lama.errors import LamaError
from lama.tokenizers import ByteTokenizer, CharacterTokenizer, gpt2_tokenizer


def test_encode_corpus_uses_the_smallest_numbers():
    assert encode_corpus(ByteTokenizer(), "aé").tolist() == [97, 195, 169]
    assert encode_corpus(ByteTokenizer(), "a").dtype == np.uint8
    assert encode_corpus(gpt2_tokenizer(), "Hello world").dtype == np.uint16
    assert encode_corpus(CharacterTokenizer("".join(map(chr, range(300)))), "a").dtype == np.uint16


def test_split_keeps_the_end_for_validation():
    train, validation = split_tail(np.arange(29))
    assert (train.tolist(), validation.tolist()) == (list(range(26)), [26, 27, 28])
    with pytest.raises(ValueError, match=r"validation=1\.0"):
        split_tail(np.arange(29), 1.0)


def test_batch_targets_are_the_next_tokens():
    inputs, targets = batch(np.arange(101, dtype=np.uint8), step=3, seed=5, batch_size=7, context_length=11)
    assert inputs.shape == targets.shape == (7, 11)
    assert inputs.dtype == targets.dtype == np.int32
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(11))


def test_batch_depends_on_seed_and_step_alone():
    data = np.arange(10007)

    def starts(step: int, seed: int) -> list[int]:
        return batch(data, step, seed, batch_size=5, context_length=3)[0][:, 0].tolist()

    first = starts(0, 0)
    np.random.seed(1)
    assert starts(0, 0) == first
    assert len({tuple(starts(step, seed)) for step in range(3) for seed in range(3)}) == 9


def test_batch_reaches_every_window():
    inputs, targets = batch(np.arange(5), step=0, seed=0, batch_size=101, context_length=3)
    assert set(inputs[:, 0].tolist()) == {0, 1}
    assert targets.max() == 4


def test_evaluation_windows_lie_end_to_end():
    inputs, targets = evaluation_windows(np.arange(12), context_length=3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]  # 9, 10, 11 have no fourth target
    assert targets.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_evaluation_windows_are_spread_when_limited():
    inputs, _ = evaluation_windows(np.arange(31), context_length=3, limit=5)
    assert inputs[:, 0].tolist() == [0, 6, 12, 18, 24]
    assert len(evaluation_windows(np.arange(31), context_length=3, limit=99)[0]) == 10


@pytest.mark.parametrize(
    "cut", [lambda data: batch(data, 0, 0, 2, 7), lambda data: evaluation_windows(data, 7)]
)
def test_windows_refuse_a_corpus_shorter_than_one(cut):
    cut(np.arange(8))
    with pytest.raises(LamaError, match=r"got 7 tokens .*context_length=7"):
        cut(np.arange(7))


# --- n-grams. Train on 0 1 0 1 0 2, judge 0 1 2, three kinds of token, k = 0.1.

TRAIN, HELD_OUT = np.array([0, 1, 0, 1, 0, 2], np.uint8), np.array([0, 1, 2], np.uint8)


def test_unigram_loss_equals_the_hand_computed_one():
    expected = -(math.log(3.1 / 6.3) + math.log(2.1 / 6.3) + math.log(1.1 / 6.3)) / 3
    assert ngram_loss(TRAIN, HELD_OUT, 1, 3) == pytest.approx(expected)


def test_bigram_loss_equals_the_hand_computed_one():
    # 0 is followed three times, by 1 twice; 1 twice, never by 2.
    expected = -(math.log(2.1 / 3.3) + math.log(0.1 / 2.3)) / 2
    assert ngram_loss(TRAIN, HELD_OUT, 2, 3) == pytest.approx(expected)


def test_trigram_loss_equals_the_hand_computed_one():
    expected = -math.log(0.1 / 2.3)  # 0 1 is followed twice, by 0
    assert ngram_loss(TRAIN, HELD_OUT, 3, 3) == pytest.approx(expected)


def test_ngram_loss_of_what_was_never_seen_is_uniform():
    assert ngram_loss(np.array([0, 0, 0]), np.array([2, 1, 2]), 3, 5) == pytest.approx(math.log(5))


def test_witten_bell_equals_the_hand_computed_one():
    # 0 1 0 2: after 0 came two kinds, one of them 1; alone, 0 came twice of four, 1 once, of three kinds.
    train, one = np.array([0, 1, 0, 2]), (1 + 3 / 3) / (4 + 3)
    zero, two = (2 + 3 / 3) / (4 + 3), (1 + 2 * one) / (2 + 2)
    found = witten_bell_loss(train, np.array([0, 1]), 2, 3)
    assert found == pytest.approx(-(math.log(zero) + math.log(two)) / 2)
    # After 2 nothing came: the shorter context decides.
    assert witten_bell_loss(train, np.array([2, 1]), 2, 3) == pytest.approx(-math.log(one))


def test_ngram_baselines_are_named():
    baselines = ngram_baselines(TRAIN, HELD_OUT, 3)
    assert list(baselines) == ["uniform", "unigram", "bigram", "trigram"]
    assert baselines["uniform"] == pytest.approx(math.log(3))


def test_ngram_baselines_read_no_more_than_the_limit():
    long = np.concatenate([TRAIN, np.full(1000, 2, np.uint8)])
    limited = ngram_baselines(long, np.concatenate([TRAIN[::-1], HELD_OUT]), 3, limit=len(TRAIN))
    assert limited == ngram_baselines(TRAIN, TRAIN[::-1], 3)


def test_ngram_baselines_leave_out_orders_that_do_not_fit():
    assert list(ngram_baselines(TRAIN, HELD_OUT[:2], 3)) == ["uniform", "unigram", "bigram"]
    assert list(ngram_baselines(TRAIN, HELD_OUT, 2**21)) == ["uniform", "unigram", "bigram"]
    assert list(ngram_baselines(TRAIN, HELD_OUT, 2**21 - 1))[1:] == ["unigram", "bigram", "trigram"]


def test_ngram_loss_names_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="got vocab_size=50257, n=5"):
        ngram_loss(TRAIN, HELD_OUT, 5, 50257)
    with pytest.raises(ValueError, match="got 6 and 3, n=4"):
        ngram_loss(TRAIN, HELD_OUT, 4, 3)


def test_ngram_losses_of_tinyshakespeare_are_the_known_ones():
    path = Path(__file__).parents[2] / "shared" / "data" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tinyshakespeare.txt is not on this machine")
    text = path.read_text(encoding="utf-8")
    train, held_out = split_tail(encode_corpus(CharacterTokenizer(text), text))
    losses = [ngram_loss(train, held_out, n, 65) for n in range(5)]
    np.testing.assert_allclose(losses, [4.174, 3.347, 2.484, 2.046, 1.784], atol=5e-4)
