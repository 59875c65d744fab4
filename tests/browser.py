"""A page in headless Chromium, driven through its debugging pipe: what scripts return, what the mouse does,
what is complained of.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: the page is not looked at in a browser"
)
PATIENCE = 180  # seconds


class Browser:
    """Opens pages one after the other; to be closed by `with`."""

    def __init__(self) -> None:
        self.profile = tempfile.TemporaryDirectory()
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        # Out of the way of 3 and 4.
        commands, answers = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read, write))
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={self.profile.name}",
        ]

        def connect() -> None:  # Chromium reads commands from 3 and answers to 4
            os.dup2(commands, 3)
            os.dup2(answers, 4)

        quiet: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            [str(CHROMIUM), *flags, "about:blank"], preexec_fn=connect, close_fds=False, **quiet
        )
        for end in (read, write, commands, answers):
            os.close(end)
        self.complaints: list[str] = []
        """Uncaught errors, what is logged as an error or warning, and every request for anything but the page
        itself.
        """
        self._number, self._rest, self._session = 0, b"", None
        (page,) = (each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)[
            "sessionId"
        ]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._session = None
        self.call("Browser.close")
        self.process.wait(30)
        os.close(self._in)
        os.close(self._out)
        self.profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                answers = select.select([self._in], [], [], PATIENCE)[0]
                part = os.read(self._in, 1 << 20) if answers else b""
                if not part:
                    self.process.kill()
                    raise RuntimeError(
                        f"the browser must answer within {PATIENCE} s; got nothing to {method}"
                    )
                self._rest += part
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._notice(answer.get("method"), answer.get("params", {}))

    def _notice(self, method: str, about: dict[str, Any]) -> None:
        match method:
            case "Runtime.exceptionThrown":
                self.complaints.append(str(about["exceptionDetails"].get("exception", about)))
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(about["args"]))
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.complaints.append(about["entry"]["text"])
            case "Network.requestWillBeSent" if about["type"] != "Document" and not about["request"][
                "url"
            ].startswith("data:"):
                self.complaints.append(f"asked for {about['request']['url']}")

    def open(
        self, page: Path | str, address: str = "", width: int = 360, height: int = 740, dark: bool = False
    ) -> None:
        """A file or an address, in a window of that size, until the page says that it is drawn."""
        self.complaints.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{page.as_uri() if isinstance(page, Path) else page}{address}")
        self.until("document.documentElement?.dataset.ready")

    def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        self.run(f"while (!({condition})) await new Promise((done) => setTimeout(done, 10))")

    def run(self, script: str) -> Any:
        """What `script`, the body of an async function, returns, once what it set off is drawn."""
        frame = "requestAnimationFrame(() => setTimeout(done, 30))"
        drawn = f"await new Promise((done) => setTimeout(() => {frame}, 30));"
        code = (
            f"(async () => {{ const found = await (async () => {{ {script} }})(); {drawn} return found; }})()"
        )
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.run(f"return document.querySelector({json.dumps(selector)}).textContent"))

    def place(self, selector: str) -> tuple[float, float]:
        """The middle of an element, scrolled to."""
        find = f"const found = document.querySelector({json.dumps(selector)});"
        find += " found.scrollIntoView({ block: 'center' }); const box = found.getBoundingClientRect();"
        x, y = self.run(f"{find} return [box.x + box.width / 2, box.y + box.height / 2]")
        return x, y

    def mouse(self, selector: str, clicks: int = 0, at: tuple[float, float] | None = None) -> None:
        """Point at the middle of an element, or at a place `at` from its corner, and click so often."""
        x, y = self.place(selector)
        if at is not None:
            box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
            x, y = self.run(f"const box = {box}; return [box.x, box.y]")
            x, y = x + at[0], y + at[1]
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for n in range(1, clicks + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=n)
        self.run("")

    def type(self, text: str) -> None:
        """Into the field that has the focus."""
        self.call("Input.insertText", text=text)
        self.run("")

    def key(self, name: str, shift: bool = False) -> None:
        codes = {
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "Tab": 9,
            "Enter": 13,
            "Escape": 27,
        }
        about = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name], "modifiers": 8 * shift}
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if name == "Enter" and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, **about, **text)
        self.run("")

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
