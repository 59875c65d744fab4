"""Build a model and fill it with the tensors of a file."""

from collections.abc import Callable, Mapping

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.checkpoint import Checkpoint
from lama.checkpoints.tensor import FileTensor, read_weights
from lama.errors import LamaError, UsageError, abbreviated, quoted
from lama.kernels import Quantized
from lama.kernels.quantized import empty
from lama.models.config import LAYERS, config_from_dict
from lama.models.gpt import GPT
from lama.models.quantized import BITS, bits_of_weights, make_quantized, set_weight, weights_of
from lama.models.registry import Config, Model, make_model
from lama.ops import quantize
from lama.runtime.buffers import from_array, host_array, release_unused
from lama.runtime.threads import on_threads
from lama.shapes import Array

READERS = 4  # threads that read; more gain nothing for a file in memory
DTYPES = {"float32": dtypes.float32, "float16": dtypes.float16, "bfloat16": dtypes.bfloat16}
_DTYPES = DTYPES | {"int8": dtypes.int8, "uint8": dtypes.uint8}  # with those of quantised weights
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def check_dtype(dtype: str) -> None:
    """Raise UsageError if weights cannot have this dtype."""
    if dtype not in (*DTYPES, *BITS):
        raise UsageError(f"dtype must be one of {', '.join((*DTYPES, *BITS))}; got {quoted(dtype)}")


def filled(checkpoint: Checkpoint, dtype: str = "float32", device: str | None = None) -> Model:
    """The model of a checkpoint, with its weights cast to `dtype` on `device`. Raises LamaError.

    Names and shapes are compared before a weight is read. Then at most one tensor is in memory beside the
    weights. For int8 and int4 matrices are rounded one by one, unless they are quantised in the file; the
    rest is float32.
    """
    check_dtype(dtype)
    if checkpoint.dtype is not None:
        if dtype not in ("float32", checkpoint.dtype):
            got = f"got dtype={dtype} for one of {checkpoint.dtype} in {checkpoint.source}"
            raise LamaError(f"a quantised model is loaded as it is; {got}")
        dtype = "float32"
    tensors, config = dict(checkpoint.tensors()), checkpoint.config
    shapes = {name: tuple(map(int, each.shape)) for name, each in parameters_of(config).items()}
    check_tensors(shapes, tensors, checkpoint.source, checkpoint.name_in_file)
    model = new_model(config)
    for name, tensor in list(tensors.items()):
        if tensor.quantized is not None:
            d_out, d_in = tensor.shape
            set_weight(model, name, empty(d_out, d_in, BITS[tensor.dtype]))
            tensors[f"{name}.values"], tensors[f"{name}.scales"] = tensor.quantized
    parameters = get_state_dict(model)
    if dtype in BITS:
        for name, bits in bits_of_weights(model, dtype).items():
            set_weight(model, name, _rounded(tensors[name], bits, dtype, device))
            del parameters[name]
        release_unused(device)
        dtype = "float32"
    target: dict[str, Tensor] = {}
    in_parts: list[str] = []
    for name, p in parameters.items():
        held = DTYPES[dtype] if p.dtype == dtypes.float32 else p.dtype  # else of a quantised matrix
        target[name] = Tensor.empty(*p.shape, dtype=held, device=device)
        if tensors[name].read_into is not None and host_array(target[name]) is not None:
            in_parts.append(name)

    def read(name: str) -> Array:
        return read_weights(tensors[name], DTYPE_NAMES[target[name].dtype], host_array(target[name]))

    on_threads(read, in_parts, READERS)
    for name, parameter in parameters.items():
        if name not in in_parts:
            held = target[name].dtype
            target[name] = from_array(read_weights(tensors[name], DTYPE_NAMES[held]), held, device)
        parameter.replace(target[name])
    if isinstance(model, GPT):
        model.sampling = checkpoint.sampling
    return model


def new_model(config: Config, dtype: str | None = None) -> Model:
    """An unfilled model, with quantised matrices for a `dtype` of int8 or int4."""
    model = make_model(config, seed=None)
    if dtype is not None:
        make_quantized(model, dtype)
    return model


def parameters_of(config: Config, dtype: str | None = None) -> dict[str, Tensor | Quantized]:
    """Every parameter of `new_model` by name, unfilled. Layers of a stack share those of one layer.

    A config may name thousands of layers, each of which takes milliseconds to build.
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


def _rounded(tensor: FileTensor, bits: int, dtype: str, device: str | None) -> Quantized:
    """Read a matrix and quantise it, unless the file has it in these bits. Raises LamaError."""
    if tensor.exact is not None and tensor.exact[0].dtype == ("int8" if bits == 8 else "uint8"):
        values, scales = tensor.exact
        kind = dtypes.int8 if bits == 8 else dtypes.uint8
        halves = read_weights(scales, "float16")
        return Quantized(
            from_array(read_weights(values, values.dtype), kind, device),
            from_array(halves, dtypes.float16, device),
            tensor.shape[1],
        )
    weight = Tensor.empty(*tensor.shape, device=device)
    memory = host_array(weight)
    array = read_weights(tensor, "float32", memory)
    if memory is None:
        weight = from_array(array, dtypes.float32, device)
    quantized = quantize(weight, bits)
    Tensor.realize(*quantized.tensors())
    if not np.isfinite(quantized.scales.numpy()).all():
        got = f"got too large ones in {tensor.name}. Load it as float32"
        raise LamaError(f"weights must fit {dtype}, whose scales are float16; {got}")
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
