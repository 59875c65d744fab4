"""Where a tensor's elements lie in memory: kernels read views of a stored tensor in place, where tinygrad would copy them."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tinygrad import Tensor, UOp
from tinygrad.uop.ops import Ops


@dataclass(frozen=True)
class Layout:
    """Element (i, j, ...) of a view is at offset + i · strides[0] + j · strides[1] + ... of its base, all counted in elements."""

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def view(x: Tensor) -> tuple[Tensor, Layout]:
    """x as a view of a stored tensor: that, which may have any shape, and where in it x lies. What is no view is stored first."""
    found = _view(x)
    if found is None:
        return _copy(x), Layout(shape_of(x), 0, contiguous_strides(shape_of(x)))
    return found


def stored(x: Tensor) -> Tensor:
    """x where it is in memory as it stands, such as a kernel's result, else x made contiguous, once for all who ask.

    `Tensor.contiguous` copies what a kernel wrote.
    """
    base = without_reshapes(x.uop)
    if base.has_buffer_identity(after_ok=True):
        return x
    found = _view(x)
    if found is not None and found[0].numel() == x.numel() and found[1] == Layout(shape_of(x), 0, contiguous_strides(shape_of(x))):
        return found[0].reshape(x.shape)
    return _copy(x)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a tensor that is stored row by row; an axis of length 1 has none, 0."""
    return tuple(0 if n == 1 else math.prod(shape[i + 1 :]) for i, n in enumerate(shape))


@functools.cache
def covers(numel: int, layouts: tuple[Layout, ...]) -> bool:
    """Whether each element of a base of `numel` belongs to exactly one of these views, each of which has an axis for the batch first."""
    batch = layouts[0].shape[0]
    if sum(math.prod(layout.shape) for layout in layouts) != numel or numel % batch:
        return False
    # The same in each row of the batch, so that one tells.
    if any(layout.shape[0] != batch or (batch > 1 and layout.strides[0] != numel // batch) for layout in layouts):
        return False
    hits = np.zeros(numel // batch, np.int8)
    for layout in layouts:
        places = np.full((1,) * len(layout.shape[1:]), layout.offset)
        for axis, (size, stride) in enumerate(zip(layout.shape[1:], layout.strides[1:], strict=True)):
            places = places + (np.arange(size) * stride).reshape(-1, *[1] * (len(layout.shape) - 2 - axis))
        if places.max() >= len(hits):
            return False
        np.add.at(hits, places.ravel(), 1)
    return bool((hits == 1).all())


def shape_of(x: Tensor) -> tuple[int, ...]:
    """x.shape where nothing in it is symbolic."""
    return tuple(int(size) for size in x.shape)


def without_reshapes(uop: UOp) -> UOp:
    """What a tensor was before it was given other shapes."""
    while uop.op is Ops.RESHAPE:
        uop = uop.src[0]
    return uop


def _copy(x: Tensor) -> Tensor:
    """Not of x but of what it is a reshape of: other reshapes of that share the copy."""
    return Tensor(without_reshapes(x.uop)).contiguous().reshape(x.shape)


def _view(x: Tensor) -> tuple[Tensor, Layout] | None:
    """As `view`, but None for what is no view of a stored tensor, or not one of plain numbers."""
    steps: list[tuple[Ops, tuple]] = []
    base = x.uop
    # Not down to what a stored tensor is a reshape of: that is no tensor that anyone asks the gradient of.
    while base.op in (Ops.RESHAPE, Ops.PERMUTE, Ops.SHRINK, Ops.EXPAND) and not base.has_buffer_identity(after_ok=True):
        steps.append((base.op, base.marg))
        base = base.src[0]
    if not base.has_buffer_identity(after_ok=True) or not all(isinstance(n, int) for n in _flat((base.shape, [step[1] for step in steps]))):
        return None
    layout = _layout(tuple(int(n) for n in base.shape), tuple(reversed(steps)))
    return None if layout is None else (Tensor(base), layout)


def _flat(x: Any) -> Iterator[Any]:
    if isinstance(x, (tuple, list)):
        for part in x:
            yield from _flat(part)
    else:
        yield x


@functools.cache
def _layout(shape: tuple[int, ...], steps: tuple[tuple[Ops, tuple], ...]) -> Layout | None:
    """What these steps make of a tensor of this shape, stored row by row; None if the result is no view of it."""
    offset, strides = 0, contiguous_strides(shape)
    for op, argument in steps:
        if op is Ops.PERMUTE:
            shape, strides = tuple(shape[i] for i in argument), tuple(strides[i] for i in argument)
        elif op is Ops.SHRINK:
            offset += sum(first * stride for (first, _), stride in zip(argument, strides, strict=True))
            shape = tuple(size for _, size in argument)
        elif op is Ops.EXPAND:  # new axes, before the others
            shape, strides = (*argument, *shape), (*[0] * len(argument), *strides)
        elif (new := _reshaped(shape, strides, argument)) is not None:
            shape, strides = argument, new
        else:
            return None
    return Layout(shape, offset, tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True)))


def _reshaped(shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...] | None:
    """The strides of a view of another shape; None where there are none."""
    runs: list[tuple[int, int]] = []  # axes that follow one another in memory, as one: size and stride
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    found: list[int] = []
    for size in reversed(new):
        if size == 1:
            found.append(0)
            continue
        left, stride = runs.pop()
        if left % size:
            return None
        found.append(stride)
        if left > size:
            runs.append((left // size, stride * size))
    return tuple(reversed(found))
