"""Large buffers lie in large pages, where the system has them."""

import numpy as np
import pytest
from test_kernels import needs_c
from tinygrad import Device, Tensor, dtypes

from lama.runtime import buffers
from lama.runtime.buffers import LARGE, LargePages, use_large_pages


@needs_c
def test_large_buffers_hold_numbers_and_start_at_zero():
    use_large_pages("CPU")
    use_large_pages("CPU")  # twice is once
    assert not isinstance(getattr(Device["CPU"].allocator._alloc, "_alloc", None), LargePages)
    n = LARGE // 4 + 3
    numbers = np.arange(n, dtype=np.float32)
    x = Tensor(numbers).realize()
    np.testing.assert_array_equal((x + 1).numpy(), numbers + 1)
    # Memory of its own: nothing was freed in this size.
    assert (Tensor.empty(n + 1024).realize().numpy() == 0).all()


def test_other_devices_keep_their_allocators():
    use_large_pages("NULL")
    assert not isinstance(Device["NULL"].allocator._alloc, LargePages)


@pytest.mark.parametrize("dtype", [dtypes.float32, dtypes.float16, dtypes.bfloat16, dtypes.int32], ids=str)
@pytest.mark.parametrize("tested", [True, False], ids=["tested release", "another"])
def test_bytes_that_are_read_can_be_written(dtype, tested, monkeypatch):
    monkeypatch.setattr(buffers, "is_tested", lambda: tested)
    tensor = Tensor([[1, 2], [3, 4], [5, 6]], dtype=dtype).contiguous().realize()
    rows = buffers.read(tensor).reshape(3, -1)
    assert buffers.write(tensor, rows[[2, 0, 1]]) is tensor
    assert tensor.float().tolist() == [[5, 6], [1, 2], [3, 4]]
