"""A Hugging Face Hub on 127.0.0.1: as much of its API as a download needs, and faults on demand."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `repositories[owner/name][file] = bytes`; `url` is what HF_ENDPOINT should be.

    Large files (`.safetensors`, `.bin`) are declared as LFS files with their SHA-256, others with their git
    object id.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        """Repositories whose files only those may have who accepted a licence."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and Range of each request."""
        self.damage: dict[str, bytes] = {}
        """Files that are sent with other bytes than declared."""
        self.breaks: dict[str, int] = {}
        """Files whose first download breaks off after so many bytes."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def downloads(self) -> list[str]:
        """The files that were fetched, in the order of their first request."""
        return list(
            dict.fromkeys(
                path.rsplit("/", 1)[1]
                for method, path, _ in self.requests
                if method == "GET" and "/resolve/" in path
            )
        )

    @staticmethod
    def digest(name: str, content: bytes) -> str:
        if name.endswith((".safetensors", ".bin")):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def describe(self, name: str, content: bytes, tree: bool) -> dict[str, Any]:
        """A file in a repository's listing, or in a tree's."""
        digest = self.digest(name, content)
        entry: dict[str, Any] = {"path": name, "type": "file"} if tree else {"rfilename": name}
        entry |= {
            "size": len(content),
            "oid" if tree else "blobId": digest if len(digest) == 40 else "f" * 40,
        }
        if len(digest) == 64:
            entry["lfs"] = {"oid" if tree else "sha256": digest, "size": len(content), "pointerSize": 134}
        return entry

    def _handler(hub) -> type[BaseHTTPRequestHandler]:  # `self` is the handler inside
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(
                self, code: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
            ) -> None:
                self.send_response(code)
                for key, value in (
                    {"Content-Length": str(len(body) if length is None else length)} | (headers or {})
                ).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def missing(self, code: str) -> None:
                self.answer(404, b"", {"X-Error-Code": code, "X-Error-Message": "not here"})

            def do_GET(self) -> None:
                path = urlsplit(self.path).path.lstrip("/")
                hub.requests.append((self.command, path, self.headers.get("Range")))
                owner, name, *rest = path.removeprefix("api/models/").split("/")
                files = hub.repositories.get(f"{owner}/{name}")
                if files is None:
                    return self.missing("RepoNotFound")
                revision = rest[1] if len(rest) > 1 else "main"
                if revision not in ("main", COMMIT):
                    return self.missing("RevisionNotFound")
                if path.startswith("api/"):
                    tree = rest[:1] == ["tree"]
                    listing = [hub.describe(file, content, tree) for file, content in files.items()]
                    info = {
                        "_id": "1",
                        "id": f"{owner}/{name}",
                        "sha": COMMIT,
                        "siblings": listing,
                        "tags": [],
                        "private": False,
                    }
                    return self.answer(
                        200,
                        json.dumps(listing if tree else info).encode(),
                        {"Content-Type": "application/json"},
                    )
                if f"{owner}/{name}" in hub.gated:
                    return self.answer(
                        403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}
                    )
                self.send_file(rest[2], files[rest[2]])

            do_HEAD = do_GET

            def send_file(self, name: str, content: bytes) -> None:
                headers = {
                    "X-Repo-Commit": COMMIT,
                    "ETag": f'"{hub.digest(name, content)}"',
                    "Accept-Ranges": "bytes",
                }
                body = hub.damage.get(name, content)
                code, start = 200, 0
                if (asked := self.headers.get("Range")) and self.command == "GET":
                    code, start = 206, int(asked.removeprefix("bytes=").split("-")[0])
                    headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                if self.command == "GET" and name in hub.breaks:
                    self.answer(code, body[start : hub.breaks.pop(name)], headers, length=len(body) - start)
                    self.close_connection = True
                    return
                self.answer(code, body[start:], headers)

        return Handler
