"""A real server on a loopback port: the openai package, clients that leave or send half, and its end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="lama serve needs starlette")
pytest.importorskip("uvicorn", reason="lama serve needs uvicorn")

from servers import listening, running, until

import lama
from lama.cli import main
from lama.server.service import Limits, Service
from lama.tokenizers import ByteTokenizer

BUNDLED = Path(__file__).parent.parent / "weights" / "lama-bpe"
LONG = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(slow=0.002) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(service) as url:
        yield url


def post(url: str, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    asked = urllib.request.Request(url + path, json.dumps(body).encode())
    with urllib.request.urlopen(asked, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def connected(url: str, content: bytes) -> socket.socket:
    """A connection on which these bytes were sent."""
    host, _, port = url.removeprefix("http://").partition(":")
    found = socket.create_connection((host, int(port)), timeout=60)
    found.sendall(content)
    return found


def request(path: str = "/v1/completions", **body: Any) -> bytes:
    content = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (
        path.encode(),
        len(content),
        content,
    )


def test_openai_client(service, url):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    given = {"temperature": 0.8, "seed": 3}
    text = str(lama.generate(service.backend.model, ByteTokenizer(), "To be", max_new_tokens=9, **given))
    found = client.completions.create(model="tiny", prompt="To be", max_tokens=9, logprobs=2, **given)
    assert found.choices[0].text == text and len(found.choices[0].logprobs.tokens) == 9
    parts = client.completions.create(model="tiny", prompt="To be", max_tokens=9, stream=True, **given)
    assert "".join(part.choices[0].text for part in parts) == text
    messages = [{"role": "user", "content": "Why?"}]
    chat = {"model": "tiny", "messages": messages, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**chat, **given)
    assert whole.usage.completion_tokens == 9 and len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    stream = client.chat.completions.create(
        **chat, **given, stream=True, stream_options={"include_usage": True}
    )
    *parts, last = list(stream)
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="x" * 100)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "prompt"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_openai_client_async_and_cancelled_half_way(service, url):
    openai = pytest.importorskip("openai")

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            given = {"model": "tiny", "max_tokens": 8, "seed": 1}
            alone = [await client.completions.create(prompt=f"Text {i}", **given) for i in range(8)]
            together = await asyncio.gather(
                *(client.completions.create(prompt=f"Text {i}", **given) for i in range(8))
            )
            assert [each.choices[0].text for each in together] == [each.choices[0].text for each in alone]
            stream = await client.completions.create(
                model="tiny", prompt="a", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
            )
            await anext(aiter(stream))
            await stream.close()
            task = asyncio.ensure_future(
                client.completions.create(model="tiny", prompt="a", max_tokens=60, n=9)
            )
            while service.backend.worker.engine.n_running == 0:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    until(lambda: not service.backend.worker.engine.is_busy and service.backend.worker.n_admitted == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_rows_of_clients_that_leave_are_free(service, url, stream):
    engine, worker = service.backend.worker.engine, service.backend.worker
    connections = [connected(url, request(**LONG, n=3, stream=stream)) for _ in range(4)]
    until(lambda: engine.n_running == 3)
    for connection in connections:
        connection.close()
    until(lambda: worker.n_admitted == 0)
    before = worker.counts.steps
    until(lambda: not engine.is_busy)
    assert worker.counts.steps <= before + 2
    assert post(url, prompt="a", max_tokens=1)["choices"]


def test_clients_that_do_not_read_hold_up_nobody(service, url):
    big = {**LONG, "n": 3, "stream": True, "logprobs": 20}
    stalled = [connected(url, request(**big)) for _ in range(4)]
    partly = connected(url, request(**LONG)[:-5])
    head = connected(url, b"POST /v1/completions HTTP/1.1\r\nHost: local")
    for i in range(5):
        assert post(url, prompt=f"Text {i}", max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3
    for connection in (*stalled, partly, head):
        connection.close()
    until(lambda: service.backend.worker.n_admitted == service.n_active == 0)


def test_requests_that_never_get_complete_end():
    with running(limits=Limits(timeout=0.4)) as service, listening(service) as url:
        with closing(connected(url, request(**LONG)[:-5])) as partly:
            assert partly.recv(1000).startswith(b"HTTP/1.1 408")
        for part in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: local"):
            with closing(connected(url, part)) as head:
                assert head.recv(1000) == b""
        with closing(connected(url, request(prompt="a", max_tokens=1))) as again:
            assert again.recv(10000).startswith(b"HTTP/1.1 200")
            again.sendall(b"POST /v1")
            rest = b"".join(iter(lambda: again.recv(10000), b""))  # the server closes
            assert b"200" not in rest


def test_full_queue():
    with running(rows=1, queue=2, slow=0.02) as service, listening(service) as url:
        engine = service.backend.worker.engine
        waiting = [connected(url, request(**LONG)) for _ in range(3)]
        until(lambda: service.backend.worker.n_admitted == 3 and engine.n_running == 1)
        with pytest.raises(urllib.error.HTTPError) as full:
            post(url, **LONG)
        assert (full.value.code, full.value.headers["Retry-After"]) == (429, "1")
        assert json.load(full.value)["error"]["code"] == "queue_full"
        with pytest.raises(urllib.error.HTTPError) as full:
            post(url, **LONG, stream=True)
        assert full.value.code == 429
        for connection in waiting:
            connection.close()
        until(lambda: service.backend.worker.n_admitted == 0)
        assert post(url, prompt="a", max_tokens=1)["choices"]


def test_requests_join_running_ones(service, url):
    """Each of many requests at once gets its own text."""
    rng = [f"Prompt {i % 7} " * (1 + i % 4) for i in range(24)]
    given = {"max_tokens": 7, "seed": 2, "temperature": 0.7}
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        found[i] = post(url, prompt=rng[i], **given)["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(rng))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(rng):
        model = service.backend.model
        text = str(lama.generate(model, ByteTokenizer(), prompt, max_new_tokens=7, seed=2, temperature=0.7))
        assert found[i] == text, prompt


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of `lama serve` with the bundled model, ready, and its address."""
    command = [sys.executable, "-m", "lama", "serve", "-m", str(BUNDLED), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert " at http://127.0.0.1:" in line and " MB" in line, line
        url = "http://127.0.0.1:" + line.partition(" at http://127.0.0.1:")[2].partition(":")[0]
        until(lambda: is_ready(url), 120)
        yield process, url
    finally:
        process.kill()
        process.communicate()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health") as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        assert error.code == 503 and json.load(error)["error"]["code"] == "loading"
        return False


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_lets_answers_end():
    with serving("--rows", "1", "--spare", "0") as (process, url):
        given = {"prompt": "In the", "max_tokens": 250, "n": 4, "ignore_eos": True, "stream": True}
        with closing(connected(url, request(**given))) as connection:
            first = connection.recv(100)
            assert first.startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert [process.stderr.readline() for _ in range(3)][2].startswith(
                "lama: SIGTERM: finishing running answers"
            )
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(url, prompt="a")
            assert refused.value.code == 503
            rest = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert b"data: [DONE]" in rest and rest.count(b'"finish_reason":"length"') == 4
        assert process.wait(60) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_second_signal_ends_at_once():
    with serving("--rows", "1", "--spare", "0") as (process, url):
        given = {"prompt": "In the", "max_tokens": 250, "n": 100, "ignore_eos": True, "stream": True}
        with closing(connected(url, request(**given))) as connection:
            assert connection.recv(100)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            assert [process.stderr.readline() for _ in range(3)][2].startswith("lama: SIGINT")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--host", "0.0.0.0"], 2, "must have a key; got --host 0.0.0.0. Give --api-key-file FILE"),
        (["--rows", "0"], 2, "rows must be at least 1"),
        (["--port", "70000"], 2, "port must be from 0 to 65535"),
        (["--timeout", "nan"], 2, "timeout must be above 0"),
        (["--host", "192.0.2.1", "--no-key"], 1, "cannot listen on port 0 of 192.0.2.1: "),
        (["--api-key-file", "missing"], 1, "missing cannot be read"),
        (["--context", "300"], 2, "--context must be at most 256, the model's; got 300"),
        (["--rows", "100000000"], 1, "the cache must fit the memory; 100000004 rows of 256 tokens take"),
    ],
)
def test_wrong_use_is_one_line(options, code, message, capfd):
    assert main(["serve", "-m", str(BUNDLED), "--port", "0", *options]) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_port_in_use(capfd):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "-m", str(BUNDLED), "--port", str(port)]) == 1
    assert f"port {port} of 127.0.0.1 is in use; choose another one with --port" in capfd.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_key_file_that_others_can_read(tmp_path, capfd):
    path = tmp_path / "keys"
    path.write_text("secret\n")
    path.chmod(0o644)
    assert main(["serve", "-m", str(BUNDLED), "--port", "0", "--api-key-file", str(path)]) == 1
    assert "; got mode 644. Run: chmod 600 " in capfd.readouterr().err


def test_missing_packages_are_named(monkeypatch, capfd):
    for name in ("starlette", "uvicorn"):
        with monkeypatch.context() as patch:
            for module in [each for each in sys.modules if each.split(".")[0] == name]:
                patch.setitem(sys.modules, module, None)
            patch.setitem(sys.modules, name, None)
            assert main(["serve", "-m", str(BUNDLED), "--port", "0"]) == 1
            line = f"lama: lama serve needs {name}; pip install 'lama[serve]'\n"
            assert capfd.readouterr().err == line
