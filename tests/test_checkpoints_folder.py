"""lama's own format: what was saved comes back, and a save that fails changes nothing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.checkpoints import load, load_model, save
from lama.data.inputs import input_tokens
from lama.errors import LamaError, LamaWarning
from lama.evaluation.sliding import perplexity
from lama.generation import generate
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import BytePairTokenizer, ByteTokenizer, CharacterTokenizer, Tokenizer, gpt2_tokenizer

TINY = GPTConfig(vocab_size=256, context_length=7, d_model=6, n_layers=2, n_heads=2, d_mlp=11)


def same(a: GPT, b: GPT) -> bool:
    ours, theirs = get_state_dict(a), get_state_dict(b)
    return ours.keys() == theirs.keys() and all(
        np.array_equal(ours[name].numpy(), theirs[name].numpy()) for name in ours
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": False, "bias": False},
        {"positions": "sinusoidal", "norm": "post"},
        {"similarity": "general", "activation": "relu"},
    ],
)
def test_saved_model_comes_back(tmp_path: Path, changes: dict):
    model = GPT(GPTConfig(**(vars(TINY) | changes)), seed=3)
    save(tmp_path / "a", model, ByteTokenizer(), {"steps": 17})
    loaded, tokenizer = load(tmp_path / "a")
    assert loaded.config == model.config and same(model, loaded)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "model.safetensors"]
    spec = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (spec["format"], spec["model"], spec["training"]) == ("lama", "gpt", {"steps": 17})


def test_saved_model_computes_the_same(tmp_path: Path):
    model, tokens = GPT(TINY, seed=3), Tensor([[1, 2, 3]])
    save(tmp_path, model, ByteTokenizer())
    assert np.array_equal(model(tokens).numpy(), load_model(tmp_path)(tokens).numpy())


def test_saved_file_has_lamas_names(tmp_path: Path):
    model = GPT(TINY, seed=3)
    save(tmp_path, model, ByteTokenizer())
    assert load_file(tmp_path / "model.safetensors").keys() == get_state_dict(model).keys()


@pytest.mark.parametrize("dtype", [dtypes.float16, dtypes.bfloat16])
def test_saved_half_precision_comes_back_bit_for_bit(tmp_path: Path, dtype):
    model = GPT(TINY, seed=3)
    for parameter in get_state_dict(model).values():
        parameter.replace(parameter.cast(dtype).realize())
    save(tmp_path, model, ByteTokenizer())
    name = {dtypes.float16: "float16", dtypes.bfloat16: "bfloat16"}[dtype]
    loaded = get_state_dict(load_model(tmp_path, dtype=name))
    for key, parameter in get_state_dict(model).items():
        assert loaded[key].dtype == dtype
        assert np.array_equal(loaded[key].float().numpy(), parameter.float().numpy())


@pytest.mark.parametrize(
    "tokenizer", [CharacterTokenizer("abc \n"), gpt2_tokenizer()], ids=["character", "gpt2"]
)
def test_saved_tokenizer_comes_back(tmp_path: Path, tokenizer):
    model = GPT(GPTConfig(**(vars(TINY) | {"vocab_size": tokenizer.vocab_size})), seed=0)
    save(tmp_path, model, tokenizer)
    assert load(tmp_path)[1].encode("cab a") == tokenizer.encode("cab a")


def test_saved_huggingface_tokenizer_comes_back(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    alphabet = [chr(c) for c in range(33, 127)] + ["Ġ"]
    (source / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([*alphabet, "ab"])}))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    from lama.tokenizers import load_huggingface_tokenizer

    tokenizer = load_huggingface_tokenizer(source)
    assert isinstance(tokenizer, BytePairTokenizer)
    model = GPT(GPTConfig(**(vars(TINY) | {"vocab_size": tokenizer.vocab_size})), seed=0)
    for _ in range(2):  # saving over an older one as well
        save(tmp_path / "a", model, tokenizer)
    assert load(tmp_path / "a")[1].encode("ab a") == tokenizer.encode("ab a") == [95, 94, 64]


def test_save_replaces_an_older_model(tmp_path: Path):
    save(tmp_path, GPT(TINY, seed=1), ByteTokenizer())
    newer = GPT(GPTConfig(**(vars(TINY) | {"n_layers": 1})), seed=2)
    save(tmp_path, newer, ByteTokenizer())
    assert same(load_model(tmp_path), newer)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_save_that_fails_keeps_the_older_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = GPT(TINY, seed=1)
    save(tmp_path, model, ByteTokenizer())

    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(LamaError, match=r"cannot be written: No space left on device"):
        save(tmp_path, GPT(TINY, seed=2), ByteTokenizer())
    assert same(load_model(tmp_path), model)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_save_takes_in_nothing_that_a_killed_process_left(tmp_path: Path):
    for name in (f".saving-{os.getpid()}", ".lama-0123456789ab"):
        (tmp_path / "m" / name).mkdir(parents=True)
        (tmp_path / "m" / name / "added_tokens.json").write_text("{}")
    save(tmp_path / "m", GPT(TINY, seed=1), ByteTokenizer())
    assert sorted(os.listdir(tmp_path / "m")) == [
        ".lama-0123456789ab",
        f".saving-{os.getpid()}",
        "config.json",
        "model.safetensors",
    ]


def test_save_that_fails_names_the_folder_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    folder = tmp_path / "a" / "b"
    reason = r"No space left on device\. Nothing was changed"
    with pytest.raises(LamaError, match=rf"^{folder}/model.safetensors cannot be written: {reason}"):
        save(folder, GPT(TINY, seed=2), ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_save_replaces_links_and_not_what_they_lead_to(tmp_path: Path):
    """As in the Hugging Face cache, whose files are links."""
    (tmp_path / "blob").write_text("mine")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "blob")
    save(tmp_path / "m", GPT(TINY, seed=1), ByteTokenizer())
    assert (tmp_path / "blob").read_text() == "mine" and not (
        tmp_path / "m" / "model.safetensors"
    ).is_symlink()


def test_save_onto_a_file_says_so(tmp_path: Path):
    (tmp_path / "a").write_text("here")
    with pytest.raises(LamaError, match=r"the folder \S*a cannot be written: "):
        save(tmp_path / "a", GPT(TINY, seed=1), ByteTokenizer())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "dalle"}, "must have a model among gpt.* and its config; got model='dalle'"),
        ({"config": {"d_model": 6, "depth": 3}}, "config fields must be among .*; got depth"),
        ({"config": {"d_model": "six"}}, r"config\.json: "),
        ({"tokenizer": None}, "must name its tokenizer; got None"),
        ({"tokenizer": {"kind": "smoke"}}, "a tokenizer's kind must be one of"),
    ],
)
def test_lama_config_that_is_wrong_is_refused(tmp_path: Path, change: dict, message: str):
    save(tmp_path, GPT(TINY, seed=1), ByteTokenizer())
    spec = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(spec | change))
    with pytest.raises(LamaError, match=message):
        load(tmp_path)


def test_tokenizer_larger_than_its_model_is_a_warning_and_such_a_token_an_error(tmp_path: Path):
    save(tmp_path, GPT(GPTConfig(**(vars(TINY) | {"vocab_size": 98})), seed=1), ByteTokenizer())
    with pytest.warns(
        LamaWarning,
        match="is larger than the model, 256 tokens for vocab_size=98: text with a token from id 98 on will",
    ):
        model, tokenizer = load(tmp_path)
    assert len(generate(model, tokenizer, "a", max_new_tokens=3).prompt_tokens) == 1
    got = "got 'b', id 98 (vocab_size=98, and the tokenizer has 256 tokens)"
    message = f"the text must be made of the model's tokens; {got}"
    for attempt in (
        lambda: generate(model, tokenizer, "ab"),
        lambda: perplexity(model, tokenizer, "abc"),
        lambda: read(model, tokenizer),
    ):
        with pytest.raises(LamaError) as caught:
            attempt()
        assert str(caught.value) == message


def read(model: GPT, tokenizer: Tokenizer) -> list[int]:
    return input_tokens(model, tokenizer, "ab")
