"""The thread that runs an engine: it sends answers as events, and runs functions between two steps."""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from lama.errors import LamaError, first_line, note
from lama.generation.engine import Engine, Event, Request
from lama.generation.engines import Engines

T = TypeVar("T")
Loop = asyncio.AbstractEventLoop


class QueueFull(LamaError):
    """The queue of waiting requests is full."""


class Draining(LamaError):
    """The server accepts no more requests."""


class Answers:
    """The events of some requests; iterating gives (index of the request, event), in the order of the tokens.

    The worker never waits for the consumer: events are kept here until they are read, at most one for each
    token.
    """

    def __init__(self, worker: "Worker", n: int):
        self.loop = asyncio.get_running_loop()
        self.numbers: dict[int, int] = {}  # the engine's number of each request, set by its thread
        self.is_over = False
        """Whether the consumer has left; no more requests are submitted then."""
        self.unended = set(range(n))
        self._worker, self._events, self._ready = worker, deque[tuple[int, Event]](), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        while self.unended:
            await self._ready.wait()
            self._ready.clear()
            while self._events:
                index, event = self._events.popleft()
                if index in self.unended:
                    if event.finish_reason is not None:
                        self.unended.discard(index)
                    yield index, event

    def push(self, index: int, event: Event) -> None:
        """Add an event, in the consumer's loop."""
        self._events.append((index, event))
        self._ready.set()

    def end(self, index: int) -> None:
        """Cancel a request: it has no more events, and its row is free from the next step on."""
        self.unended.discard(index)
        self._worker.cancel(self, [index])


@dataclass
class Counts:
    """Totals since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of prompts that the cache already held."""
    predicted_tokens: int = 0
    steps: int = 0
    busy_rows: int = 0
    """Sum of the rows that were busy in each step."""


class Worker:
    """Runs an engine in a thread of its own. All other methods are called from event loops.

    Without work it waits for a command, and uses no processor.
    """

    def __init__(self, engine: Engine | Engines, queue_size: int = 32):
        """At most `queue_size` requests wait; one more raises QueueFull."""
        self.engine, self.queue_size = engine, queue_size
        self._most, self._n_jobs = engine.rows + queue_size, 0
        self.counts = Counts()
        self.draining = False
        self.n_admitted = 0
        """Requests that have not ended; changed in the event loop only."""
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: deque[Callable[[], None]] = deque()
        self._answers: dict[int, tuple[Answers, int]] = {}
        self._thread = threading.Thread(target=self.loop, name="lama-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that runs; requests that run get no more events."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def drain(self) -> None:
        """Accept no more requests; those that wait or run are still answered."""
        self.draining = True

    @contextmanager
    def answering(self, requests: Sequence[Request]) -> Iterator[Answers]:
        """The events of requests; those that have not ended at the end of the block are cancelled.

        Raises QueueFull while `queue_size` others wait, Draining after `drain`.
        """
        if self.draining:
            raise Draining("the server is shutting down; send the request to another one")
        if self.n_admitted >= self._most:
            raise QueueFull(f"at most {self.queue_size} requests wait; try again later")
        answers = Answers(self, len(requests))
        self.n_admitted += len(requests)
        self._commands.put(partial(self._submit, answers, requests))
        try:
            yield answers
        finally:
            self.n_admitted -= len(requests)
            answers.is_over = True
            self.cancel(answers, list(answers.unended))

    def cancel(self, answers: Answers, indices: Sequence[int]) -> None:
        """Cancel some requests of these answers."""
        if indices:
            self._commands.put(partial(self._cancel, answers, indices))

    async def run(self, function: Callable[[], T]) -> T:
        """Run a function in the engine's thread, between two steps, and return its result.

        At most one function runs between two steps. It is skipped if its caller has left. Raises QueueFull if
        too many functions wait.
        """
        if self._n_jobs >= self._most:
            raise QueueFull(f"at most {self._most} requests wait; try again later")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            if future.cancelled():
                return
            try:
                done = partial(_set_result, future, function())
            except BaseException as error:
                done = partial(_set_error, future, error)
            _call(loop, done)

        self._commands.put(partial(self._jobs.append, job))
        self._n_jobs += 1
        try:
            return await future
        finally:
            self._n_jobs -= 1

    def loop(self) -> None:
        """Run until `stop`; the body of the thread."""
        while True:
            idle = not self.engine.is_busy and not self._jobs
            try:
                while True:
                    command = self._commands.get(block=idle)
                    if command is None:
                        return
                    command()
                    idle = False
            except queue.Empty:
                pass
            if self._jobs:
                self._jobs.popleft()()
            if self.engine.is_busy:
                self._step()

    def _submit(self, answers: Answers, requests: Sequence[Request]) -> None:
        if answers.is_over:
            return
        events: list[tuple[Answers, int, Event]] = []
        for index, request in enumerate(requests):
            try:
                number = self.engine.submit(request)
                answers.numbers[index] = number
                self._answers[number] = answers, index
                self.counts.prompt_tokens += len(request.tokens)
            except Exception as error:  # this request's alone
                events.append((answers, index, Event(0, None, "error", error=first_line(error))))
        _deliver(events)

    def _cancel(self, answers: Answers, indices: Sequence[int]) -> None:
        for index in indices:
            if (number := answers.numbers.pop(index, None)) is not None:
                self._answers.pop(number, None)
                self.engine.cancel(number)

    def _step(self) -> None:
        try:
            found = self.engine.step()
        except Exception as error:
            note(f"a step of the engine failed, and all running requests with it: {first_line(error)}")
            message = "the engine failed; try again"
            found = [Event(number, None, "error", error=message) for number in self._answers]
            for number in self._answers:
                self.engine.cancel(number)
            self.engine.forget()
        events: list[tuple[Answers, int, Event]] = []
        counts = self.counts
        counts.steps += 1
        counts.busy_rows += self.engine.n_running + sum(event.finish_reason is not None for event in found)
        for event in found:
            if event.request not in self._answers:
                continue
            answers, index = self._answers[event.request]
            counts.cached_tokens += event.cached_tokens
            counts.predicted_tokens += event.token is not None
            if event.finish_reason is not None:
                del self._answers[event.request]
                answers.numbers.pop(index, None)
            events.append((answers, index, event))
        _deliver(events)


def _deliver(events: Sequence[tuple[Answers, int, Event]]) -> None:
    """Pass events to the loops of their consumers, waking each loop once."""
    by_loop: dict[Loop, list[tuple[Answers, int, Event]]] = {}
    for each in events:
        by_loop.setdefault(each[0].loop, []).append(each)
    for loop, some in by_loop.items():
        _call(loop, partial(_push_all, some))


def _push_all(events: Sequence[tuple[Answers, int, Event]]) -> None:
    for answers, index, event in events:
        answers.push(index, event)


def _call(loop: Loop, function: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(function)


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
