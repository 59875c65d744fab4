"""GGUF files: read and written, by the package `gguf` as the oracle, and hostile ones refused in one line."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import fill, preset_shape
from tinygrad import Tensor

import lama
from lama.checkpoints import export_gguf, load_model
from lama.checkpoints.fill import filled
from lama.checkpoints.formats import open_checkpoint
from lama.checkpoints.gguf import KINDS, open_gguf, tensor_at, write_gguf
from lama.checkpoints.rows import joined
from lama.checkpoints.tensor import FileTensor
from lama.errors import LamaError, LamaWarning
from lama.kernels import Quantized
from lama.kernels.quantized import side_by_side
from lama.models.gpt import GPT, GPTConfig
from lama.models.quantized import dtype_of
from lama.ops import dequantize
from lama.tokenizers import ByteTokenizer, load_huggingface_tokenizer
from lama.tokenizers.chat_template import template_of
from lama.tokenizers.gguf import PRE
from lama.tokenizers.library import LibraryTokenizer

LLAMA = {
    "vocab_size": 257,
    "context_length": 40,
    "d_model": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_mlp": 96,
    "norm_kind": "rms",
    "bias": False,
    "gated": True,
    "activation": "silu",
    "positions": "rope",
}
GPT2 = {"vocab_size": 257, "context_length": 40, "d_model": 64, "n_layers": 2, "n_heads": 4}
MODELS = {
    "gpt2": GPT2,
    "gpt2-without-biases": {**GPT2, "bias": False, "tied": False},
    "gpt2-with-some-biases": {**GPT2, "bias": False, "mlp_bias": True},
    "gpt2-without-some-biases": {**GPT2, "mlp_bias": False, "qkv_bias": False, "tied": False},
    "llama": LLAMA,
    "llama3": {
        **LLAMA,
        "rope_theta": 5e5,
        "rope_scaling": (32.0, 1.0, 4.0, 8192.0),
        "tied": False,
        "d_head": 18,
    },
    "linear": {**LLAMA, "rope_scaling": (4.0,)},
    "qwen2": {**LLAMA, "qkv_bias": True},
    "qwen3": {**LLAMA, "qk_norm": "head", "d_head": 32},
    "modern-bpe": {"vocab_size": 257, **preset_shape("modern-bpe")},
}
TOKENS = np.random.default_rng(1).integers(0, 257, (2, 19))
SIZES = (0, 1, 2**31, 2**40, 2**63, 2**64 - 1)
TEMPLATE = "{{ messages[0]['content'] }}"


def tokenizer(folder: Path) -> LibraryTokenizer:
    """Bytes as Qwen 2's files have them, and an end token."""
    letters = json.loads(json.dumps({c: i for i, c in enumerate(_letters())}))
    end = {"id": 256, "content": "<|end|>", "special": True}
    end |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        "model": {"type": "BPE", "vocab": letters, "merges": []},
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": PRE["qwen2"],
        "added_tokens": [end],
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_huggingface_tokenizer(folder)
    assert isinstance(found, LibraryTokenizer)
    return found


def _letters() -> list[str]:
    from lama.tokenizers.bpe import byte_alphabet

    return [*byte_alphabet()]


def model_of(**fields) -> GPT:
    model = GPT(GPTConfig(**fields))
    fill(model, seed=3)
    return model


def logits(model) -> np.ndarray:
    return model(Tensor(TOKENS)).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_written_model_is_read_with_equal_logits(name: str, tmp_path: Path):
    model, own = model_of(**MODELS[name]), tokenizer(tmp_path / "tokenizer")
    export_gguf(tmp_path / "model.gguf", model, own, name)
    read, found = lama.load(tmp_path / "model.gguf")
    np.testing.assert_allclose(logits(read), logits(model), atol=2e-5 * np.abs(logits(model)).max())
    text = "Why? 12 <|end|> é\n\n"
    assert found.encode(text) == own.encode(text)
    assert read.config.end_tokens == (256,) and found.end_of_text == 256
    template = template_of(found)
    assert template is not None and template.source == TEMPLATE


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_written_precisions(name: str, dtype: str, tmp_path: Path):
    lama.save(tmp_path / "float32", model_of(**MODELS[name]), tokenizer(tmp_path / "tokenizer"))
    model, own = lama.load(tmp_path / "float32", dtype=dtype)
    export_gguf(tmp_path / "model.gguf", model, own, name)
    file = open_gguf(tmp_path / "model.gguf")
    kinds = {"float16": "F16", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
    assert file.kinds["blk.0.ffn_up.weight"] == kinds[dtype] and file.kinds["output_norm.weight"] == "F32"
    assert file.kinds["token_embd.weight"] == ("Q8_0" if dtype == "int4" else kinds[dtype])
    weight = model.blocks[0].mlp.down.weight
    values = (dequantize(weight) if isinstance(weight, Quantized) else weight.float()).numpy()
    found = load_model(tmp_path / "model.gguf", dtype="float32")
    np.testing.assert_array_equal(found.blocks[0].mlp.down.weight.numpy(), values)
    if dtype in ("int8", "int4"):  # not rounded again
        for asked in (dtype, None):
            again = load_model(tmp_path / "model.gguf", dtype=asked)
            assert dtype_of(again) == dtype
            np.testing.assert_array_equal(logits(again), logits(model))


HALVES = {"Q6_K": [208], "Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}


def blocks_of(number: int, n: int, seed: int = 0) -> np.ndarray:
    """n random blocks of a type, with finite scales."""
    rng, kind = np.random.default_rng(seed), KINDS[number]
    blocks = rng.integers(0, 256, (n, kind.size), dtype=np.uint8)
    for at in HALVES.get(kind.name, [0]):
        blocks[:, at : at + 2] = (rng.standard_normal((n, 1)) / 50).astype("<f2").view(np.uint8)
    return blocks


def tensor_of(number: int, shape: tuple[int, int], folder: Path, seed: int = 0) -> FileTensor:
    """A matrix of a type, in a file of its own."""
    kind, path = KINDS[number], folder / f"{number}-{seed}"
    path.write_bytes(blocks_of(number, shape[0] * shape[1] // kind.numbers, seed).tobytes())
    return tensor_at(path, "w", kind, shape, 0)


def held(tensor: FileTensor) -> Quantized:
    assert tensor.exact is not None
    return Quantized(*map(Tensor, side_by_side(*(part.read() for part in tensor.exact))), tensor.shape[1])


WITH_LAYOUT = {kind.name: number for number, kind in KINDS.items() if kind.bits}


@pytest.mark.parametrize("name", WITH_LAYOUT)
def test_matrix_of_blocks_is_held_without_rounding(name: str, tmp_path: Path):
    shapes = [(5, 256), (7, 768)] if name.endswith("K") else [(3, 32), (5, 256), (600, 544)]
    for shape in shapes:
        tensor = tensor_of(WITH_LAYOUT[name], shape, tmp_path)
        np.testing.assert_array_equal(dequantize(held(tensor)).numpy(), tensor.read())
        rows = joined([tensor, tensor_of(WITH_LAYOUT[name], shape, tmp_path, seed=1)])
        np.testing.assert_array_equal(dequantize(held(rows)).numpy(), rows.read())


def test_matrix_in_memory_is_hardly_larger_than_in_the_file(tmp_path: Path):
    for name in ("Q4_0", "Q4_1", "Q8_0", "Q4_K"):
        weight, kind = held(tensor_of(WITH_LAYOUT[name], (4, 768), tmp_path)), KINDS[WITH_LAYOUT[name]]
        assert sum(part.nbytes() for part in weight.tensors()) <= 1.1 * 4 * 768 / kind.numbers * kind.size


def test_blocks_with_infinite_scales_are_refused(tmp_path: Path):
    tensor = tensor_of(WITH_LAYOUT["Q4_K"], (2, 256), tmp_path)
    data = bytearray((tmp_path / "12-0").read_bytes())
    data[144:146] = np.float16(np.inf).tobytes()
    (tmp_path / "12-0").write_bytes(data)
    assert tensor.exact is not None
    with pytest.raises(LamaError, match="weights must be finite; got NaN or infinity in w"):
        tensor.exact[1].read()


def test_stored_matrices_stay_quantised_and_second_rounding_is_told(tmp_path: Path):
    """Q4_1 stays as it is; Q6_K, and rows of two types, are rounded to 8 bits; vectors are float32."""
    config = {**LLAMA, "d_model": 256, "n_layers": 1, "d_mlp": 256}
    lama.save(tmp_path / "float32", model_of(**config), tokenizer(tmp_path / "tokenizer"))
    checkpoint = open_checkpoint(tmp_path / "float32")
    tensors = {**checkpoint.tensors()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    tensors["embed.weight"] = tensor_of(14, shapes["embed.weight"], tmp_path)
    tensors["blocks.0.mlp.up.weight"] = tensor_of(3, shapes["blocks.0.mlp.up.weight"], tmp_path)
    rows = shapes["blocks.0.attn.qkv.weight"][0]
    parts = [tensor_of(3, (rows - 8, 256), tmp_path, 2), tensor_of(14, (8, 256), tmp_path, 2)]
    tensors["blocks.0.attn.qkv.weight"] = joined(parts)
    changed = dataclasses.replace(checkpoint, tensors=lambda: tensors)
    with pytest.warns(LamaWarning, match=r"2 matrices of Q4_1, Q6_K in .* second time, .* error of 0\.\d\d%"):
        model = filled(changed)
    up, qkv = model.blocks[0].mlp.up.weight, model.blocks[0].attn.qkv.weight
    assert (up.bits, qkv.bits, model.embed.weight.bits, dtype_of(model)) == (4, 8, 8, "int4")
    assert isinstance(model.blocks[0].mlp.down.weight, Tensor) and isinstance(model.ln_final.weight, Tensor)
    exact = filled(changed, "float32")
    np.testing.assert_array_equal(dequantize(up).numpy(), exact.blocks[0].mlp.up.weight.numpy())
    found, expected = logits(model), logits(exact)
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()
    with pytest.raises(LamaError, match=r"as? ?.*lama quantize makes.*float32"):
        lama.save(tmp_path / "new", model, ByteTokenizer())
    with pytest.warns(LamaWarning, match="3 matrices of"):  # lama's own int4 has no minima
        own = filled(changed, "int4")
    lama.save(tmp_path / "new", own, ByteTokenizer())


def test_models_that_gguf_cannot_hold_are_refused_by_one_line(tmp_path: Path):
    own = tokenizer(tmp_path / "tokenizer")
    with pytest.raises(LamaError, match="only models with the architecture of gpt2, llama, qwen2, qwen3 can"):
        export_gguf(tmp_path / "a.gguf", model_of(**GPT2, norm="post"), own, "a")
    lama.save(tmp_path / "odd", model_of(**{**GPT2, "d_model": 60}), own)
    model, _ = lama.load(tmp_path / "odd", dtype="int8")
    with pytest.raises(LamaError, match="rows of whole groups of 32 numbers for int8; got 60 in"):
        export_gguf(tmp_path / "b.gguf", model, own, "b")
    from lama.tokenizers import CharacterTokenizer

    with pytest.raises(LamaError, match=r"a tokenizer must be byte-level BPE .* got a CharacterTokenizer"):
        export_gguf(tmp_path / "c.gguf", model_of(**GPT2), CharacterTokenizer("ab"), "c")
    assert not [*tmp_path.glob("*.gguf")]


def test_bytes_are_a_tokenizer_that_gguf_can_hold(tmp_path: Path):
    export_gguf(tmp_path / "model.gguf", model_of(**GPT2), ByteTokenizer(), "bytes")
    _, found = lama.load(tmp_path / "model.gguf")
    assert found.decode(found.encode("é, no?")) == "é, no?" and len(found.encode("é")) == 2


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("small")
    export_gguf(folder / "m.gguf", model_of(**LLAMA), tokenizer(folder / "tokenizer"), "small")
    return (folder / "m.gguf").read_bytes()


def outcome(path: Path) -> str:
    """An empty text, or the error, which is one line."""
    try:
        lama.load(path)
    except LamaError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return str(error)
    return ""


def test_a_thousand_mutated_files_are_one_line_each_or_load(small: bytes, tmp_path: Path):
    """Bytes of the header are changed, parts cut out and doubled, lengths and counts most often."""
    rng, path, refused = np.random.default_rng(0), tmp_path / "model.gguf", 0
    end = small.index(b"blk.1.ffn_down.weight")  # past most of the header
    for i in range(1000):
        data = bytearray(small)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, end)) if i % 4 else int(rng.integers(0, 200))
            match int(rng.integers(0, 5)):
                case 0:
                    data[at] = int(rng.integers(0, 256))
                case 1:
                    data[at : at + 8] = rng.integers(0, 256, 8, np.uint8).tobytes()
                case 2:
                    data[at : at + 8] = SIZES[int(rng.integers(0, len(SIZES)))].to_bytes(8, "little")
                case 3:
                    del data[at : at + int(rng.integers(1, 40))]
                case 4:
                    data[at:at] = data[at : at + int(rng.integers(1, 40))]
        path.write_bytes(data)
        refused += outcome(path) != ""
    assert refused > 500


def edited(tensors=None, **keys) -> tuple[dict, dict]:
    """The keys and tensors of a valid file, changed."""
    base = {
        "general.architecture": "llama",
        "llama.context_length": 8,
        "llama.embedding_length": 32,
        "llama.block_count": 0,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": _letters(),
        "tokenizer.ggml.token_type": [1] * 256,
        "tokenizer.ggml.merges": ["Ġ t"],
    }
    return base | {key.replace("__", "."): value for key, value in keys.items()}, tensors or {}


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"general__architecture": "mamba"}, "must have an architecture among gpt2, .*; got 'mamba'"),
        ({"llama__context_length": "x"}, "must have llama.context_length, a number; got 'x'"),
        ({"llama__block_count": -1.0}, "n_layers must be at least 0; got n_layers=-1"),
        ({"llama__rope__scaling__type": "yarn"}, "has rope.scaling.type='yarn', which lama does not support"),
        ({"tokenizer__ggml__pre": "future"}, "must have tokenizer.ggml.pre among default, .*; got 'future'"),
        ({"tokenizer__ggml__model": "bert"}, "must have tokenizer.ggml.model gpt2 or llama; got 'bert'"),
        ({"tokenizer__ggml__pre": ["a", "b"]}, "tokenizer.ggml.pre in .* must be a text; got"),
        ({"tokenizer__ggml__model": [1, 2]}, "tokenizer.ggml.model in .* must be a text; got"),
        ({"tokenizer__ggml__add_bos_token": [1, 2]}, "tokenizer.ggml.add_bos_token in .* must be true or"),
        ({"llama__rope__scaling__type": [1, 2]}, "llama.rope.scaling.type in .* must be a text; got"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, "must have distinct tokens; got 'a' twice"),
        ({"tokenizer__ggml__token_type": [1]}, "must have a token_type for each of 256 tokens"),
        ({"tokenizer__ggml__eos_token_id": 999}, "eos_token_id must be below 256; got 999"),
        ({"general__alignment": 3}, "general.alignment must be a power of two"),
    ],
    ids=str,
)
def test_wrong_keys_are_one_line(keys, wrong, tmp_path: Path):
    from lama.checkpoints.tensor import FileTensor

    values = np.zeros((256, 32), np.float32)
    tensors = {
        "token_embd.weight": ("F32", FileTensor("e", "float32", values.shape, values.copy)),
        "output_norm.weight": ("F32", FileTensor("n", "float32", (32,), lambda: np.ones(32, np.float32))),
    }
    write_gguf(tmp_path / "model.gguf", *edited(tensors, **keys))
    found = outcome(tmp_path / "model.gguf")
    assert re.search(wrong, found), found


def test_other_files_are_one_line(small: bytes, tmp_path: Path):
    path = tmp_path / "model.gguf"
    for data, wrong in (
        (b"", "fewer than 24 bytes"),
        (b"GGML" + small[4:], "must begin with GGUF; got b'GGML'"),
        (small[:4] + b"\x01" + small[5:], "must be of version 2 or 3 of GGUF; got 1"),
        (small[:-100], "is incomplete: blk.1.attn_v.weight ends at byte"),
        (small[:3000], "is incomplete"),
    ):
        path.write_bytes(data)
        assert wrong in outcome(path)
    (tmp_path / "second.gguf").write_bytes(small)
    assert "must have one GGUF file; got model.gguf, second.gguf" in outcome(tmp_path)


def test_split_file_is_read_from_any_part_and_a_missing_part_is_named(small: bytes, tmp_path: Path):
    (tmp_path / "whole.gguf").write_bytes(small)
    whole = open_gguf(tmp_path / "whole.gguf")
    items = [(name, (whole.kinds[name], tensor)) for name, tensor in whole.tensors.items()]
    keys = {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in whole.keys.items()
    }
    folder = tmp_path / "split"
    folder.mkdir()
    for i, part in enumerate((items[:9], items[9:])):
        own = {**(keys if i == 0 else {}), "split.no": i, "split.count": 2}
        write_gguf(folder / f"m-{i + 1:05}-of-00002.gguf", own, dict(part))
    expected = logits(load_model(tmp_path / "whole.gguf"))
    for path in (folder, folder / "m-00002-of-00002.gguf"):
        np.testing.assert_array_equal(logits(load_model(path)), expected)
    (folder / "m-00002-of-00002.gguf").unlink()
    assert "must have its other parts beside it; got no m-00002-of-00002.gguf" in outcome(folder)


@pytest.mark.peers
def test_quantised_types_equal_the_package_gguf():
    gguf = pytest.importorskip("gguf")
    for number, kind in KINDS.items():
        if kind.integers is None:
            continue
        blocks = blocks_of(number, 300)
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(number))
        np.testing.assert_array_equal(kind.dequantize(blocks), expected.reshape(300, -1), kind.name)


@pytest.mark.peers
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_written_file_is_read_by_the_package_gguf(dtype: str, tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    lama.save(tmp_path / "float32", model_of(**LLAMA), tokenizer(tmp_path / "tokenizer"))
    model, own = lama.load(tmp_path / "float32", dtype=dtype)
    export_gguf(tmp_path / "model.gguf", model, own, "name")
    reader, ours = gguf.GGUFReader(tmp_path / "model.gguf"), open_gguf(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ours.keys["tokenizer.ggml.tokens"]
    assert {tensor.name for tensor in reader.tensors} == ours.tensors.keys()
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = ours.tensors[tensor.name]
        if tensor.tensor_type.name == "BF16":
            continue  # the package gives float32, lama the bits
        np.testing.assert_array_equal(found.read().astype(np.float32), expected.reshape(found.shape))
