"""Errors of the server as OpenAI's: a status, and an object that names the wrong field."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lama.errors import LamaError, UsageError, first_line
from lama.server.fields import BadField
from lama.server.worker import Draining, QueueFull

INVALID = "invalid_request_error"
RETRY_AFTER = "1"  # seconds


@dataclass(frozen=True)
class ErrorAnswer:
    """An error as a client receives it."""

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """The error as OpenAI's JSON object."""
        found = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": found}


class Refused(LamaError):
    """An error with a status and a code of its own."""

    def __init__(self, status: int, message: str, *, type: str = INVALID, param: str = "", code: str = ""):
        super().__init__(message)
        self.answer = ErrorAnswer(status, message, type, param or None, code or None)


def answer_to(error: BaseException) -> ErrorAnswer:
    """The answer to a request that ended with this error."""
    match error:
        case Refused():
            return error.answer
        case QueueFull():
            retry = {"Retry-After": RETRY_AFTER}
            return ErrorAnswer(429, str(error), "rate_limit_error", code="queue_full", headers=retry)
        case Draining():
            return ErrorAnswer(503, str(error), "unavailable_error", headers={"Retry-After": RETRY_AFTER})
        case BadField():
            return ErrorAnswer(400, str(error), param=error.param)
        case UsageError() | LamaError():
            return ErrorAnswer(400, str(error))
    return ErrorAnswer(500, f"unexpected {type(error).__name__}: {first_line(error)}", "server_error")
