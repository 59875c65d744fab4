"""nanoGPT's ckpt.pt and meta.pkl: weights, config and characters, without PyTorch and without the optimizer's
state.
"""

import json
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import numpy_gpt2, random_gpt2
from reference.random_gpt2 import _Call, _Global, _Storage, tensor, torch_state, write_legacy, write_torch_zip
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

import lama
from lama.checkpoints import load_model, load_tokenizer
from lama.errors import LamaError, LamaWarning, UsageError
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import ByteTokenizer, CharacterTokenizer

CHARACTERS = sorted("\n abcdefghijklmnopqrstu")  # 23
ARGUMENTS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 10,
    "block_size": 13,
    "bias": False,
    "vocab_size": 23,
    "dropout": 0.0,
}
CONFIG = random_gpt2.make_config(**random_gpt2.TINY, activation_function="gelu")
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def weights_of(bias: bool) -> random_gpt2.Weights:
    """GPT-2's tensors, in its own layout; without `bias`, the biases are 0."""
    weights = random_gpt2.make_weights(CONFIG, seed=3, std=0.3)
    return {name: value * (bias or not name.endswith("bias")) for name, value in weights.items()}


def write_checkpoint(
    folder: Path, bias: bool = True, prefix: str = "", write=write_torch_zip, **arguments: Any
) -> Path:
    """What nanoGPT's train.py saves: linear layers as (out, in), the head beside the embedding, masks, and an
    optimizer.
    """
    theirs = {
        f"transformer.{name}": value.T.copy() if name.endswith(CONV1D) else value
        for name, value in weights_of(bias).items()
    }
    theirs = {name: value for name, value in theirs.items() if bias or not name.endswith("bias")}
    theirs |= {
        "lm_head.weight": theirs["transformer.wte.weight"],
        "transformer.h.0.attn.bias": np.ones((1, 1, 13, 13), np.float32),
    }
    state, storages = torch_state({prefix + name: value for name, value in theirs.items()})
    moment = _Storage("moment", np.full(7, np.nan, np.float32))
    number = _Call(
        _Global("numpy.core.multiarray", "scalar"),
        _Call(_Global("numpy", "dtype"), "f8", False, True),
        b"\0" * 8,
    )
    checkpoint = {
        "model": state,
        "optimizer": {
            "state": {0: {"exp_avg": tensor(moment, 0, (7,), (1,))}},
            "param_groups": [{"betas": (0.9, 0.95)}],
        },
        "model_args": {**ARGUMENTS, "bias": bias, **arguments},
        "iter_num": 2000,
        "best_val_loss": number,
        "config": OrderedDict(out_dir="out", wandb_log=False, learning_rate=6e-4, compile=None),
    }
    folder.mkdir(exist_ok=True)
    write(folder / "ckpt.pt", checkpoint, [*storages, moment])
    return folder


def write_meta(folder: Path, characters: list[str] = CHARACTERS, **others: Any) -> Path:
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta | others))
    return folder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("write", [write_torch_zip, write_legacy], ids=["zip", "legacy"])
def test_checkpoint_gives_the_numbers_of_a_numpy_gpt2(tmp_path: Path, bias: bool, prefix: str, write):
    folder = write_checkpoint(tmp_path / "out", bias, prefix, write)
    shape = GPTConfig(23, 13, d_model=10, n_layers=2, n_heads=2, bias=bias, activation="gelu")
    for path in (folder, folder / "ckpt.pt"):
        model = load_model(path)
        assert isinstance(model, GPT) and model.config == shape and model.unembed is None
    tokens = np.random.default_rng(0).integers(0, 23, (2, 13))
    expected = numpy_gpt2.logits(
        {name: value.astype(float) for name, value in weights_of(bias).items()}, CONFIG, tokens
    )
    np.testing.assert_allclose(
        model(Tensor(tokens.astype(np.int32))).numpy(), expected, atol=1e-5 * np.abs(expected).max()
    )


def test_meta_gives_the_characters(tmp_path: Path):
    folder = write_meta(write_checkpoint(tmp_path / "out"))
    model, tokenizer = lama.load(folder)
    assert (
        isinstance(tokenizer, CharacterTokenizer)
        and tokenizer.encode("\n a") == [0, 1, 2]
        and tokenizer.decode([22, 2]) == "ua"
    )
    assert len(lama.generate(model, tokenizer, "abc", max_new_tokens=3, temperature=0).prompt_tokens) == 3


@pytest.mark.parametrize("rows", [50257, 50304])
def test_gpt2s_tokenizer_belongs_to_its_rows(tmp_path: Path, rows: int):
    # The tensors are not read for this.
    folder = write_meta(write_checkpoint(tmp_path / "out", vocab_size=rows))
    assert load_tokenizer(folder).encode("How can entropy be reversed?") == [2437, 460, 40709, 307, 17687, 30]


def test_tokenizer_may_be_named(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "out")
    got = r"got no .*meta\.pkl, in .*out; copy it there or name another"
    with pytest.raises(LamaError, match=f"must have its tokenizer beside it; {got}"):
        lama.load(folder)
    data = tmp_path / "data"
    data.mkdir()
    write_meta(data)
    for name in (data, str(data), data / "meta.pkl", CharacterTokenizer("".join(CHARACTERS))):
        assert lama.load(folder, tokenizer=name)[1].encode("ab") == [2, 3]
    with pytest.warns(LamaWarning, match="is larger than the model, 256 tokens for vocab_size=23"):
        assert isinstance(lama.load(folder, tokenizer="bytes")[1], ByteTokenizer)
    with pytest.raises(
        UsageError, match=r"a tokenizer must be gpt2, bytes, a folder with one, or a meta\.pkl; got nowhere"
    ):
        lama.load(folder, tokenizer="nowhere")


def test_loaded_checkpoint_is_saved_as_any_model(tmp_path: Path):
    model, tokenizer = lama.load(write_meta(write_checkpoint(tmp_path / "out", bias=False)))
    lama.save(tmp_path / "own", model, tokenizer)
    again, _ = lama.load(tmp_path / "own")
    ours, theirs = get_state_dict(model), get_state_dict(again)
    assert again.config == model.config and all(
        np.array_equal(ours[name].numpy(), theirs[name].numpy()) for name in ours
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_layer": "2"}, "n_layer in model_args in .*ckpt.pt must be a whole number; got '2'"),
        ({"bias": 1}, "bias in model_args in .*ckpt.pt must be true or false; got 1"),
        ({"n_layer": 10_000}, r"missing: h\.2\.ln_1\.weight, .* more"),
        ({"n_head": 3}, "d_model must be a multiple of n_heads"),
        ({"vocab_size": 10**12}, "vocab_size must be at most 2,147,483,647; got vocab_size=1000000000000"),
        ({"block_size": None}, "block_size in model_args in .*ckpt.pt must be a whole number; got None"),
    ],
)
def test_arguments_that_are_wrong_are_refused(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(LamaError, match=message):
        load_model(write_checkpoint(tmp_path / "out", **arguments))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"itos": {0: "a", 2: "b"}}, "must number distinct characters from 0 in code point order"),
        ({"itos": {0: "b", 1: "a"}}, "must number distinct characters from 0 in code point order"),
        ({"itos": {0: "a", 1: "bc"}}, "must number distinct characters from 0 in code point order"),
        (
            {"itos": {i: [] for i in range(9999)}},
            "must number distinct characters from 0 in code point order",
        ),
        ({"itos": ["a", "b"]}, r"itos in .*meta\.pkl must be an object"),
        ({"itos": {}}, "must know at least one character"),
        ({"stoi": math.sqrt}, r"must hold tensors only; got math\.sqrt in its pickle, which could run code"),
    ],
    ids=str,
)
def test_meta_that_is_wrong_is_refused(tmp_path: Path, others: dict, message: str):
    with pytest.raises(LamaError, match=message) as caught:
        lama.load(write_meta(write_checkpoint(tmp_path / "out"), **others))
    assert len(str(caught.value)) < 500


def test_file_that_is_no_checkpoint_of_nanogpt_needs_its_config(tmp_path: Path):
    write_torch_zip(tmp_path / "a.pt", *torch_state(weights_of(True)))
    with pytest.raises(LamaError, match=r"a model must have config\.json beside its weights; got none in"):
        load_model(tmp_path / "a.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert isinstance(load_model(tmp_path / "a.pt"), GPT)


@pytest.mark.peers
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_written_by_pytorch_gives_its_numbers(tmp_path: Path, bias: bool, zipped: bool):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    ours = {
        name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in weights_of(bias).items()
    }

    def forward(tokens):
        """nanoGPT's model.py in functions."""

        def norm(name, x):
            return functional.layer_norm(x, (10,), ours[f"{name}.weight"], ours[f"{name}.bias"], 1e-5)

        def linear(name, x):
            return x @ ours[f"{name}.weight"] + ours[f"{name}.bias"]

        x = ours["wte.weight"][tokens] + ours["wpe.weight"][: tokens.shape[1]]
        for i in range(2):
            parts = linear(f"h.{i}.attn.c_attn", norm(f"h.{i}.ln_1", x)).split(10, -1)
            q, k, v = (part.view(*x.shape[:2], 2, 5).transpose(1, 2) for part in parts)
            z = (
                functional.scaled_dot_product_attention(q, k, v, is_causal=True)
                .transpose(1, 2)
                .reshape(x.shape)
            )
            x = x + linear(f"h.{i}.attn.c_proj", z)
            x = x + linear(
                f"h.{i}.mlp.c_proj", torch.nn.GELU()(linear(f"h.{i}.mlp.c_fc", norm(f"h.{i}.ln_2", x)))
            )
        return norm("ln_f", x) @ ours["wte.weight"].T

    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 23, (2, 13)))
    optimizer = torch.optim.AdamW(ours.values(), lr=0.0)
    forward(tokens).sum().backward()
    optimizer.step()
    state = {
        f"_orig_mod.transformer.{n}": p.data.T.contiguous() if n.endswith(CONV1D) else p.data
        for n, p in ours.items()
    }
    state = {name: value for name, value in state.items() if bias or not name.endswith("bias")}
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    checkpoint = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": ARGUMENTS | {"bias": bias},
        "iter_num": 1,
    }
    checkpoint |= {
        "best_val_loss": torch.tensor(1.5),
        "config": {"device": "cpu", "loss": np.float64(1.5), "of": np.float32(2)},
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    with torch.no_grad():
        expected = forward(tokens).numpy()
    found = load_model(tmp_path)(Tensor(tokens.numpy().astype(np.int32))).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
