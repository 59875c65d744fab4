"""TinyJit without the call that it does not capture."""

from collections.abc import Callable
from typing import Any

from tinygrad import TinyJit


def capture_at_once(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step`, captured by its first call and replayed by the others, which saves half of the start-up.

    TinyJit runs a function once without capturing it, for tensors that are not realised until then: here every tensor
    that `step` reads must be realised before. Its results are overwritten by the next call.
    """
    jit = TinyJit(step)
    jit.cnt = 1
    return jit
