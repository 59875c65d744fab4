"""Configs that lie about sizes and types, and files that are none: one line at once, whatever the format."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import random_gpt2
from tinygrad import Tensor

import lama
from lama.checkpoints import hub, load_model
from lama.embeddings import SinusoidalPositions, sinusoids
from lama.errors import LamaError
from lama.models.bert import Bert, BertConfig, Classifier, ClassifierConfig
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import ByteTokenizer

SIZES = {"context_length": 7, "d_model": 6, "n_heads": 2, "d_mlp": 10}
OWN = {
    "gpt": GPT(GPTConfig(256, n_layers=2, **SIZES)),
    "sinusoidal": GPT(GPTConfig(256, n_layers=2, positions="sinusoidal", **SIZES)),
    "transformer": Transformer(TransformerConfig(256, n_encoder_layers=2, n_decoder_layers=1, **SIZES)),
    "bert": Bert(BertConfig(256, n_layers=2, **SIZES)),
    "classifier": Classifier(ClassifierConfig(256, n_layers=2, positions="sinusoidal", **SIZES)),
}
THEIRS = random_gpt2.make_config(**random_gpt2.TINY)
BERT = {
    "model_type": "bert",
    "vocab_size": 23,
    "hidden_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 13,
}
HOSTILE = (10_000, 10**8, 10**12, 10**24, -1, True, 2.5, "a" * 100_000, None, [[1]], {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each format; the BERT's weights are GPT-2's, as no size of it fits anyway."""
    root = tmp_path_factory.mktemp("models")
    for name, model in OWN.items():
        lama.save(root / name, model, ByteTokenizer())
    random_gpt2.write_folder(root / "gpt2", THEIRS, random_gpt2.make_weights(THEIRS))
    random_gpt2.write_folder(root / "hf-bert", BERT, random_gpt2.make_weights(THEIRS))
    lama.save(root / "int8", load_model(root / "gpt", dtype="int8"), ByteTokenizer())
    return {folder.name: folder for folder in root.iterdir()}


def outcome(folder: Path) -> str:
    """What comes of loading: an empty text, or the error, which is one line."""
    began = time.process_time()
    try:
        load_model(folder)
        message = ""
    except LamaError as error:
        message = str(error)
        if "Type-check error" not in message:  # of the tests' own checker, which is not there outside of them
            assert message and "\n" not in message and len(message) < 1000
    assert time.process_time() - began < 2  # seconds of this process, whatever else the machine does
    return message


@pytest.mark.parametrize("name", [*OWN, "int8", "gpt2", "hf-bert"])
def test_sizes_and_types_that_lie_are_refused_at_once(folders: dict[str, Path], name: str, tmp_path: Path):
    folder = Path(shutil.copytree(folders[name], tmp_path / name))
    written = json.loads((folder / "config.json").read_text())
    fields = written["config"] if name in (*OWN, "int8") else written
    for key, value in fields.items():
        if key in ("architectures", "end_tokens", "attn_pdrop", "embd_pdrop", "resid_pdrop", "bos_token_id"):
            continue
        for other in HOSTILE:
            fields[key] = other
            (folder / "config.json").write_text(json.dumps(written))
            message = outcome(folder)
            large = (
                isinstance(value, int)
                and not isinstance(value, bool)
                and type(other) is int
                and other >= 10_000
            )
            possible = key in ("eos_token_id", "pad", "mask", "begin", "end") or (key, other) == (
                "context_length",
                10_000,
            )
            assert message or not large or possible, (key, other)
        fields[key] = value
    if name != "hf-bert":
        (folder / "config.json").write_text(json.dumps(written))
        assert outcome(folder) == ""


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", {}, "model in .*config.json must be a text; got {}"),
        ("model", ["gpt"], r"model in .*config.json must be a text; got \['gpt'\]"),
        ("model", None, "model in .*config.json must be a text; got None"),
        ("config", [], r"config in .*config.json must be an object; got \[\]"),
        ("dtype", {}, "must have a dtype among int8, int4, or none; got {}"),
    ],
)
def test_own_config_of_other_types_is_refused(
    folders: dict[str, Path], tmp_path: Path, key: str, value: Any, message: str
):
    folder = Path(shutil.copytree(folders["gpt"], tmp_path / "gpt"))
    spec = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(spec | {key: value}))
    for load in (load_model, lama.load):
        with pytest.raises(LamaError, match=message):
            load(folder)


def test_layers_that_the_file_lacks_are_named(folders: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(folders["transformer"], tmp_path / "t"))
    spec = json.loads((folder / "config.json").read_text())
    spec["config"] |= {"n_encoder_layers": 10_000, "n_decoder_layers": 2}
    (folder / "config.json").write_text(json.dumps(spec))
    message = outcome(folder)
    assert "missing: encoder.blocks.2.ln1.weight, encoder.blocks.3.ln1.weight" in message
    more = 12 * 9_998 + 18 - 4
    assert f" and {more:,} more" in message


def test_sinusoids_are_computed_when_they_are_used_and_bounded():
    began = time.perf_counter()
    SinusoidalPositions(1 << 20, 64)
    GPTConfig(context_length=1 << 20, d_model=64, n_heads=1, positions="sinusoidal")
    assert time.perf_counter() - began < 0.5
    assert np.array_equal(SinusoidalPositions(9, 6)(4, Tensor([2])).numpy()[0], sinusoids(9, 6)[2:6])
    with pytest.raises(
        ValueError, match="at most 67,108,864 numbers; got context_length=1048576, d_model=65"
    ):
        GPTConfig(context_length=1 << 20, d_model=65, n_heads=1, positions="sinusoidal")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "ckpt.pt"])
def test_pipe_in_a_models_folder_is_refused(folders: dict[str, Path], tmp_path: Path, name: str):
    folder = Path(shutil.copytree(folders["gpt"], tmp_path / "gpt"))
    (folder / ("model.safetensors" if name == "ckpt.pt" else name)).unlink()
    os.mkfifo(folder / name)
    assert f"{name} must be a regular file" in outcome(folder)


def test_shard_with_a_long_name_is_refused(folders: dict[str, Path], tmp_path: Path):
    shutil.copy(folders["gpt"] / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a" * 300 + ".safetensors"}})
    )
    assert "shards that model.safetensors.index.json lists are missing: aaa" in outcome(tmp_path)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": 1', b"\xff", b"[]", b'{"a": NaN}', b'{"' + b"9" * 5000, b""]
)
def test_record_of_verified_files_that_is_damaged_is_left_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
):
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "verified.json").write_bytes(content)
    (tmp_path / "file").write_bytes(b"abc")
    hub.check_hash(tmp_path / "file", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "")
    assert str(tmp_path / "file") in json.loads((tmp_path / "cache" / "verified.json").read_text())


@pytest.mark.parametrize("name", ["gpt", "transformer", "bert", "classifier"])
@pytest.mark.parametrize(
    ("ids", "got"), [([[1, 256]], 256), ([[-1, 2]], -1), ([[1, 2, 10**9]], 10**9)], ids=str
)
def test_ids_outside_the_vocabulary_are_refused(name: str, ids: list, got: int):
    model = OWN[name]
    for tokens in (Tensor(ids), Tensor(np.array(ids)), Tensor(np.array(ids, np.int32)).realize()):
        inputs = (Tensor([[1, 2]]), tokens) if name == "transformer" else (tokens,)
        with pytest.raises(LamaError, match=f"ids must be from 0 to 255; got {got}"):
            model(*inputs)


def test_segments_that_the_model_lacks_are_refused():
    with pytest.raises(LamaError, match="ids must be from 0 to 1; got 2"):
        OWN["bert"](Tensor([[1, 2]]), Tensor([[0, 2]]))
