"""Sums of gradients in a fixed binary tree: the same bits, whichever process computes a part of a batch."""

from collections.abc import Mapping, Sequence

import numpy as np
from tinygrad import Tensor

from lama.runtime.buffers import host_array
from lama.runtime.capture import CapturedStep
from lama.runtime.threads import on_threads
from lama.shapes import Array
from lama.training.optimizers import zeros_like_all

LARGE = 1 << 20  # this many numbers or more are added by several threads
IN_CACHE = 1 << 15  # `add_rows` adds this many numbers of a row at a time


def numbers_of_processes(parts: int) -> list[int]:
    """The numbers of processes that can share the parts of a batch: each gets 2ⁿ parts, or one gets all."""
    divisors = [n for n in range(2, parts + 1) if parts % n == 0]
    return [1, *(n for n in divisors if (parts // n).bit_count() == 1)]


def levels_of_sum(parts: int) -> int:
    """The number of partial sums that `TreeSum` keeps in addition to the gradients."""
    return (parts - 1).bit_length()


class TreeSum:
    """The sum of `count` gradients, given one after the other: neighbours first, then sums of neighbours.

    Four are added as (0 + 1) + (2 + 3). If a level has an odd number, the last one is carried to the next.
    Each aligned part of 2ⁿ gradients is a subtree, which one process can sum.
    """

    def __init__(self, count: int):
        self.count = count
        self._levels: list[dict[str, Tensor]] = []
        """Level k holds a sum of 2ᵏ gradients that waits for its neighbour."""
        self._steps: dict[int, CapturedStep[None]] = {}
        self._given: Mapping[str, Tensor] = {}

    def add(self, i: int, gradients: Mapping[str, Tensor]) -> None:
        """Add gradient `i`, always in the same tensors; after the last one, these hold the sum of all."""
        if self.count == 1:
            return
        if host_array(next(iter(gradients.values()))) is None:
            self._given = gradients
            self._steps.setdefault(i, CapturedStep(lambda: self._add_on_device(i)))()
            return

        def work(name: str) -> None:
            parts, into = self.parts(i, name, gradients)
            add_parts(parts, into)

        if sum(int(t.numel()) for t in gradients.values()) >= LARGE:
            on_threads(work, gradients)
        else:
            for name in gradients:
                work(name)

    def parts(self, i: int, name: str, gradients: Mapping[str, Tensor]) -> tuple[list[Array], Array]:
        """The arrays to add for gradient `i` of a parameter, earliest first, and the array for their sum."""
        merged, level = self._plan(i, gradients)
        leaf = _memory(gradients[name])
        parts = [*(_memory(self._levels[k][name]) for k in reversed(merged)), leaf]
        return parts, leaf if level is None else _memory(self._levels[level][name])

    def _plan(self, i: int, gradients: Mapping[str, Tensor]) -> tuple[list[int], int | None]:
        """The levels that gradient `i` is added to, lowest first, and the sum's level; None for the total."""
        while len(self._levels) < levels_of_sum(self.count):
            self._levels.append(zeros_like_all(gradients))
        if i == self.count - 1:
            return [k for k in range(len(self._levels)) if i >> k & 1], None
        level = (~i & i + 1).bit_length() - 1  # the number of ones at the end of i
        return list(range(level)), level

    def _add_on_device(self, i: int) -> None:
        gradients = self._given
        merged, level = self._plan(i, gradients)
        changed = []
        for name, total in gradients.items():
            for k in merged:
                total = (self._levels[k][name] + total).contiguous()  # else tinygrad adds in another order
            target = gradients[name] if level is None else self._levels[level][name]
            changed.append(target.assign(total))
        Tensor.realize(*changed)


def add_parts(parts: Sequence[Array], into: Array) -> None:
    """Write parts[0] + (parts[1] + (... + parts[-1])), float32 of one shape, to `into`, maybe parts[-1]."""
    *earlier, total = parts
    for part in reversed(earlier):
        np.add(part, total, out=into)
        total = into
    if total is not into:
        np.copyto(into, total)


def add_rows(rows: Array) -> Array:
    """The sum of the rows (n, k) float32 in the tree of `TreeSum`; overwrites the rows."""
    n, size = rows.shape
    for first in range(0, size, IN_CACHE):
        block, step = rows[:, first : first + IN_CACHE], 1
        while step < n:
            for i in range(0, n - step, 2 * step):
                block[i] += block[i + step]
            step *= 2
    total: Array = rows[0]
    return total


def _memory(tensor: Tensor) -> Array:
    found = host_array(tensor)
    assert found is not None, "gradients on the host"
    return found
