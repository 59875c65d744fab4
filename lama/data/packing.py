"""Conversations packed into rows of a context: several in a row, each of which sees only itself."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np

from lama.shapes import Array

PACKED_TOGETHER = 2048  # conversations that are packed together; more do not fill the rows better

Arrays = tuple[Array, ...]


class PackedRows:
    """Conversations in rows of `context_length` tokens; each epoch has every conversation once.

    Their order is a function of seed and epoch. Without `packing`, a row has one conversation.
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
        """`ids`, `ends`, `counted`: those of a part of `TokenFiles`; texts of at most context_length + 1."""
        self.ids, self.counted, self.context_length = ids, counted, context_length
        self.begins = np.concatenate([[0], ends[:-1]])
        self.lengths = np.asarray(ends) - self.begins - 1  # the last token is only a target
        self.sizes = self.lengths
        """The tokens of each unit that is packed: a conversation."""
        self.seed, self.packing = seed, packing
        self.epoch = lru_cache(maxsize=2)(self._epoch)
        self._firsts = [0]  # the number of each epoch's first row

    def _epoch(self, number: int) -> list[list[int]]:
        """The conversations in each row of an epoch: longest first, each in the smallest space that fits."""
        rng = np.random.default_rng((self.seed, number))
        order = rng.permutation(len(self.sizes)).tolist()
        if not self.packing:
            return [[i] for i in order]
        rows: list[list[int]] = []
        for start in range(0, len(order), PACKED_TOGETHER):
            spaces: list[tuple[int, int]] = []  # of the rows, sorted, with their numbers
            for i in sorted(order[start : start + PACKED_TOGETHER], key=lambda i: -self.sizes[i]):
                length = int(self.sizes[i])
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
        """The number of batches in so many epochs; the last batch may begin another epoch."""
        return -(-sum(len(self._epoch(i)) for i in range(epochs)) // batch_size)

    def row(self, number: int) -> list[int]:
        """The conversations in a row; rows are counted from 0 over all epochs."""
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

        The mean of loss · weight over all positions is the mean loss of the tokens that count. The mean of
        these means over equal parts of the rows is the same. A position after the last conversation sees only
        itself.
        """
        *arrays, counted = self._filled(rows)
        weights = counted.astype(np.float32)
        return (*arrays, weights * np.float32(weights.size / max(1.0, weights.sum())))

    def _filled(
        self, rows: Sequence[Sequence[int]], number: Callable[[int], int] = lambda place: 1
    ) -> Arrays:
        """Inputs, targets, starts, and the number of the conversation for tokens that count, else 0.

        `number` gives that number for a conversation's place in its row.
        """
        B, T = len(rows), self.context_length
        inputs, targets, counted = np.zeros((3, B, T), np.int32)
        starts = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        for b, row in enumerate(rows):
            at = 0
            for place, i in enumerate(row):
                begin, n = int(self.begins[i]), int(self.lengths[i])
                here, there = slice(at, at + n), slice(begin, begin + n)
                after = slice(begin + 1, begin + n + 1)
                inputs[b, here], targets[b, here] = self.ids[there], self.ids[after]
                counted[b, here] = number(place) * self.counted[after].astype(np.int32)
                starts[b, here] = at
                at += n
        return inputs, targets, starts, counted


class PackedPairs(PackedRows):
    """Pairs in rows: conversation 2i has the chosen answer, 2i + 1 the rejected one; a row has both."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.sizes = self.lengths[0::2] + self.lengths[1::2]
        self.most = max(1, self.context_length // int(self.sizes.min()))
        """The most pairs in a row."""

    def arrays(self, rows: Sequence[Sequence[int]]) -> Arrays:
        """Inputs, targets, starts and answers (rows, context_length), and weights (rows, `most`).

        Answers are k for a token of the chosen answer of a row's k-th pair, counted from 1. They are -k for
        one of the rejected answer, and 0 for other tokens. The mean of loss · weight over all places for
        pairs is the mean loss of a pair.
        """
        both = [[i for pair in row for i in (2 * pair, 2 * pair + 1)] for row in rows]
        arrays = self._filled(both, lambda place: place // 2 + 1 if place % 2 == 0 else -(place // 2 + 1))
        there = np.arange(self.most) < np.array([len(row) for row in rows])[:, None]
        return (*arrays, (there * (there.size / there.sum())).astype(np.float32))
