"""Products of factors that are rounded to bfloat16, and their gradients: sums in float32."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers import normal, rounded
from test_kernels import FORMS, assert_all_close, gelu64, needs_c, ran, results, stored  # noqa: F401
from tinygrad import Tensor, dtypes

from lama import host
from lama.kernels import matmul_precision
from lama.ops import attention, gelu, matmul
from lama.runtime import kernel as program

pytestmark = needs_c
# The package has functions of these names.
MATMUL, ATTENTION = (importlib.import_module(f"lama.kernels.{name}") for name in ("matmul", "attention"))


@contextmanager
def compiled_with(macros: str) -> Iterator[None]:
    source = program.Kernel.source
    program._program.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program.Kernel, "source", lambda kernel: f"#define {macros}\n" + source(kernel))
        yield
    program._program.cache_clear()


@pytest.fixture(params=["UNUSED", "NO_AMX", "PORTABLE 1", "V 8", "V 4\n#define PORTABLE 1"])
def each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With this processor's instructions, without them, and as narrower machines compile the kernels."""
    if request.param == "NO_AMX":
        for module in (MATMUL, ATTENTION):
            monkeypatch.setattr(module, "may_use_amx", lambda: False)
    with compiled_with(request.param):
        yield


def assert_rounded(m: int, k: int, n: int, transpose_a: bool, transpose_b: bool) -> None:
    """The product and its gradients equal numpy's of the rounded factors."""
    a, b, dy = normal(m, k), normal(k, n, seed=1), normal(m, n, seed=2)
    tensors = Tensor(stored(a, transpose_a)), Tensor(stored(b, transpose_b))
    with matmul_precision(dtypes.bfloat16):
        y = matmul(*tensors, transpose_a, transpose_b)
    ours = results(y, dy, *tensors)
    a, b, dy = rounded(a), rounded(b), rounded(dy)
    assert_all_close(ours, [a @ b, stored(dy @ b.T, transpose_a), stored(a.T @ dy, transpose_b)])


# Less than a vector of pairs; one more block than the first in every direction.
@pytest.mark.parametrize(("m", "k", "n"), [(7, 5, 11), (101, 197, 523)])
@pytest.mark.parametrize(("transpose_a", "transpose_b"), FORMS)
def test_product_and_its_gradients_are_those_of_the_rounded(m, k, n, transpose_a, transpose_b):
    assert_rounded(m, k, n, transpose_a, transpose_b)


def test_product_of_more_rows_than_a_block_has():
    assert_rounded(1553, 801, 65, False, True)


def test_product_is_the_same_on_other_processors(each):
    assert_rounded(53, 405, 67, False, True)


def test_product_takes_up_bias_and_gelu(each, ran):  # noqa: F811
    x, w, v, bias = normal(3, 17, 67), normal(141, 67, seed=1), normal(11, 141, seed=2), normal(141, seed=3)
    dy, tensors = normal(3, 17, 11, seed=4), [Tensor(t) for t in (x, w, v, bias)]
    with matmul_precision(dtypes.bfloat16):
        h = gelu(matmul(tensors[0], tensors[1], transpose_b=True, bias=tensors[3]))
        ours = results(matmul(h, tensors[2], transpose_b=True), dy, *tensors)
    before = rounded(x) @ rounded(w).T + bias
    slope = (gelu64(before + 1e-5) - gelu64(before - 1e-5)) / 2e-5
    after, back = rounded(gelu64(before)), rounded(dy) @ rounded(v) * slope
    expected = [after @ rounded(v).T, rounded(back) @ rounded(w)]
    expected.append(np.einsum("bmn,bmk->nk", rounded(back), rounded(x)))
    expected += [np.einsum("bmn,bmk->nk", rounded(dy), after), back.sum((0, 1))]
    # Numbers close to the middle of two bfloat16 may be rounded to either.
    assert_all_close(ours, expected, 1e-3)
    assert any(name.endswith("gelu_bfloat16") for name in ran)
    assert any(name.endswith("factor_bfloat16") for name in ran)


def assert_close_to_floats(shapes: list[tuple[int, ...]], **masks) -> None:
    """Attention within `matmul_precision` and its gradients are those of floats, but for rounding."""
    tensors = [Tensor(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
    dz = normal(*shapes[0][:3], shapes[2][3], seed=3)
    expected = results(attention(*tensors, 0.25, **masks), dz, *tensors)
    with matmul_precision(dtypes.bfloat16):
        ours = results(attention(*tensors, 0.25, **masks), dz, *tensors)
    for got, wanted in zip(ours, expected, strict=True):
        # Two factors are rounded by up to 2^-9 each, mostly less.
        assert 1e-4 < np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()) < 2**-7


# Tails of every kind; queries that see nothing in a block of keys; several heads with the same keys.
@pytest.mark.parametrize("masks", [{"offset": 3}, {"offset": 9, "window": 40}, {"offset": 230, "rate": 0.3}])
def test_attention_is_that_of_floats_but_for_rounding(masks, ran):  # noqa: F811
    key = Tensor([5, 0], dtype=dtypes.uint32).realize()
    assert_close_to_floats([(2, 6, 77, 33), (2, 2, 307, 33), (2, 2, 307, 40)], key=key, **masks)
    assert len(ran) == 4


def test_attention_is_the_same_on_other_processors(each):
    visible = Tensor(normal(2, 1, 1, 75) > 0)
    assert_close_to_floats([(2, 1, 37, 20), (2, 1, 75, 20), (2, 1, 75, 20)], offset=38, padding=visible)


def test_attention_of_packed_texts_is_that_of_floats():
    starts = np.where(np.arange(131) >= 70, 70, 0) * np.ones((2, 1), int)
    assert_close_to_floats([(2, 3, 131, 20)] * 3, offset=0, starts=Tensor(starts))


def test_batches_have_a_matrix_each_or_share_one():
    a, b, shared = normal(3, 7, 5), normal(3, 5, 11, seed=1), normal(5, 11, seed=2)
    with matmul_precision(dtypes.bfloat16):
        ours = [matmul(Tensor(a), Tensor(w)).numpy() for w in (b, shared)]
    assert_all_close(ours, [rounded(a) @ rounded(b), rounded(a) @ rounded(shared)])


@pytest.mark.parametrize("dtype", [dtypes.float16, dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_weights_in_half_precision_are_rounded_too(dtype, transpose_b):
    a, w = normal(13, 67), Tensor(stored(normal(67, 37), transpose_b)).cast(dtype).realize()
    with matmul_precision(dtypes.bfloat16):
        y = matmul(Tensor(a), w, False, transpose_b).numpy()
    assert_all_close([y], [rounded(a) @ stored(rounded(w.float().numpy()), transpose_b)])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(value):
    a = normal(14, 70)
    a[2, 5] = value
    with matmul_precision(dtypes.bfloat16):
        y = matmul(Tensor(a), Tensor(normal(70, 9))).numpy()
    assert not np.isfinite(y[2]).any() and np.isfinite(np.delete(y, 2, axis=0)).all()


def test_the_system_is_asked_for_amx_where_the_processor_has_it(monkeypatch):
    flags = Path("/proc/cpuinfo")
    if host.may_use_amx.__wrapped__():
        assert "amx_tile" in flags.read_text().split()
    with monkeypatch.context() as small:
        small.setattr(host.threading, "stack_size", lambda: 1 << 20)
        assert host.stack_bytes() == 1 << 20 and not host.may_use_amx.__wrapped__()
    monkeypatch.setattr(host.sys, "platform", "darwin")
    assert not host.may_use_amx.__wrapped__()


def test_the_instruction_is_found_only_where_there_is_one():
    processor = Path("/proc/cpuinfo")
    if MATMUL.multiplies_bfloat16.__wrapped__("CPU") and processor.exists():
        assert {"avx512_bf16", "bf16"} & set(processor.read_text().split())
    with compiled_with("PORTABLE 1"):
        assert not MATMUL.multiplies_bfloat16.__wrapped__("CPU")
