"""Reading and writing safetensors: right numbers, and a clear refusal of every damaged file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from reference import random_gpt2
from safetensors.numpy import load_file, save_file

from lama.checkpoints.files import open_weights
from lama.checkpoints.safetensors_files import open_safetensors, write_safetensors
from lama.checkpoints.tensor import (
    NUMPY,
    FileTensor,
    bfloat16_to_float32,
    float32_to_bfloat16,
    read_weights,
)
from lama.errors import LamaError

RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.standard_normal((3, 5)).astype(np.float32),
    "float16": RNG.standard_normal((7,)).astype(np.float16),
    "float64": RNG.standard_normal((2, 3, 5)),
    "int64": np.arange(5),
    "bool": np.array([True, False, True]),
    "uint8": np.array(7, np.uint8),  # no axes
    "empty": np.zeros((0, 3), np.float32),
}


def stored(name: str, array: np.ndarray, dtype: str = "float32") -> FileTensor:
    return FileTensor(name, dtype, array.shape, lambda: array)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_safetensors_reads_what_the_library_wrote(tmp_path: Path):
    save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tensors = open_safetensors(tmp_path / "model.safetensors")
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        read = tensors[name].read()
        assert read.dtype == array.dtype == NUMPY[tensors[name].dtype]
        assert tensors[name].shape == read.shape == array.shape
        assert np.array_equal(read, array)


def test_safetensors_library_reads_what_lama_wrote(tmp_path: Path):
    write_safetensors(
        tmp_path / "a.safetensors",
        {name: stored(name, array, array.dtype.name) for name, array in ARRAYS.items()},
    )
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == ARRAYS.keys()
    assert all(np.array_equal(read[name], array) for name, array in ARRAYS.items())


def test_safetensors_keeps_bfloat16_bits(tmp_path: Path):
    bits = np.array([[0x3F80, 0xC000, 0x0001]], np.uint16)  # 1, -2, the smallest
    write_safetensors(tmp_path / "a.safetensors", {"x": stored("x", bits, "bfloat16")})
    tensor = open_safetensors(tmp_path / "a.safetensors")["x"]
    assert tensor.dtype == "bfloat16" and np.array_equal(tensor.read(), bits)
    assert read_weights(tensor, "float32").tolist() == [[1.0, -2.0, 2.0**-133]]


def test_bfloat16_rounds_to_the_nearest_ties_to_even():
    # bfloat16 has 7 bits after the point: around 1 it steps by 1/128.
    values = np.array([1 + 1 / 256, 1 + 3 / 256, 1 + 1.1 / 256, -1 - 0.9 / 256], np.float32)
    assert bfloat16_to_float32(float32_to_bfloat16(values)).tolist() == [1.0, 1 + 2 / 128, 1 + 1 / 128, -1.0]


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_safetensors_refuses_a_truncated_file(tmp_path: Path, keep: int):
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        LamaError,
        match=r"model\.safetensors is not a complete safetensors file: .*\. Download or copy it again",
    ):
        open_safetensors(path)


def test_safetensors_refuses_a_longer_file(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(LamaError, match="is not a complete safetensors file"):
        open_safetensors(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        {"a": entry([2], 0, 8), "b": entry([2], 4, 12), "c": entry([1], 12, 16)},  # overlap
        {"a": entry([3], 0, 8), "b": entry([2], 8, 16)},  # more numbers than bytes
        {"a": entry([4], 8, 24)},  # past the end
        {"a": entry([2], 8, 16)},  # bytes that belong to nobody
        {"a": entry([2, 2**62], 0, 16)},
        {"a": entry([4], 0, 16, dtype="F31")},
        {"a": entry([-4], 0, 16)},
    ],
)
def test_safetensors_refuses_a_damaged_header(tmp_path: Path, header: object):
    path = tmp_path / "model.safetensors"
    random_gpt2.write_raw_safetensors(path, header, [np.zeros(4, np.float32)])
    with pytest.raises(LamaError, match="is not a complete safetensors file") as caught:
        open_safetensors(path)
    assert "\n" not in str(caught.value)


def test_safetensors_refuses_a_name_twice(tmp_path: Path):
    one = json.dumps(entry([2], 0, 8))
    two = json.dumps(entry([2], 8, 16))
    path = tmp_path / "model.safetensors"
    random_gpt2.write_raw_safetensors(
        path, f'{{"a": {one}, "b": {one}, "b": {two}}}'.encode(), [np.zeros(4, np.float32)]
    )
    with pytest.raises(LamaError, match="is not a complete safetensors file"):
        open_safetensors(path)


def test_safetensors_names_a_dtype_it_cannot_read(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    random_gpt2.write_raw_safetensors(
        path, {"a": entry([4], 0, 4, dtype="F8_E4M3")}, [np.zeros(1, np.float32)]
    )
    tensor = open_safetensors(path)["a"]
    with pytest.raises(LamaError, match="got F8_E4M3 for a in"):
        tensor.read()
    with pytest.raises(LamaError, match=r"weights must be of a float dtype .*; got F8_E4M3 for a"):
        read_weights(tensor, "float32")


def test_safetensors_missing_file_is_one_line():
    with pytest.raises(LamaError, match=r"^/nowhere/model\.safetensors cannot be read: No such file"):
        open_safetensors(Path("/nowhere/model.safetensors"))


def test_write_keeps_the_old_file_after_an_error(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": stored("x", np.ones(3, np.float32))})
    before = path.read_bytes()

    def fail() -> np.ndarray:
        raise OSError(28, "No space left on device")

    with pytest.raises(
        LamaError,
        match=r"model\.safetensors cannot be written: No space left on device\. Nothing was changed",
    ):
        write_safetensors(
            path, {"x": stored("x", np.zeros(3, np.float32)), "y": FileTensor("y", "float32", (3,), fail)}
        )
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full to be a full disk")
def test_write_reports_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lama import atomic

    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(atomic, "open", lambda path, mode: full, raising=False)
        with pytest.raises(LamaError, match="cannot be written: No space left on device"):
            write_safetensors(
                tmp_path / "model.safetensors", {"x": stored("x", np.zeros(1 << 16, np.float32))}
            )


def test_write_takes_a_name_of_255_bytes(tmp_path: Path):
    write_safetensors(tmp_path / ("a" * 255), {"x": stored("x", np.zeros(3, np.float32))})
    assert os.listdir(tmp_path) == ["a" * 255]


def test_write_reports_a_folder_that_is_not_there(tmp_path: Path):
    with pytest.raises(LamaError, match="cannot be written: No such file or directory"):
        write_safetensors(tmp_path / "no" / "model.safetensors", {"x": stored("x", np.zeros(3, np.float32))})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_read_weights_refuses_what_is_not_finite(bad: float, kind: str):
    values = np.array([1, bad, 2], np.float32)
    tensor = stored("h.0.ln_1.bias", values, "float32")
    if kind == "bfloat16":
        tensor = stored("h.0.ln_1.bias", (values.view(np.uint32) >> 16).astype(np.uint16), "bfloat16")
    with pytest.raises(LamaError, match=r"weights must be finite; got NaN or infinity in h\.0\.ln_1\.bias"):
        read_weights(tensor, "float32")


def test_read_weights_refuses_a_number_too_large_for_float16():
    with pytest.raises(
        LamaError, match=r"weights must fit float16; got 7e\+04 in x\. Load the model as float32"
    ):
        read_weights(stored("x", np.array([1, -7e4], np.float32)), "float16")


def shard_folder(folder: Path) -> Path:
    random_gpt2.write_shards(folder, {f"t{i}": np.full((i + 1,), i, np.float32) for i in range(5)}, n=2)
    return folder / "model.safetensors.index.json"


def test_shards_are_read_as_one(tmp_path: Path):
    tensors = open_weights(shard_folder(tmp_path))
    assert {name: tensor.read().tolist() for name, tensor in tensors.items()} == {
        f"t{i}": [i] * (i + 1) for i in range(5)
    }


def test_shards_that_are_missing_are_named(tmp_path: Path):
    index = shard_folder(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        LamaError, match=r"shards that .* lists are missing: model-00002-of-00002\.safetensors in"
    ):
        open_weights(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"t9": "model-00001-of-00002.safetensors"},
            "got t9, which is not in model-00001-of-00002.safetensors",
        ),
        ({"t9": "../secret.safetensors"}, "shards must be in the folder of .*; got '../secret.safetensors'"),
        ({"t9": 7}, "must have a weight_map of tensors to files"),
    ],
)
def test_shard_index_that_is_wrong_is_refused(tmp_path: Path, change: dict, message: str):
    index = shard_folder(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"] |= change
    index.write_text(json.dumps(content))
    with pytest.raises(LamaError, match=message):
        open_weights(index)


def test_shards_with_the_same_tensor_are_refused(tmp_path: Path):
    index = shard_folder(tmp_path)
    random_gpt2.write_safetensors(
        tmp_path, {"t0": np.ones(1, np.float32)}, "model-00002-of-00002.safetensors"
    )
    with pytest.raises(LamaError, match="a tensor must be in one shard only; got t0"):
        open_weights(index)
