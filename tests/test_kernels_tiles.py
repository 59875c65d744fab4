"""Weights of half precision in tiles: tensors like any other, and products with the bits of those of rows."""

from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, normal, tiled
from test_kernels import needs_c, ran  # noqa: F401  (a fixture)
from test_kernels_bfloat16 import compiled_with
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

import lama
from lama.checkpoints import save
from lama.checkpoints.rows import spans
from lama.checkpoints.tensor import CHUNK, FileTensor
from lama.generation import Runner
from lama.kernels import matmul_precision
from lama.kernels.tiles import HEIGHT, UNITS, tiles_of
from lama.models.gpt import GPT, GPTConfig
from lama.models.quantized import matrices_of, multiplied
from lama.ops import add, embedding, gelu, layernorm, matmul
from lama.runtime import kernel as program
from lama.runtime.buffers import host_array
from lama.tokenizers import ByteTokenizer
from lama.training.replica import Replica
from lama.training.settings.base import TrainingConfig

pytestmark = needs_c
HALVES = pytest.mark.parametrize("dtype", list(UNITS), ids=["float16", "bfloat16"])
SIZES = pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 8), (37, 7), (131, 401)])
BYTES = GPTConfig(**(SMALL | {"vocab_size": 257, "d_model": 18, "tied": True}))


def rows(n: int, k: int, dtype) -> Tensor:
    return Tensor(normal(n, k)).cast(dtype).contiguous().realize()


def bits(x: Tensor) -> np.ndarray:
    return x.bitcast(dtypes.uint16).numpy()


@HALVES
@SIZES
def test_matrix_is_a_tensor_like_any_other(dtype, n, k):
    matrix = rows(n, k, dtype)
    copy = tiled(matrix)
    assert (copy.shape, copy.dtype, copy.nbytes()) == (matrix.shape, dtype, matrix.nbytes())
    some = Tensor(np.arange(n)[::-3].copy())
    for part in (lambda w: w, lambda w: w[1 % n :], lambda w: w[some], lambda w: w.transpose() + 1):
        np.testing.assert_array_equal(bits(part(copy)), bits(part(matrix)))
    assert tiles_of(copy.realize()) is not None
    if n > 1:
        assert tiles_of(copy[1:]) is None and tiles_of(copy.reshape(k, n)) is None
    np.testing.assert_array_equal(bits(copy.assign(matrix * 2).realize()), bits(matrix * 2))


@HALVES
@SIZES
def test_tiles_hold_units_of_rows_side_by_side_and_zeros(dtype, n, k):
    matrix = rows(n, k, dtype)
    tiles = host_array(tiles_of(tiled(matrix)))
    unit = UNITS[dtype]
    expected = np.zeros((-(-n // HEIGHT) * HEIGHT, -(-k // unit) * unit), tiles.dtype)
    expected[:n, :k] = host_array(matrix)
    expected = expected.reshape(len(tiles), HEIGHT, -1, unit).swapaxes(1, 2)
    np.testing.assert_array_equal(tiles.view(np.uint16), expected.view(np.uint16))


@pytest.fixture(params=["UNUSED", "PORTABLE 1", "V 8", "V 4\n#define PORTABLE 1"])
def each(request: pytest.FixtureRequest):
    """With this processor's instructions, without them, and as narrower machines compile the kernels."""
    with compiled_with(request.param):
        yield


@HALVES
def test_products_have_the_bits_of_those_of_rows(each, ran, dtype):  # noqa: F811
    for m, n, k in ((3, 37, 7), (1, 131, 401), (5, 131, 401), (24, 131, 401), (40, 131, 401)):
        matrix, bias = rows(n, k, dtype), Tensor(normal(n)).realize()
        a = Tensor(normal(m, k)).realize()
        found, expected = (matmul(a, w, transpose_b=True, bias=bias).numpy() for w in (tiled(matrix), matrix))
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
        assert "tiles" in ran[-2] and "tiles" not in ran[-1]


@HALVES
@pytest.mark.parametrize("m", [3, 30])
def test_products_of_less_precision_are_those_of_rows(dtype, m):
    matrix, a = rows(53, 67, dtype), Tensor(normal(m, 67)).realize()
    with matmul_precision(dtypes.bfloat16):
        found, expected = (matmul(a, w, transpose_b=True).numpy() for w in (tiled(matrix), matrix))
    np.testing.assert_array_equal(found, expected)


@HALVES
@pytest.mark.parametrize("m", [3, 30])
def test_kernels_do_the_work_around_a_product_and_its_gradient(ran, dtype, m):  # noqa: F811
    n, k = 53, 67
    matrix, bias, norm = rows(n, k, dtype), *(Tensor(normal(size)).realize() for size in (n, k))
    x, residual, dy = (Tensor(normal(m, size, seed=seed)).realize() for seed, size in enumerate((k, n, n)))

    def outcome(w: Tensor) -> list[np.ndarray]:
        y = gelu(matmul(layernorm(x, norm, None, 1e-5), w, transpose_b=True, bias=bias))
        y = add(residual, y)
        inputs = [x, norm, bias, residual]
        gradients = y.gradient(*inputs, gradient=dy)
        Tensor.realize(y, *gradients)
        return [t.numpy() for t in (y, *gradients)]

    for found, expected in zip(outcome(tiled(matrix)), outcome(matrix), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert any("tiles" in name and "gelu" in name for name in ran)


@HALVES
def test_embedding_reads_rows_out_of_tiles(ran, dtype):  # noqa: F811
    matrix, tokens = rows(37, 7, dtype), Tensor(np.array([[0, 36, -1], [16, 37, 5]], np.int32)).realize()
    found, expected = (embedding(w, tokens).numpy() for w in (tiled(matrix), matrix))
    np.testing.assert_array_equal(found, expected)
    assert len(ran) == 2


def test_parts_of_a_matrix_in_a_file_are_its_rows():
    width = 5000
    whole = np.arange(CHUNK // width * 3 * width + 7 * width, dtype=np.float32).reshape(-1, width)

    def read_into(start: int, out: np.ndarray) -> None:
        out.reshape(-1)[:] = whole.reshape(-1)[start : start + out.size]

    tensor = FileTensor("w", "float32", whole.shape, lambda: whole, read_into=read_into)
    found = []
    for first, part in spans(tensor, HEIGHT):
        assert first % HEIGHT == 0 and first == sum(map(len, found)) and part.shape[0] * width <= CHUNK
        out = np.empty(part.shape, np.float32)
        part.read_into(0, out)
        found.append(out)
    np.testing.assert_array_equal(np.concatenate(found), whole)
    assert len(found) > 2
    for other in (
        FileTensor("w", "float32", whole.shape, lambda: whole),
        FileTensor("w", "float32", whole.shape, lambda: whole, transposed=True, read_into=read_into),
    ):
        assert [*spans(other, HEIGHT)] == [(0, other)]


# --- models


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save(tmp_path / "model", GPT(BYTES, seed=3), ByteTokenizer())
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loaded_matrices_are_in_tiles_and_decode_as_rows_do(path, monkeypatch, dtype):
    model = lama.load(path, dtype=dtype)[0]
    names = set(multiplied(model))
    assert names == set(matrices_of(model)) and "embed.weight" in names
    assert {name for name, p in get_state_dict(model).items() if tiles_of(p) is not None} == names
    in_rows = lama.load(path, dtype=dtype, in_rows=True)[0]  # as training needs them
    assert not any(tiles_of(p) is not None for p in get_state_dict(in_rows).values())
    tokens = np.array([[3, 1, 4, 1, 5]])
    found = [Runner(model).prefill(tokens), Runner(model).decode(tokens[0, :1])]
    for parameter in get_state_dict(
        model
    ).values():  # the same model object: the captured step must be another
        parameter.replace(parameter.contiguous().realize())
    for one, other in zip(
        found, [Runner(model).prefill(tokens), Runner(model).decode(tokens[0, :1])], strict=True
    ):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(program, "_reference", lambda: True)
    plain = lama.load(path, dtype=dtype)[0]
    for name, parameter in get_state_dict(plain).items():
        assert tiles_of(parameter) is None
        np.testing.assert_array_equal(bits(parameter), bits(get_state_dict(model)[name]))


def test_untied_embedding_is_not_multiplied():
    model = GPT(GPTConfig(**(vars(BYTES) | {"tied": False})))
    assert set(matrices_of(model)) - set(multiplied(model)) == {"embed.weight"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_model_in_tiles_is_saved_bit_for_bit(path, tmp_path, dtype):
    model, tokenizer = lama.load(path, dtype=dtype)[:2]
    save(tmp_path / "again", model, tokenizer)
    again = get_state_dict(lama.load(tmp_path / "again", dtype=dtype)[0])
    for name, parameter in get_state_dict(model).items():
        np.testing.assert_array_equal(bits(again[name]), bits(parameter), name)


def test_model_in_tiles_is_trained_in_rows(path):
    model = lama.load(path, dtype="float16")[0]
    before = {name: p.numpy() for name, p in get_state_dict(model).items()}
    replica = Replica(model, TrainingConfig(), lambda model, x, **_: model(x).square().mean(), 1)
    for name, parameter in replica.parameters.items():
        assert tiles_of(parameter) is None
        np.testing.assert_array_equal(parameter.numpy(), before[name])
