"""What results were made from: so that a kernel can do the work of the one before it, or of the one after it.

Nothing runs before its result is wanted. Where `gelu(x)` finds that x is a product, it returns another product, one with
GELU at its end; the first never runs unless somebody else wants x. So the model is written as if nothing were fused, and
whoever keeps or replaces an activation gets what he asked for. Once x has been computed, nothing is known of it.
"""

from typing import TypeVar
from weakref import WeakKeyDictionary

from tinygrad import Tensor, UOp

from lama.kernels.views import without_reshapes


class Record:
    """How a result was made, as UOps: a record that held tensors would keep their memory, and change when they are computed."""

    def then(self, step: str, *others: Tensor) -> Tensor | None:
        """`step` ("gelu", "add", ...) of this result and `others`, made in one go; None where no kernel does that."""
        return None


T = TypeVar("T")
_records: WeakKeyDictionary[UOp, Record] = WeakKeyDictionary()


def made(result: Tensor, record: Record) -> Tensor:
    """`result`, remembered as what `record` says. A record may hold only what the result itself is made from."""
    _records[without_reshapes(result.uop)] = record
    return result


def maker(x: Tensor, kind: type[T]) -> T | None:
    """How x, or what it is a reshape of, was made, if it was made in this way."""
    record = _records.get(without_reshapes(x.uop))
    return record if isinstance(record, kind) else None


def then(x: Tensor, step: str, *others: Tensor) -> Tensor | None:
    """`step` of x and others in the shape of x, done by the kernel that makes x; None where it cannot."""
    record = _records.get(without_reshapes(x.uop))
    fused = None if record is None else record.then(step, *others)
    return None if fused is None else fused.reshape(x.shape)


def apart(x: Tensor) -> Tensor:
    """x, which from here on no kernel takes up into itself: it is computed as it stands, and has gradients of its own."""
    _records.pop(without_reshapes(x.uop), None)
    return x
