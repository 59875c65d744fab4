"""TinyJit without what it costs: the call that it does not capture, its own work in every other, new tensors for a call's numbers."""

from collections.abc import Callable
from typing import Any

import numpy as np
from tinygrad import Tensor, TinyJit, UOp
from tinygrad.device import Buffer
from tinygrad.engine.realize import get_graph_runtime
from tinygrad.helpers import DEBUG, PROFILE
from tinygrad.uop.ops import Ops


def capture_at_once(step: Callable[..., Any]) -> "Captured":
    """`step`, captured by its first call and replayed by the others, which saves half of the start-up.

    TinyJit runs a function once without capturing it, for tensors that are not realised until then: here every tensor
    that `step` reads must be realised before. Its results are overwritten by the next call.
    """
    return Captured(step)


class Captured:
    """What `capture_at_once` makes.

    TinyJit asks in every call what its inputs are and where: 2 ms of Python for a step of training. Where a call's inputs are
    the very tensors of the last call, as `Input` makes them, and all that was captured can be done again as it was, it is.
    """

    def __init__(self, step: Callable[..., Any]):
        self.jit: Any = TinyJit(step)
        self.jit.cnt = 1
        self._last: list[UOp] = []
        self._again: list[Callable[[], None]] = []
        self._result: Any = None

    def __call__(self, *inputs: Any) -> Any:
        uops = [x.uop if isinstance(x, Tensor) else None for x in inputs]
        if self._again and len(uops) == len(self._last) and all(x is y for x, y in zip(uops, self._last, strict=True)):
            for run in self._again:
                run()
            return self._result
        self._result = self.jit(*inputs)
        found = [u for u in uops if u is not None]
        self._last, self._again = found, _repeatable(self.jit.captured, found) if len(found) == len(uops) else []
        return self._result


def _repeatable(captured: Any, inputs: list[UOp]) -> list[Callable[[], None]]:
    """What does all that was captured once more in the same places: one `again` for each of the device's graphs. Empty if
    there is more to do than that, or somebody wants to see what runs."""
    if captured is None or DEBUG or PROFILE or any(u.base in captured._written_uops for u in inputs):
        return []
    parts = [call.src[0] for call in captured.linear.src]
    if not all(part.op is Ops.CUSTOM_FUNCTION and part.arg == "graph" for part in parts):
        return []
    runs = [getattr(get_graph_runtime(part), "again", None) for part in parts]
    return [run for run in runs if run is not None] if None not in runs else []


class Input:
    """One input of a captured step: a tensor that gets new numbers in place. To make a new one takes tinygrad milliseconds."""

    def __init__(self, device: str | None = None):
        self.device = device
        self._tensor: Tensor | None = None
        self._kind: tuple[Any, ...] = ()

    def __call__(self, array: np.ndarray) -> Tensor:
        """These numbers as a realised tensor, the same one as before where shape and dtype are the same."""
        array = np.ascontiguousarray(array)
        if self._tensor is None or self._kind != (array.shape, array.dtype):
            self._tensor, self._kind = Tensor(array, device=self.device).realize(), (array.shape, array.dtype)
            return self._tensor
        buffer, numbers = _buffer(self._tensor), array.data.cast("B")
        if buffer.device.startswith("CPU"):
            buffer.as_memoryview(force_zero_copy=True).cast("B")[:] = numbers
        else:
            buffer.copy_from(Buffer("PYTHON", buffer.size, buffer.dtype, opaque=numbers))
        return self._tensor


def number(x: Tensor) -> float:
    """The number in a realised float32 tensor that has one. `Tensor.item` takes half a millisecond."""
    return float(_buffer(x).as_memoryview(allow_zero_copy=True).cast("B").cast("f")[0])


def _buffer(x: Tensor) -> Buffer:
    buffer = x.uop.base.buffer
    assert isinstance(buffer, Buffer), "a tensor on several devices at once"
    return buffer
