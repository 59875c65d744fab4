"""lama's own format: a folder with model.safetensors, config.json and the tokenizer's files.

config.json: `{"format": "lama", "model": KIND, "config": {its config's fields}, "tokenizer": {...}, "training": {notes}}`,
with a KIND of `lama.models.kinds`: gpt, ...; and `"dtype": "int8"` or `"int4"` if its matrices are quantised, each of them then two
tensors, NAME.values and NAME.scales.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.atomic import atomic_folder
from lama.checkpoints.files import read_json
from lama.checkpoints.fill import DTYPE_NAMES
from lama.checkpoints.safetensors_files import write_safetensors
from lama.checkpoints.stored import StoredTensor
from lama.errors import LamaError, quoted
from lama.files import field, quoted_path
from lama.models.config import config_from_dict
from lama.models.kinds import KINDS, kind_of
from lama.models.quantized import BITS, dtype_of, make_quantized
from lama.tokenizers import Tokenizer, tokenizer_from_json

FORMAT = "lama"


def save(folder: str | Path, model: Any, tokenizer: Tokenizer, notes: Mapping[str, Any] | None = None) -> None:
    """Write a model that `load` reads back bit for bit; `notes` (JSON) say how it came to be.

    All is written under other names first, then renamed, config.json last. Raises LamaError if the folder cannot be
    written; a model that was there before is then still there.
    """
    spec = {
        "format": FORMAT,
        "model": kind_of(model),
        "config": asdict(model.config),
        "tokenizer": tokenizer.to_json(),
        "training": dict(notes or {}),
    }
    if (dtype := dtype_of(model)) is not None:
        spec["dtype"] = dtype
    with atomic_folder(Path(folder)) as temporary:
        tokenizer.save(temporary)
        write_tensors(temporary / "model.safetensors", get_state_dict(model))
        (temporary / "config.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")


def is_own_folder(folder: Path) -> bool:
    """Whether `save` has written there."""
    try:
        return read_json(folder / "config.json").get("format") == FORMAT
    except LamaError:
        return False


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of them, under its name when all of it is on the disk. Raises LamaError."""
    write_safetensors(path, stored(tensors))


def stored(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors to be written, each fetched from the device when its turn comes."""
    return {name: StoredTensor(name, DTYPE_NAMES[t.dtype], tuple(map(int, t.shape)), partial(_fetch, t)) for name, t in tensors.items()}


def _fetch(parameter: Tensor) -> np.ndarray:
    return (parameter.bitcast(dtypes.uint16) if parameter.dtype == dtypes.bfloat16 else parameter).numpy()


def described_by_lama(fields: Mapping[str, Any], source: object) -> tuple[Callable[[Any], Any], Any]:
    """(make, config) of the model that a lama `config.json` describes: `make(config)` is it, unfilled. Raises LamaError."""
    kind, config = field(fields, "model", str, source), field(fields, "config", dict, source)
    if kind not in KINDS:
        raise LamaError(f"{source} must have a model among {', '.join(KINDS)} and its config; got model={quoted(kind)}")
    of_model, of_config = KINDS[kind]
    dtype = fields.get("dtype")
    if dtype is not None and dtype not in tuple(BITS):
        raise LamaError(f"{source} must have a dtype among {', '.join(BITS)}, or none; got {quoted(dtype)}")

    def make(config: Any) -> Any:
        model = of_model(config, seed=None)
        if dtype is not None:
            make_quantized(model, dtype)
        return model

    try:
        return make, config_from_dict(of_config, config)
    except (ValueError, TypeError) as error:
        raise LamaError(f"{source}: {error}") from error


def tokenizer_from_lama(fields: Mapping[str, Any], folder: Path) -> Tokenizer:
    """The tokenizer that was saved with a model. Raises LamaError."""
    spec = fields.get("tokenizer")
    if not isinstance(spec, dict):
        raise LamaError(f"{quoted_path(folder / 'config.json')} must name its tokenizer; got {quoted(spec)}")
    return tokenizer_from_json(spec, folder)
