"""What a captured step reads and returns, without new tensors."""

import numpy as np
import pytest
from tinygrad import Tensor, TinyJit

from lama.jit import Input, capture_at_once, number
from lama.kernels import matmul


@pytest.mark.parametrize("device", ["CPU", "PYTHON"])
def test_input_gives_a_captured_step_its_new_numbers(device):
    put = Input(device)
    total = capture_at_once(lambda x: x.float().sum().realize())
    for i in range(4):
        numbers = np.arange(i, i + 21, dtype=np.int32).reshape(3, 7)
        assert number(total(put(numbers))) == numbers.sum()


def test_input_keeps_its_tensor_while_shape_and_dtype_stay():
    put = Input()
    first = put(np.zeros((2, 3), np.float32))
    assert put(np.ones((3, 2), np.float32).T) is first
    np.testing.assert_array_equal(first.numpy(), np.ones((2, 3)))
    assert put(np.ones((3, 2), np.float32)).shape == (3, 2)
    assert put(np.ones((3, 2), np.int32)).numpy().dtype == np.int32


def test_number_reads_what_a_tensor_holds():
    assert number(Tensor([0.1]).realize()) == np.float32(0.1)
    assert number((Tensor([1.0, 2.0]).realize().sum() + 0.5).realize()) == 3.5


@pytest.mark.parametrize("device", ["CPU", "PYTHON"])
def test_other_tensors_are_read_where_they_are(device):
    a, b = (Tensor(np.full((3, 7), n, np.float32), device=device).realize() for n in (1, 10))
    weight = Tensor(np.ones((7, 7), np.float32), device=device).realize()
    step = capture_at_once(lambda x, y: (matmul(x, weight) + 2 * y).realize())
    for x, y, expected in ((a, b, 27), (a, b, 27), (b, a, 72), (b, a, 72), (a, b, 27)):
        assert (step(x, y).numpy() == expected).all()


def test_an_input_that_the_step_writes_is_given_to_it_unchanged_every_time():
    x, total = (Tensor(np.full((3, 7), n, np.float32), device="CPU").realize() for n in (1, 0))

    def count(x: Tensor) -> Tensor:
        total.assign(total + x)
        return x.assign(x * 2).realize(total)

    step = capture_at_once(count)
    seen = [(step(x).numpy()[0, 0], total.numpy()[0, 0]) for _ in range(4)]
    plain = TinyJit(count)
    plain.cnt = 1
    x.assign(Tensor(np.ones((3, 7), np.float32), device="CPU")).realize()
    total.assign(Tensor(np.zeros((3, 7), np.float32), device="CPU")).realize()
    assert seen == [(plain(x).numpy()[0, 0], total.numpy()[0, 0]) for _ in range(4)]
