"""Checkpoints: finding them, reading them, filling a model from them, and writing lama's own.

model, tokenizer = load("gpt2")              # weights/gpt2/, else the Hugging Face cache, else downloaded
model, tokenizer = load("runs/shakespeare")  # a folder that `save` wrote, or one in Hugging Face's format
"""

from pathlib import Path
from types import UnionType
from typing import Any, get_args

from lama.checkpoints.bert import bert_name, config_from_bert, is_bert, translate_bert
from lama.checkpoints.export import export_huggingface
from lama.checkpoints.files import open_weights, read_json, weight_file
from lama.checkpoints.fill import check_dtype, fill
from lama.checkpoints.folder import FORMAT, is_own_folder, save, tokenizer_from_lama, unfilled_from_lama, write_tensors
from lama.checkpoints.gpt2 import config_from_huggingface, gpt2_name, translate
from lama.checkpoints.hub import EMBEDDED, Found, NotFound, find
from lama.errors import LamaError
from lama.models.bert import Bert
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import Tokenizer, gpt2_tokenizer, load_huggingface_tokenizer, load_wordpiece_tokenizer

__all__ = [
    "EMBEDDED",
    "Found",
    "NotFound",
    "export_huggingface",
    "find",
    "is_own_folder",
    "kind_at",
    "load",
    "load_gpt",
    "load_kind",
    "load_model",
    "load_tokenizer",
    "open_weights",
    "read_json",
    "save",
    "write_tensors",
]


def load(
    model: str | Path = "gpt2", *, dtype: str = "float32", device: str | None = None, offline: bool = False, revision: str | None = None
) -> tuple[Any, Tokenizer]:
    """A model, its weights in `dtype` (float32, float16, bfloat16, int8 or int4) on `device`, and its tokenizer.

    int8 and int4 are of the matrices, rounded as they are read; a model that was saved so is loaded as it is.

    `model` is a path or a name: see `lama.checkpoints.hub.find`. Raises LamaError.
    """
    return load_kind(None, model, dtype=dtype, device=device, offline=offline, revision=revision)


def load_kind(
    kind: str | None,
    model: str | Path,
    tokenizers: type | UnionType = object,
    *,
    dtype: str = "float32",
    device: str | None = None,
    offline: bool = False,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """`load` for what needs a model of one kind of `lama.models.kinds`, and a tokenizer of one of some types.

    Raises LamaError for others too, before the weights are read.
    """
    check_dtype(dtype)
    path = find(model, offline=offline, revision=revision).path
    if kind is not None and (found := kind_at(path)) != kind:
        raise LamaError(f"the model must be a {kind} here; got a {found} in {model}")
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, tokenizers):
        wanted = " or ".join(each.__name__ for each in get_args(tokenizers) or (tokenizers,))
        raise LamaError(f"the model must have a {wanted} here; got a {type(tokenizer).__name__} in {model}")
    loaded = load_model(path, dtype=dtype, device=device)
    if tokenizer.vocab_size > loaded.config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens for vocab_size={loaded.config.vocab_size}"
        raise LamaError(f"a tokenizer's vocabulary must fit its model's; got {sizes} in {path}. Is it this model's tokenizer?")
    return loaded, tokenizer


def load_gpt(model: str | Path = "gpt2", **options: Any) -> tuple[GPT, Tokenizer]:
    """`load_kind` of a GPT."""
    return load_kind("gpt", model, **options)


def kind_at(path: str | Path) -> str:
    """The kind of the model there, by its config.json: a name of `lama.models.kinds`. Raises LamaError."""
    folder, _ = _places(Path(path))
    fields = read_json(folder / "config.json")
    return str(fields.get("model")) if fields.get("format") == FORMAT else "bert" if is_bert(fields) else "gpt"


def load_model(path: str | Path, *, dtype: str = "float32", device: str | None = None) -> Any:
    """The model in a folder, or in a weight file with its config.json beside it. Raises LamaError."""
    folder, weights = _places(Path(path))
    fields = read_json(folder / "config.json")
    tensors = open_weights(weights)
    if fields.get("format") == FORMAT:
        model = unfilled_from_lama(fields, folder / "config.json")
        if (stored_in := fields.get("dtype")) is not None and dtype not in ("float32", stored_in):
            raise LamaError(f"a quantised model is loaded as it is; got dtype={dtype} for one of {stored_in} in {folder}")
        fill(model, tensors, weights, dtype="float32" if stored_in else dtype, device=device)
        return model
    if is_bert(fields):
        bert = Bert(config_from_bert(fields, folder / "config.json"), seed=None)
        fill(bert, translate_bert(tensors), weights, dtype=dtype, device=device, name_in_file=bert_name)
        return bert
    config = config_from_huggingface(fields, folder / "config.json")
    gpt = GPT(config, seed=None)
    fill(gpt, translate(tensors, config, weights), weights, dtype=dtype, device=device, name_in_file=gpt2_name)
    return gpt


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that belongs to the model there; GPT-2's own for a model of its vocabulary that has none. Raises LamaError."""
    folder, _ = _places(Path(path))
    fields = read_json(folder / "config.json")
    if fields.get("format") == FORMAT:
        return tokenizer_from_lama(fields, folder)
    if is_bert(fields):
        return load_wordpiece_tokenizer(folder)
    if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
        return load_huggingface_tokenizer(folder)
    if config_from_huggingface(fields, folder / "config.json").vocab_size == GPTConfig.vocab_size:
        return gpt2_tokenizer()
    raise LamaError(f"a model must have its tokenizer beside it; got no tokenizer.json, nor vocab.json and merges.txt, in {folder}")


def _places(path: Path) -> tuple[Path, Path]:
    """The folder with the config, and the weight file. Raises LamaError if there is none."""
    if path.is_file():
        return path.parent, path
    if not path.is_dir():
        raise LamaError(f"a model must be a folder or a weight file; got {path}, which is not there")
    weights = weight_file(path)
    if weights is None:
        raise LamaError(f"a model's folder must hold model.safetensors or pytorch_model.bin; got neither in {path}")
    return path, weights
