"""The running server: a socket, uvicorn, the thread that loads the model, and an orderly end."""

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Protocol, runtime_checkable

from lama.errors import LamaError, note
from lama.server.access import Access
from lama.server.app import make_app
from lama.server.service import Backend, Service

KEEP_ALIVE = 60  # seconds that an idle connection is kept
LAST_BYTES = 10  # seconds that clients have for reading the ends of their answers
POLL = 0.02  # seconds between checks whether the last answer has ended


@runtime_checkable
class Server(Protocol):
    """A server that can be run once."""

    failure: BaseException | None
    """The error that ended the loading of the model."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer requests until the end."""

    def stop(self) -> None:
        """End the server, from any thread."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free port. Raises LamaError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise LamaError(f"--host must be an address of this machine; got {host!r} ({error})") from None
    try:
        if os.name == "posix":  # elsewhere it would share the port of another server
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise LamaError(f"port {port} of {host} is in use; choose another one with --port") from None
        raise LamaError(f"cannot listen on port {port} of {host}: {error.strerror}") from None
    return found


def url_of(sock: socket.socket, host: str) -> str:
    """The address of a server that listens on this socket."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{sock.getsockname()[1]}"


def make_server(service: Service, access: Access, load: Callable[[], Backend]) -> Server:
    """A server that loads its model in a thread, and then answers.

    The first SIGTERM or SIGINT finishes running answers and refuses new requests; the second ends at once.
    Raises LamaError if a package is missing.
    """
    app = make_app(service, access)
    try:
        import uvicorn
        from uvicorn.protocols.http.auto import AutoHTTPProtocol
    except ImportError:
        raise LamaError("lama serve needs uvicorn; pip install 'lama[serve]'") from None

    class Patient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """Close connections whose request's head does not arrive in time. The app itself waits for bodies."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: object) -> None:  # uvloop's are not asyncio's
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            super().data_received(data)
            if self.cycle is not before and self._timer is not None:
                self._timer.cancel()
                self._timer = None
            elif self._timer is None and (before is None or before.response_complete):
                self._await_head()

        def _await_head(self) -> None:
            self._timer = self.loop.call_later(service.limits.timeout, self.transport.close)

        def connection_lost(self, error: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(error)

    class LamaServer(uvicorn.Server):
        failure: BaseException | None = None
        n_signals = 0

        async def main_loop(self) -> None:
            # Waits for the end; uvicorn's own loop wakes up ten times a second.
            self.server_state.default_headers = self.config.encoded_headers
            self.running, self.stopped = asyncio.get_running_loop(), asyncio.Event()
            threading.Thread(target=self.load, name="lama-engine", daemon=True).start()
            if self.n_signals == 0:
                await self.stopped.wait()

        def load(self) -> None:
            try:
                backend = load()
            except BaseException as error:
                self.failure = error
                self.stop()
                return
            service.backend = backend
            if service.draining:
                backend.worker.drain()
            backend.worker.loop()  # this thread is the engine's from now on

        def stop(self) -> None:
            """End the server, from any thread."""
            self.running.call_soon_threadsafe(self.stopped.set)

        async def drain(self) -> None:
            while service.n_active:
                await asyncio.sleep(POLL)
            self.stopped.set()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.n_signals += 1
            if self.n_signals > 1:
                os._exit(128 + sig)
            name = signal.Signals(sig).name
            note(f"{name}: finishing running answers, refusing new requests; a second signal ends at once")
            service.drain()
            if hasattr(self, "stopped"):
                self.running.call_soon_threadsafe(self._start_drain)

        def _start_drain(self) -> None:
            self._draining = asyncio.ensure_future(self.drain())

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=Patient,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=LAST_BYTES,
    )
    return LamaServer(config)
