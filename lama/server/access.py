"""Access to the server: keys, names of the host, and origins of pages."""

import hmac
import ipaddress
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lama.errors import LamaError, quoted
from lama.files import quoted_path, read_file
from lama.server.errors import ErrorAnswer

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> frozenset[str]:
    """The keys in a file, one a line. Raises LamaError for a file that others can read, or without keys."""
    content = read_file(path, 1 << 20)
    where = quoted_path(path)
    if os.name == "posix" and (mode := path.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO):
        got = f"got mode {stat.S_IMODE(mode):o}. Run: chmod 600 {where}"
        raise LamaError(f"only its owner may have access to the key file {where}; {got}")
    keys = {line.strip() for line in content.decode("utf-8", "replace").splitlines()} - {""}
    if not keys:
        raise LamaError(f"the key file {where} must have one key a line; got none")
    if wrong := [key for key in keys if not (key.isascii() and key.isprintable())]:
        raise LamaError(f"keys in {where} must be printable ASCII; got one of {len(wrong[0])} characters")
    return frozenset(keys)


@dataclass(frozen=True)
class Access:
    """The conditions of using the server."""

    host: str = "127.0.0.1"
    """The address that the server is bound to."""
    keys: frozenset[str] = frozenset()
    """Keys that give access; none if the server is open to everyone."""
    origins: frozenset[str] = frozenset()
    """Origins of other web pages that may use it."""

    def refusal(self, headers: Mapping[str, str]) -> ErrorAnswer | None:
        """The error for a Host that is not this server's (DNS rebinding), or for another page's Origin."""
        host = headers.get("host", "")
        if not self._knows(_name_of(host)):
            message = f"the Host must be an address of this server; got {quoted(host, 80)}"
            return ErrorAnswer(403, message, code="host_not_allowed")
        origin = headers.get("origin")
        if origin is None or origin.partition("://")[2] == host or self.origins & {origin, "*"}:
            return None
        message = f"pages of {quoted(origin, 80)} may not use this server; --allow-origin lets them"
        return ErrorAnswer(403, message, code="origin_not_allowed")

    def _knows(self, name: str) -> bool:
        if name in LOOPBACK or name == self.host.lower():
            return True
        if is_loopback(self.host):
            return False
        if self.keys:  # a page that rebinds DNS has no key
            return True
        return name == socket.gethostname().lower() or _is_address(name)

    def opens(self, headers: Mapping[str, str]) -> bool:
        """Whether a request has a valid key, or needs none."""
        if not self.keys:
            return True
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        # All are compared, each in a time that does not depend on the first wrong character.
        return sum(hmac.compare_digest(key.encode(), given.encode()) for key in self.keys) > 0


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """The name in a Host header, without its port: `[::1]:8080` is `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
