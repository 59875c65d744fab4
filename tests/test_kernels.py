"""The C kernels against numpy, and against their plain tinygrad twins."""

from collections.abc import Iterator

import numpy as np
import pytest
from helpers import normal, rounded
from tinygrad import Device, Tensor, UOp, dtypes

from lama.kernels.embedding import with_token_gradient
from lama.kernels.matmul import sum_rows
from lama.ops import (
    HIDDEN,
    adamw,
    add,
    cross_entropy,
    embedding,
    gelu,
    layernorm,
    matmul,
    position_rows,
    softmax,
)
from lama.runtime import kernel as program

needs_c = pytest.mark.skipif(Device.DEFAULT != "CPU", reason="the kernels serve tinygrad's CPU device")

FORMS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C kernels that are used, in order."""
    names: list[str] = []
    call = program.Kernel.into

    def recorded(self, *args, **kwargs):
        names.append(self.name)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(program.Kernel, "into", recorded)
    return names


@pytest.fixture(params=["kernel", "plain"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> Iterator[None]:
    """The test runs twice: on the C kernel, and on its plain twin."""
    monkeypatch.setattr(program, "_reference", lambda: request.param == "plain")
    yield
    if Device.DEFAULT == "CPU":
        assert bool(ran) == (request.param == "kernel")


def results(y: Tensor, dy: np.ndarray, *inputs: Tensor) -> list[np.ndarray]:
    """y, and the gradient of Σ y·dy for each of the inputs."""
    gradients = y.gradient(*inputs, gradient=Tensor(dy))
    Tensor.realize(y, *gradients)
    return [t.numpy() for t in (y, *gradients)]


def assert_all_close(ours: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-6) -> None:
    """Equal within `tolerance` of the largest value of each array."""
    for got, wanted in zip(ours, expected, strict=True):
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() <= tolerance * max(1e-30, np.abs(wanted).max())


# --- matrix products


def stored(x: np.ndarray, transposed: bool) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(-2, -1)) if transposed else x


@pytest.mark.parametrize(("transpose_a", "transpose_b"), FORMS)
@pytest.mark.parametrize(
    ("lead", "m", "k", "n"),
    [
        ((), 101, 197, 523),  # one more block than the first in every direction, none of them full
        ((), 1553, 1024, 545),  # more rows than a block has, stored so far apart that they are copied
        ((3,), 7, 5, 11),
    ],
)
def test_matmul_equals_numpy(ran, lead, m, k, n, transpose_a, transpose_b):
    a, b = normal(*lead, m, k), normal(*lead, k, n, seed=1)
    product = matmul(Tensor(stored(a, transpose_a)), Tensor(stored(b, transpose_b)), transpose_a, transpose_b)
    assert_all_close([product.numpy()], [a.astype(float) @ b])
    assert Device.DEFAULT != "CPU" or ran


@pytest.mark.parametrize("k", [3, 53])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_matmul_of_a_few_rows_equals_numpy(m, k):
    a, b = normal(m, k), normal(7, k)
    assert_all_close([matmul(Tensor(a), Tensor(b), transpose_b=True).numpy()], [a.astype(float) @ b.T])


def test_matmul_of_a_few_rows_takes_batches():
    a, b = normal(3, 2, 19), normal(3, 5, 19)
    assert_all_close(
        [matmul(Tensor(a), Tensor(b), transpose_b=True).numpy()], [a.astype(float) @ b.swapaxes(1, 2)]
    )


@pytest.mark.parametrize("transpose_b", [False, True])
def test_matmul_of_one_matrix_serves_all_leading_axes(transpose_b):
    a, b = normal(2, 3, 5, 7), normal(7, 11)
    product = matmul(Tensor(a), Tensor(stored(b, transpose_b)), False, transpose_b)
    assert_all_close([product.numpy()], [a.astype(float) @ b])


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("m", [2, 13])
@pytest.mark.parametrize("dtype", [dtypes.float16, dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_matmul_takes_weights_in_half_precision(both, dtype, m, transpose_b):
    k, n = 19, 37  # a vector and its tail, a tile and its tail
    # Or the casts there and back cancel.
    a, b = normal(m, k), Tensor(stored(normal(k, n), transpose_b)).cast(dtype).realize()
    product = matmul(Tensor(a), b, False, transpose_b)
    assert product.dtype == dtypes.float32
    widened = stored(b.float().numpy().astype(float), transpose_b)  # the half-precision numbers themselves
    a = rounded(a) if dtype == dtypes.bfloat16 else a.astype(float)
    assert_all_close([product.numpy()], [a @ widened])


@pytest.mark.parametrize(("transpose_a", "transpose_b"), FORMS)
def test_matmul_gradients_equal_numpy(both, transpose_a, transpose_b):
    a, b, dy = normal(3, 7, 5), normal(3, 5, 11), normal(3, 7, 11)
    stored_a, stored_b = Tensor(stored(a, transpose_a)), Tensor(stored(b, transpose_b))
    ours = results(matmul(stored_a, stored_b, transpose_a, transpose_b), dy, stored_a, stored_b)
    grad_a, grad_b = dy @ b.astype(float).swapaxes(1, 2), a.astype(float).swapaxes(1, 2) @ dy
    assert_all_close(ours, [a.astype(float) @ b, stored(grad_a, transpose_a), stored(grad_b, transpose_b)])


@pytest.mark.parametrize("transpose_a", [False, True])
def test_matmul_gradient_of_a_shared_matrix_sums_over_the_batch(both, transpose_a):
    a, b, dy = normal(3, 7, 5), normal(5, 11), normal(3, 7, 11)
    stored_a, shared = Tensor(stored(a, transpose_a)), Tensor(b)
    ours = results(matmul(stored_a, shared, transpose_a), dy, stored_a, shared)
    grad_a, grad_b = dy @ b.astype(float).T, np.einsum("bmk,bmn->kn", a.astype(float), dy)
    assert_all_close(ours, [a.astype(float) @ b, stored(grad_a, transpose_a), grad_b])


@pytest.mark.parametrize("m", [3, 101])
def test_matmul_adds_a_bias_and_gives_its_gradient(both, m):
    a, b, bias, dy = normal(2, m, 197), normal(71, 197), normal(71), normal(2, m, 71)
    tensors = [Tensor(t) for t in (a, b, bias)]
    ours = results(matmul(tensors[0], tensors[1], transpose_b=True, bias=tensors[2]), dy, *tensors)
    a, b = a.astype(float), b.astype(float)
    assert_all_close(
        ours, [a @ b.T + bias, dy @ b, np.einsum("bmn,bmk->nk", dy, a), dy.sum((0, 1), dtype=float)]
    )


@pytest.mark.parametrize("shape", [(101, 197), (3, 5, 64), (7, 3)])
@needs_c
def test_sum_rows_is_the_sum_over_all_axes_but_the_last(shape):
    x = normal(*shape)
    assert_all_close([sum_rows(Tensor(x)).numpy()], [x.sum(tuple(range(x.ndim - 1)), dtype=float)])


def test_matmul_gradients_of_half_precision_weights_keep_their_dtype():
    a, b = Tensor(normal(13, 19)), Tensor(normal(19, 37)).cast(dtypes.float16)
    gradient = matmul(a, b).gradient(b, gradient=Tensor(normal(13, 37)))[0]
    assert gradient.dtype == dtypes.float16
    expected = a.numpy().T.astype(float) @ normal(13, 37)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=2e-3, atol=2e-3)


@needs_c
def test_matmul_names_sizes_that_disagree():
    with pytest.raises(ValueError, match=r"the inner sizes of a product must agree; got .*5.* and .*7"):
        matmul(Tensor(normal(3, 5)), Tensor(normal(7, 11)))


# --- softmax


def softmax64(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(float) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(2, 3, 37), (5, 16), (7, 3)])
def test_softmax_and_its_gradient_equal_the_formula(both, shape):
    x, dy = 3 * normal(*shape), normal(*shape, seed=1)
    tensor = Tensor(x)
    ours = results(softmax(tensor), dy, tensor)
    p = softmax64(x)
    assert_all_close(ours, [p, p * (dy - (dy * p).sum(-1, keepdims=True))])
    np.testing.assert_allclose(ours[0], p, rtol=1e-5)  # small ones too


def test_softmax_hides_what_is_masked_and_never_gives_nan(both):
    x = normal(3, 37)
    x[0, 5:] = x[1, ::2] = x[2] = HIDDEN  # a tail, every other one, all of them
    tensor = Tensor(x)
    p, gradient = results(softmax(tensor), normal(3, 37, seed=1), tensor)
    assert (p[0, 5:] == 0).all() and (p[1, ::2] == 0).all()
    np.testing.assert_allclose(p, softmax64(x), rtol=1e-5)
    np.testing.assert_allclose(p[2], 1 / 37, rtol=1e-6)
    assert np.isfinite(gradient).all() and (gradient[0, 5:] == 0).all()


def test_softmax_is_safe_with_huge_and_infinite_scores(both):
    x = normal(3, 37)
    x[0] += 1e4
    x[1] *= 1e30
    x[2, 7:] = -np.inf
    p = softmax(Tensor(x)).numpy()
    np.testing.assert_allclose(p[0], softmax64(x[:1])[0], rtol=1e-5)
    assert p[1, x[1].argmax()] == 1 and p[1].sum() == 1
    assert (p[2, 7:] == 0).all() and abs(p[2].sum() - 1) < 1e-6


@pytest.mark.parametrize("place", [0, 11, 36])
def test_softmax_passes_nan_on(both, place):
    x = normal(3, 37)
    x[1, place] = np.nan
    p = softmax(Tensor(x)).numpy()
    assert np.isnan(p[1]).all()
    assert np.isfinite(p[[0, 2]]).all()


# --- GELU


def gelu64(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("shape", [(3, 37), (2, 16), (3,)])
def test_gelu_and_its_gradient_equal_the_formula(both, shape):
    x, dy = 3 * normal(*shape), normal(*shape, seed=1)
    tensor = Tensor(x)
    ours = results(gelu(tensor), dy, tensor)
    x64 = x.astype(float)
    slope = (gelu64(x64 + 1e-5) - gelu64(x64 - 1e-5)) / 2e-5
    assert_all_close(ours, [gelu64(x64), dy * slope])


def test_gelu_is_the_identity_far_up_and_zero_far_down(both):
    x = np.full((3, 37), -1e4, np.float32)
    x[1], x[2] = 1e4, 0
    tensor = Tensor(x)
    y, gradient = results(gelu(tensor), np.ones_like(x), tensor)
    np.testing.assert_allclose(y, np.maximum(x, 0), atol=1e-20)
    np.testing.assert_allclose(gradient, [[0.0] * 37, [1.0] * 37, [0.5] * 37], atol=1e-20)


def test_gelu_passes_nan_on(both):
    x = normal(3, 37)
    x[1, 5] = np.nan
    assert (np.isnan(gelu(Tensor(x)).numpy()) == np.isnan(x)).all()


def gelu_slope64(x: np.ndarray) -> np.ndarray:
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return (1 + np.tanh(u)) / 2 + x * (1 - np.tanh(u) ** 2) / 2 * np.sqrt(2 / np.pi) * (
        1 + 3 * 0.044715 * x**2
    )


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "d", "hidden"), [((2, 13), 19, 37), ((101,), 197, 71), ((1553,), 23, 545), ((3, 1), 5, 33)]
)
def test_mlp_and_its_gradients_equal_the_formulas(both, rows, d, hidden, has_bias):
    """GELU is taken by the product before it, and the way back is multiplied by its slope by the product
    before that.
    """
    x, up, down, dy = (
        normal(*rows, d),
        normal(hidden, d, seed=1),
        normal(d, hidden, seed=2),
        normal(*rows, d, seed=3),
    )
    bias = normal(hidden, seed=4) if has_bias else np.zeros(hidden, np.float32)
    inputs = [Tensor(t) for t in (x, up, down, *([bias] if has_bias else []))]
    hidden_of = gelu(matmul(inputs[0], inputs[1], transpose_b=True, bias=inputs[3] if has_bias else None))
    ours = results(matmul(hidden_of, inputs[2], transpose_b=True), dy, *inputs)
    x, up, down, dy = (t.astype(float) for t in (x.reshape(-1, d), up, down, dy.reshape(-1, d)))
    before = x @ up.T + bias
    back = (dy @ down) * gelu_slope64(before)
    expected = [
        (gelu64(before) @ down.T).reshape(*rows, d),
        (back @ up).reshape(*rows, d),
        back.T @ x,
        dy.T @ gelu64(before),
    ]
    assert_all_close(ours, [*expected, *([back.sum(0)] if has_bias else [])], 2e-6)


@needs_c
def test_products_take_gelu_and_its_slope_with_them(ran):
    x, up, down = Tensor(normal(2, 13, 19)), Tensor(normal(37, 19)), Tensor(normal(19, 37))
    y = matmul(gelu(matmul(x, up, transpose_b=True)), down, transpose_b=True)
    Tensor.realize(y, *y.sum().gradient(x, up, down))
    assert not [name for name in ran if name.startswith("lama_gelu")]
    assert (
        len([name for name in ran if name.endswith("_gelu")])
        == len([name for name in ran if name.endswith("_factor")])
        == 1
    )


@needs_c
def test_a_product_whose_result_is_wanted_too_is_made_as_it_stands():
    x, up = normal(26, 19), normal(37, 19)
    before = matmul(Tensor(x), Tensor(up), transpose_b=True)
    after = gelu(before)
    Tensor.realize(after, before)
    expected = x.astype(float) @ up.T
    assert_all_close([before.numpy(), after.numpy()], [expected, gelu64(expected)])


# --- the embedding

ROWS = np.array([[3, 1, 4, 1], [5, 1, 2, 6]], np.int32)  # 1 three times, 0 never


def test_embedding_gathers_rows_and_its_gradient_adds_them_up(both):
    weight, dy = normal(7, 19), normal(2, 4, 19)
    tensor = Tensor(weight)
    ours = results(embedding(tensor, Tensor(ROWS)), dy, tensor)
    expected = np.zeros((7, 19))
    np.add.at(expected, ROWS, dy)
    assert_all_close(ours, [weight[ROWS], expected])
    assert (ours[0] == weight[ROWS]).all()
    assert (ours[1][0] == 0).all()


def test_gradient_of_a_table_that_a_product_reads_too_is_one_sum(both, ran):
    weight, dy = normal(7, 19), normal(2, 4, 7)
    tensor, other = Tensor(weight), Tensor(normal(19))
    gradients = matmul(embedding(tensor, Tensor(ROWS)) * other, tensor, transpose_b=True).gradient(
        tensor, other, gradient=Tensor(dy)
    )
    found = with_token_gradient(gradients)
    ours = [gradient.numpy() for gradient in found]
    x = weight[ROWS] * normal(19)
    expected = np.einsum("btn,btk->nk", dy, x.astype(float))
    np.add.at(expected, ROWS, (dy @ weight) * normal(19))
    assert_all_close(ours, [expected, ((dy @ weight) * weight[ROWS]).sum((0, 1))])
    if ran:
        assert found[0] is not gradients[0] and found[1] is gradients[1]
        assert ran[-1].endswith("_gradient_of_tokens_add")


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_embedding_takes_any_integers(both, dtype):
    weight = normal(7, 19)
    assert (embedding(Tensor(weight), Tensor(ROWS.astype(dtype))).numpy() == weight[ROWS]).all()


def test_embedding_of_a_token_that_is_no_row_is_zeros(both):
    tokens, weight = np.array([[7, 3, -1, 2**30]], np.int32), Tensor(normal(7, 19))
    rows, gradient = results(embedding(weight, Tensor(tokens)), np.ones((1, 4, 19), np.float32), weight)
    assert (rows[0, [0, 2, 3]] == 0).all() and (rows[0, 1] == normal(7, 19)[3]).all()
    assert gradient.sum() == 19 and (gradient[3] == 1).all()


@pytest.mark.parametrize("shape", [(2, 4), (4,)])
def test_embedding_adds_positions_and_gives_their_gradient(both, ran, shape):
    weight, table, tokens, dy = (
        normal(7, 19),
        normal(11, 19, seed=1),
        ROWS.ravel()[: int(np.prod(shape))].reshape(shape),
        normal(*shape, 19),
    )
    tensors = Tensor(weight), Tensor(table)
    ours = results(add(embedding(tensors[0], Tensor(tokens)), position_rows(tensors[1], 4)), dy, *tensors)
    d_weight, d_table = np.zeros((7, 19)), np.zeros((11, 19))
    np.add.at(d_weight, tokens, dy)
    d_table[:4] = dy.reshape(-1, 4, 19).sum(0, dtype=float)
    assert_all_close(ours, [weight[tokens] + table[:4], d_weight, d_table])


@pytest.mark.parametrize(
    "dtype", [dtypes.float32, dtypes.float16, dtypes.bfloat16], ids=["float32", "float16", "bfloat16"]
)
def test_embedding_reads_each_rows_position_when_it_runs_and_tables_of_any_type(both, ran, dtype):
    tables = [Tensor(normal(n, 19)).cast(dtype).contiguous().realize() for n in (7, 11)]
    weight, table = (t.float().numpy() for t in tables)
    positions = np.array([5, 0, 7][: len(ROWS)], np.int32)
    places = Tensor(positions).realize()
    ran.clear()
    rows = add(embedding(tables[0], Tensor(ROWS).realize()), position_rows(tables[1], ROWS.shape[1], places))
    assert rows.dtype == dtypes.float32
    expected = np.stack(
        [weight[row] + table[p : p + ROWS.shape[1]] for row, p in zip(ROWS, positions, strict=True)]
    )
    np.testing.assert_array_equal(rows.numpy(), expected)


# --- which path is taken


@needs_c
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("matvec", lambda x: matmul(x, x, transpose_b=True)),
        ("softmax", softmax),
        ("gelu", gelu),
        ("embedding", lambda x: embedding(x, Tensor([[1, 2]]))),
    ],
)
def test_kernels_serve_plain_float32_on_the_cpu_and_nothing_else(ran, monkeypatch, name, use):
    x = Tensor(normal(3, 37))
    use(x)
    assert len(ran) == 1 and ran[0].startswith(f"lama_{name}_")
    ran.clear()
    if name != "embedding":
        use(x.cast(dtypes.float16))
        use(x[: UOp.variable("n", 1, 3).bind(2)])
        use(Tensor.empty(0, 37))
        use(Tensor.empty(3, 37, device="NULL"))
    else:
        embedding(x, Tensor.empty(1, 5, dtype=dtypes.int32)[:, : UOp.variable("n", 1, 5).bind(2)])
        embedding(x, Tensor.empty(1, 0, dtype=dtypes.int32))
    monkeypatch.setattr(program, "_compiles_c", lambda device: False)
    use(x)
    monkeypatch.undo()
    assert not ran


@needs_c
@pytest.mark.parametrize(
    "use",
    [
        lambda: cross_entropy(Tensor(normal(2, 3, 5)), Tensor([1, 2, 3])),
        lambda: matmul(Tensor(normal(13, 7)), Tensor(normal(7, 5)), bias=Tensor([1.0])),
        lambda: matmul(Tensor(normal(2, 7)), Tensor(normal(5, 7)), transpose_b=True, bias=Tensor([1.0])),
        lambda: layernorm(Tensor(normal(3, 7)), Tensor([2.0]), Tensor(normal(7)), 1e-5),
        lambda: layernorm(Tensor(normal(3, 7)), Tensor(normal(7)), Tensor([2.0]), 1e-5),
    ],
    ids=["targets", "bias", "bias of few rows", "norm's weight", "norm's bias"],
)
def test_sizes_that_are_broadcast_are_left_to_the_plain_twin(ran, monkeypatch, use):
    here = use().numpy()
    assert not ran
    monkeypatch.setattr(program, "_reference", lambda: True)
    np.testing.assert_array_equal(here, use().numpy())


@needs_c
@pytest.mark.parametrize(
    "use",
    [
        lambda: cross_entropy(Tensor(normal(2, 3, 5)), Tensor([1, 2])),
        lambda: matmul(Tensor(normal(13, 7)), Tensor(normal(7, 5)), bias=Tensor(normal(4))),
        lambda: layernorm(Tensor(normal(3, 7)), Tensor(normal(6)), None, 1e-5),
        lambda: adamw(*(Tensor(normal(n)) for n in (5, 5, 5, 4, 3, 1)), 0.9, 0.99, 0.1)[0],
    ],
    ids=["targets", "bias", "norm's weight", "gradient"],
)
def test_sizes_that_disagree_are_refused(ran, use):
    with pytest.raises((ValueError, IndexError, RuntimeError, AssertionError)):
        use().numpy()
    assert not ran


@needs_c
@pytest.mark.parametrize("shape", [(3, 19), (9, 18)], ids=["too few", "another width"])
def test_positions_of_another_size_are_refused(shape):
    with pytest.raises((ValueError, IndexError, RuntimeError, AssertionError)):
        add(embedding(Tensor(normal(7, 19)), Tensor(ROWS)), position_rows(Tensor(normal(*shape)), 4)).numpy()


def test_reference_in_the_environment_turns_the_kernels_off(monkeypatch):
    for value, off in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("LAMA_REFERENCE", value)
        assert program._reference.__wrapped__() is off


@needs_c
def test_kernels_run_on_views_and_under_jit(ran):
    from tinygrad import TinyJit

    @TinyJit
    def product(a: Tensor, b: Tensor) -> Tensor:
        return gelu(matmul(a.transpose(0, 1), b)).realize()

    for seed in range(4):
        a, b = normal(5, 7, seed=seed), normal(5, 11, seed=seed)
        expected = gelu64(a.astype(float).T @ b)
        assert_all_close([product(Tensor(a).realize(), Tensor(b).realize()).numpy()], [expected])
    assert len(ran) == 4  # two kernels, in the first call and in the captured one


@needs_c
def test_what_a_kernel_wrote_is_not_copied_for_the_next():
    x = Tensor(normal(3, 37))
    y = gelu(x)
    assert program.materialise(y) is y and program.materialise(y.reshape(37, 3)).uop.base is y.uop
    lazy = x + 1
    one, other = program.materialise(lazy), program.materialise(lazy.reshape(37, 3))
    assert one.uop is not lazy.uop and one.uop is other.uop.src[0]
