"""Producers: how results were made, so that one kernel can also do the work of the kernel before it.

Nothing runs before its result is wanted. Where `gelu(x)` finds that x is a product, it returns another
product, one with GELU at its end; the first never runs unless something else needs x. So models are written
as if nothing were fused, and a recorded or replaced activation is computed as usual. docs/kernels.md has a
table of all fusions.

Producers are frozen. What changes is only the table here, which maps a result to its producer. A model could
do without it only by handing pairs such as (sum, norm of the sum) from block to block.
"""

from typing import TypeVar
from weakref import WeakKeyDictionary

from tinygrad import Tensor, UOp

from lama.runtime.strides import without_reshapes


class Producer:
    """How a result was made, as UOps: a record of tensors would keep their memory and change with them.

    Its methods return the result of one kernel that does both operations, or None where there is none.
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
    """`result`, with its producer, which may refer only to inputs of the result."""
    _producers[without_reshapes(result.uop)] = producer
    return result


def producer_of(x: Tensor, kind: type[P]) -> P | None:
    """The producer of x, or of the tensor that x is a reshape of, if it is of this kind."""
    producer = _producers.get(without_reshapes(x.uop)) if _producers else None
    return producer if isinstance(producer, kind) else None


def remember_computed(x: Tensor, result: Tensor) -> None:
    """Let `result`, which a fused kernel has computed beside its own, stand for x from here on."""
    _producers.pop(without_reshapes(x.uop), None)
    _computed[without_reshapes(x.uop)] = result.uop


def computed(x: Tensor) -> Tensor:
    """x, or the equal result of a fused kernel: x itself would be computed a second time."""
    found = _computed.get(without_reshapes(x.uop)) if _computed else None
    return x if found is None else Tensor(found).reshape(x.shape)


def no_fusion(x: Tensor) -> Tensor:
    """Exclude x from fusion, so that it is realised and has its own gradient."""
    if _producers or _computed:
        _producers.pop(without_reshapes(x.uop), None)
        _computed.pop(without_reshapes(x.uop), None)
    return x
