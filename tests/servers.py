"""What the tests of the server share: a small random model behind it, in this process or behind a socket."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from helpers import fill

from lama.generation.engine import Engine
from lama.models.gpt import GPT, GPTConfig
from lama.server.access import Access
from lama.server.service import Backend, Limits, Service
from lama.server.worker import Worker
from lama.tokenizers import ByteTokenizer
from lama.tokenizers.chat_template import DIALOGUE, ChatTemplate

CONTEXT = 64
HERE = "http://127.0.0.1"


def make_model(context: int = CONTEXT) -> GPT:
    tokenizer = ByteTokenizer()
    model = GPT(GPTConfig(tokenizer.vocab_size, context, d_model=16, n_layers=2, n_heads=2), seed=None)
    fill(model)
    return model


@contextmanager
def running(
    model: GPT | None = None,
    limits: Limits | None = None,
    rows: int = 3,
    queue: int = 32,
    slow: float = 0,
    template: str | None = DIALOGUE,
    context: int = CONTEXT,
    **options: Any,
) -> Iterator[Service]:
    """A service whose engine runs; `slow`: seconds that each of its steps takes longer."""
    model = model or make_model(context)
    engine = Engine(model, rows, ByteTokenizer().vocab_size, reuse=True, spare=1, chunk=24)
    if slow:
        engine.step = partial(slowly, engine.step, slow)  # type: ignore[method-assign]
    worker = Worker(engine, queue)
    worker.start()
    service = Service(limits, **options)
    chat = None if template is None else ChatTemplate(template)
    service.backend = Backend("tiny", model, ByteTokenizer(), worker, chat)
    try:
        yield service
    finally:
        worker.stop()


def slowly(step: Callable[[], Any], seconds: float) -> Any:
    time.sleep(seconds)
    return step()


@contextmanager
def listening(service: Service, access: Access | None = None) -> Iterator[str]:
    """The address of a real server in a thread."""
    from lama.server.serving import listen, make_server, url_of

    backend = service.backend
    with listen("127.0.0.1", 0) as sock:
        server = make_server(service, access or Access(), lambda: backend)
        server.load = lambda: None  # type: ignore[attr-defined]  # the worker has a thread of its own
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        url = url_of(sock, "127.0.0.1")
        try:
            yield url
        finally:
            server.stop()
            thread.join()


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)
