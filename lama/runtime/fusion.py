"""Producers: records of how results are made, so that one kernel can also do the work of the one before it.

Nothing runs before its result is needed. If `gelu(x)` finds that x is a matrix product, it returns another
product, one that ends with GELU. The first never runs unless something else needs x. So models are written as
if nothing were fused, and a recorded or replaced activation is computed as usual. docs/kernels.md has a table
of all fusions.

Producers are frozen. Only the table here changes, which maps a result to its producer. Without it, blocks
would have to pass pairs such as (sum, norm of the sum) to one another.
"""

from typing import TypeVar
from weakref import WeakKeyDictionary

from tinygrad import Tensor, UOp

from lama.runtime.strides import without_reshapes


class Producer:
    """A record of how a result is made, as UOps: tensors would keep their memory and change later.

    Its methods return the result of one kernel that does both operations, or None if there is none.
    """

    def with_gelu(self) -> Tensor | None:
        """GELU of this result."""
        return None

    def with_residual(self, residual: Tensor) -> Tensor | None:
        """This result + residual, a tensor of its shape."""
        return None

    def times(self, factor: Tensor) -> Tensor | None:
        """This result · factor, a tensor of its shape."""
        return None


P = TypeVar("P", bound=Producer)
_producers: WeakKeyDictionary[UOp, Producer] = WeakKeyDictionary()
_computed: WeakKeyDictionary[UOp, UOp] = WeakKeyDictionary()


def remember(result: Tensor, producer: Producer) -> Tensor:
    """Record the producer of `result`, which may refer only to the result's inputs; returns `result`."""
    _producers[without_reshapes(result.uop)] = producer
    return result


def producer_of(x: Tensor, kind: type[P]) -> P | None:
    """The producer of x, or of the tensor that x reshapes, if it is of this kind, else None."""
    producer = _producers.get(without_reshapes(x.uop)) if _producers else None
    return producer if isinstance(producer, kind) else None


def remember_computed(x: Tensor, result: Tensor) -> None:
    """Use `result`, an additional output of a fused kernel, in place of x from now on."""
    _producers.pop(without_reshapes(x.uop), None)
    _computed[without_reshapes(x.uop)] = result.uop


def computed(x: Tensor) -> Tensor:
    """x, or the equal result that a fused kernel already computes: x would be computed a second time."""
    found = _computed.get(without_reshapes(x.uop)) if _computed else None
    return x if found is None else Tensor(found).reshape(x.shape)


def no_fusion(x: Tensor) -> Tensor:
    """Exclude x from fusion, so that it is realised and has its own gradient."""
    if _producers or _computed:
        _producers.pop(without_reshapes(x.uop), None)
        _computed.pop(without_reshapes(x.uop), None)
    return x
