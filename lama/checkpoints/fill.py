"""Building a model and filling it with the tensors of a file."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.device import Buffer, LRUAllocator
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.huggingface import abbreviated
from lama.checkpoints.stored import NUMPY, StoredTensor, read_weights
from lama.errors import LamaError, UsageError, quoted
from lama.kernels import Quantized, quantize
from lama.kernels.pool import on_threads
from lama.models.config import LAYERS
from lama.models.quantized import BITS, bits_of_weights, set_weight

READERS = 4  # threads that read: more gain nothing once the file's pages are in memory
DTYPES = {"float32": dtypes.float32, "float16": dtypes.float16, "bfloat16": dtypes.bfloat16}
_DTYPES = DTYPES | {"int8": dtypes.int8, "uint8": dtypes.uint8}  # and those of quantised weights
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def check_dtype(dtype: str) -> None:
    """Raises UsageError if weights cannot be held in `dtype`."""
    if dtype not in (*DTYPES, *BITS):
        raise UsageError(f"dtype must be one of {', '.join((*DTYPES, *BITS))}; got {quoted(dtype)}")


def filled(
    make: Callable[[Any], Any],
    config: Any,
    tensors: Mapping[str, StoredTensor],
    source: object,
    *,
    dtype: str = "float32",
    device: str | None = None,
    name_in_file: Callable[[str], str] = lambda name: name,
) -> Any:
    """The model `make(config)`, made unfilled, with every parameter replaced by the tensor of its name, cast to `dtype` on `device`.

    Names and shapes are all compared before the model is built or a number is read. Then one tensor at a time is in memory
    beside the weights; or, where the file has the numbers one after the other and the device's memory is the host's, less than that.
    With a `dtype` of int8 or int4 the matrices are rounded one by one as they have been read, and the rest is in float32.
    What is quantised in the file, and therefore in `model`, stays as it is.
    `source` (a path) and `name_in_file` (lama's name -> the file's) are for the message. Raises LamaError.
    """
    check_dtype(dtype)
    check_tensors(shapes_of(make, config), tensors, source, name_in_file)
    model = make(config)
    parameters = get_state_dict(model)
    bits = bits_of_weights(model, dtype) if dtype in BITS else {}
    for name in bits:
        set_weight(model, name, _rounded(tensors[name], bits[name], dtype, device))
        del parameters[name]
    if bits:
        _give_back(device)
    # What is quantised in the file is in the model, too, and is read as it is.
    held = {name: DTYPE_NAMES[p.dtype] if p.dtype != dtypes.float32 else "float32" if bits else dtype for name, p in parameters.items()}
    read = {name: Tensor.empty(*p.shape, dtype=_DTYPES[held[name]], device=device) for name, p in parameters.items()}
    in_parts = [name for name in read if tensors[name].read_into is not None and host_memory(read[name]) is not None]
    on_threads(lambda name: read_weights(tensors[name], held[name], host_memory(read[name])), in_parts, READERS)
    for name, parameter in parameters.items():
        parameter.replace(read[name] if name in in_parts else to_device(read_weights(tensors[name], held[name]), held[name], device))
    return model


def shapes_of(make: Callable[[Any], Any], config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of `make(config)`, worked out from one layer of each stack.

    A config may name thousands of layers, each of which takes milliseconds to build.
    """
    layers = {name: n for name, n in vars(config).items() if name in LAYERS}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in get_state_dict(make(replace(config, **{name: min(n, 1) for name, n in layers.items()}))).items():
        stack, in_block, rest = name.partition("blocks.0.")
        n = layers.get(f"n_{stack.rstrip('.')}_layers", layers.get("n_layers", 0))
        names = [f"{stack}blocks.{i}.{rest}" for i in range(n)] if in_block else [name]
        shapes |= dict.fromkeys(names, tuple(map(int, parameter.shape)))
    return shapes


def _rounded(tensor: StoredTensor, bits: int, dtype: str, device: str | None) -> Quantized:
    """A matrix of the file, quantised. Raises LamaError."""
    weight = Tensor.empty(*tensor.shape, device=device)
    memory = host_memory(weight)
    weight = to_device(read_weights(tensor, "float32"), "float32", device) if memory is None else weight
    if memory is not None:
        read_weights(tensor, "float32", memory)
    quantized = quantize(weight, bits)
    Tensor.realize(*quantized.tensors())
    if not np.isfinite(quantized.scales.numpy()).all():
        raise LamaError(f"weights must fit {dtype}, whose scales are float16; got too large ones in {tensor.name}. Load it as float32")
    return quantized


def _give_back(device: str | None) -> None:
    """The memory of tensors that are no more, which tinygrad keeps for others of their size."""
    allocator = Device[device or Device.DEFAULT].allocator
    if isinstance(allocator, LRUAllocator):
        allocator.free_cache()


def host_memory(tensor: Tensor) -> np.ndarray | None:
    """A stored tensor's memory, to be written in place, bfloat16 as uint16; None where it is not the host's."""
    buffer = tensor.uop.buffer
    assert isinstance(buffer, Buffer)
    if not buffer.device.startswith("CPU"):
        return None
    memory = buffer.ensure_allocated().as_memoryview(force_zero_copy=True)
    return np.frombuffer(memory, NUMPY[DTYPE_NAMES[tensor.dtype]]).reshape(tensor.shape)


def to_device(array: np.ndarray, dtype: str, device: str | None) -> Tensor:
    """A tensor of its own that holds `array`; bfloat16 comes as uint16 bits.

    The bytes are copied straight into the tensor's buffer: scheduling `Tensor(array).realize()` costs 5 ms a tensor.
    """
    tensor = Tensor.empty(*array.shape, dtype=_DTYPES[dtype], device=device)
    buffer = tensor.uop.buffer
    assert isinstance(buffer, Buffer)
    buffer.ensure_allocated().copy_from(Buffer("PYTHON", buffer.size, buffer.dtype, opaque=array.reshape(-1).view(np.uint8).data))
    return tensor


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, StoredTensor], source: object, name_in_file: Callable[[str], str]
) -> None:
    """Raises one LamaError that names the missing tensors, the unknown ones and those of another shape."""
    missing = [name for name in expected if name not in found]
    unknown = [tensor.name for name, tensor in found.items() if name not in expected]
    wrong = [_shapes(found[name], shape) for name, shape in expected.items() if name in found and found[name].shape != shape]
    if missing or unknown or wrong:
        problems = {
            "missing": abbreviated(missing, name_in_file),
            "unknown": abbreviated(unknown),
            "wrong shape": abbreviated(wrong),
        }
        told = "; ".join(f"{what}: {names}" for what, names in problems.items() if names)
        raise LamaError(f"{source} must hold exactly the tensors that its config describes; got {told}. Is config.json this model's?")


def _shapes(tensor: StoredTensor, shape: tuple[int, ...]) -> str:
    return f"{tensor.name} {tensor.shape_in_file(tensor.shape)} instead of {tensor.shape_in_file(shape)}"
