"""Building a model and filling it with the tensors of a file."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from tinygrad import Device, Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.checkpoint import Checkpoint
from lama.checkpoints.rows import spans
from lama.checkpoints.tensor import CHUNK, FileTensor, read_weights
from lama.errors import LamaError, UsageError, abbreviated, quoted, warn
from lama.kernels import Quantized
from lama.kernels.quantized import TILE, row_sizes, side_by_side
from lama.kernels.tiles import HEIGHT, UNITS, in_tiles, tiles_of, write_tiles
from lama.models.config import LAYERS, config_from_dict
from lama.models.gpt import GPT
from lama.models.quantized import (
    BITS,
    bits_of_weights,
    make_quantized,
    matrices_of,
    multiplied,
    set_weight,
    weights_of,
    without_rounding,
)
from lama.models.registry import Config, Model, make_model
from lama.ops import dequantize, quantize
from lama.runtime.buffers import (
    empty,
    from_array,
    host_array,
    packed,
    release_unused,
    write,
)
from lama.runtime.kernel import is_fast
from lama.runtime.threads import ahead, on_threads
from lama.shapes import Array

READERS = 4  # threads that read; more are no faster, even for a file in memory
DTYPES = {"float32": dtypes.float32, "float16": dtypes.float16, "bfloat16": dtypes.bfloat16}
_DTYPES = DTYPES | {"int8": dtypes.int8, "uint8": dtypes.uint8}  # with those of quantised weights
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def check_dtype(dtype: str | None) -> None:
    """Raise UsageError if weights cannot have this dtype; None means that of the file."""
    if dtype is not None and dtype not in (*DTYPES, *BITS):
        raise UsageError(f"dtype must be one of {', '.join((*DTYPES, *BITS))}; got {quoted(dtype)}")


def filled(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    device: str | None = None,
    float_activations: bool = False,
    in_rows: bool = False,
) -> Model:
    """The model of a checkpoint, with its weights cast to `dtype` on `device`. Raises LamaError.

    Without a dtype, matrices that are quantised in a GGUF file stay quantised, and the rest is float32. Names
    and shapes are compared before any weight is read, and only a few tensors are in memory besides the
    weights. For int8 and int4, matrices are rounded one by one, unless the file has them with as many bits
    and without minima. A warning counts matrices rounded a second time. With `float_activations`, quantised
    matrices multiply activations without rounding them. With `in_rows`, weights of half precision are not put
    into tiles.
    """
    check_dtype(dtype)
    if checkpoint.dtype is not None:
        if dtype not in (None, "float32", checkpoint.dtype):
            got = f"got dtype={dtype} for one of {checkpoint.dtype} in {checkpoint.source}"
            raise LamaError(f"a quantised model keeps its dtype; {got}")
        dtype = None
    tensors, config = dict(checkpoint.tensors()), checkpoint.config
    shapes = {name: tuple(map(int, each.shape)) for name, each in parameters_of(config).items()}
    check_tensors(shapes, tensors, checkpoint.source, checkpoint.name_in_file)
    model = new_model(config)
    with packed(device):
        _fill(model, tensors, checkpoint, dtype, device, in_rows)
    if float_activations and not without_rounding(model):
        rule = "float activations are an option of quantised models"
        raise UsageError(f"{rule}; got none in {checkpoint.source}. Leave it out, or load int8 or int4")
    if isinstance(model, GPT):
        model.sampling, model.family = checkpoint.sampling, checkpoint.family
    return model


def _fill(
    model: Model,
    tensors: Mapping[str, FileTensor],
    checkpoint: Checkpoint,
    dtype: str | None,
    device: str | None,
    in_rows: bool,
) -> None:
    """Put the tensors into the model. Raises LamaError."""
    parameters = get_state_dict(model)
    stored = {
        name: Stored(tensor.quantized, ("uint8" if BITS[tensor.dtype] == 4 else "int8", "float16"))
        for name, tensor in tensors.items()
        if tensor.quantized is not None
    }
    wanted: dict[str, int] = {}
    if dtype in (None, *BITS):
        wanted = _stored_bits(model, tensors) if dtype is None else bits_of_weights(model, dtype)
        found = {name: _as_stored(tensors[name], bits, dtype is None) for name, bits in wanted.items()}
        stored |= {name: each for name, each in found.items() if each is not None}
    arrays = ahead(Stored.read, stored.values())
    for (name, each), (values, scales) in zip(stored.items(), arrays, strict=True):
        parts = zip((values, scales), each.names, strict=True)
        both = [from_array(array, _DTYPES[of], device) for array, of in parts]
        set_weight(model, name, Quantized(both[0], both[1], tensors[name].shape[1]))
        del parameters[name]
    again = RoundedAgain()
    for name in [name for name in wanted if name not in stored]:
        set_weight(model, name, _rounded(tensors[name], wanted[name], device, again))
        del parameters[name]
    if wanted:
        release_unused(device)
    again.tell(checkpoint.source)
    held = dtypes.float32 if dtype is None or dtype in BITS else DTYPES[dtype]
    target: dict[str, Tensor] = {}
    memory: dict[str, Array | None] = {}
    tiled = multiplied(model) if isinstance(model, GPT) and held in UNITS and not in_rows else {}
    for name, p in parameters.items():
        shape, is_held = tuple(map(int, p.shape)), (p.dtype, p.device) == (held, Device.canonicalize(device))
        target[name] = p if is_held else empty(*shape, dtype=held, device=device)
        if name in tiled and is_fast(target[name]):
            target[name] = in_tiles(shape[0], shape[1], held, device)
        tiles = tiles_of(target[name])
        memory[name] = host_array(target[name] if tiles is None else tiles)  # allocates it, not on threads

    def read(name: str) -> None:
        _read(tensors[name], target[name], memory[name])

    on_host = [name for name in parameters if tensors[name].read_into and memory[name] is not None]
    on_threads(read, on_host, READERS)
    for name, parameter in parameters.items():
        if name not in on_host:
            read(name)
        parameter.replace(target[name])


def _read(tensor: FileTensor, target: Tensor, memory: Array | None) -> None:
    """Fill a realised tensor; `memory` is its memory if that is the host's. Raises LamaError."""
    dtype = DTYPE_NAMES[target.dtype]
    if memory is None:
        write(target, read_weights(tensor, dtype))
    elif tiles_of(target) is None:
        read_weights(tensor, dtype, memory)
    else:
        for first, part in spans(tensor, HEIGHT):
            write_tiles(memory, first, read_weights(part, dtype))


def new_model(config: Config, dtype: str | None = None) -> Model:
    """An unfilled model, with quantised matrices for a `dtype` of int8 or int4."""
    model = make_model(config, seed=None)
    if dtype is not None:
        make_quantized(model, dtype)
    return model


def parameters_of(config: Config, dtype: str | None = None) -> dict[str, Tensor | Quantized]:
    """Every parameter of `new_model` by name, unfilled; all layers of a stack share those of one layer.

    A config may ask for thousands of layers, each of which takes milliseconds to build.
    """
    layers = {name: n for name, n in vars(config).items() if name in LAYERS}
    one_layer = vars(config) | {name: min(n, 1) for name, n in layers.items()}
    model = new_model(config_from_dict(type(config), one_layer), dtype)
    parameters: dict[str, Tensor | Quantized] = {}
    for name, parameter in weights_of(model).items():
        stack, in_block, rest = name.partition("blocks.0.")
        n = layers.get(f"n_{stack.rstrip('.')}_layers", layers.get("n_layers", 0))
        names = [f"{stack}blocks.{i}.{rest}" for i in range(n)] if in_block else [name]
        parameters |= dict.fromkeys(names, parameter)
    return parameters


@dataclass(frozen=True)
class Stored:
    """The values and scales of a matrix in the file, and the names of their expected dtypes."""

    parts: tuple[FileTensor, FileTensor]
    names: tuple[str, str]

    def read(self) -> tuple[Array, Array]:
        """The arrays of a `Quantized`. Raises LamaError for other dtypes."""
        values, scales = map(read_weights, self.parts, self.names)
        return side_by_side(values, scales)


@dataclass
class RoundedAgain:
    """Matrices that are quantised in the file and had to be rounded again, and the error of this."""

    matrices: int = 0
    types: set[str] = field(default_factory=set)
    error: float = 0.0
    """Σ (rounded − read)²."""
    size: float = 0.0
    """Σ read²."""

    def add(self, tensor: FileTensor, rounded: Quantized, read: Array) -> None:
        self.matrices += 1
        self.types.update(tensor.stored.split(", "))
        for row in range(0, len(read), rows := max(1, CHUNK // tensor.shape[1] // TILE) * TILE):
            some = read[row : row + rows]
            self.error += float(
                np.square(dequantize(rounded[row : row + rows]).numpy() - some).sum(dtype=float)
            )
            self.size += float(np.square(some).sum(dtype=float))

    def tell(self, source: str) -> None:
        """Warn of such matrices, if there are any."""
        if self.matrices:
            error = math.sqrt(self.error / self.size) if self.size else 0.0
            what = f"{self.matrices} matrices of {', '.join(sorted(self.types))} in {source}"
            warn(f"{what} are rounded a second time, with a relative rms error of {error:.2%}")


def _stored_bits(model: Model, tensors: Mapping[str, FileTensor]) -> dict[str, int]:
    """The bits for matrices that are quantised in the file: 4 if their type fits lama's 4 bits, else 8."""
    return {
        name: 4 if tensor.exact is not None and tensor.exact[0].dtype == "uint8" else 8
        for name in matrices_of(model)
        if (tensor := tensors[name]).stored
    }


def _as_stored(tensor: FileTensor, bits: int, minima: bool) -> Stored | None:
    """The matrix as it is in the file, if it has these bits there, and no minima unless `minima`."""
    if tensor.exact is None or tensor.exact[0].dtype != ("int8" if bits == 8 else "uint8"):
        return None
    values, scales = tensor.exact
    if not minima and (scales.dtype, scales.shape[1]) != ("float16", row_sizes(tensor.shape[1], bits)[1]):
        return None
    return Stored(tensor.exact, (values.dtype, scales.dtype))


def _rounded(tensor: FileTensor, bits: int, device: str | None, again: RoundedAgain) -> Quantized:
    """Read a matrix and quantise it. Raises LamaError."""
    weight = Tensor.empty(*tensor.shape, device=device)
    memory = host_array(weight)
    array = read_weights(tensor, "float32", memory)
    if memory is None:
        weight = from_array(array, dtypes.float32, device)
    quantized = quantize(weight, bits)
    Tensor.realize(*quantized.tensors())
    if not np.isfinite(quantized.scales.numpy()).all():
        got = f"got too large ones in {tensor.name}. Load the model as float32"
        raise LamaError(f"weights must fit int{bits}, whose scales are float16; {got}")
    if tensor.stored:
        again.add(tensor, quantized, array)
    return quantized


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, FileTensor],
    source: object,
    name_in_file: Callable[[str], str] = str,
) -> None:
    """Raise one LamaError that names the missing tensors, the unknown ones and those of another shape."""
    wrong: list[str] = []
    for name, tensor in found.items():
        if tensor.shape != (shape := expected.get(name, tensor.shape)):
            shapes = f"{tensor.shape_in_file(tensor.shape)} instead of {tensor.shape_in_file(shape)}"
            wrong.append(f"{tensor.name} {shapes}")
    problems = {
        "missing": abbreviated([name for name in expected if name not in found], name_in_file),
        "unknown": abbreviated([tensor.name for name, tensor in found.items() if name not in expected]),
        "wrong shape": abbreviated(wrong),
    }
    if told := "; ".join(f"{what}: {names}" for what, names in problems.items() if names):
        rule = "hold exactly the tensors that its config describes"
        raise LamaError(f"{source} must {rule}; got {told}. Is config.json this model's?")
