"""The layout of tensors in memory: kernels read views of a realised tensor in place, without a copy."""

import functools
import math
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, UOp

from lama.runtime.internals import Ops, is_tested


@dataclass(frozen=True)
class Layout:
    """A view's place in its base: element (i, j) is element offset + i · strides[0] + j · strides[1]."""

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


def strided_view(x: Tensor) -> tuple[Tensor, Layout]:
    """The realised tensor that x is a view of, and the layout of x in it. Other tensors are copied first."""
    found = _strided_view(x)
    return (_copy(x), _rows_of(x)) if found is None else found


def materialise(x: Tensor) -> Tensor:
    """x if it is already realised, otherwise a contiguous copy shared by all callers.

    `Tensor.contiguous` would also copy a kernel's result.
    """
    if not is_tested():
        return x.contiguous()
    base = without_reshapes(x.uop)
    if base.has_buffer_identity(after_ok=True):
        return x
    found = _strided_view(x)
    if found is not None and found[0].numel() == x.numel() and found[1] == _rows_of(x):
        return found[0].reshape(x.shape)
    return _copy(x)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose rows follow one another; 0 for an axis of length 1."""
    return tuple(0 if n == 1 else math.prod(shape[i + 1 :]) for i, n in enumerate(shape))


@functools.cache
def partitions(numel: int, layouts: tuple[Layout, ...]) -> bool:
    """Whether each element of a base of `numel` is in exactly one view; a view's first axis is the batch."""
    batch = layouts[0].shape[0]
    if sum(math.prod(layout.shape) for layout in layouts) != numel or numel % batch:
        return False
    # All rows of the batch have the same layout: checking one is enough.
    for layout in layouts:
        if layout.shape[0] != batch or (batch > 1 and layout.strides[0] != numel // batch):
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
    """x.shape as integers; no size in it may be symbolic."""
    return tuple(int(size) for size in x.shape)


def without_reshapes(uop: UOp) -> UOp:
    """The UOp of a tensor before it was reshaped."""
    while uop.op is Ops.RESHAPE:
        uop = uop.src[0]
    return uop


def _rows_of(x: Tensor) -> Layout:
    return Layout(shape_of(x), 0, contiguous_strides(shape_of(x)))


def _copy(x: Tensor) -> Tensor:
    """A copy of the tensor that x reshapes; other reshapes of that tensor share the copy."""
    return Tensor(without_reshapes(x.uop)).contiguous().reshape(x.shape)


def _strided_view(x: Tensor) -> tuple[Tensor, Layout] | None:
    """`strided_view`, or None if x is not a view of a realised tensor or has symbolic sizes."""
    steps: list[tuple[Ops, tuple]] = []
    base = x.uop
    # Stop at a realised tensor even if it reshapes another: gradients are taken with respect to it.
    moves = (Ops.RESHAPE, Ops.PERMUTE, Ops.SHRINK, Ops.EXPAND)
    while base.op in moves and not base.has_buffer_identity(after_ok=True):
        steps.append((base.op, base.marg))
        base = base.src[0]
    arguments = [argument for _, argument in steps]
    if not base.has_buffer_identity(after_ok=True) or not _is_static((base.shape, *arguments)):
        return None
    layout = _layout(tuple(int(n) for n in base.shape), tuple(reversed(steps)))
    return None if layout is None else (Tensor(base), layout)


def _is_static(x: object) -> bool:
    """Whether nested tuples contain only integers."""
    return all(map(_is_static, x)) if isinstance(x, (tuple, list)) else isinstance(x, int)


@functools.cache
def _layout(shape: tuple[int, ...], steps: tuple[tuple[Ops, tuple], ...]) -> Layout | None:
    """The layout after these steps on a contiguous tensor of this shape; None if the result is not a view."""
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
    strides = tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    return Layout(shape, offset, strides)


def _reshaped(
    shape: tuple[int, ...], strides: tuple[int, ...], new: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The strides of a view after a reshape; None if no strides describe it."""
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
