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


@needs_c
def test_zeros_are_zero_where_memory_was_used_before_and_keep_their_numbers_in_large_pages():
    use_large_pages("CPU")
    for n in (3, buffers.FRESH // 4 + 1, LARGE // 4 + 5):
        used = buffers.from_array(np.ones(n, np.float32), dtypes.float32, "CPU")
        del used
        zeros = buffers.zeros(n, dtype=dtypes.float32, device="CPU")
        memory = buffers.host_array(zeros)
        assert memory is not None and not memory.any()
        memory[:] = np.arange(n)
        buffers.use_large_pages_for(zeros)
        np.testing.assert_array_equal(zeros.numpy(), np.arange(n, dtype=np.float32))


@needs_c
def test_packed_tensors_lie_side_by_side_on_lines_of_the_cache_and_die_together():
    use_large_pages("CPU")
    with buffers.packed("CPU"):
        tensors = [
            buffers.from_array(np.full(n, n % 251, np.uint8), dtypes.uint8, "CPU") for n in (3, 65, 1000)
        ]
        large = buffers.empty(LARGE, dtype=dtypes.uint8, device="CPU")
    outside = buffers.from_array(np.zeros(7, np.uint8), dtypes.uint8, "CPU")
    at = [buffers.address_of(buffers.buffer_of(tensor)) for tensor in (*tensors, large, outside)]
    assert at[0] % 64 == 0 and [at[1] - at[0], at[2] - at[1]] == [64, 128]
    assert all(not at[0] <= other < at[0] + buffers.SHARED for other in at[3:])
    assert [tensor.numpy().tolist() for tensor in tensors] == [[n % 251] * n for n in (3, 65, 1000)]


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5)])
@pytest.mark.parametrize("tested", [True, False], ids=["tested release", "another"])
def test_empty_is_tinygrad_s_own_empty(shape, tested, monkeypatch):
    monkeypatch.setattr(buffers, "is_tested", lambda: tested)
    ours, theirs = buffers.empty(*shape, dtype=dtypes.int32), Tensor.empty(*shape, dtype=dtypes.int32)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert [u.op for u in ours.uop.toposort()] == [u.op for u in theirs.uop.toposort()]
