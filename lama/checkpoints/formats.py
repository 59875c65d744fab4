"""The formats of models that lama reads. A new format is one more entry of FORMATS."""

import os
from dataclasses import replace
from pathlib import Path

from lama.checkpoints import smollm2
from lama.checkpoints.bert import bert_name, config_from_bert, translate_bert
from lama.checkpoints.checkpoint import Checkpoint, Format, ModelFiles
from lama.checkpoints.families import FAMILIES, config_from_family, name_in_family, translate_family
from lama.checkpoints.files import read_json
from lama.checkpoints.folder import FORMAT, quantized_tensors
from lama.checkpoints.gguf import open_gguf
from lama.checkpoints.gguf_models import (
    architecture_of,
    config_from_gguf,
    gguf_name,
    gguf_tokenizer,
    translate_gguf,
)
from lama.checkpoints.gpt2 import config_from_huggingface, gpt2_name, translate
from lama.checkpoints.huggingface import checked_config, recommended
from lama.checkpoints.nanogpt import config_from_nanogpt, gpt_tokenizer
from lama.errors import LamaError, quoted
from lama.files import field
from lama.models.gpt import GPTConfig
from lama.models.quantized import BITS
from lama.models.registry import MODELS, Config
from lama.tokenizers import Tokenizer, load_wordpiece_tokenizer, tokenizer_from_json


class LamaFolder:
    """A folder that `save` wrote."""

    def recognises(self, files: ModelFiles) -> bool:
        return files.config.get("format") == FORMAT

    def open(self, files: ModelFiles) -> Checkpoint:
        fields, source = files.config, files.config_source
        kind, config = field(fields, "model", str, source), field(fields, "config", dict, source)
        if kind not in MODELS:
            got = f"got model={quoted(kind)}"
            raise LamaError(f"{source} must have a model among {', '.join(MODELS)} and its config; {got}")
        dtype, notes, spec = fields.get("dtype"), fields.get("training"), fields.get("tokenizer")
        if dtype is not None and not (isinstance(dtype, str) and dtype in BITS):
            dtypes = ", ".join(BITS)
            raise LamaError(f"{source} must have a dtype among {dtypes}, or none; got {quoted(dtype)}")
        own: Config = checked_config(MODELS[kind][1], config, source)

        def tokenizer() -> Tokenizer:
            if not isinstance(spec, dict):
                raise LamaError(f"{source} must name its tokenizer; got {quoted(spec)}")
            return tokenizer_from_json(spec, files.folder)

        return Checkpoint(
            files.weights_source,
            kind,
            own,
            lambda: files.tensors() if dtype is None else quantized_tensors(files, own, dtype),
            tokenizer,
            dtype=dtype,
            notes=notes if isinstance(notes, dict) else {},
        )


class NanoGPT:
    """nanoGPT's ckpt.pt, which contains its config."""

    def recognises(self, files: ModelFiles) -> bool:
        return files.arguments is not None

    def open(self, files: ModelFiles) -> Checkpoint:
        return _gpt2(files, config_from_nanogpt(files.arguments or {}, files.weights_source), conv1d=False)


class HuggingFaceBert:
    """A BERT in Hugging Face's format."""

    def recognises(self, files: ModelFiles) -> bool:
        return files.config.get("model_type") == "bert"

    def open(self, files: ModelFiles) -> Checkpoint:
        return Checkpoint(
            files.weights_source,
            "bert",
            config_from_bert(files.config, files.config_source),
            lambda: translate_bert(files.tensors(), files.weights_source),
            lambda: load_wordpiece_tokenizer(files.folder, files.config),
            bert_name,
        )


class GGUFModel:
    """A decoder in a GGUF file."""

    def recognises(self, files: ModelFiles) -> bool:
        return files.weights.suffix == ".gguf"

    def open(self, files: ModelFiles) -> Checkpoint:
        file = open_gguf(files.weights)
        config = config_from_gguf(file)
        return Checkpoint(
            file.source,
            "gpt",
            config,
            lambda: translate_gguf(file, config),
            lambda: gguf_tokenizer(file, files.folder),
            gguf_name,
            architecture_of(file).family,
            sampling=smollm2.SAMPLING if files.weights.name == smollm2.FILE else {},
        )


class HuggingFaceDecoder:
    """A decoder of `FAMILIES` in Hugging Face's format."""

    def recognises(self, files: ModelFiles) -> bool:
        kind = files.config.get("model_type")
        return isinstance(kind, str) and kind in FAMILIES

    def open(self, files: ModelFiles) -> Checkpoint:
        fields, source = files.config, files.config_source
        family = FAMILIES[str(fields["model_type"])]
        generation = _generation(files)
        config = config_from_family(family, fields, source, generation)
        return Checkpoint(
            files.weights_source,
            "gpt",
            config,
            lambda: translate_family(family, files.tensors(), config, fields, files.weights_source),
            lambda: gpt_tokenizer(files.folder, config.vocab_size, fields),
            name_in_family(family),
            str(fields["model_type"]),
            sampling=recommended(generation),
        )


class HuggingFaceGPT2:
    """A GPT-2 in Hugging Face's format. This format is the last: it refuses every other `model_type`."""

    def recognises(self, files: ModelFiles) -> bool:
        return True

    def open(self, files: ModelFiles) -> Checkpoint:
        generation = _generation(files)
        config = config_from_huggingface(files.config, files.config_source, generation)
        return replace(_gpt2(files, config, conv1d=True), sampling=recommended(generation))


def _generation(files: ModelFiles) -> dict[str, object] | None:
    path = files.folder / "generation_config.json"
    return read_json(path) if os.path.exists(path) else None


def _gpt2(files: ModelFiles, config: GPTConfig, conv1d: bool) -> Checkpoint:
    """A model whose tensors have GPT-2's names."""
    return Checkpoint(
        files.weights_source,
        "gpt",
        config,
        lambda: translate(files.tensors(), config, files.weights_source, conv1d),
        lambda: gpt_tokenizer(files.folder, config.vocab_size, files.config if conv1d else None),
        gpt2_name,
        "gpt2",
    )


FORMATS: tuple[Format, ...] = (
    GGUFModel(),
    NanoGPT(),
    LamaFolder(),
    HuggingFaceBert(),
    HuggingFaceDecoder(),
    HuggingFaceGPT2(),
)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The model in a folder, or in a weight file with its config.json beside it. Raises LamaError."""
    files = ModelFiles(Path(path))
    return next(each for each in FORMATS if each.recognises(files)).open(files)
