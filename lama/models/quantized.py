"""A model whose matrices are of 8 or 4 bits: which of its parameters are, and what cannot be done with it."""

from functools import reduce
from typing import Any

from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.embeddings import TokenEmbedding
from lama.errors import LamaError
from lama.kernels import Quantized
from lama.kernels.quantized import empty
from lama.layers import Linear
from lama.models.gpt import GPT

BITS = {"int8": 8, "int4": 4}
"""The dtypes of such a model, by name."""


def bits_of_weights(model: Any, dtype: str) -> dict[str, int]:
    """The bits of each parameter that is quantised in a model of `dtype`, by name: all matrices of linear layers.

    The embedding of a tied model is one, and keeps 8 bits: it is read as often as it is the output layer, where an error goes
    straight into the logits. Raises LamaError for a model that is no GPT.
    """
    if not isinstance(model, GPT):
        raise LamaError(f"a model must be a GPT to be held in {dtype}; got a {type(model).__name__}")
    bits = {}
    for name in get_state_dict(model):
        layer, _, parameter = name.rpartition(".")
        owner = _at(model, layer)
        if parameter == "weight" and isinstance(owner, Linear):
            bits[name] = BITS[dtype]
        elif isinstance(owner, TokenEmbedding) and model.config.tied:
            bits[name] = 8
    return bits


def set_weight(model: Any, name: str, weight: Quantized) -> None:
    """Put it in the place of the parameter of that name."""
    layer, _, parameter = name.rpartition(".")
    setattr(_at(model, layer), parameter, weight)


def make_quantized(model: Any, dtype: str) -> None:
    """Put unfilled quantised weights into an unfilled model. Raises LamaError."""
    for name, bits in bits_of_weights(model, dtype).items():
        d_out, d_in = (int(n) for n in get_state_dict(model)[name].shape)
        set_weight(model, name, empty(d_out, d_in, bits))


def _at(model: Any, path: str) -> Any:
    return reduce(lambda owner, part: owner[int(part)] if part.isdecimal() else getattr(owner, part), path.split("."), model)


def weights_of(model: Any) -> dict[str, Tensor | Quantized]:
    """All parameters by name; a quantised one is one of them, not two."""
    weights: dict[str, Any] = get_state_dict(model, tensor_type=(Tensor, Quantized))
    return weights


def dtype_of(model: Any) -> str | None:
    """int8 or int4 if its matrices are such, else None."""
    found = {weight.bits for weight in weights_of(model).values() if isinstance(weight, Quantized)}
    return next((name for name, bits in BITS.items() if found and min(found) == bits), None)


def refuse_quantized(model: Any, what: str) -> None:
    """Raises LamaError if the model is quantised. `what` is to be done with it."""
    if (dtype := dtype_of(model)) is not None:
        raise LamaError(f"a model must have weights of a float dtype {what}; got {dtype}. Take the one that it was made from")
