"""What a captured step reads and returns, without new tensors."""

import numpy as np
import pytest
from tinygrad import Tensor

from lama.jit import Input, capture_at_once, number


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
