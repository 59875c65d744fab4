"""Everything that depends on tinygrad's internals: compiler, device, buffers, kernels, threads, capture.

The rest of lama imports `Tensor`, `UOp`, `dtypes`, `Device`, `Context`, `TinyJit` and `nn.state` from
tinygrad, and all else from here. On a release of tinygrad that lama was not tested with, this package uses
none of the internals: lama is then slower.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinygrad.dtype import DType

__all__ = ["DType"]


def __getattr__(name: str) -> object:
    if name != "DType":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tinygrad.dtype import DType

    return DType
