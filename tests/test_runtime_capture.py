"""What a captured step reads and returns, without new tensors."""

import numpy as np
import pytest
from tinygrad import Tensor

from lama.ops import matmul
from lama.runtime.buffers import read_scalar
from lama.runtime.capture import CapturedStep, InputBuffer


@pytest.mark.parametrize("device", ["CPU", "PYTHON"])
def test_input_gives_a_captured_step_its_new_numbers(device):
    put = InputBuffer(device)
    total = CapturedStep(lambda x: x.float().sum().realize())
    for i in range(4):
        numbers = np.arange(i, i + 21, dtype=np.int32).reshape(3, 7)
        assert read_scalar(total(put(numbers))) == numbers.sum()


def test_input_keeps_its_tensor_while_shape_and_dtype_stay():
    put = InputBuffer()
    first = put(np.zeros((2, 3), np.float32))
    assert put(np.ones((3, 2), np.float32).T) is first
    np.testing.assert_array_equal(first.numpy(), np.ones((2, 3)))
    assert put(np.ones((3, 2), np.float32)).shape == (3, 2)
    assert put(np.ones((3, 2), np.int32)).numpy().dtype == np.int32


def test_number_reads_what_a_tensor_holds():
    assert read_scalar(Tensor([0.1]).realize()) == np.float32(0.1)
    assert read_scalar((Tensor([1.0, 2.0]).realize().sum() + 0.5).realize()) == 3.5


@pytest.mark.parametrize("device", ["CPU", "PYTHON"])
def test_other_tensors_are_read_where_they_are(device):
    a, b = (Tensor(np.full((3, 7), n, np.float32), device=device).realize() for n in (1, 10))
    weight = Tensor(np.ones((7, 7), np.float32), device=device).realize()
    step = CapturedStep(lambda x, y: (matmul(x, weight) + 2 * y).realize())
    for x, y, expected in ((a, b, 27), (a, b, 27), (b, a, 72), (b, a, 72), (a, b, 27)):
        assert (step(x, y).numpy() == expected).all()


def test_a_result_given_back_is_read_before_it_is_written():
    weight = Tensor(np.full((7, 7), 2, np.float32), device="CPU").realize()
    step = CapturedStep(lambda x: (matmul(x, weight) + x).realize())
    x, expected = Tensor(np.ones((3, 7), np.float32), device="CPU").realize(), 1
    for _ in range(4):
        x, expected = step(x), expected * 15
        assert (x.numpy() == expected).all()


def test_a_tensor_computed_anew_is_read_anew():
    weight = Tensor(np.ones((7, 7), np.float32), device="CPU").realize()
    x = Tensor(np.ones((3, 7), np.float32), device="CPU").realize()
    step = CapturedStep(lambda x: (matmul(x, weight) + x).realize())
    for i in range(1, 5):
        assert (step(x + 1).numpy() == 8 * (i + 1)).all()
        x.assign(x + 1).realize()


def test_an_interrupted_call_is_not_taken_for_the_last_one(monkeypatch):
    a, b = (Tensor(np.full((3, 7), n, np.float32), device="CPU").realize() for n in (1, 10))
    weight = Tensor(np.ones((7, 7), np.float32), device="CPU").realize()
    step = CapturedStep(lambda x: (matmul(x, weight) + x).realize())
    step(a)
    ask = type(step.jit).__call__

    def interrupted(self, *inputs):
        ask(self, *inputs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(step.jit), "__call__", interrupted)
        step(b)
    assert (step(a).numpy() == 8).all()
