"""nanoGPT's checkpoints: the `model_args` of a ckpt.pt, and the characters of a meta.pkl. Its tensors have GPT-2's names.

Source: github.com/karpathy/nanoGPT, model.py, train.py and data/shakespeare_char/prepare.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lama.checkpoints.torch_files import read_pickle
from lama.errors import LamaError, quoted
from lama.files import checked, field, quoted_path
from lama.models.gpt import GPTConfig
from lama.tokenizers import CharacterTokenizer

META = "meta.pkl"

FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "d_model",
    "n_layer": "n_layers",
    "n_head": "n_heads",
}


def config_from_nanogpt(arguments: Mapping[str, Any], source: object) -> GPTConfig:
    """The model that `model_args` describe. GELU is exact, as in nanoGPT since May 2023. Raises LamaError."""
    what = f"model_args in {source}"
    ours = {name: field(arguments, key, int, what) for key, name in FIELDS.items()}
    try:
        return GPTConfig(**ours, bias=field(arguments, "bias", bool, what, True), activation="gelu")
    except ValueError as error:
        raise LamaError(f"{source}: {error}") from error


def tokenizer_from_meta(path: Path) -> CharacterTokenizer:
    """The characters of a corpus, as nanoGPT's prepare.py numbers them. Raises LamaError."""
    source = quoted_path(path)
    itos = field(checked(read_pickle(path), dict, source), "itos", dict, source)
    characters = [itos.get(i) for i in range(len(itos))]
    if not all(isinstance(each, str) and len(each) == 1 for each in characters) or sorted(set(characters)) != characters:
        raise LamaError(f"itos in {source} must number distinct characters from 0 in code point order; got {quoted(itos)}")
    return CharacterTokenizer("".join(characters))
