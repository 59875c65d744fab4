"""Folders and runs of an earlier version still load, with the same logits, and resume, with the same bits."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

import lama
from lama import kernels, ops
from lama.checkpoints import open_weights
from lama.cli import main
from lama.host import cpu_model
from lama.tokenizers import load_huggingface_tokenizer

EARLIER = Path(__file__).parent / "earlier"
EXPECTED = np.load(EARLIER / "expected.npz")
SAME_PROCESSOR = str(EXPECTED["processor"]) == hashlib.sha256(cpu_model().encode()).hexdigest()
TOKENS = np.array([[3, 1, 4, 1, 5, 2, 6]], np.int32)


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - {"processor"}))
def test_models_of_an_earlier_version_give_the_same_logits(name, monkeypatch):
    model, _ = lama.load(EARLIER / name)
    if name in ("int8", "int4"):  # that version rounded activations only from nine rows on
        monkeypatch.setattr(ops, "round_activations", lambda x: x)
        monkeypatch.setattr(kernels, "matmul", lambda *_: None)
    inputs = [Tensor(TOKENS), Tensor(TOKENS[:, :4])] if name == "pairs" else [Tensor(TOKENS)]
    expected = EXPECTED[name]
    np.testing.assert_allclose(model(*inputs).numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_tokenizers_of_an_earlier_version_give_the_same_ids():
    tokenizer = load_huggingface_tokenizer(EARLIER / "tokenizer")
    vocabulary = json.loads((EARLIER / "tokenizer" / "vocab.json").read_text())
    text = (EARLIER / "corpus.txt").read_text()
    words = (EARLIER / "tokenizer" / "tokens.txt").read_text().split()
    assert tokenizer.encode(text) == [vocabulary[word] for word in words]
    for name in ("bpe", "bert", "exported", "run"):
        _, loaded = lama.load(EARLIER / name)
        assert loaded.decode(loaded.encode(text)) == text


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A copy of the runs, in the folder where they were made."""
    for name in ("run", "run-finished"):
        shutil.copytree(EARLIER / name, tmp_path / name)
    shutil.copy(EARLIER / "corpus.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_of_an_earlier_version_resumes_to_the_same_end(here):
    assert main(["train", "--resume", "run"]) in (0, 1)  # so small a model need not beat the bigrams
    for name in ("model.safetensors", "checkpoints/step-000012/training.safetensors"):
        got, expected = open_weights(here / "run" / name), open_weights(here / "run-finished" / name)
        assert got.keys() == expected.keys()
        for tensor in expected:
            a, b = got[tensor].read(), expected[tensor].read()
            if SAME_PROCESSOR:
                np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    losses, wanted = (
        [json.loads(line).get("loss") for line in (here / run / "log.jsonl").read_text().splitlines()]
        for run in ("run", "run-finished")
    )
    np.testing.assert_allclose(
        [x for x in losses if x], [x for x in wanted if x], rtol=0 if SAME_PROCESSOR else 1e-4
    )


def test_a_finished_run_of_an_earlier_version_is_known_as_finished(here, capsys):
    assert main(["train", "--resume", "run-finished"]) == 0
    assert "run-finished is finished: 12 steps" in capsys.readouterr().out
    assert main(["attention", "-m", "run-finished", "--recorded", "--out", "page.html"]) == 0
    assert "And God" in (here / "page.html").read_text()
