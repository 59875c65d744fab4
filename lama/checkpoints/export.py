"""Export a model in Hugging Face's format, which transformers loads with equal logits."""

import dataclasses
import json
from pathlib import Path

from tinygrad.nn.state import get_state_dict

from lama.atomic import atomic_folder, write_files
from lama.checkpoints.families import config_of_form, form_of, tensors_of_form
from lama.checkpoints.folder import file_tensors
from lama.checkpoints.gpt2 import PREFIX, TRANSPOSED, gpt2_name, huggingface_config, transposed, with_biases
from lama.checkpoints.safetensors_files import write_safetensors
from lama.checkpoints.tensor import FileTensor
from lama.models.adapters import refuse_adapter
from lama.models.gpt import GPT
from lama.models.quantized import refuse_quantized
from lama.tokenizers import Tokenizer, huggingface_files


def export_huggingface(folder: str | Path, model: GPT, tokenizer: Tokenizer) -> list[str]:
    """Write model.safetensors, config.json and the files of a byte-level tokenizer; returns their names.

    A model with the architecture of Llama, Qwen 2 or Qwen 3 is written as such, others as GPT-2; missing
    biases of a GPT-2 become zeros. Raises LamaError for a model that fits none of these, and for a folder
    that cannot be written.
    """
    refuse_adapter(model, "to be exported")
    refuse_quantized(model, "to be exported")
    if form := form_of(model.config):
        config = config_of_form(model.config, form, tokenizer.end_of_text)
        tensors = tensors_of_form(file_tensors(get_state_dict(model)), model.config, form)
    else:
        biased = dataclasses.replace(model.config, bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
        config, tensors = huggingface_config(biased, tokenizer.end_of_text), _gpt2_tensors(model)
    files = huggingface_files(tokenizer) | {"config.json": (json.dumps(config, indent=1) + "\n").encode()}
    with atomic_folder(Path(folder)) as temporary:
        write_safetensors(temporary / "model.safetensors", tensors)
        write_files(temporary, files)
    return sorted([*files, "model.safetensors"])


def _gpt2_tensors(model: GPT) -> dict[str, FileTensor]:
    """The parameters with GPT-2's names and layout."""
    tensors: dict[str, FileTensor] = {}
    for name, tensor in with_biases(file_tensors(get_state_dict(model))).items():
        theirs = gpt2_name(name) if name.startswith("unembed") else PREFIX + gpt2_name(name)
        tensors[theirs] = transposed(tensor) if theirs.endswith(TRANSPOSED) else tensor
    return tensors
