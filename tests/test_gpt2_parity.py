"""lama's GPT-2 gives the numbers of two others: a plain numpy GPT-2, and transformers' GPT2LMHeadModel where
installed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import numpy_gpt2, random_gpt2
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.checkpoints import load_model
from lama.generation.decoder import Runner
from lama.generation.tokens import generate_tokens
from lama.models.gpt import GPT

TOLERANCE = 1e-5  # of the largest logit's magnitude

SHAPES: dict[str, dict[str, Any]] = {
    "gelu_new": {"vocab_size": 29, "n_positions": 31, "n_embd": 33, "n_layer": 2, "n_head": 3},
    "gelu": {
        "vocab_size": 23,
        "n_positions": 13,
        "n_embd": 22,
        "n_layer": 1,
        "n_head": 11,
        "n_inner": 37,
        "layer_norm_epsilon": 1e-2,
        "activation_function": "gelu",
    },
    "relu, untied": {
        "vocab_size": 41,
        "n_positions": 7,
        "n_embd": 20,
        "n_layer": 3,
        "n_head": 5,
        "activation_function": "relu",
        "tie_word_embeddings": False,
    },
    "silu, scaled by layer": {
        "vocab_size": 23,
        "n_positions": 11,
        "n_embd": 20,
        "n_layer": 3,
        "n_head": 2,
        "activation_function": "silu",
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
    },
    "quick_gelu, not scaled": {
        "vocab_size": 19,
        "n_positions": 11,
        "n_embd": 14,
        "n_layer": 2,
        "n_head": 2,
        "activation_function": "quick_gelu",
        "scale_attn_weights": False,
    },
    "tanh, scaled by layer only": {
        "vocab_size": 17,
        "n_positions": 11,
        "n_embd": 14,
        "n_layer": 2,
        "n_head": 2,
        "activation_function": "tanh",
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
    },
}
LONG = {"vocab_size": 101, "n_positions": 211, "n_embd": 34, "n_layer": 2, "n_head": 2}


class Case:
    """One random checkpoint, as lama has it and as the references do."""

    def __init__(self, folder: Path, std: float = 0.3, **config: Any):
        self.config = random_gpt2.make_config(**config)
        self.weights = random_gpt2.make_weights(self.config, seed=5, std=std)
        self.folder = random_gpt2.write_folder(folder, self.config, self.weights)
        self.model: GPT = load_model(folder)

    def tokens(self, batch: int, length: int) -> np.ndarray:
        return np.random.default_rng(length).integers(0, self.config["vocab_size"], (batch, length))

    def numpy_logits(self, tokens: np.ndarray) -> np.ndarray:
        exact = {name: value.astype(np.float64) for name, value in self.weights.items()}
        return numpy_gpt2.logits(exact, self.config, tokens)


def logits(model: GPT, tokens: np.ndarray) -> np.ndarray:
    return model(Tensor(tokens.astype(np.int32))).numpy()


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal within TOLERANCE, and far enough from flat for that to mean something."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.3
    assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("gpt2"), **SHAPES[request.param])


@pytest.fixture(scope="module")
def long_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("long"), **LONG)


def test_gpt2_logits_match_numpy_reference(case: Case):
    tokens = case.tokens(3, case.config["n_positions"])
    assert_close(logits(case.model, tokens), case.numpy_logits(tokens))


def test_gpt2_prompts_of_every_length_match_numpy_reference(tmp_path: Path):
    case = Case(tmp_path, **SHAPES["gelu_new"])
    decoder = Runner(case.model, batch=2)
    tokens = case.tokens(2, case.config["n_positions"])
    theirs = case.numpy_logits(tokens)
    for n in range(1, tokens.shape[1] + 1):
        assert_close(decoder.prefill(tokens[:, :n]), theirs[:, n - 1])


def test_gpt2_greedy_continuation_matches_numpy_reference(long_case: Case):
    prompt = [3, 1, 4, 1, 5]
    expected = list(prompt)
    for _ in range(200):
        expected.append(int(long_case.numpy_logits(np.array([expected]))[0, -1].argmax()))
    ours = [step[0] for step in generate_tokens(long_case.model, [prompt], 200)]
    assert ours == expected[5:]
    assert len(set(expected)) > 10  # not one token over and over


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    return pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    )


class Peer:
    """transformers' GPT2LMHeadModel in float32, from the same folder."""

    def __init__(self, transformers: Any, folder: Path):
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval().float()

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self.model(torch.from_numpy(tokens)).logits.numpy()

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        import torch

        tokens = torch.tensor([prompt])
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
        )
        return out[0, len(prompt) :].tolist()


@pytest.mark.peers
def test_numpy_reference_matches_transformers(case: Case, transformers: Any):
    tokens = case.tokens(3, case.config["n_positions"])
    assert_close(case.numpy_logits(tokens), Peer(transformers, case.folder).logits(tokens))


@pytest.mark.peers
def test_gpt2_logits_match_transformers(case: Case, transformers: Any):
    peer = Peer(transformers, case.folder)
    tokens = case.tokens(3, case.config["n_positions"])
    assert_close(logits(case.model, tokens), peer.logits(tokens))
    decoder = Runner(case.model, batch=3)
    for n in range(1, tokens.shape[1] + 1):
        assert_close(decoder.prefill(tokens[:, :n]), peer.logits(tokens[:, :n])[:, -1])


@pytest.mark.peers
def test_gpt2_greedy_continuation_matches_transformers(long_case: Case, transformers: Any):
    prompt = [2, 7, 1, 8]
    ours = [step[0] for step in generate_tokens(long_case.model, [prompt], 200)]
    assert ours == Peer(transformers, long_case.folder).greedy(prompt, 200)


@pytest.fixture(scope="module")
def case_124m(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    case = Case(tmp_path_factory.mktemp("gpt2-124m"), std=0.08)
    yield case
    (case.folder / "model.safetensors").unlink()


@pytest.mark.peers
def test_gpt2_124m_logits_match_transformers(case_124m: Case, transformers: Any):
    peer = Peer(transformers, case_124m.folder)
    for batch, length in ((1, 1), (2, 17), (1, 1024)):
        tokens = case_124m.tokens(batch, length)
        assert_close(logits(case_124m.model, tokens), peer.logits(tokens))


@pytest.mark.peers
def test_gpt2_124m_greedy_continuation_matches_transformers(case_124m: Case, transformers: Any):
    prompt = [2437, 460, 40709, 307, 17687, 30]
    ours = [step[0] for step in generate_tokens(case_124m.model, [prompt], 200)]
    assert ours == Peer(transformers, case_124m.folder).greedy(prompt, 200)


def test_gpt2_and_the_gpt_trained_from_scratch_are_the_same_class(tmp_path: Path):
    """One class, one block, one attention: a model made as transformer.py makes it computes what a loaded
    GPT-2 does.
    """
    config = random_gpt2.make_config(**random_gpt2.TINY)
    loaded = load_model(random_gpt2.write_folder(tmp_path, config, random_gpt2.make_weights(config)))
    scratch = GPT(loaded.config, seed=3)
    parts = ("blocks", "attn", "mlp", "ln1")
    assert type(scratch) is type(loaded) and [type(b) for b in scratch.blocks] == [
        type(b) for b in loaded.blocks
    ]
    assert all(
        type(getattr(scratch.blocks[0], part)) is type(getattr(loaded.blocks[0], part)) for part in parts[1:]
    )
    ours, theirs = get_state_dict(scratch), get_state_dict(loaded)
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    tokens = Tensor(np.arange(5, dtype=np.int32).reshape(1, -1))
    assert not np.allclose(scratch(tokens).numpy(), loaded(tokens).numpy())
    for name, p in ours.items():
        p.assign(theirs[name]).realize()
    assert np.array_equal(scratch(tokens).numpy(), loaded(tokens).numpy())
