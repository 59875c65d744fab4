"""What training is made of besides products: layer normalisation, cross-entropy, the optimizer's update and
the gradient's norm.
"""

import numpy as np
import pytest
from helpers import normal
from test_kernels import assert_all_close, both, needs_c, ran, results  # noqa: F401  (fixtures)
from tinygrad import Tensor, TinyJit, dtypes

from lama.ops import adamw, add, cross_entropy, dropout, layernorm, square_parts
from lama.runtime import kernel as program
from lama.runtime.fusion import no_fusion

# --- layer normalisation


def layernorm64(
    x: np.ndarray, w: np.ndarray, b: np.ndarray | float, dy: np.ndarray, epsilon: float
) -> list[np.ndarray]:
    """y, dx, dw, db."""
    x, dy = x.astype(float), dy.astype(float)
    scale = 1 / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    z, g = (x - x.mean(-1, keepdims=True)) * scale, dy * w
    dx = (g - g.mean(-1, keepdims=True) - z * (g * z).mean(-1, keepdims=True)) * scale
    rows = tuple(range(x.ndim - 1))
    return [z * w + b, dx, (dy * z).sum(rows), dy.sum(rows)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "epsilon"), [((2, 3, 37), 1e-5), ((5, 16), 1e-2), ((7, 3), 1e-12), ((1543, 53), 1e-5)]
)
def test_layernorm_and_its_gradients_equal_the_formula(both, shape, epsilon, bias):  # noqa: F811
    x, w, b, dy = (
        3 * normal(*shape) + 2,
        normal(shape[-1], seed=1),
        normal(shape[-1], seed=2),
        normal(*shape, seed=3),
    )
    inputs = [Tensor(x), Tensor(w), *([Tensor(b)] if bias else [])]
    y = layernorm(inputs[0], inputs[1], inputs[2] if bias else None, epsilon)
    expected = layernorm64(x, w, b if bias else 0.0, dy, epsilon)
    assert_all_close(results(y, dy, *inputs), expected[: 1 + len(inputs)], 3e-6)


def test_layernorm_of_a_row_of_one_number_is_its_bias(both):  # noqa: F811
    x = np.full((3, 37), 5.0, np.float32)
    y = layernorm(Tensor(x), Tensor(normal(37)), Tensor(normal(37, seed=1)), 1e-5)
    np.testing.assert_allclose(y.numpy(), np.broadcast_to(normal(37, seed=1), (3, 37)), atol=1e-6)


# The residual stream: a sum, its norm, and another sum.


def stream(
    x: Tensor, h: Tensor, w: Tensor, b: Tensor | None, key: Tensor, rate: float, keep: bool, epsilon: float
) -> Tensor:
    """norm(x + dropout(h)), and with `keep` the sum is added to a multiple of that once more, and normalised
    again.
    """
    total = add(x, dropout(h, rate, key, 5) if rate else h)
    y = layernorm(total, w, b, epsilon)
    return layernorm(add(total, y * 2), w, b, epsilon) if keep else y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(2, 3, 37), (5, 16), (7, 3), (3, 401, 53)])
@needs_c
def test_norm_of_a_sum_and_its_gradients_equal_those_one_by_one(ran, monkeypatch, shape, rate, keep, bias):  # noqa: F811
    arrays = [
        normal(*shape),
        normal(*shape, seed=1),
        1 + normal(shape[-1], seed=2),
        *([normal(shape[-1], seed=3)] if bias else []),
    ]
    dy, key = normal(*shape, seed=4), Tensor([77, 3], dtype=dtypes.uint32).realize()

    def run() -> list[np.ndarray]:
        inputs = [Tensor(a) for a in arrays]
        x, h, w, *b = inputs
        return results(stream(x, h, w, b[0] if b else None, key, rate, keep, 1e-2), dy, *inputs)

    fast = run()
    # The sums in them, forward and back.
    assert sum("layernorm" in name for name in ran) == (4 if keep else 2)
    monkeypatch.setattr(program, "_reference", lambda: True)
    assert_all_close(fast, run(), 3e-5 if keep else 5e-6)


@needs_c
def test_sum_that_was_normalised_is_computed_once(ran):  # noqa: F811
    x, h, w = (Tensor(normal(*shape, seed=i)).realize() for i, shape in enumerate([(3, 37), (3, 37), (37,)]))
    total = add(x, h)
    y = layernorm(total, w, None, 1e-5)
    later = layernorm(add(total, y), w, None, 1e-5)
    linear = later.schedule_linear()
    assert len(linear.src) == 2
    np.testing.assert_array_equal(total.numpy(), x.numpy() + h.numpy())  # whoever wants it gets it


@needs_c
def test_gradient_of_a_sum_whose_norm_is_unused_is_right(ran):  # noqa: F811
    x, h, w = (Tensor(normal(*shape, seed=i)).realize() for i, shape in enumerate([(3, 37), (3, 37), (37,)]))
    total = add(x, h)
    layernorm(total, w, None, 1e-5)
    y = add(total, h)
    dy = normal(3, 37, seed=5)
    _, dx, dh = results(y, dy, x, h)
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_array_equal(dh, 2 * dy)


@needs_c
def test_sum_kept_apart_is_not_taken_up(ran):  # noqa: F811
    x, h, w = (Tensor(normal(*shape, seed=i)).realize() for i, shape in enumerate([(3, 37), (3, 37), (37,)]))
    total = no_fusion(add(x, h))
    y = layernorm(total, w, None, 1e-5)
    assert len(y.schedule_linear().src) == 2


# --- cross-entropy


def cross_entropy64(x: np.ndarray, targets: np.ndarray, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """The losses, and the gradient of their sum."""
    x = x.astype(float) - x.max(-1, keepdims=True)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    wanted = (1 - smoothing) * np.eye(x.shape[-1])[targets] + smoothing / x.shape[-1]
    return -(wanted * np.log(p)).sum(-1), p - wanted


def test_cross_entropy_takes_a_logit_that_is_impossible(both):  # noqa: F811
    x, targets = normal(3, 37), np.array([2, 0, 36])
    x[:, 5] = -np.inf
    ours = results(cross_entropy(logits := Tensor(x), Tensor(targets)), np.ones(3, np.float32), logits)
    losses, gradient = cross_entropy64(np.delete(x, 5, axis=1), np.array([2, 0, 35]), 0.0)
    assert_all_close(ours, [losses, np.insert(gradient, 5, 0, axis=1)], 3e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3, 5, 37), (7, 16), (5, 3), (311, 65)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_cross_entropy_and_its_gradient_equal_the_formula(both, shape, smoothing, dtype):  # noqa: F811
    x, dy = 3 * normal(*shape) + 100, normal(*shape[:-1], seed=1)
    targets = np.random.default_rng(0).integers(0, shape[-1], shape[:-1])
    logits = Tensor(x)
    ours = results(cross_entropy(logits, Tensor(targets.astype(dtype)), smoothing), dy, logits)
    losses, gradient = cross_entropy64(x, targets, smoothing)
    assert_all_close(ours, [losses, gradient * dy[..., None]], 1e-5)


def test_cross_entropy_is_exact_for_any_size_of_the_sum(both):  # noqa: F811
    x = np.stack(
        [np.full(101, -30.0), np.zeros(101), np.linspace(-8, 0, 101), np.linspace(0, 1e-3, 101)]
    ).astype(np.float32)
    x[0, 7] = 0  # a sum of almost exactly 1
    losses = cross_entropy(Tensor(x), Tensor([3, 3, 3, 3])).numpy()
    np.testing.assert_allclose(losses, cross_entropy64(x, np.full(4, 3), 0.0)[0], rtol=1e-6)


@needs_c
def test_cross_entropy_passes_nan_on():
    x = normal(3, 37)
    x[1, 5] = np.nan
    losses = cross_entropy(Tensor(x), Tensor([1, 2, 3])).numpy()
    assert (np.isnan(losses) == [False, True, False]).all()


def test_cross_entropy_is_safe_with_huge_logits(both):  # noqa: F811
    x = np.array([[1e30, 0, -1e30], [-1e4, 1e4, 0]], np.float32)
    logits = Tensor(x)
    losses, gradient = results(cross_entropy(logits, Tensor([0, 1])), np.ones(2, np.float32), logits)
    assert (losses == 0).all() and (gradient == 0).all()


# --- the optimizer


@pytest.mark.parametrize("shape", [(3, 37), (16,), (5,), (211, 353)])
def test_adamw_updates_in_place_as_the_formula_says(both, shape):  # noqa: F811
    p, m, v, g = normal(*shape), normal(*shape, seed=1), normal(*shape, seed=2) ** 2, normal(*shape, seed=3)
    tensors = [Tensor(t).realize() for t in (p, m, v)]
    beta1, beta2, decay, epsilon, rate, scale = 0.9, 0.99, 0.1, 1e-8, 3e-3, 0.5
    expected = [t.astype(float) for t in (p, m, v)]
    for step in (1, 2, 3):
        scalars = Tensor([rate, 1 - beta1**step, 1 - beta2**step]).realize()
        Tensor.realize(*adamw(*tensors, Tensor(g), scalars, Tensor([scale]), beta1, beta2, decay, epsilon))
        p64, m64, v64 = expected
        m64, v64 = (
            beta1 * m64 + (1 - beta1) * scale * g,
            beta2 * v64 + (1 - beta2) * (scale * g.astype(float)) ** 2,
        )
        change = m64 / (1 - beta1**step) / (np.sqrt(v64 / (1 - beta2**step)) + epsilon)
        expected = [p64 - rate * (change + decay * p64), m64, v64]
        assert_all_close([t.numpy() for t in tensors], expected)


def test_adamw_under_jit_follows_its_inputs(both):  # noqa: F811
    p, m, v = (Tensor.zeros(5, 7).contiguous().realize() for _ in range(3))

    @TinyJit
    def step(g: Tensor, scalars: Tensor) -> Tensor:
        Tensor.realize(*adamw(p, m, v, g, scalars, Tensor.ones(1), 0.9, 0.99, 0.0))
        return (p + 0).realize()

    seen = 0.0
    for i in range(1, 6):
        rate = 0.1 * i
        step(Tensor(np.ones((5, 7), np.float32)).realize(), Tensor([rate, 1 - 0.9**i, 1 - 0.99**i]).realize())
        seen -= rate  # a constant gradient's step is the rate
        np.testing.assert_allclose(p.numpy(), seen, rtol=1e-5)


def test_square_parts_are_those_of_all_numbers(both):  # noqa: F811
    arrays = [normal(3, 37), normal(1), normal(16), normal(523, 701)]
    found = square_parts([Tensor(a) for a in arrays]).sum(keepdim=True)
    # Tinygrad adds up in a row.
    np.testing.assert_allclose(found.numpy(), [sum((a.astype(float) ** 2).sum() for a in arrays)], rtol=1e-3)


# --- which path is taken


@needs_c
def test_training_kernels_serve_plain_float32_on_the_cpu_and_nothing_else(ran, monkeypatch):  # noqa: F811
    x, w, targets = Tensor(normal(3, 37)), Tensor(normal(37)), Tensor([1, 2, 3])
    uses = {
        "layernorm": lambda x: layernorm(x, w, None, 1e-5),
        "cross_entropy": lambda x: cross_entropy(x, targets),
        "squares": lambda x: square_parts([x]),
        "adamw": lambda x: adamw(
            *(Tensor.zeros(3, 37).contiguous().realize() for _ in range(3)), x, w[:3], w[:1], 0.9, 0.99, 0.1
        ),
    }
    for name, use in uses.items():
        use(x.contiguous().realize())
        assert len(ran) == 1 and ran.pop().startswith(f"lama_{name}_")
        use(x.cast(dtypes.float16).contiguous().realize())
    monkeypatch.setattr(program, "_compiles_c", lambda device: False)
    for use in uses.values():
        use(x.contiguous().realize())
    monkeypatch.undo()
    assert not ran
