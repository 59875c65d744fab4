"""Filling a model with the tensors of a file."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.stored import StoredTensor, read_weights
from lama.errors import LamaError, UsageError

DTYPES = {"float32": dtypes.float32, "float16": dtypes.float16, "bfloat16": dtypes.bfloat16}


def check_dtype(dtype: str) -> None:
    """Raises UsageError if weights cannot be held in `dtype`."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")


def fill(
    model: Any,
    tensors: Mapping[str, StoredTensor],
    source: object,
    *,
    dtype: str = "float32",
    device: str | None = None,
    name_in_file: Callable[[str], str] = lambda name: name,
) -> None:
    """Replace every parameter of `model` by the tensor of its name, cast to `dtype` on `device`.

    Names and shapes are all compared before a number is read; then one tensor at a time is in memory beside the weights.
    `source` (a path) and `name_in_file` (lama's name -> the file's) are for the message. Raises LamaError.
    """
    check_dtype(dtype)
    parameters = get_state_dict(model)
    check_tensors({name: tuple(map(int, p.shape)) for name, p in parameters.items()}, tensors, source, name_in_file)
    for name, parameter in parameters.items():
        parameter.replace(to_device(read_weights(tensors[name], dtype), dtype, device))


def to_device(array: np.ndarray, dtype: str, device: str | None) -> Tensor:
    """A tensor of its own that holds `array`; bfloat16 comes as uint16 bits.

    The bytes are copied straight into the tensor's buffer: scheduling `Tensor(array).realize()` costs 5 ms a tensor.
    """
    tensor = Tensor.empty(*array.shape, dtype=DTYPES[dtype], device=device)
    buffer = tensor.uop.buffer
    assert isinstance(buffer, Buffer)
    buffer.ensure_allocated().copy_from(Buffer("PYTHON", buffer.size, buffer.dtype, opaque=array.reshape(-1).view(np.uint8).data))
    return tensor


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, StoredTensor], source: object, name_in_file: Callable[[str], str]
) -> None:
    """Raises one LamaError that names the missing tensors, the unknown ones and those of another shape."""
    problems = [
        ("missing", [name_in_file(name) for name in expected if name not in found]),
        ("unknown", [tensor.name for name, tensor in found.items() if name not in expected]),
        ("wrong shape", [_shapes(found[name], shape) for name, shape in expected.items() if name in found and found[name].shape != shape]),
    ]
    if any(names for _, names in problems):
        told = "; ".join(f"{what}: {_abbreviate(names)}" for what, names in problems if names)
        raise LamaError(f"{source} must hold exactly the tensors that its config describes; got {told}. Is config.json this model's?")


def _shapes(tensor: StoredTensor, shape: tuple[int, ...]) -> str:
    return f"{tensor.name} {tensor.shape_in_file(tensor.shape)} instead of {tensor.shape_in_file(shape)}"


def _abbreviate(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
