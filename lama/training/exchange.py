"""Sums of gradients across processes, which also share the optimizer's work.

Each process sums its parts of a batch in a subtree of `TreeSum`. A bucket of gradients, about those of a
block, is then cut into one part for each process. A process gets its part from all, adds these as the rest of
the tree, and sends the sums to the owners of the parameters. Each owner updates its parameters and sends them
to all.
"""

import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
from tinygrad import Tensor

from lama.checkpoints.tensor import bfloat16_to_float32, float32_to_bfloat16
from lama.ops import square_parts
from lama.runtime.buffers import write
from lama.runtime.capture import CapturedStep, InputBuffer
from lama.shapes import Array
from lama.training.optimizers import Optimizer, zeros_like_all
from lama.training.processes import Processes, memory_of
from lama.training.replica import Replica
from lama.training.sums import add_parts, add_rows

SMALL, LARGEST = 1 << 20, 1 << 23  # numbers of a bucket: the least to end with a block, and the most
UNEVEN = 1.25  # owners sum their own part of a bucket if no part is larger than this times an equal one


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are exchanged together; those of one owner are adjacent."""

    names: tuple[str, ...]
    places: tuple[int, ...]
    """The first number of each parameter, and the end of the last."""
    owned: tuple[int, ...]
    """The first number of each owner's parameters, and the end of the last's."""
    cuts: tuple[int, ...]
    """The first number of the part that each process sums, and the end of the last's."""


class Exchange:
    """The gradients' sums and the parameters of the processes, of which this one owns `own`."""

    def __init__(self, team: Processes, parameters: Mapping[str, Tensor], rounded: bool):
        """`rounded`: gradients are sent in bfloat16."""
        self.team, self.parameters, self.rounded = team, parameters, rounded
        sizes = {name: int(p.numel()) for name, p in parameters.items()}
        self.owners = owners_of(sizes, team.size)
        self.buckets = [bucket_of(names, sizes, self.owners, team.size) for names in bucket_names(sizes)]
        self.own = {name: p for name, p in parameters.items() if self.owners[name] == team.rank}
        self.gradients = zeros_like_all(self.own)
        """The sums of the gradients of `own`."""
        most = max(bucket.places[-1] for bucket in self.buckets)
        parts = [bucket.cuts[team.rank + 1] - bucket.cuts[team.rank] for bucket in self.buckets]
        self._whole = np.empty(most, np.float32)
        self._parts = np.empty(team.size * max(parts), np.float32)
        self._comm, self._thread = team.communicator(), ThreadPoolExecutor(1)
        self._squares = CapturedStep(self._square_parts)
        self._width = int(square_parts([next(iter(parameters.values()))]).shape[0])
        self._sums = InputBuffer(str(next(iter(parameters.values())).device))
        self.sent, self.busy, self.waited = 0, 0.0, 0.0
        """Bytes sent by this process, seconds of exchanges, and seconds of waiting for them."""

    # Gradients

    def learn(self, replica: Replica, i: int, key: Array, arrays: Sequence[Array]) -> float:
        """The loss of part `i`, the last of this process's share; fills `gradients`.

        Buckets are exchanged while the gradients of other buckets are still being computed.
        """
        ready: queue.SimpleQueue[int] = queue.SimpleQueue()
        found = replica.gradients  # none before the first call
        groups = [[found[name] for name in bucket.names] for bucket in self.buckets] if found else []
        exchanged = self._thread.submit(self._exchange_all, replica, i, ready)
        try:
            with replica.step.watched(groups, ready.put):
                loss = replica.learn(key, arrays)
        finally:
            for _ in self.buckets:
                ready.put(-1)  # all gradients are complete now, also those that were not watched
        began = time.perf_counter()
        exchanged.result()
        self.waited += time.perf_counter() - began
        return loss

    def _exchange_all(self, replica: Replica, i: int, ready: "queue.SimpleQueue[int]") -> None:
        complete: set[int] = set()
        for number, bucket in enumerate(self.buckets):
            while number not in complete and -1 not in complete:
                complete.add(ready.get())
            began = time.perf_counter()
            self._exchange(bucket, replica, i)
            self.busy += time.perf_counter() - began

    def _exchange(self, bucket: Bucket, replica: Replica, i: int) -> None:
        team, rank = self.team, self.team.rank
        whole = self._whole[: bucket.places[-1]]
        for name, (first, last) in zip(bucket.names, pairwise(bucket.places), strict=True):
            parts, _ = replica.sum.parts(i, name, replica.gradients)
            add_parts([part.reshape(-1) for part in parts], whole[first:last])
        size = bucket.cuts[rank + 1] - bucket.cuts[rank]
        parts_of_all = self._parts[: team.size * size].reshape(team.size, size)
        counts = [last - first for first, last in pairwise(bucket.cuts)]
        wanted = [size] * team.size
        if self.rounded:
            bits = np.empty(parts_of_all.shape, np.uint16)
            self._send_parts(float32_to_bfloat16(whole), counts, bits, wanted)
            parts_of_all[:] = bfloat16_to_float32(bits)
        else:
            self._send_parts(whole, counts, parts_of_all, wanted)
        total = add_rows(parts_of_all)
        begin, end = bucket.owned[rank], bucket.owned[rank + 1]
        if bucket.cuts != bucket.owned:
            counts = [_overlap(bucket.cuts, rank, bucket.owned, other) for other in range(team.size)]
            wanted = [_overlap(bucket.cuts, other, bucket.owned, rank) for other in range(team.size)]
            self._send_parts(total, counts, whole[begin:end], wanted)
            total = whole[begin:end]
        for name, (first, last) in zip(bucket.names, pairwise(bucket.places), strict=True):
            if self.owners[name] == rank:
                write(self.gradients[name], total[first - begin : last - begin])

    def _send_parts(self, given: Array, counts: list[int], taken: Array, wanted: list[int]) -> None:
        """Send `counts` numbers to the processes, and receive `wanted` numbers from them into `taken`.

        `taken` must be contiguous: its parts are views. Ialltoallv would do the same, but MPICH's moves only
        8 kB at each test of whether it is complete: 6 MB took 75 ms instead of 1.3.
        """
        rank, taken = self.team.rank, taken.reshape(-1)
        self.sent += given.itemsize * (sum(counts) - counts[rank])
        arriving, leaving = pairwise(accumulate(wanted, initial=0)), pairwise(accumulate(counts, initial=0))
        parts = [(taken[a:b], given[c:d]) for (a, b), (c, d) in zip(arriving, leaving, strict=True)]
        others = [i for i in range(self.team.size) if i != rank]
        requests = [self._comm.Irecv(parts[i][0], i) for i in others]
        requests += [self._comm.Isend(parts[i][1], i) for i in others]
        parts[rank][0][:] = parts[rank][1]
        for request in requests:
            self.team.wait(request)

    # The update

    def squares(self, numbers: Sequence[float]) -> tuple[Array, Tensor]:
        """The `numbers` of all processes, as rows, and the `square_parts` of all gradients.

        The latter are added tensor by tensor, in the order of the parameters.
        """
        own = np.array(numbers, np.float32)
        if self.own:
            own = np.concatenate([own, self._squares().numpy().reshape(-1)])
        width = self._width
        counts = [len(numbers)] * self.team.size
        for owner in self.owners.values():
            counts[owner] += width
        shares = np.split(self.team.gather_numbers(own, counts), list(accumulate(counts))[:-1])
        rows = [iter(share[len(numbers) :].reshape(-1, width)) for share in shares]
        total = np.zeros(width, np.float32)
        for owner in self.owners.values():
            total += next(rows[owner])
        return np.stack([share[: len(numbers)] for share in shares]), self._sums(total)

    def _square_parts(self) -> Tensor:
        return Tensor.stack(*(square_parts([t]) for t in self.gradients.values())).realize()

    def share_parameters(self) -> None:
        """Send this process's updated parameters to the others, and receive theirs."""
        rank = self.team.rank
        for bucket in self.buckets:
            memory = memory_of({name: self.parameters[name].reshape(-1) for name in bucket.names})
            whole = self._whole[: bucket.places[-1]]
            begin, end = bucket.owned[rank], bucket.owned[rank + 1]
            mine = [memory[name] for name in bucket.names if name in self.own]
            own = np.concatenate([np.empty(0, np.float32), *mine])
            counts = [last - first for first, last in pairwise(bucket.owned)]
            self.sent += 4 * (end - begin) * (self.team.size - 1)
            self.team.wait(self._comm.Iallgatherv(own, [whole, counts]))
            for name, (first, last) in zip(bucket.names, pairwise(bucket.places), strict=True):
                if name not in self.own:
                    memory[name][:] = whole[first:last]

    # The optimizer's state

    def move_state(self, whole: Optimizer, own: Optimizer, back: bool) -> None:
        """Copy the state of all parameters from the first process to their owners, or `back` from them.

        In the other processes `whole` is zeros, which take up no memory.
        """
        there, here = memory_of(whole.state()), memory_of(own.state())
        used = dict.fromkeys(here, 0)
        for state, rows in whole.rows_of_state().items():
            at = 0
            for name, count in rows:
                owner, first = self.owners[name], used.get(state, 0)
                ours = theirs = there[state][at : at + count]
                if owner == self.team.rank:
                    ours = here[state][first : first + count]
                    used[state] += count
                at += count
                if back:
                    self.team.send(ours, owner, 0, theirs)
                else:
                    self.team.send(theirs, 0, owner, ours)


def _overlap(cuts: Sequence[int], i: int, owned: Sequence[int], j: int) -> int:
    """The numbers that are both in part i of `cuts` and in part j of `owned`."""
    return max(0, min(cuts[i + 1], owned[j + 1]) - max(cuts[i], owned[j]))


def owners_of(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The process that updates each parameter: each, largest first, goes to the one with the least so far."""
    loads, owners = [0] * count, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += sizes[name]
    return {name: owners[name] for name in sizes}


def bucket_names(sizes: Mapping[str, int]) -> list[list[str]]:
    """The parameters in buckets, from last to first: the last gradients are complete first."""
    buckets: list[list[str]] = []
    filled, block = LARGEST, ""
    for name in reversed(list(sizes)):
        own = ".".join(name.split(".")[:2])
        if filled + sizes[name] > LARGEST or (filled >= SMALL and own != block):
            buckets.append([])
            filled = 0
        buckets[-1].append(name)
        filled, block = filled + sizes[name], own
    return buckets


def bucket_of(
    names: Sequence[str], sizes: Mapping[str, int], owners: Mapping[str, int], count: int
) -> Bucket:
    """A bucket, cut between owners if their shares are about equal, else into equal parts."""
    ordered = sorted(names, key=owners.__getitem__)
    places = list(accumulate((sizes[name] for name in ordered), initial=0))
    shares = [sum(sizes[name] for name in names if owners[name] == rank) for rank in range(count)]
    owned = list(accumulate(shares, initial=0))
    whole = places[-1]
    cuts = owned
    if max(shares) * count > UNEVEN * whole:
        cuts = [whole * i // count for i in range(count + 1)]
    return Bucket(tuple(ordered), tuple(places), tuple(owned), tuple(cuts))
