"""A model handed over in Hugging Face's format computes the same there and when it comes back."""

from pathlib import Path

import numpy as np
import pytest
from helpers import fill, preset_shape
from tinygrad import Tensor

from lama.checkpoints import export, export_huggingface, load, save
from lama.cli import main
from lama.errors import LamaError
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    gpt2_tokenizer,
    huggingface_files,
    load_huggingface_tokenizer,
)

SHAPE = {"context_length": 13, "d_model": 10, "n_layers": 2, "n_heads": 2, "d_mlp": 17}
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]], np.int32)
MODERN = {"norm_kind": "rms", "bias": False, "gated": True, "activation": "silu", "positions": "rope"}
PRESETS = ("modern-char-cpu", "modern-char", "modern-bpe")
kinds = pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": False, "tied": False, "activation": "relu"},
        {**MODERN, "n_kv_heads": 1, "d_head": 6, "rope_scaling": (8.0, 1.0, 4.0, 16.0)},
        {**MODERN, "qkv_bias": True, "tied": False, "d_head": 6, "rope_theta": 500.0, "rope_scaling": (2.0,)},
        {**MODERN, "qk_norm": "head", "d_head": 6},
        *map(preset_shape, PRESETS),
    ],
    ids=["gpt2", "no biases, untied", "llama", "qwen2", "qwen3", *PRESETS],
)


def model_of(**fields) -> GPT:
    model = GPT(GPTConfig(256, **SHAPE | fields), seed=None)
    fill(model)
    return model


@kinds
def test_exported_model_comes_back_with_equal_logits(tmp_path: Path, fields):
    model = model_of(**fields)
    names = export_huggingface(tmp_path / "hf", model, ByteTokenizer())
    assert names == [
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    again, tokenizer = load(tmp_path / "hf")
    assert again.config.tied is model.config.tied
    assert np.array_equal(again(Tensor(TOKENS)).numpy(), model(Tensor(TOKENS)).numpy())
    assert tokenizer.encode("héllo\n") == list("héllo\n".encode())


@pytest.mark.peers
@kinds
def test_exported_model_gives_transformers_equal_logits(tmp_path: Path, fields):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install lama[peers]"
    )
    model = model_of(**fields)
    export_huggingface(tmp_path, model, ByteTokenizer())
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = peer(torch.from_numpy(TOKENS).long()).logits.numpy()
    ours = model(Tensor(TOKENS)).numpy()
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_exported_tokenizers_give_the_same_ids(tmp_path: Path):
    for name, content in huggingface_files(gpt2_tokenizer()).items():
        (tmp_path / name).write_bytes(content)
    text = "How can entropy be reversed? \n\n 熵 <|endoftext|>"
    assert load_huggingface_tokenizer(tmp_path).encode(text) == gpt2_tokenizer().encode(text)
    assert huggingface_files(CharacterTokenizer("abc")) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "post"}, "a GPT-2 model must have norm='pre'; got 'post'"),
        ({"residual": False}, "a GPT-2 model must have residual=True; got False"),
        ({"mlp": False, "d_mlp": 0}, "a GPT-2 model must have mlp=True; got False"),
    ],
)
def test_export_refuses_what_gpt2_is_not(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(LamaError, match=message):
        export_huggingface(tmp_path / "hf", model_of(**changes), ByteTokenizer())
    assert not (tmp_path / "hf").exists()


def test_export_that_fails_leaves_no_half_of_a_model(tmp_path: Path, monkeypatch):
    def full(folder: Path, files: dict[str, bytes]) -> None:
        raise OSError(28, "No space left on device")

    model, tokenizer = model_of(), ByteTokenizer()
    with monkeypatch.context() as patch:
        patch.setattr(export, "write_files", full)
        with pytest.raises(LamaError, match=r"the folder .* cannot be written: No space left on device"):
            export_huggingface(tmp_path / "out", model, tokenizer)
    assert not (tmp_path / "out").exists()
    names = export_huggingface(tmp_path / "out", model, tokenizer)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_export_command_writes_a_folder_and_replaces_none(tmp_path: Path, capsys):
    save(tmp_path / "model", model_of(), ByteTokenizer())
    command = ["export", "-m", str(tmp_path / "model"), str(tmp_path / "hf")]
    assert main(command) == 0 and "model.safetensors" in capsys.readouterr().out
    assert main(command) == 2
    assert capsys.readouterr().err == f"lama: DIR must be a new or empty folder; got {tmp_path / 'hf'}\n"


@pytest.mark.parametrize(
    "words",
    [
        "-m {model} --to hf {out}",
        "{out} -m {model}",
        "--model={model} {out} --to hf",
        "--to hf {model} {out}",
    ],
)
def test_export_command_takes_the_format_wherever_it_stands(tmp_path: Path, capsys, words: str):
    save(tmp_path / "model", model_of(), ByteTokenizer())
    command = words.format(model=tmp_path / "model", out=tmp_path / "hf").split()
    assert main(["export", *command]) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()
    names = "config.json, merges.txt, model.safetensors, tokenizer.json, tokenizer_config.json, vocab.json"
    assert capsys.readouterr().out == f"saved in {tmp_path / 'hf'}: {names}\n"


def test_export_help_shows_the_format_before_the_folder(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "usage: lama export -m MODEL [--to hf|gguf] OUT " in capsys.readouterr().out
