"""Steps that tinygrad captures once and replays, and the tensors that are their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from tinygrad import Tensor, TinyJit, UOp

from lama.runtime.buffers import buffer_of, write
from lama.runtime.internals import DEBUG, PROFILE, Ops, get_graph_runtime, is_tested
from lama.shapes import Array

if TYPE_CHECKING:
    from lama.runtime.threads import CallGraph

R = TypeVar("R")


class CapturedStep(Generic[R]):
    """A function of tensors, captured by its first call and replayed by the others.

    TinyJit first runs a function once without capturing it, to realise its tensors. Here every tensor that
    the function reads must already be realised, which saves half of the start-up. Results are overwritten by
    the next call.

    TinyJit also looks up its inputs in every call: 1 ms of Python for a training step. That is skipped if a
    call has the same tensors as the last one (see `InputBuffer`) and nothing else can have changed.
    """

    def __init__(self, step: Callable[..., R]):
        self.jit = TinyJit(step)
        if is_tested():
            self.jit.cnt = 1
        self._last: list[UOp] = []
        self._graphs: list[tuple[CallGraph, int]] = []
        self._result: list[R] = []
        self._watched: tuple[Sequence[Sequence[Tensor]], Callable[[int], None]] = (), lambda group: None

    def __call__(self, *inputs: object) -> R:
        """The step's result for these tensors; other arguments must be the same in every call."""
        if self._can_rerun(inputs):
            groups, complete = self._watched
            for (graph, _), stops in zip(self._graphs, self._stops(groups), strict=True):
                done = 0
                for n, group in stops:
                    graph.rerun(done, n)
                    done = n
                    complete(group)
                graph.rerun(done)
            return self._result[0]
        self._last, self._graphs = [], []  # if this call is interrupted, the next one looks everything up
        result: R = self.jit(*inputs)
        self._result = [result]
        uops = [x.uop for x in inputs if isinstance(x, Tensor)]
        if len(uops) == len(inputs) and (graphs := self._repeatable(uops)):
            self._last, self._graphs = uops, [(graph, graph.bindings) for graph in graphs]
        return result

    @contextmanager
    def watched(self, groups: Sequence[Sequence[Tensor]], complete: Callable[[int], None]) -> Iterator[None]:
        """Let replays in the block call `complete` with a group's number once its tensors are computed.

        The tensors must be realised. The first calls of a step, and all calls off the CPU, report nothing.
        """
        self._watched = groups, complete
        try:
            yield
        finally:
            self._watched = (), complete

    def _stops(self, groups: Sequence[Sequence[Tensor]]) -> list[list[tuple[int, int]]]:
        """For each graph, the calls after which a group is complete, in order, and the group's number."""
        writes = {
            buffer: (i, n)
            for i, (graph, _) in enumerate(self._graphs if groups else ())
            for buffer, n in graph.last_writes().items()
        }
        found: list[list[tuple[int, int]]] = [[] for _ in self._graphs]
        end = max(writes.values(), default=(0, 0))  # for a tensor that no graph is known to write
        for number, group in enumerate(groups):
            i, n = max(writes.get(id(buffer_of(tensor).base), end) for tensor in group)
            found[i].append((n, number))
        return [sorted(stops) for stops in found]

    def _can_rerun(self, inputs: Sequence[object]) -> bool:
        return (
            len(self._graphs) > 0
            and len(inputs) == len(self._last)
            and all(
                isinstance(x, Tensor) and x.uop is last for x, last in zip(inputs, self._last, strict=True)
            )
            and all(graph.bindings == n for graph, n in self._graphs)
        )

    def _repeatable(self, inputs: list[UOp]) -> list[CallGraph]:
        """The captured graphs if they are the whole step, else none; none with DEBUG or PROFILE."""
        from lama.runtime.threads import CallGraph

        captured = self.jit.captured
        if not is_tested() or captured is None or DEBUG or PROFILE:
            return []
        parts = [call.src[0] for call in captured.linear.src]
        if not all(part.op is Ops.CUSTOM_FUNCTION and part.arg == "graph" for part in parts):
            return []
        if any(uop.base in captured._written_uops for uop in inputs):
            return []
        graphs = [get_graph_runtime(part) for part in parts]
        found = [graph for graph in graphs if isinstance(graph, CallGraph)]
        return found if len(found) == len(graphs) else []


class InputBuffer:
    """One input of a captured step: a tensor whose numbers are replaced in place.

    A new tensor would cost milliseconds.
    """

    def __init__(self, device: str | None = None):
        self.device = device
        self._tensor: Tensor | None = None
        self._kind: tuple[tuple[int, ...], str] | None = None

    def __call__(self, array: Array) -> Tensor:
        """These numbers as a realised tensor: the same tensor as before if shape and dtype are the same."""
        array = np.ascontiguousarray(array)
        kind = (array.shape, array.dtype.str)
        if self._tensor is not None and self._kind == kind:
            return write(self._tensor, array)
        self._tensor, self._kind = Tensor(array, device=self.device).realize(), kind
        return self._tensor
