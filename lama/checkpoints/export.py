"""A model handed over: a folder in Hugging Face's GPT-2 format, which transformers loads with equal logits."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np
from tinygrad.nn.state import get_state_dict

from lama.checkpoints.atomic import atomic_folder, atomic_write
from lama.checkpoints.folder import stored
from lama.checkpoints.gpt2 import PREFIX, TRANSPOSED, gpt2_name, huggingface_config, transposed
from lama.checkpoints.safetensors_files import write_safetensors
from lama.checkpoints.stored import NUMPY, StoredTensor
from lama.models.gpt import GPT
from lama.models.quantized import refuse_quantized
from lama.tokenizers import Tokenizer, huggingface_files


def export_huggingface(folder: str | Path, model: GPT, tokenizer: Tokenizer) -> list[str]:
    """Write model.safetensors, config.json and, for a tokenizer made of bytes, its files too; returns the names.

    A model without biases gets biases of zero, which GPT-2's format requires and which change nothing. Raises LamaError
    for a model that GPT-2's format cannot hold, and for a folder that cannot be written.
    """
    refuse_quantized(model, "to be exported")
    config = huggingface_config(dataclasses.replace(model.config, bias=True), tokenizer.end_of_text)
    tensors = {PREFIX * (not name.startswith("lm_head")) + name: tensor for name, tensor in _gpt2_tensors(model).items()}
    files = huggingface_files(tokenizer) | {"config.json": (json.dumps(config, indent=1) + "\n").encode()}
    with atomic_folder(Path(folder)) as temporary:
        write_safetensors(temporary / "model.safetensors", tensors)
        for name, content in files.items():
            with atomic_write(temporary / name) as file:
                file.write(content)
    return sorted([*files, "model.safetensors"])


def _gpt2_tensors(model: GPT) -> dict[str, StoredTensor]:
    """The parameters under GPT-2's names and in its layout."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored(get_state_dict(model)).items():
        theirs = gpt2_name(name)
        if theirs.endswith(TRANSPOSED):
            tensor = transposed(tensor)
        tensors[theirs] = tensor
        if not model.config.bias and not theirs.startswith(("wte", "wpe", "lm_head")):
            zeros = np.zeros(tensor.shape[-1:], NUMPY[tensor.dtype])
            tensors[theirs.removesuffix("weight") + "bias"] = dataclasses.replace(tensor, shape=zeros.shape, read=partial(np.copy, zeros))
    return tensors
