"""nanoGPT's checkpoints: the `model_args` of a ckpt.pt, whose tensors have GPT-2's names, and meta.pkl.

Source: github.com/karpathy/nanoGPT, model.py, train.py and data/shakespeare_char/prepare.py.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from lama.checkpoints.huggingface import checked_config
from lama.checkpoints.torch_files import read_pickle
from lama.errors import LamaError, quoted
from lama.files import checked, field, quoted_path
from lama.models.gpt import GPTConfig
from lama.tokenizers import CharacterTokenizer, Tokenizer, gpt2_tokenizer, load_huggingface_tokenizer

META = "meta.pkl"
# The size of GPT-2's vocabulary, and the next multiple of 64, as in nanoGPT and llm.c.
GPT2_ROWS = (50257, 50304)
FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "d_model",
    "n_layer": "n_layers",
    "n_head": "n_heads",
}


def config_from_nanogpt(arguments: Mapping[str, object], source: object) -> GPTConfig:
    """The model that `model_args` describe. GELU is exact, as in nanoGPT since May 2023. Raises LamaError."""
    what = f"model_args in {source}"
    ours: dict[str, object] = {name: field(arguments, key, int, what) for key, name in FIELDS.items()}
    bias = field(arguments, "bias", bool, what, True)
    return checked_config(GPTConfig, {**ours, "bias": bias, "activation": "gelu"}, source)


def gpt_tokenizer(folder: Path, vocab_size: int, config: Mapping[str, object] | None) -> Tokenizer:
    """The tokenizer in a model's folder, else GPT-2's if the vocabulary is as large. Raises LamaError."""
    if any(os.path.exists(folder / name) for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return load_huggingface_tokenizer(folder, config)
    if vocab_size in GPT2_ROWS:
        return gpt2_tokenizer()
    if os.path.exists(folder / META):
        return tokenizer_from_meta(folder / META)
    files = f"tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt, nor {META}"
    got = f"got no {files}, in {quoted_path(folder)}"
    advice = "copy it there or name another with tokenizer"
    raise LamaError(f"a model must have its tokenizer beside it; {got}; {advice}")


def tokenizer_from_meta(path: Path) -> CharacterTokenizer:
    """The character tokenizer in a meta.pkl of nanoGPT's prepare.py. Raises LamaError."""
    source = quoted_path(path)
    itos = field(checked(read_pickle(path), dict, source), "itos", dict, source)
    found = [itos.get(i) for i in range(len(itos))]
    characters = [each for each in found if isinstance(each, str) and len(each) == 1]
    if len(characters) < len(found) or sorted(set(characters)) != characters:
        rule = "number distinct characters from 0 in code point order"
        raise LamaError(f"itos in {source} must {rule}; got {quoted(itos)}")
    return CharacterTokenizer("".join(characters))
