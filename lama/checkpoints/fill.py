"""Filling a model with the tensors of a file."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.device import Buffer
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.stored import NUMPY, StoredTensor, read_weights
from lama.compiler import cores
from lama.errors import LamaError, UsageError

READERS = 4  # threads that read: more gain nothing once the file's pages are in memory
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

    Names and shapes are all compared before a number is read; then one tensor at a time is in memory beside the weights, or,
    where the file has the numbers one after the other and the device's memory is the host's, less than that.
    `source` (a path) and `name_in_file` (lama's name -> the file's) are for the message. Raises LamaError.
    """
    check_dtype(dtype)
    parameters = get_state_dict(model)
    check_tensors({name: tuple(map(int, p.shape)) for name, p in parameters.items()}, tensors, source, name_in_file)
    read = {name: Tensor.empty(*p.shape, dtype=DTYPES[dtype], device=device) for name, p in parameters.items()}
    in_parts = [name for name in read if tensors[name].read_into is not None and host_memory(read[name]) is not None]
    with ThreadPoolExecutor(min(READERS, cores())) as pool:
        list(pool.map(lambda name: read_weights(tensors[name], dtype, host_memory(read[name])), in_parts))
    for name, parameter in parameters.items():
        parameter.replace(read[name] if name in in_parts else to_device(read_weights(tensors[name], dtype), dtype, device))


def host_memory(tensor: Tensor) -> np.ndarray | None:
    """A stored tensor's memory, to be written in place, bfloat16 as uint16; None where it is not the host's."""
    buffer = tensor.uop.buffer
    assert isinstance(buffer, Buffer)
    if not buffer.device.startswith("CPU"):
        return None
    memory = buffer.ensure_allocated().as_memoryview(force_zero_copy=True)
    return np.frombuffer(memory, NUMPY[{dtype: name for name, dtype in DTYPES.items()}[tensor.dtype]]).reshape(tensor.shape)


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
