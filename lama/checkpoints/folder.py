"""lama's own format: a folder with model.safetensors, config.json and the tokenizer's files.

config.json: `{"format": "lama", "model": KIND, "config": {its config's fields}, "tokenizer": {...},
"training": {notes}}`, with a KIND of `lama.models.registry`: gpt, ... With `"dtype": "int8"` or `"int4"` each
matrix is two tensors, NAME.values and NAME.scales.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tinygrad import Tensor, dtypes

from lama.atomic import atomic_folder
from lama.checkpoints import adapters
from lama.checkpoints.checkpoint import ModelFiles
from lama.checkpoints.fill import DTYPE_NAMES, check_tensors, parameters_of
from lama.checkpoints.safetensors_files import write_safetensors
from lama.checkpoints.tensor import FileTensor
from lama.kernels import Quantized
from lama.models.adapters import changes_of
from lama.models.gpt import GPT
from lama.models.quantized import check_layout, dtype_of, weights_of
from lama.models.registry import Config, Model, kind_of
from lama.shapes import Array
from lama.tokenizers import Tokenizer

FORMAT = "lama"


def save(
    folder: str | Path, model: Model, tokenizer: Tokenizer, notes: Mapping[str, object] | None = None
) -> None:
    """Write a model that `load` reads back bit for bit; `notes` are JSON, such as the training's settings.

    Of a model with an adapter, only the adapter is written, which names its base model. Raises LamaError if
    the folder cannot be written; an earlier model in it is then unchanged.
    """
    if isinstance(model, GPT) and changes_of(model):
        return adapters.save_adapter(folder, model, tokenizer, notes)
    spec = {
        "format": FORMAT,
        "model": kind_of(model),
        "config": asdict(model.config),
        "tokenizer": tokenizer.to_json(),
        "training": dict(notes or {}),
    }
    if (dtype := dtype_of(model)) is not None:
        check_layout(model, dtype)
        spec["dtype"] = dtype
    with atomic_folder(Path(folder)) as temporary:
        tokenizer.save(temporary)
        write_tensors(temporary / "model.safetensors", weights_of(model))
        (temporary / "config.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")
    (Path(folder) / adapters.CONFIG).unlink(missing_ok=True)  # of an earlier adapter


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Quantized]) -> None:
    """Write a safetensors file, which gets its name when it is complete. Raises LamaError."""
    write_safetensors(path, file_tensors(tensors))


def file_tensors(tensors: Mapping[str, Tensor | Quantized]) -> dict[str, FileTensor]:
    """Tensors to write; `read` copies each from its device. A quantised matrix is two tensors, in rows."""
    found: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Quantized):
            parts = dict(zip((f"{name}.values", f"{name}.scales"), tensor.in_rows(), strict=True))
        else:
            parts = {name: tensor}
        for part, t in parts.items():
            found[part] = FileTensor(part, DTYPE_NAMES[t.dtype], tuple(map(int, t.shape)), partial(_fetch, t))
    return found


def _fetch(parameter: Tensor) -> Array:
    return (parameter.bitcast(dtypes.uint16) if parameter.dtype == dtypes.bfloat16 else parameter).numpy()


def quantized_tensors(files: ModelFiles, config: Config, dtype: str) -> dict[str, FileTensor]:
    """A quantised model's tensors, with values and scales of a matrix as one tensor. Raises LamaError."""
    found = files.tensors()
    shapes: dict[str, tuple[int, ...]] = {}
    parameters = parameters_of(config, dtype)
    for name, parameter in parameters.items():
        parts = {name: parameter}
        if isinstance(parameter, Quantized):
            parts = {f"{name}.values": parameter.values, f"{name}.scales": parameter.scales}
        shapes |= {part: tuple(map(int, tensor.shape)) for part, tensor in parts.items()}
    check_tensors(shapes, found, files.weights_source)
    for name, parameter in parameters.items():
        if isinstance(parameter, Quantized):
            values, scales = found.pop(f"{name}.values"), found.pop(f"{name}.scales")
            bits, shape = f"int{parameter.bits}", parameter.shape
            found[name] = FileTensor(name, bits, shape, values.read, quantized=(values, scales))
    return found
