"""Quantised models: which matrices have 8 or 4 bits, and checks where such models cannot be used."""

from dataclasses import replace

from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.embeddings import TokenEmbedding
from lama.errors import LamaError
from lama.kernels import Quantized
from lama.kernels.quantized import empty
from lama.layers import Linear
from lama.models.gpt import GPT

BITS = {"int8": 8, "int4": 4}
"""The dtypes of such models, by name."""


def bits_of_weights(model: object, dtype: str) -> dict[str, int]:
    """The bits of each quantised parameter in a model of `dtype`, by name: all matrices of linear layers.

    A tied embedding is also quantised, with 8 bits: as the output layer, its errors directly change the
    logits. Raises LamaError for a model other than a GPT.
    """
    if not isinstance(model, GPT):
        raise LamaError(f"only a GPT can have {dtype} weights; got a {type(model).__name__}")
    return {
        name: BITS[dtype] if isinstance(owner, Linear) else 8 for name, owner in multiplied(model).items()
    }


def multiplied(model: GPT) -> dict[str, Linear | TokenEmbedding]:
    """The layers of `matrices_of` whose matrix is a factor of products: all but an untied embedding."""
    found = matrices_of(model)
    return {name: owner for name, owner in found.items() if isinstance(owner, Linear) or model.config.tied}


def matrices_of(model: object) -> dict[str, Linear | TokenEmbedding]:
    """The layers whose matrix can be quantised, by the name of that parameter."""
    found: dict[str, Linear | TokenEmbedding] = {}
    for name in weights_of(model):
        layer, _, parameter = name.rpartition(".")
        owner = _at(model, layer) if layer else None
        if parameter == "weight" and isinstance(owner, Linear | TokenEmbedding):
            found[name] = owner
    return found


def set_weight(model: object, name: str, weight: Quantized) -> None:
    """Replace the parameter of that name by a quantised one."""
    layer, _, parameter = name.rpartition(".")
    setattr(_at(model, layer), parameter, weight)


def make_quantized(model: object, dtype: str) -> None:
    """Put unfilled quantised weights into an unfilled model. Raises LamaError."""
    for name, bits in bits_of_weights(model, dtype).items():
        d_out, d_in = (int(n) for n in get_state_dict(model)[name].shape)
        set_weight(model, name, empty(d_out, d_in, bits))


def _at(model: object, path: str) -> object:
    """The part of a model that a path such as `blocks.0.attn` names."""
    found = model
    for part in path.split("."):
        found = found[int(part)] if isinstance(found, list) else getattr(found, part)
    return found


def weights_of(model: object) -> dict[str, Tensor | Quantized]:
    """All parameters by name; a quantised matrix counts as one parameter."""
    return {**get_state_dict(model, tensor_type=(Tensor, Quantized))}


def without_rounding(model: object) -> bool:
    """Let quantised matrices multiply activations without rounding them; False for a model that has none."""
    matrices = {name: w for name, w in weights_of(model).items() if isinstance(w, Quantized)}
    for name, weight in matrices.items():
        set_weight(model, name, replace(weight, rounds=False))
    return len(matrices) > 0


def dtype_of(model: object) -> str | None:
    """int8 or int4 for a quantised model, else None."""
    found = {weight.bits for weight in weights_of(model).values() if isinstance(weight, Quantized)}
    return next((name for name, bits in BITS.items() if found and min(found) == bits), None)


def check_layout(model: object, dtype: str) -> None:
    """Raise LamaError if a matrix of a quantised model is not of a kind that `lama quantize` makes."""
    wanted = bits_of_weights(model, dtype)
    for name, weight in weights_of(model).items():
        if isinstance(weight, Quantized) and (weight.has_minima or weight.bits != wanted.get(name)):
            rule = "only quantised matrices of the kinds that lama quantize makes can be saved or exported"
            raise LamaError(f'{rule}; {name} is of another kind. Load the model with dtype="float32"')


def refuse_quantized(model: object, what: str) -> None:
    """Raise LamaError if the model is quantised; `what` is the purpose, such as "to be trained"."""
    if (dtype := dtype_of(model)) is not None:
        rule = f"a model must have weights of a float dtype {what}; got {dtype}"
        raise LamaError(f"{rule}. Use the model that it was quantised from")
