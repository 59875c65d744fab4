"""pytorch_model.bin without PyTorch: both formats, views, and pickles that are not to be trusted."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from reference import random_gpt2
from reference.random_gpt2 import _Call, _Global, _Storage, tensor, write_legacy, write_torch_zip

from lama.checkpoints.tensor import FileTensor
from lama.checkpoints.torch_files import read_torch
from lama.errors import LamaError

WRITERS = {"zip": write_torch_zip, "legacy": write_legacy}
both_formats = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())

WEIGHTS = {
    "float32": np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32),
    "float16": np.arange(7, dtype=np.float16),
    "bfloat16": np.array([0x3F80, 0xC000], np.uint16),
    "float64": np.linspace(0, 1, 11),
    "int64": np.arange(6).reshape(3, 2),
    "uint8": np.tri(3, dtype=np.uint8).reshape(1, 1, 3, 3),
    "bool": np.array([True, False]),
    "no axes": np.array(-1e4, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def open_torch(path: Path) -> dict[str, FileTensor]:
    return read_torch(path)[0]


@both_formats
def test_torch_file_gives_every_dtype(tmp_path: Path, write):
    write(tmp_path / "a.bin", *random_gpt2.torch_state(WEIGHTS))
    tensors = open_torch(tmp_path / "a.bin")
    assert tensors.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        read = tensors[name].read()
        assert (read.dtype, read.shape, tensors[name].shape) == (array.dtype, array.shape, array.shape)
        assert np.array_equal(read, array)
    assert tensors["bfloat16"].dtype == "bfloat16"


@both_formats
def test_torch_file_gives_views_of_a_shared_storage(tmp_path: Path, write):
    numbers = np.arange(60, dtype=np.float32)
    shared = _Storage("0", numbers)
    state = {
        "all": tensor(shared, 0, (60,), (1,)),
        "offset": tensor(shared, 10, (4, 5), (5, 1)),
        "transposed": tensor(shared, 10, (5, 4), (1, 5)),
        "every third": tensor(shared, 0, (20,), (3,)),
        "expanded": tensor(shared, 7, (2, 3), (0, 0)),
        "last": tensor(shared, 59, (), ()),
    }
    write(tmp_path / "a.bin", state, [shared])
    read = {name: stored.read() for name, stored in open_torch(tmp_path / "a.bin").items()}
    assert np.array_equal(read["all"], numbers)
    assert np.array_equal(read["offset"], numbers[10:30].reshape(4, 5))
    assert np.array_equal(read["transposed"], numbers[10:30].reshape(4, 5).T)
    assert np.array_equal(read["every third"], numbers[::3])
    assert np.array_equal(read["expanded"], np.full((2, 3), 7))
    assert read["last"] == 59


@both_formats
def test_torch_file_unwraps_parameters(tmp_path: Path, write):
    storage = _Storage("0", np.arange(3, dtype=np.float32))
    parameter = _Call(
        _Global("torch._utils", "_rebuild_parameter"), tensor(storage, 0, (3,), (1,)), True, None
    )
    write(tmp_path / "a.bin", {"p": parameter}, [storage])
    assert open_torch(tmp_path / "a.bin")["p"].read().tolist() == [0, 1, 2]


@both_formats
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch.storage", "_load_from_bytes"),
        ("torch", "load"),
        ("torch._utils", "exec"),
    ],
)
def test_torch_file_that_would_run_code_is_refused(tmp_path: Path, write, module: str, name: str):
    attack = _Call(_Global(module, name), f"touch {tmp_path / 'ran'}")
    write(tmp_path / "a.bin", {"x": attack}, [])
    with pytest.raises(
        LamaError,
        match=rf"a\.bin must hold tensors only; got {module}\.{name} in its pickle, which could run code",
    ):
        open_torch(tmp_path / "a.bin")
    assert not (tmp_path / "ran").exists()


def test_plain_pickle_that_would_run_code_is_refused(tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.bin").write_bytes(pickle.dumps(Attack(), protocol))
        with pytest.raises(LamaError, match=r"must hold tensors only; got (posix|nt)\.system in its pickle"):
            open_torch(tmp_path / "a.bin")
    assert not (tmp_path / "ran").exists()


@both_formats
def test_torch_file_cut_anywhere_is_refused(tmp_path: Path, write):
    path = tmp_path / "a.bin"
    write(
        path,
        *random_gpt2.torch_state({"a": np.arange(11, dtype=np.float32), "b": np.arange(3, dtype=np.float16)}),
    )
    whole = path.read_bytes()
    for keep in range(0, len(whole), 13):
        path.write_bytes(whole[:keep])
        with pytest.raises(LamaError, match=r"a\.bin is not a complete ") as caught:
            open_torch(path)
        assert "\n" not in str(caught.value)


def test_torch_archive_with_changed_numbers_fails_its_checksum(tmp_path: Path):
    path = tmp_path / "a.bin"
    write_torch_zip(path, *random_gpt2.torch_state({"a": np.full(11, 1.5, np.float32)}))
    path.write_bytes(path.read_bytes().replace(np.float32(1.5).tobytes(), np.float32(2.5).tobytes(), 1))
    with pytest.raises(LamaError, match="Bad CRC-32"):
        open_torch(path)["a"].read()


@both_formats
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (58, (3,), (1,)),
        (0, (61,), (1,)),
        (0, (2, 2), (59, 2)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 3), (1,)),
        (0, (2.0,), (1,)),
    ],
)
def test_torch_file_whose_tensor_leaves_its_storage_is_refused(tmp_path: Path, write, offset, shape, strides):
    storage = _Storage("0", np.zeros(60, np.float32))
    write(tmp_path / "a.bin", {"x": tensor(storage, offset, shape, strides)}, [storage])
    with pytest.raises(LamaError, match="is not a complete PyTorch checkpoint: a tensor"):
        open_torch(tmp_path / "a.bin")


@both_formats
@pytest.mark.parametrize(
    ("state", "kind"), [([1, 2], "list"), (7, "int"), ({"x": 7}, "int for 'x'"), ({3: 4}, "int for 3")]
)
def test_torch_file_without_a_state_dict_is_refused(tmp_path: Path, write, state, kind: str):
    write(tmp_path / "a.bin", state, [])
    with pytest.raises(LamaError, match=f"must hold a state dict, tensors by name; got {kind}"):
        open_torch(tmp_path / "a.bin")


def test_torch_archive_that_is_compressed_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}) + bytes(10000))
    with pytest.raises(
        LamaError, match=r"checkpoint: archive/data\.pkl compressed, which torch\.save never does"
    ):
        open_torch(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"],
)
def test_something_else_called_bin_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(
        LamaError, match=r"a\.bin is not a complete PyTorch checkpoint: .*\. Download or copy it again"
    ):
        open_torch(tmp_path / "a.bin")


@both_formats
def test_torch_file_that_would_fill_the_memory_is_refused(tmp_path: Path, write):
    storage = _Storage("0", np.zeros(60, np.float32))
    for state in (
        {"x": tensor(storage, 0, (10**6, 10**6), (0, 0))},
        {f"x{i}": tensor(storage, 0, (60,), (1,)) for i in range(100)},
    ):
        write(tmp_path / "a.bin", state, [storage])
        with pytest.raises(LamaError, match="checkpoint: tensors that repeat the numbers of their storages"):
            open_torch(tmp_path / "a.bin")


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\xff", b"p4294967295\n"])
def test_pickle_whose_memo_would_fill_the_memory_is_refused(tmp_path: Path, put: bytes):
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + put + b".")
    with pytest.raises(LamaError, match="checkpoint: a pickle of over 1,048,576 objects"):
        open_torch(tmp_path / "a.bin")


@pytest.mark.peers
@pytest.mark.parametrize("zipped", [True, False], ids=WRITERS.keys())
def test_torch_file_of_pytorch_itself_is_read(tmp_path: Path, zipped: bool):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    base = torch.arange(60.0)
    state = {
        "plain": torch.randn(3, 5),
        "transposed": torch.randn(4, 7).T,
        "part": base[10:30].view(4, 5),
        "every third": base[::3],
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "half": torch.randn(3).half(),
        "double": torch.randn(2).double(),
        "bool": torch.tensor([True, False]),
        "no axes": torch.tensor(-1e4),
        "expanded": torch.randn(3, 1).expand(3, 4),
    }
    torch.save(state, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    tensors = open_torch(tmp_path / "a.bin")
    assert tensors.keys() == state.keys()
    assert all(np.array_equal(tensors[name].read(), value.detach().numpy()) for name, value in state.items())
    torch.save({"b": torch.randn(5, 3).bfloat16()}, tmp_path / "b.bin", _use_new_zipfile_serialization=zipped)
    assert open_torch(tmp_path / "b.bin")["b"].dtype == "bfloat16"


@pytest.mark.peers
@both_formats
def test_pytorch_reads_what_the_generator_writes(tmp_path: Path, write):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install lama[peers]")
    write(
        tmp_path / "a.bin",
        *random_gpt2.torch_state({name: value for name, value in WEIGHTS.items() if name != "bfloat16"}),
    )
    state = torch.load(tmp_path / "a.bin", weights_only=True)
    assert all(
        np.array_equal(state[name].numpy(), value) for name, value in WEIGHTS.items() if name != "bfloat16"
    )
