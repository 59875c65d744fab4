"""Products of many rows with quantised weights: activations are rounded to integers, too, and integers are
multiplied.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import normal
from test_kernels import assert_all_close, both, needs_c, ran  # noqa: F401
from test_quantized import BITS, made, nearest, unpacked
from tinygrad import Tensor

from lama import ops
from lama.kernels import integers
from lama.kernels.matmul import FEW_ROWS
from lama.ops import add, gelu, matmul
from lama.runtime import kernel as program

# (rows, columns, sum): less than a vector, a group and a word of it, one more than a tile, whole tiles, three
# panels along the sum; parts of the columns, parts of the rows.
SHAPES = [
    (25, 5, 3),
    (27, 7, 31),
    (31, 67, 130),
    (28, 64, 64),
    (37, 33, 1601),
    (263, 197, 192),
    (1031, 67, 160),
]


MATMUL = importlib.import_module("lama.kernels.matmul")  # the package has a function of this name


@pytest.fixture(params=["integers", "floats", "plain"])
def each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The test runs on the kernel for integers, whether this processor has the instruction or not; on that
    for floats; on the twin.
    """
    monkeypatch.setattr(program, "_reference", lambda: request.param == "plain")
    monkeypatch.setattr(MATMUL, "multiplies_integers", lambda device: request.param == "integers")
    yield request.param


@pytest.mark.parametrize("k", [3, 32, 130])
def test_rounded_is_the_nearest_of_127_steps_to_a_groups_largest(both, k):  # noqa: F811
    a = normal(11, k)
    a[3, :32], a[4, :32] = 0, 1e-35  # no scale to divide by
    found = ops.round_activations(Tensor(a)).numpy()
    assert_all_close([found], [nearest(a)])
    steps = (
        np.abs(np.pad(a, ((0, 0), (0, -k % 32))).reshape(11, -1, 32)).max(-1).repeat(32, axis=1)[:, :k] / 127
    )
    assert (np.abs(found - a) <= 0.501 * steps + 1e-35).all()


def test_rounded_keeps_what_is_not_finite(both):  # noqa: F811
    a = normal(9, 70)
    a[2, 5], a[3, 69] = np.nan, np.inf
    found = ops.round_activations(Tensor(a)).numpy()
    assert not np.isfinite(found[2, 5]) and not np.isfinite(found[3, 69])
    assert np.isfinite(found[[0, 1, 4, 5, 6, 7, 8]]).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_of_many_rows_equals_that_of_the_rounded_ones(each, ran, shape, bits):  # noqa: F811
    m, n, k = shape
    weight, a, bias = made(n, k, bits=bits), normal(m, k, seed=1), normal(n, seed=2)
    ran.clear()
    product = matmul(Tensor(a), weight, transpose_b=True, bias=Tensor(bias))
    assert_all_close([product.numpy()], [nearest(a) @ unpacked(weight).T + bias], 2e-6)
    assert any("integers" in name for name in ran) == (each == "integers" and bool(ran))


@needs_c
@pytest.mark.parametrize("bits", BITS)
def test_product_of_many_rows_takes_up_gelu_and_residual(each, ran, bits):  # noqa: F811
    weight, a, bias, residual = made(67, 1601, bits=bits), normal(1, 26, 1601), normal(67), normal(1, 26, 67)
    x, b, r = (Tensor(array).realize() for array in (a, bias, residual))
    ran.clear()
    y = add(r, gelu(matmul(x, weight, transpose_b=True, bias=b)))
    h = nearest(a[0]) @ unpacked(weight).T + bias
    assert_all_close(
        [y.numpy()], [residual + 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))], 3e-6
    )
    if each == "integers":  # three kernels are described, and the last of them runs
        assert [name for name in ran if "integers" in name][-1].endswith("bias_gelu_residual")


@pytest.mark.parametrize("bits", BITS)
def test_product_of_many_rows_passes_the_gradient_as_if_nothing_were_rounded(each, bits):
    weight, a, bias, dy = (
        made(19, 130, bits=bits),
        Tensor(normal(27, 130)),
        Tensor(normal(19)),
        normal(27, 19),
    )
    y = matmul(a, weight, transpose_b=True, bias=bias)
    gradients = y.gradient(a, bias, gradient=Tensor(dy))
    assert_all_close(
        [g.numpy() for g in gradients], [dy.astype(float) @ unpacked(weight), dy.sum(0, dtype=float)], 2e-6
    )


@needs_c
def test_gradient_goes_back_through_gelu_and_residual(each):
    weight, a, r, dy = made(19, 130, bits=8), Tensor(normal(27, 130)), Tensor(normal(27, 19)), normal(27, 19)
    of_a, of_r = add(r, gelu(matmul(a, weight, transpose_b=True))).gradient(a, r, gradient=Tensor(dy))
    h = nearest(a.numpy()) @ unpacked(weight).T
    inner = np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)
    slope = 0.5 * (1 + np.tanh(inner)) + 0.5 * h * (1 - np.tanh(inner) ** 2) * np.sqrt(2 / np.pi) * (
        1 + 3 * 0.044715 * h**2
    )
    assert_all_close([of_a.numpy(), of_r.numpy()], [(dy * slope) @ unpacked(weight), dy], 3e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_product_of_many_rows_keeps_what_is_not_finite(each, value):
    a = normal(26, 70)
    a[2, 5] = value
    found = matmul(Tensor(a), made(7, 70, bits=8), transpose_b=True).numpy()
    assert not np.isfinite(found[2]).any() and np.isfinite(np.delete(found, 2, axis=0)).all()


@pytest.mark.parametrize("rows", [1, 8, 11, FEW_ROWS])
def test_few_rows_are_rounded_as_many_are(both, rows):  # noqa: F811
    weight, a = made(19, 130, bits=8), normal(FEW_ROWS + 1, 130)
    few, many = (matmul(Tensor(a[:m]), weight, transpose_b=True).numpy() for m in (rows, FEW_ROWS + 1))
    assert_all_close(
        [few, many], [nearest(a[:rows]) @ unpacked(weight).T, nearest(a) @ unpacked(weight).T], 2e-6
    )
    exact = a.astype(float) @ unpacked(weight).T
    assert 1e-4 < np.abs(few - exact[:rows]).max() / np.abs(exact).max() < 1e-2


@needs_c
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [3, 35])
@pytest.mark.parametrize(
    "macros", ["PORTABLE 1", "HALVES 1", "HALVES 1\n#define V 8", "HALVES 1\n#define V 4"]
)
def test_the_instruction_gives_what_other_code_gives(monkeypatch, bits, rows, macros):
    monkeypatch.setattr(MATMUL, "multiplies_integers", lambda device: True)
    weight, a, source = made(67, 200, bits=bits), Tensor(normal(rows, 200)).realize(), program.Kernel.source
    ours = matmul(a, weight, transpose_b=True).numpy()
    program._program.cache_clear()
    monkeypatch.setattr(program.Kernel, "source", lambda kernel: f"#define {macros}\n" + source(kernel))
    other = matmul(a, weight, transpose_b=True).numpy()
    program._program.cache_clear()
    assert (ours == other).all()


@needs_c
def test_the_instruction_is_found_only_where_there_is_one(monkeypatch):
    device, source = Tensor([1.0]).device, program.Kernel.source
    found = integers.multiplies_integers.__wrapped__(device)
    processor = Path("/proc/cpuinfo")
    if found and processor.exists():
        assert {"avx512_vnni", "avx_vnni", "asimddp", "sse2"} & set(processor.read_text().split())
    monkeypatch.setattr(program.Kernel, "source", lambda kernel: "#define PORTABLE 1\n" + source(kernel))
    assert not integers.multiplies_integers.__wrapped__(device)
