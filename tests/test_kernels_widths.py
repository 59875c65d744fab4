"""Kernels as other machines compile them, vectors of 8 floats as with AVX2 and of 4 as with SSE and NEON:
against this machine's.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from helpers import normal
from test_kernels import assert_all_close, needs_c, ran, results  # noqa: F401  (a fixture)
from tinygrad import Tensor, dtypes

from lama import kernels, ops
from lama.kernels import Quantized
from lama.kernels.quantized import side_by_side
from lama.layers import ACTIVATIONS
from lama.ops import (
    add,
    cross_entropy,
    dequantize,
    dropout,
    embedding,
    gelu,
    layernorm,
    matmul,
    position_rows,
    quantize,
    quantize_array,
    softmax,
)
from lama.runtime import kernel as program

pytestmark = needs_c
KEY = np.array([7, 3], np.uint32)
TOKENS = np.random.default_rng(0).integers(0, 37, (3, 13))
HALVES = (dtypes.float16, dtypes.bfloat16)


def attention(q: Tensor, k: Tensor, v: Tensor, offset: int | None = None, rate: float = 0.0) -> Tensor:
    mask = Tensor(normal(1, 1, 1, k.shape[-2]) > -1) if offset is None else None
    return ops.attention(q, k, v, 0.3, offset, mask, rate, Tensor(KEY), 3)


def in_cache(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    caches = [Tensor(x.numpy()).realize() for x in (keys, values)]  # they are written to
    return kernels.attention_in_cache(
        q, k, v, *caches, Tensor([17, 5], dtype=dtypes.int32).realize(), None, 0.3
    )


def few(x: Tensor, residual: Tensor, w: Tensor, bias: Tensor, norm: Tensor) -> Tensor:
    return add(residual, gelu(matmul(layernorm(x, norm, None, 1e-5), w, transpose_b=True, bias=bias)))


def updated(p: Tensor, m: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state = [Tensor(abs(x.numpy())).realize() for x in (p, m, v)]
    scalars, scale = Tensor([0.1, 0.2, 0.3]).realize(), ops.square_parts([g]).sum(keepdim=True).realize()
    return Tensor.stack(*ops.adamw(*state, g.contiguous().realize(), scalars, scale, 0.9, 0.99, 0.1))


def rounded(w: Tensor, bits: int) -> Quantized:
    """By numpy: which of two scales that are as good is taken depends on the last bit."""
    return Quantized(*map(Tensor, side_by_side(*quantize_array(w.numpy(), bits))), int(w.shape[1]))


def unrounded(a: Tensor, w: Tensor, bits: int) -> Tensor:
    """A product with a quantised matrix and the gradient that passes through it."""
    y = matmul(a, replace(rounded(w, bits), rounds=False), transpose_b=True)
    return y.flatten().cat(y.gradient(a, gradient=Tensor(normal(*y.shape)))[0].flatten())


# With gradients; a function, and the shapes of what it is given.
TRAINED: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "a b": (matmul, [(53, 67), (67, 71)]),
    "a b of batches": (lambda a, b: matmul(a, b, transpose_a=True), [(3, 19, 37), (3, 19, 23)]),
    "MLP": (
        lambda x, w, b, v: matmul(gelu(matmul(x, w, bias=b)), v),
        [(53, 67), (67, 141), (141,), (141, 11)],
    ),
    "few rows": (few, [(3, 67), (3, 29), (29, 67), (29,), (67,)]),
    "softmax": (softmax, [(11, 37)]),
    "gelu": (gelu, [(11, 37)]),
    "norm": (lambda x, w, b: layernorm(x, w, b, 1e-5), [(11, 37), (37,), (37,)]),
    "norm of a sum": (
        lambda x, h, w: layernorm(add(x, dropout(h, 0.2, Tensor(KEY), 3)), w, None, 1e-5),
        [(11, 37), (11, 37), (37,)],
    ),
    "RMS norm of a sum": (
        lambda x, h, w: ops.rmsnorm(add(x, h), w, 1e-5),
        [(11, 37), (11, 37), (37,)],
    ),
    "gated by SiLU": (lambda x, up: ops.gated(x, up, ACTIVATIONS["silu"]), [(11, 37), (11, 37)]),
    "gated by GELU": (lambda x, up: ops.gated(x, up, ACTIVATIONS["gelu_new"]), [(11, 37), (11, 37)]),
    "rotary positions": (lambda x: ops.rotate(x, Tensor(normal(16, 14)), None), [(2, 3, 13, 21)]),
    "cross-entropy": (lambda x: cross_entropy(x, Tensor(TOKENS), 0.1), [(3, 13, 37)]),
    "embedding": (lambda w, p: add(embedding(w, Tensor(TOKENS)), position_rows(p, 13)), [(37, 19), (17, 19)]),
    "attention": (attention, [(2, 3, 41, 21), (2, 3, 77, 21), (2, 3, 77, 9)]),
    "causal attention": (
        lambda q, k, v: attention(q, k, v, 2, 0.2),
        [(2, 1, 61, 33), (2, 1, 75, 33), (2, 1, 75, 33)],
    ),
    "grouped heads in a window": (
        lambda q, k, v: ops.attention(q, k, v, 0.3, 2, window=17),
        [(2, 6, 61, 33), (2, 2, 75, 33), (2, 2, 75, 33)],
    ),
    "attention of narrow heads": (
        lambda q, k, v: attention(q, k, v, 0),
        [(1, 2, 131, 3), (1, 2, 1031, 3), (1, 2, 1031, 3)],
    ),
}
# Without.
RUN: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "one new token": (
        in_cache,
        [(2, 3, 1, 21), (2, 3, 1, 21), (2, 3, 1, 21), (2, 3, 41, 21), (2, 3, 41, 21)],
    ),
    "one new token of grouped heads": (
        in_cache,
        [(2, 6, 1, 21), (2, 2, 1, 21), (2, 2, 1, 21), (2, 2, 41, 21), (2, 2, 41, 21)],
    ),
    "many new tokens": (
        in_cache,
        [(2, 3, 19, 21), (2, 3, 19, 21), (2, 3, 19, 21), (2, 3, 41, 21), (2, 3, 41, 21)],
    ),
    "AdamW": (updated, [(7, 19)] * 4),
    **{
        f"{rows} rows of {dtype.name}": (
            lambda a, w, dtype=dtype: matmul(a, w.cast(dtype).contiguous().realize(), transpose_b=True),
            shapes,
        )
        for dtype in HALVES
        for rows, shapes in ((rows, [(rows, 67), (29, 67)]) for rows in (2, 23, 41))
    },
    **{
        f"rounding to int{bits}": (
            lambda w, bits=bits: (dequantize(quantize(w, bits)) - w).square().sum(),
            [(29, 67)],
        )
        for bits in (8, 4)
    },
    **{
        f"{rows} rows of int{bits}": (
            lambda a, w, bits=bits: matmul(a, rounded(w, bits), transpose_b=True),
            [(rows, 67), (29, 67)],
        )
        for bits in (8, 4)
        for rows in (2, 23)
    },
    **{
        f"41 rows that are not rounded by int{bits}": (
            lambda a, w, bits=bits: unrounded(a, w, bits),
            [(41, 67), (29, 67)],
        )
        for bits in (8, 4)
    },
}


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("name", [*TRAINED, *RUN])
def test_kernels_of_any_width_give_the_same(ran, monkeypatch, name, width):  # noqa: F811
    use, shapes = (TRAINED | RUN)[name]

    def outcome() -> list[np.ndarray]:
        program._program.cache_clear()
        inputs = [Tensor(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
        y = use(*inputs)
        return results(y, normal(*y.shape), *inputs) if name in TRAINED else [y.numpy()]

    with monkeypatch.context() as patch:
        source = program.Kernel.source
        patch.setattr(program.Kernel, "source", lambda kernel: f"#define V {width}\n" + source(kernel))
        found = outcome()
    assert ran
    assert_all_close(found, outcome(), 5e-6)
