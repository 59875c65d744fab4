"""Products with few rows, and what their kernel takes up into itself: the normalisation before, GELU and a
sum after.
"""

import numpy as np
import pytest
from helpers import SMALL, normal, rounded
from test_kernels import assert_all_close, needs_c, ran  # noqa: F401  (fixtures)
from test_kernels_training import layernorm64
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_parameters

from lama.blocks import MLP
from lama.generation import Runner
from lama.kernels.matvec import FEWEST_ROWS
from lama.models.gpt import GPT, GPTConfig
from lama.ops import add, gelu, layernorm, matmul
from lama.runtime import kernel as program
from lama.runtime import replay as plan
from lama.runtime.fusion import no_fusion

DTYPES = pytest.mark.parametrize(
    "dtype", [dtypes.float32, dtypes.float16, dtypes.bfloat16], ids=["float32", "float16", "bfloat16"]
)
SIZES = pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 37, 53), (2, 32, 64), (3, 5, 2), (FEWEST_ROWS, 67, 131)]
)


def parameters(k: int, n: int, dtype) -> list[Tensor]:
    """w, bias, norm_weight, norm_bias."""
    shapes = [(n, k), (n,), (k,), (k,)]
    tensors = [Tensor(normal(*shape, seed=seed)).cast(dtype) for seed, shape in enumerate(shapes)]
    Tensor.realize(*tensors)  # or the casts there and back cancel
    return tensors


def gelu64(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


@needs_c
@DTYPES
@SIZES
@pytest.mark.parametrize("norm", ["", "norm", "norm with bias"])
@pytest.mark.parametrize("steps", ["", "gelu", "add", "gelu add"])
def test_product_takes_up_what_is_around_it(ran, dtype, m, k, n, norm, steps):  # noqa: F811
    x, residual = 3 * normal(1, m, k, seed=5) + 2, normal(1, m, n, seed=6)
    w, bias, norm_weight, norm_bias = parameters(k, n, dtype)
    use_bias = "gelu" in steps
    w64, bias64, norm_weight64, norm_bias64 = (
        t.float().numpy().astype(float) for t in (w, bias, norm_weight, norm_bias)
    )

    a, expected = Tensor(x), x.astype(float)
    if norm:
        a = layernorm(a, norm_weight, norm_bias if "bias" in norm else None, 1e-5)
        expected = layernorm64(x, norm_weight64, norm_bias64 if "bias" in norm else 0.0, x, 1e-5)[0]
    y, expected = (
        matmul(a, w, transpose_b=True, bias=bias if use_bias else None),
        (rounded(expected) if dtype == dtypes.bfloat16 else expected) @ w64.T + use_bias * bias64,
    )
    if "gelu" in steps:
        y, expected = gelu(y), gelu64(expected)
    if "add" in steps:
        y, expected = add(Tensor(residual), y), expected + residual
    assert_all_close([y.numpy()], [expected], 2e-6)
    kernel = ran[-1]  # all of it
    assert (kernel.startswith("lama_matvec"), "norm" in kernel, "gelu" in kernel) == (
        True,
        "norm" in norm,
        "gelu" in steps,
    )


def steps(
    x: Tensor, residual: Tensor, w: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    return add(
        residual, gelu(matmul(layernorm(x, norm_weight, norm_bias, 1e-5), w, transpose_b=True, bias=bias))
    )


@needs_c
@DTYPES
def test_gradients_of_everything_that_is_fused_equal_those_of_the_plain_twins(ran, monkeypatch, dtype):  # noqa: F811
    m, k, n = 3, 37, 53
    inputs = [Tensor(normal(1, m, k, seed=5)), Tensor(normal(1, m, n, seed=6)), *parameters(k, n, dtype)]
    dy = Tensor(normal(1, m, n, seed=7))

    def run() -> list[np.ndarray]:
        y = steps(*inputs)
        gradients = y.gradient(*inputs, gradient=dy)
        assert [g.dtype for g in gradients] == [x.dtype for x in inputs]
        Tensor.realize(y, *gradients)
        return [t.float().numpy() for t in (y, *gradients)]

    ours = run()
    assert any(name.startswith("lama_matvec") and "gelu" in name for name in ran)
    monkeypatch.setattr(program, "_reference", lambda: True)
    assert_all_close(ours, run(), 3e-6 if dtype == dtypes.float32 else 2e-2)


@needs_c
def test_fused_product_has_the_bits_of_its_parts():
    inputs = [
        Tensor(normal(1, 2, 37, seed=5)),
        Tensor(normal(1, 2, 53, seed=6)),
        *parameters(37, 53, dtypes.float32),
    ]
    x, residual, w, bias, norm_weight, norm_bias = inputs
    product = no_fusion(
        matmul(no_fusion(layernorm(x, norm_weight, norm_bias, 1e-5)), w, transpose_b=True, bias=bias)
    )
    np.testing.assert_array_equal(steps(*inputs).numpy(), add(residual, no_fusion(gelu(product))).numpy())


@needs_c
def test_what_was_computed_is_not_computed_again(ran):  # noqa: F811
    x, w = Tensor(normal(1, 37)), Tensor(normal(53, 37))
    y = matmul(x, w, transpose_b=True).realize()
    gelu(y).realize()
    assert ran[-1].startswith("lama_gelu")


@needs_c
def test_activation_that_is_kept_has_its_value_and_a_gradient():
    mlp, kept = MLP(5, 7), {}
    for i, parameter in enumerate([mlp.up.weight, mlp.up.bias, mlp.down.weight, mlp.down.bias]):
        parameter.assign(Tensor(normal(*parameter.shape, seed=i)))
    x = Tensor(normal(1, 2, 5))

    def tap(name: str, value: Tensor) -> Tensor:
        kept[name] = no_fusion(value)
        return kept[name]

    y = mlp(x, tap)
    gradient = y.sum().gradient(kept["pre"])[0]
    pre = x.numpy() @ mlp.up.weight.numpy().T + mlp.up.bias.numpy()
    np.testing.assert_allclose(kept["pre"].numpy(), pre, atol=1e-5)
    slope = (gelu64(pre + 1e-5) - gelu64(pre - 1e-5)) / 2e-5
    np.testing.assert_allclose(gradient.numpy(), slope * mlp.down.weight.numpy().sum(0), atol=1e-2)


@needs_c
@DTYPES
def test_decoding_a_token_takes_five_kernels_for_each_layer(monkeypatch, dtype):
    model, recipes = GPT(GPTConfig(**SMALL)), []
    for parameter in get_parameters(model):
        parameter.replace(parameter.cast(dtype).contiguous().realize())
    make = plan.LoadedCalls.__init__
    monkeypatch.setattr(
        plan.LoadedCalls,
        "__init__",
        lambda self, recipe, given: (recipes.append(recipe), make(self, recipe, given))[1],
    )
    decoder = Runner(model)
    decoder.prefill(np.array([[1, 2, 3]]))
    decoder.decode(np.array([4]))
    kernels = [recipes[-1].programs[number][0] for number, *_ in recipes[-1].calls]
    layer = ["lama_matvec", "lama_attention", "lama_matvec", "lama_matvec", "lama_matvec"]
    embedding, last = ["lama_embedding"], ["lama_matvec"]
    assert ["_".join(name.split("_")[:2]) for name in kernels if name.startswith("lama")] == [
        *embedding,
        *2 * layer,
        *last,
    ]
    assert len(kernels) == 1 + 2 * 5 + 1
