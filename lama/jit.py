"""TinyJit without what it costs: the call that it does not capture, its own work in every other, new tensors for a call's numbers."""

from collections.abc import Callable, Sequence
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

    TinyJit asks in every call what its inputs are and where: 1 ms of Python for a step of training. Where a call's inputs are
    the very tensors of the last call, as `Input` makes them, and all that was captured can be done again as it was, it is.
    """

    def __init__(self, step: Callable[..., Any]):
        self.jit: Any = TinyJit(step)
        self.jit.cnt = 1
        self._last: list[UOp] = []
        self._graphs: list[tuple[Any, int]] = []
        self._result: Any = None

    def __call__(self, *inputs: Any) -> Any:
        if self._graphs and self._are_the_last(inputs) and all(graph.placed == placed for graph, placed in self._graphs):
            for graph, _ in self._graphs:
                graph.again()
            return self._result
        self._last, self._graphs = [], []  # should this call be interrupted, the next one asks
        self._result = self.jit(*inputs)
        uops = [x.uop for x in inputs if isinstance(x, Tensor)]
        if len(uops) == len(inputs) and (graphs := _repeatable(self.jit.captured, uops)):
            self._last, self._graphs = uops, [(graph, graph.placed) for graph in graphs]
        return self._result

    def _are_the_last(self, inputs: Sequence[Any]) -> bool:
        return len(inputs) == len(self._last) and all(
            isinstance(x, Tensor) and x.uop is last for x, last in zip(inputs, self._last, strict=True)
        )


def _repeatable(captured: Any, inputs: list[UOp]) -> list[Any]:
    """The device's graphs that are all that was captured, each with a method `again` that runs it once more in the same places
    and counts in `placed` how often it got new ones. Empty if there is more to do, or somebody wants to see what runs."""
    if captured is None or DEBUG or PROFILE or any(u.base in captured._written_uops for u in inputs):
        return []
    parts = [call.src[0] for call in captured.linear.src]
    if not all(part.op is Ops.CUSTOM_FUNCTION and part.arg == "graph" for part in parts):
        return []
    graphs = [get_graph_runtime(part) for part in parts]
    return graphs if all(hasattr(graph, "again") for graph in graphs) else []


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
