"""Conversations in rows of a context: several in a row, each of which sees only itself."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count

import numpy as np

from lama.shapes import Array

PACKED_TOGETHER = 2048  # conversations that are packed together: more fill the rows no better

Arrays = tuple[Array, Array, Array, Array]


class PackedRows:
    """Conversations in rows of `context_length` tokens; each epoch has every one once, in its own order.

    The order is a function of seed and epoch. Without `packing`, a row has one conversation.
    """

    def __init__(
        self,
        ids: Array,
        ends: Array,
        counted: Array,
        context_length: int,
        seed: int,
        packing: bool = True,
    ):
        """`ids`, `ends` and `counted` are those of a part of `TokenFiles`, none longer than a row and 1."""
        self.ids, self.counted, self.context_length = ids, counted, context_length
        self.begins = np.concatenate([[0], ends[:-1]])
        self.lengths = np.asarray(ends) - self.begins - 1  # the last token is only a target
        self.seed, self.packing = seed, packing
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self._firsts = [0]  # of each epoch, counted through all

    def _epoch(self, number: int) -> list[list[int]]:
        """The conversations in each row of an epoch: the longest first, each in the least space for it."""
        rng = np.random.default_rng((self.seed, number))
        order = rng.permutation(len(self.lengths)).tolist()
        if not self.packing:
            return [[i] for i in order]
        rows: list[list[int]] = []
        for start in range(0, len(order), PACKED_TOGETHER):
            spaces: list[tuple[int, int]] = []  # of the rows, sorted, with their numbers
            for i in sorted(order[start : start + PACKED_TOGETHER], key=lambda i: -self.lengths[i]):
                length = int(self.lengths[i])
                place = bisect_left(spaces, (length, -1))
                if place < len(spaces):
                    space, row = spaces.pop(place)
                else:
                    space, row = self.context_length, len(rows)
                    rows.append([])
                rows[row].append(i)
                insort(spaces, (space - length, row))
        return [rows[i] for i in rng.permutation(len(rows))]

    def steps(self, epochs: int, batch_size: int) -> int:
        """The batches that hold so many epochs; the last one may begin another epoch."""
        return -(-sum(len(self._epoch(i)) for i in range(epochs)) // batch_size)

    def row(self, number: int) -> list[int]:
        """A row, counted from 0 through all epochs."""
        for epoch in count():
            if epoch + 1 == len(self._firsts):
                self._firsts.append(self._firsts[-1] + len(self.epoch(epoch)))
            if number < self._firsts[epoch + 1]:
                return self.epoch(epoch)[number - self._firsts[epoch]]
        raise AssertionError

    def batches(self, batch_size: int) -> Callable[[int], Arrays]:
        """The arrays of each step, a function of seed and step."""
        return lambda step: self.arrays([self.row(step * batch_size + i) for i in range(batch_size)])

    def arrays(self, rows: Sequence[Sequence[int]]) -> Arrays:
        """Inputs, targets, the starts of `GPT.hidden` and the loss's weights, each (rows, context_length).

        The mean of loss x weight over all positions is the mean loss of a token that counts; so it is, summed
        up, over parts of the rows. A position after the last conversation sees only itself.
        """
        B, T = len(rows), self.context_length
        inputs, targets = np.zeros((2, B, T), np.int32)
        starts = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        weights = np.zeros((B, T), np.float32)
        for b, row in enumerate(rows):
            at = 0
            for i in row:
                begin, n = int(self.begins[i]), int(self.lengths[i])
                place, here = slice(at, at + n), slice(begin, begin + n)
                after = slice(begin + 1, begin + n + 1)
                inputs[b, place], targets[b, place] = self.ids[here], self.ids[after]
                weights[b, place] = self.counted[after]
                starts[b, place] = at
                at += n
        return inputs, targets, starts, weights * np.float32(weights.size / max(1.0, weights.sum()))
