"""The explanations of `transformer.py -v`: what they print is what the model computes."""

import re

import numpy as np
import pytest
from helpers import fill
from tinygrad import Tensor

from lama.data import text_corpus
from lama.interp.walkthrough import (
    explain_attention,
    explain_corpus,
    explain_parameters,
    explain_window,
    matrix,
    show_tokens,
)
from lama.models.gpt import GPT, GPTConfig
from lama.models.registry import describe, n_parameters
from lama.taps import Recorder
from lama.tokenizers import ByteTokenizer, CharacterTokenizer

TOKENIZER = CharacterTokenizer("\n abcdefg")
TEXT = "a bad\ncage"
WINDOW = np.array(TOKENIZER.encode(TEXT))


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(
        GPTConfig(TOKENIZER.vocab_size, 13, d_model=6, n_layers=2, n_heads=3, d_mlp=17, tied=False), seed=None
    )
    fill(model)
    return model


def test_show_tokens_lets_white_space_be_seen():
    assert show_tokens(TOKENIZER, WINDOW) == r"a| |b|a|d|\n|c|a|g|e"
    assert show_tokens(ByteTokenizer(), "é'\\".encode()) == r"�|�|'|\\"
    assert show_tokens(TOKENIZER, []) == ""


def test_explain_corpus_counts_and_names_the_source():
    text = 3 * TEXT
    tokens = np.array(TOKENIZER.encode(text), np.uint8)
    lines = explain_corpus(
        text_corpus(text, "Cages", "a bird", "CC0"), TOKENIZER, tokens[:26], tokens[26:]
    ).splitlines()
    assert lines[0] == "Cages: 30 characters (a bird; CC0)"
    assert lines[1] == "30 tokens from a vocabulary of 9: the first 26 for training, the last 4 held out"
    assert lines[2] == "text    " + show_tokens(TOKENIZER, tokens[:24])
    assert lines[3].split() == ["tokens", *map(str, tokens[:24])]


def test_explain_window_shows_that_targets_are_one_step_later():
    window = np.concatenate([WINDOW, WINDOW])  # 20 tokens: the last position sees more than is shown
    lines = explain_window(TOKENIZER, window[:-1], window[1:]).splitlines()
    assert lines[0].startswith("a window is 19 tokens;")
    assert lines[1:4] == [
        r"  position   0  sees a   target  ",
        r"  position   1  sees a|    target b",
        r"  position   2  sees a| |b   target a",
    ]
    seen = show_tokens(TOKENIZER, window[3:19])
    assert lines[4] == f"  position  18  sees ...{seen}   target e"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_explain_window_of_a_few_tokens_shows_each_once(n):
    assert len(explain_window(TOKENIZER, WINDOW[:n], WINDOW[1 : n + 1]).splitlines()) == 1 + n


def test_explain_attention_prints_the_models_own_numbers(model):
    text = explain_attention(model, TOKENIZER, WINDOW)
    shapes = {line[2:13].strip(): line[13:33].strip() for line in text.split("\n\n")[0].splitlines()}
    assert shapes == {
        "tokens": "(1, 10)",
        "embed": "(1, 10, 6)",
        "pos_embed": "(10, 6)",
        "q, k, v": "(1, 3, 10, 2)",
        "scores": "(1, 3, 10, 10)",
        "pattern": "(1, 3, 10, 10)",
        "z": "(1, 3, 10, 2)",
        "attn_out": "(1, 10, 6)",
        "mlp.post": "(1, 10, 17)",
        "resid_post": "(1, 10, 6)",
        "logits": "(1, 10, 9)",
    }
    assert "the residual stream after block 1 of 2" in text

    record = Recorder()
    model(Tensor(WINDOW.astype(np.int32).reshape(1, -1)), tap=record)
    pattern, q, k = (record[f"blocks.0.attn.{name}"].numpy()[0, 0] for name in ("pattern", "q", "k"))
    scores, mask, shown = text.split("\n\n")[1:]
    assert "scores of head 1" in scores and "(first 6 of 10 positions)" in scores
    assert_table(scores, q @ k.T / np.sqrt(2))
    assert_table(shown, np.where(np.tri(10) > 0, pattern, np.nan))
    assert [row.split()[-6:] for row in mask.splitlines()[2:]] == [
        ["1"] * (t + 1) + ["."] * (5 - t) for t in range(6)
    ]
    for t, row in enumerate(shown.splitlines()[2:]):
        assert sum(float(cell) for cell in row.split()[-6:] if cell != ".") == pytest.approx(
            1, abs=0.005 * (t + 1)
        )


def assert_table(table: str, values: np.ndarray) -> None:
    """A title, the labels, then the values of the first six positions with two decimals; a dot for NaN."""
    _, head, *rows = table.splitlines()
    assert re.findall(r"\S+", head) == ["a", "b", "a", "d", r"\n"]  # and a space
    expected = [["." if np.isnan(v) else f"{v:.2f}" for v in row[:6]] for row in values[:6]]
    assert [row.split()[-6:] for row in rows] == expected


def test_explain_attention_takes_fewer_tokens_than_it_shows(model):
    assert "(first 3 of 3 positions)" in explain_attention(model, TOKENIZER, WINDOW[:3])


def test_explain_parameters_adds_up(model):
    lines = explain_parameters(model).splitlines()
    assert lines[0] == describe(model)
    counts = {line[2:26].strip(): int(line[26:38].replace(",", "")) for line in lines[1:]}
    assert counts == {
        "token embedding": 9 * 6,
        "positions": 13 * 6,
        "norms, 2 blocks": 2 * 4 * 6,
        "attention, 2 blocks": 2 * (18 * 6 + 18 + 6 * 6 + 6),
        "MLP, 2 blocks": 2 * (17 * 6 + 17 + 6 * 17 + 6),
        "final norm": 12,
        "unembedding": 9 * 6,
    }
    assert sum(counts.values()) == n_parameters(model)
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_matrix_lines_labels_up_with_values():
    assert matrix(np.array([[1.234, np.nan], [-0.5, 10]]), ["a", r"\n"]) == (
        "            a     \\n\n     a   1.23      .\n    \\n  -0.50  10.00"
    )
    assert matrix(np.array([[True, False], [True, True]]), ["a", "b"]).splitlines()[1].split() == [
        "a",
        "1",
        ".",
    ]
