"""C functions of NumPy arrays do what NumPy does, with C and without."""

import numpy as np
import pytest
from test_kernels import needs_c

from lama.checkpoints import gguf
from lama.kernels import arrays
from lama.runtime import kernel
from lama.runtime.device import open_device

pytestmark = needs_c


@pytest.fixture(params=["C", "NumPy"], autouse=True)
def with_c(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    open_device()
    monkeypatch.setattr(kernel, "_reference", lambda: request.param == "NumPy")
    assert (kernel.native("transpose.c", WORD="unsigned int") is None) == (request.param == "NumPy")
    return request.param == "C"


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "int8", "float64"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (16, 32), (31, 47), (67, 131)])
def test_transposed_view_gets_the_values(shape: tuple[int, int], dtype: str) -> None:
    rows, columns = shape
    values = np.arange(rows * columns).reshape(shape).astype(dtype)
    whole = np.zeros((columns, rows + 7), dtype)
    arrays.assign(whole.T[3 : rows + 3], values)
    np.testing.assert_array_equal(whole[:, 3 : rows + 3], values.T)
    assert not whole[:, :3].any() and not whole[:, rows + 3 :].any()


def test_other_views_get_the_values() -> None:
    values = np.arange(35, dtype=np.float32).reshape(5, 7)
    for view in (np.zeros((5, 7), np.float32), np.zeros((5, 14), np.float32)[:, ::2], np.zeros((7, 5)).T):
        arrays.assign(view, values)
        np.testing.assert_array_equal(view, values)
    part = np.zeros(5, np.float32)
    arrays.assign(part, values[:, 2])
    np.testing.assert_array_equal(part, values[:, 2])
    transposed = np.zeros((7, 5), np.float32).T
    arrays.assign(transposed, np.asfortranarray(values))
    np.testing.assert_array_equal(transposed, values)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("shape", [(1, 16, 33), (3, 16, 64), (2, 5, 7), (0, 16, 4)])
def test_matrices_are_transposed_one_by_one(shape: tuple[int, int, int], dtype: str) -> None:
    matrices = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    out = np.ones((shape[0], shape[2], shape[1]), dtype)
    arrays.write_transposed(out, matrices)
    np.testing.assert_array_equal(out, matrices.transpose(0, 2, 1))


@pytest.mark.parametrize(("size", "at", "width"), [(18, 2, 16), (20, 4, 16), (144, 16, 32)])
def test_pairs_are_the_integers_of_the_blocks(size: int, at: int, width: int, with_c: bool) -> None:
    kind = next(kind for kind in gguf.KINDS.values() if kind.size == size and kind.bits == 4)
    assert kind.integers is not None and kind.halves == (at, width)
    blocks = np.random.default_rng(3).integers(0, 256, (5 * 3, size), np.uint8)
    used = 3 * (size - at)
    out = np.full((5, used + 9), 7, np.uint8)
    assert arrays.write_pairs(out, blocks, at, width) == with_c
    if not with_c:
        out[:, :used] = gguf._neighbours(blocks[:, at:], width).reshape(5, -1)
    integers = kind.integers(blocks).astype(int) + (8 if size == 18 else 0)
    both = integers.reshape(5, used, 2)
    np.testing.assert_array_equal(out[:, :used], both[..., 0] | both[..., 1] << 4)
    assert (out[:, used:] == 7).all()
