"""Server processes and a small HTTP client, for bench_serve.py and the tests of the server.

The client uses asyncio's streams. So it takes little processor time, and can send half a body, read slowly or
leave in the middle.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

Body = dict[str, Any] | bytes
HOST = "127.0.0.1"
BROKEN = OSError, EOFError  # what a client raises where a connection breaks


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


class Server:
    """A server process on loopback; a context manager that ends it."""

    def __init__(self, command: Sequence[object], log: Path, wait: float = 600):
        """Start `command` with `--host` and `--port`, and wait until /health answers 200.

        Raises RuntimeError with the end of the log where the process ends first, or after `wait` seconds.
        """
        self.port, self.log = free_port(), log
        words = [*map(str, command), "--host", HOST, "--port", str(self.port)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + wait
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                end = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"server must answer /health; got {self.process.wait()}: {words}\n{end}")
            time.sleep(0.1)

    def is_ready(self) -> bool:
        """Whether /health answers with 200."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # an HTTPError, such as 503, is one
            return False

    def resident(self) -> int:
        """Resident bytes of the process; 0 without Linux's /proc."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("VmRSS"):
                    return int(line.split()[1]) * 1024
        return 0

    def cpu_seconds(self) -> float:
        """Processor time of the process so far; 0 without Linux's /proc."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def stop(self, seconds: float = 60) -> int:
        """End the process by SIGTERM; returns its exit code. Killed after `seconds`."""
        self.process.terminate()
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop(10)


def lama_command(model: object, rows: int, context: int, *more: object) -> list[object]:
    """The command line of `lama serve`."""
    return [sys.executable, "-m", "lama", "serve", "-m", model, "--rows", rows, "--context", context, *more]


class Client:
    """A connection to a server on loopback, kept open between requests. Raises BROKEN where it breaks."""

    def __init__(self, port: int):
        self.port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.status, self.headers = 0, dict[str, str]()

    async def send(self, path: str, body: Body | None = None, headers: str = "", part: float = 1) -> None:
        """Send a request: POST with a body, else GET; `part` of the body's bytes."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {HOST}:{self.port}\r\n"
        head += f"Content-Length: {len(data)}\r\nContent-Type: application/json\r\n{headers}\r\n"
        await self.write(head.encode() + data[: round(part * len(data))])

    async def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(HOST, self.port)
        self._writer.write(data)
        await self._writer.drain()

    async def head(self) -> int:
        """Read the status and the headers."""
        assert self._reader is not None
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        pairs = (line.partition(":") for line in lines[1:] if line)
        self.headers = {name.lower(): value.strip() for name, _, value in pairs}
        return self.status

    async def parts(self) -> AsyncIterator[bytes]:
        """Read the body as it arrives."""
        assert self._reader is not None
        if self.headers.get("transfer-encoding") == "chunked":
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readuntil(b"\r\n")
        elif length := int(self.headers.get("content-length", 0)):
            yield await self._reader.readexactly(length)
        if self.headers.get("connection", "").lower() == "close":
            self.close()

    async def ask(self, path: str, body: Body | None = None, headers: str = "") -> tuple[int, bytes]:
        """The status and the whole body of an answer; connects again where the server has closed."""
        for fresh in (self._writer is None, True):
            try:
                await self.send(path, body, headers)
                status = await self.head()
                return status, b"".join([part async for part in self.parts()])
            except BROKEN:
                self.close()
                if fresh:
                    raise
        raise AssertionError

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The JSON objects of a stream of events, after `head`. Raises ConnectionError without [DONE]."""
        rest, done = b"", False
        async for part in self.parts():
            *events, rest = (rest + part).split(b"\n\n")
            for event in events:
                data = event.removeprefix(b"data: ")
                done = data == b"[DONE]"
                if not done and not data.startswith(b":"):
                    yield json.loads(data)
        if not done:
            raise ConnectionError("a stream must end in [DONE]")

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None
