"""Several engines whose steps take turns: a model and each of its adapters have a batch and a cache."""

from collections.abc import Sequence
from dataclasses import replace

from lama.generation.engine import Engine, Event, Request, SlotState


class Engines:
    """Engines as one. A request names its engine; the numbers of requests are distinct.

    Requests of one engine are a batch; those of two engines are computed in turn. Not thread-safe.
    """

    def __init__(self, engines: Sequence[Engine]):
        """At least one engine; all have the same context."""
        self.engines, self.context = list(engines), engines[0].context
        self.rows = sum(engine.rows for engine in engines)
        self._next = 0

    @property
    def is_busy(self) -> bool:
        """Whether any request is waiting or running."""
        return any(engine.is_busy for engine in self.engines)

    @property
    def n_running(self) -> int:
        """Number of requests that have a row."""
        return sum(engine.n_running for engine in self.engines)

    def slots(self) -> list[SlotState]:
        """The state of every row of every cache."""
        found = [(i, slot) for i, engine in enumerate(self.engines) for slot in engine.slots()]
        return [
            SlotState(row, None if slot.request is None else self._number(i, slot.request), slot.n_tokens)
            for row, (i, slot) in enumerate(found)
        ]

    def submit(self, request: Request) -> int:
        """Add a request; returns its number. Raises UsageError for a prompt that cannot be continued."""
        return self._number(request.engine, self.engines[request.engine].submit(request))

    def _number(self, engine: int, number: int) -> int:
        return number * len(self.engines) + engine

    def cancel(self, number: int) -> None:
        """Drop a request that has not ended."""
        number, engine = divmod(number, len(self.engines))
        self.engines[engine].cancel(number)

    def step(self) -> list[Event]:
        """Run a step of the next busy engine. Returns its events."""
        for _ in self.engines:
            i, self._next = self._next, (self._next + 1) % len(self.engines)
            if self.engines[i].is_busy:
                return [replace(e, request=self._number(i, e.request)) for e in self.engines[i].step()]
        return []

    def forget(self) -> None:
        """Treat every row of the caches as empty."""
        for engine in self.engines:
            engine.forget()

    def close(self) -> None:
        """Write the caches to their stores, if they have any."""
        for engine in self.engines:
            engine.close()
