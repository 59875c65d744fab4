"""Formats: one entry opens one kind of file, files are read once, quantised tensors stay as they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tinygrad.nn.state import get_state_dict

import lama
from lama import files
from lama.checkpoints import export_huggingface, formats, load_model, open_checkpoint
from lama.checkpoints.checkpoint import Checkpoint, ModelFiles
from lama.checkpoints.tensor import FileTensor
from lama.kernels import Quantized
from lama.models.gpt import GPT, GPTConfig
from lama.models.quantized import weights_of
from lama.ops import quantize_array
from lama.tokenizers import ByteTokenizer

CONFIG = GPTConfig(vocab_size=256, context_length=13, d_model=6, n_layers=2, n_heads=2, d_mlp=17)
BITS = {"blocks.0.mlp.up.weight": 8, "blocks.1.attn.qkv.weight": 4, "embed.weight": 4}


class Mixed:
    """A format whose file holds some matrices in 8 bits and others in 4, as GGUF does."""

    def __init__(self, model: GPT):
        self.arrays = {name: tensor.numpy() for name, tensor in get_state_dict(model).items()}
        self.pairs = {name: quantize_array(self.arrays[name], bits) for name, bits in BITS.items()}

    def recognises(self, found: ModelFiles) -> bool:
        return found.weights.name == "mixed.bin"

    def open(self, found: ModelFiles) -> Checkpoint:
        return Checkpoint(str(found.weights), "gpt", CONFIG, self.tensors, ByteTokenizer)

    def tensors(self) -> dict[str, FileTensor]:
        tensors = {name: held(name, array) for name, array in self.arrays.items()}
        for name, (values, scales) in self.pairs.items():
            pair = held(f"{name}.values", values), held(f"{name}.scales", scales)
            tensors[name] = replace(tensors[name], dtype=f"int{BITS[name]}", quantized=pair)
        return tensors


def held(name: str, array: np.ndarray) -> FileTensor:
    return FileTensor(name, array.dtype.name, array.shape, lambda: array)


def test_a_format_hands_over_quantised_matrices_without_rounding(tmp_path: Path, monkeypatch):
    mixed = Mixed(GPT(CONFIG))
    monkeypatch.setattr(formats, "FORMATS", (mixed, *formats.FORMATS))
    (tmp_path / "mixed.bin").touch()
    model = load_model(tmp_path / "mixed.bin")
    weights = weights_of(model)
    quantised = {name: each for name, each in weights.items() if isinstance(each, Quantized)}
    assert {name: each.bits for name, each in quantised.items()} == BITS
    for name, each in quantised.items():
        for tensor, array in zip(each.in_rows(), mixed.pairs[name], strict=True):
            assert np.array_equal(tensor.numpy(), array)
    for name in weights.keys() - quantised.keys():
        assert np.array_equal(weights[name].numpy(), mixed.arrays[name])


def test_a_quantised_checkpoint_of_lama_has_quantised_tensors(tmp_path: Path):
    lama.save(tmp_path, GPT(CONFIG), ByteTokenizer(), {"steps": 3})
    lama.save(tmp_path / "int4", load_model(tmp_path, dtype="int4"), ByteTokenizer())
    plain, quantised = open_checkpoint(tmp_path), open_checkpoint(tmp_path / "int4")
    assert (plain.kind, plain.config, plain.dtype, plain.notes) == ("gpt", CONFIG, None, {"steps": 3})
    assert (quantised.config, quantised.dtype) == (CONFIG, "int4")
    shapes = {name: tensor.shape for name, tensor in plain.tensors().items()}
    assert {name: tensor.shape for name, tensor in quantised.tensors().items()} == shapes
    assert quantised.tensors()["blocks.1.mlp.down.weight"].dtype == "int4"
    assert quantised.tensors()["embed.weight"].dtype == "int8"


@pytest.mark.parametrize("kind", ["own", "huggingface"])
def test_a_load_reads_the_config_once(tmp_path: Path, monkeypatch, kind: str):
    write = lama.save if kind == "own" else export_huggingface
    write(tmp_path, GPT(CONFIG), ByteTokenizer())
    read = []
    monkeypatch.setattr(files, "read_file", lambda path: read.append(path.name) or path.read_bytes())
    lama.load(tmp_path)
    assert read == ["config.json"]
