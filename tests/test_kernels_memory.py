"""Large buffers lie in large pages, where the system has them."""

import numpy as np
from test_kernels import needs_c
from tinygrad import Device, Tensor

from lama.kernels import use_large_pages
from lama.kernels.memory import LARGE, LargePages


@needs_c
def test_large_buffers_hold_numbers_and_start_at_zero():
    use_large_pages("CPU")
    use_large_pages("CPU")  # twice is once
    assert not isinstance(getattr(Device["CPU"].allocator._alloc, "_alloc", None), LargePages)
    n = LARGE // 4 + 3
    numbers = np.arange(n, dtype=np.float32)
    x = Tensor(numbers).realize()
    np.testing.assert_array_equal((x + 1).numpy(), numbers + 1)
    assert (Tensor.empty(n + 1024).realize().numpy() == 0).all()  # memory of its own: nothing was freed in this size


def test_other_devices_keep_their_allocators():
    use_large_pages("NULL")
    assert not isinstance(Device["NULL"].allocator._alloc, LargePages)
