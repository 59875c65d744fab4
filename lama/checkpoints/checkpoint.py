"""A model on disk, and the interface of the formats that read it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from lama.checkpoints.files import ENDINGS, check_regular, open_weights, read_json, unreadable, weight_file
from lama.checkpoints.tensor import FileTensor
from lama.checkpoints.torch_files import read_torch
from lama.errors import LamaError
from lama.files import quoted_path
from lama.models.registry import Config
from lama.tokenizers import Tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk in any format: everything known before its weights are read."""

    source: str
    """The weight file, for error messages."""
    kind: str
    """A name of `lama.models.registry`."""
    config: Config
    tensors: Callable[[], Mapping[str, FileTensor]]
    """Opens the weight file; returns unread tensors under lama's names. Raises LamaError."""
    tokenizer: Callable[[], Tokenizer]
    """Loads the model's tokenizer. Raises LamaError."""
    name_in_file: Callable[[str], str] = str
    """lama's name of a tensor -> that in the file, for error messages."""
    family: str = ""
    """Hugging Face's `model_type` for such models, if there is one."""
    dtype: str | None = None
    """int8 or int4 if the file's matrices are quantised."""
    notes: Mapping[str, object] = field(default_factory=dict)
    """Notes on the training, as `save` wrote them."""
    sampling: Mapping[str, float] = field(default_factory=dict)
    """The fields of `Sampling` that the model's files recommend."""


class ModelFiles:
    """A model's files on disk, each read at most once. Raises LamaError for a path without weights."""

    def __init__(self, path: Path):
        if os.path.isfile(path) and path.name.endswith(ENDINGS):
            self.folder, self.weights = path.parent, path
        elif not os.path.lexists(path):
            raise LamaError(f"a model must be a folder or a weight file; got none at {quoted_path(path)}")
        elif (weights := weight_file(path)) is None:
            raise LamaError(unreadable(path))
        else:
            self.folder, self.weights = path, weights
        check_regular(self.weights)
        self.config_source = quoted_path(self.folder / "config.json")
        self.weights_source = quoted_path(self.weights)

    @cached_property
    def config(self) -> dict[str, object]:
        """The content of config.json. Raises LamaError."""
        return read_json(self.folder / "config.json")

    @cached_property
    def _torch(self) -> tuple[dict[str, FileTensor], dict[str, object] | None] | None:
        return read_torch(self.weights) if self.weights.suffix in (".pt", ".pth") else None

    @property
    def arguments(self) -> dict[str, object] | None:
        """The model's arguments in nanoGPT's ckpt.pt; None for other weights. Raises LamaError."""
        return None if self._torch is None else self._torch[1]

    def tensors(self) -> dict[str, FileTensor]:
        """The tensors of the weight file under its own names. Raises LamaError."""
        return open_weights(self.weights) if self._torch is None else self._torch[0]


class Format(Protocol):
    """A file format of models: an entry of `lama.checkpoints.formats.FORMATS`. Raises LamaError."""

    def recognises(self, files: ModelFiles) -> bool: ...
    def open(self, files: ModelFiles) -> Checkpoint: ...
