"""Shape annotations for tinygrad tensors, and the glossary of axes.

`x: Float[Tensor, "B T d_model"]` is a floating-point tensor with three axes. A letter always has one meaning:

    B  batch                    T  query positions (the tokens being computed)
    H  attention heads          S  key positions (the tokens being looked at; S = T without a cache)
    d_model  residual stream    d_head  one head's width    d_mlp  hidden width of the MLP

jaxtyping checks the annotations at run time if it is imported first (the tests do that, through its import
hook). Otherwise they mean the bare type and cost nothing. `Array` is a numpy array of any numbers.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
else:
    if sys.modules.get("jaxtyping"):  # its import takes longer than that of lama's own modules
        from jaxtyping import AbstractDtype
    else:

        class AbstractDtype:
            def __class_getitem__(cls, item: tuple[type, str]) -> type:
                return item[0]

    # jaxtyping compares the spelling of the dtype; tinygrad spells float32 `float`, int32 `int`, int8 `char`.
    class Float(AbstractDtype):
        dtypes = ("float", "half", "bfloat16", "double")

    class Int(AbstractDtype):
        dtypes = ("int", "long", "short", "char", "uint", "ulong", "ushort", "uchar")

    class Bool(AbstractDtype):
        dtypes = ("bool",)


Array: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[Any]]
"""A NumPy array; the docstring of its user gives the axes."""

__all__ = ["Array", "Bool", "Float", "Int"]
