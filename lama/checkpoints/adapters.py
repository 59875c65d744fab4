"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors.

Their layers have Hugging Face's names. The rows of such a layer may be in another order than lama's, and one
layer may hold several of lama's, as GPT-2's c_attn does. Source: huggingface/peft, src/peft/tuners/lora.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from lama.atomic import atomic_folder
from lama.checkpoints import gpt2
from lama.checkpoints.families import FAMILIES, form_of, join_qkv
from lama.checkpoints.files import check_regular, weight_file
from lama.checkpoints.huggingface import checked_config
from lama.checkpoints.rows import selected
from lama.checkpoints.safetensors_files import open_safetensors, write_safetensors
from lama.checkpoints.tensor import FileTensor, read_weights
from lama.errors import LamaError, abbreviated, quoted
from lama.files import checked, field, quoted_path, read_object
from lama.layers import LowRank
from lama.models.adapters import (
    MOST_RANK,
    add_change,
    changes_of,
    magnitude_of,
    places,
    remove_adapter,
)
from lama.models.gpt import GPT, GPTConfig
from lama.shapes import Array
from lama.tokenizers import Tokenizer
from lama.tokenizers.chat_template import template_of
from lama.tokenizers.export import with_template

ENDS = {"A": ".lora_A.weight", "B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
CONFIG, WEIGHTS, NOTES = "adapter_config.json", "adapter_model.safetensors", "notes.json"
PREFIX = "base_model.model."
LARGE = 1 << 32  # more than the outputs of any layer
# Keys that must be missing, null, false or empty: lama does not support them.
UNSUPPORTED = (
    "modules_to_save",
    "lora_bias",
    "use_qalora",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "megatron_config",
)
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the model


@dataclass(frozen=True)
class Layer:
    """A layer under Hugging Face's name, with `*` for the number of the block."""

    name: str
    d_out: int
    rows: Mapping[str, Array]
    """The end of a place's name, such as `attn.q` -> the rows of this layer that belong to it."""


def is_adapter(path: Path) -> bool:
    """Whether a folder has an adapter and no model."""
    return os.path.isfile(path / CONFIG) and weight_file(path) is None


def base_of(path: Path) -> str:
    """The name of the model that an adapter is for. Raises LamaError if its config does not name one."""
    source = quoted_path(path / CONFIG)
    if name := field(read_object(path / CONFIG), "base_model_name_or_path", str, source, ""):
        return name
    raise LamaError(f"{source} must name its model, base_model_name_or_path; got none. Give it with -m")


def layers_of(config: GPTConfig, family: str) -> list[Layer]:
    """The layers that an adapter may change, as they are in a family of Hugging Face's models.

    The order of rows is found by translating row numbers in the same way as a checkpoint's rows.
    """
    c, (names, prefix) = config, _names(family)
    q, kv = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    sizes = {"attn.q": q, "attn.k": kv, "attn.v": kv, "attn.qkv": q + 2 * kv, "attn.out": c.d_model}
    if c.d_mlp:
        sizes |= {"mlp.up": c.d_mlp, "mlp.down": c.d_model}
        sizes |= {"mlp.gate": c.d_mlp, "mlp.gate_up": 2 * c.d_mlp} if c.gated else {}
    theirs = {ours.removeprefix("blocks.*."): name for name, ours in names.items()}
    found = [(name, sizes[ours]) for ours, name in theirs.items() if ours in sizes]
    numbers: dict[str, FileTensor] = {}
    for i, (name, n) in enumerate(found):
        ids = (LARGE * i + np.arange(n))[:, None]
        numbers[names[name].replace("*", "0") + ".weight"] = FileTensor(name, "int64", (n, 1), ids.copy)
    if family in FAMILIES:
        FAMILIES[family].weights(numbers, c, {})
    join_qkv(numbers)
    if (qkv := numbers.pop("blocks.0.attn.qkv.weight", None)) is not None:
        for part, first, n in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
            numbers[f"blocks.0.attn.{part}.weight"] = selected(qkv, np.arange(first, first + n))
    rows: list[dict[str, Array]] = [{} for _ in found]
    for ours, tensor in numbers.items():
        ids = tensor.read()[:, 0]
        rows[ids[0] // LARGE][ours.removeprefix("blocks.0.").removesuffix(".weight")] = ids % LARGE
    return [Layer(prefix + name, n, each) for (name, n), each in zip(found, rows, strict=True)]


def _names(family: str) -> tuple[Mapping[str, str], str]:
    """A family's table of names, and the prefix of its layers."""
    if family in FAMILIES:
        return FAMILIES[family].names, FAMILIES[family].prefix
    return gpt2.NAMES, gpt2.PREFIX


def family_of(model: GPT) -> str:
    """The `model_type` whose names an adapter gets: that of the model's file, else of its export."""
    if model.family:
        return model.family
    c = replace(model.config, bias=True, qkv_bias=True, out_bias=True, mlp_bias=True)
    try:
        gpt2.huggingface_config(c)
    except LamaError:
        return form_of(model.config) or "llama"
    return "gpt2"


# --- writing


def save_adapter(
    folder: str | Path,
    model: GPT,
    tokenizer: Tokenizer | None = None,
    notes: Mapping[str, object] | None = None,
) -> None:
    """Write the adapter of a model as PEFT does, and lama's notes.json. Raises LamaError.

    An earlier model in the folder is removed; it must not be the adapter's own model. notes.json has `notes`
    on the training, the tokens that end a text, and the tokenizer's chat template.
    """
    if model.name and os.path.realpath(model.name) == os.path.realpath(folder):
        raise LamaError(f"an adapter must not be saved in its model's folder; got {quoted_path(folder)}")
    changes, family, found = changes_of(model), family_of(model), places(model)
    dora = any(change.magnitude is not None for change in changes.values())
    tensors: dict[str, FileTensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    for i in range(model.config.n_layers):
        for layer in layers_of(model.config, family):
            parts = [(changes.get(f"blocks.{i}.{end}"), rows) for end, rows in layer.rows.items()]
            there = [(change, rows) for change, rows in parts if change is not None]
            if not there:
                continue
            name, (a, b, scale) = layer.name.replace("*", str(i)), _joined(there, layer.d_out)
            sizes[name] = len(a), scale * len(a)
            matrices = {"A": a, "B": b}
            if dora:  # PEFT's layers have a magnitude for all of their rows
                matrices["magnitude"] = magnitude = np.zeros(layer.d_out, np.float32)
                for end, rows in layer.rows.items():
                    magnitude[rows] = magnitude_of(found[f"blocks.{i}.{end}"])
            for part, matrix in matrices.items():
                key = f"{PREFIX}{name}{ENDS[part]}"
                tensors[key] = FileTensor(key, "float32", matrix.shape, partial(np.asarray, matrix))
    config = _config(sizes, [layer.name for layer in layers_of(model.config, family)], model, family)
    config["use_dora"] = dora
    with atomic_folder(Path(folder)) as temporary:
        write_safetensors(temporary / WEIGHTS, tensors)
        (temporary / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        template = None if tokenizer is None else template_of(tokenizer)
        about = {
            "training": dict(notes or {}),
            "end_tokens": list(model.config.end_tokens),
            "template": None if template is None else template.source,
        }
        (temporary / NOTES).write_text(json.dumps(about), encoding="utf-8")
    for name in ("config.json", "model.safetensors"):  # an earlier model
        (Path(folder) / name).unlink(missing_ok=True)


def _joined(parts: list[tuple[LowRank, Array]], d_out: int) -> tuple[Array, Array, float]:
    """A, B and scale of one layer, joined from its parts: A's are stacked, B is zero outside its parts."""
    scale = parts[0][0].scale
    a = np.concatenate([change.a.numpy() for change, _ in parts])
    b, first = np.zeros((d_out, len(a)), np.float32), 0
    for change, rows in parts:
        last = first + int(change.b.shape[1])
        b[rows, first:last] = change.b.numpy() * np.float32(change.scale / scale)
        first = last
    return a, b, scale


def _config(
    sizes: Mapping[str, tuple[int, float]], known: list[str], model: GPT, family: str
) -> dict[str, object]:
    """adapter_config.json for layers with these ranks and alphas."""
    (rank, alpha), _ = Counter(sizes.values()).most_common(1)[0]
    everywhere = [name.replace("*", str(i)) for name in known for i in range(model.config.n_layers)]

    def short(names: list[str]) -> list[str]:
        """The last words of the names if these match exactly those layers, else the names."""
        ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        meant = {name for name in everywhere if name.rpartition(".")[2] in ends}
        return ends if meant == set(names) else names

    others = {size: [name for name in sizes if sizes[name] == size] for size in set(sizes.values())}
    del others[rank, alpha]
    patterns = [(name, size) for size, names in others.items() for name in short(names)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {name: size[0] for name, size in patterns},
        "alpha_pattern": {name: _plain(size[1]) for name, size in patterns},
        "target_modules": short(list(sizes)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "init_lora_weights": True,
        "use_rslora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _plain(x: float) -> float:
    return int(x) if x == int(x) else x


# --- reading


def with_notes(folder: str | Path, model: GPT, tokenizer: Tokenizer) -> Tokenizer:
    """Give a model the end tokens of an adapter's notes; returns its tokenizer with the notes' chat template.

    Adapters written by PEFT have no notes. Raises LamaError for notes that `save_adapter` did not write.
    """
    path = Path(folder) / NOTES
    if not os.path.lexists(path):
        return tokenizer
    fields, source = read_object(path), quoted_path(path)
    ends = [checked(each, int, f"a token in {source}") for each in field(fields, "end_tokens", list, source)]
    model.config = checked_config(GPTConfig, {**vars(model.config), "end_tokens": tuple(ends)}, source)
    template, own = field(fields, "template", str, source, ""), template_of(tokenizer)
    is_new = template and (own is None or own.source != template)
    return with_template(tokenizer, template) if is_new else tokenizer


def load_adapter(folder: str | Path, model: GPT) -> None:
    """Read an adapter in PEFT's format into a model, in place of the model's adapter. Raises LamaError.

    Config, names, shapes and ranks are checked before any numbers are read.
    """
    folder = Path(folder)
    path, source = folder / WEIGHTS, quoted_path(folder / WEIGHTS)
    alpha_of, dora = _scales(folder / CONFIG)
    if not os.path.lexists(path):
        raise LamaError(f"an adapter must have {WEIGHTS} beside {CONFIG}; got none in {quoted_path(folder)}")
    check_regular(path)
    layers = {
        layer.name.replace("*", str(i)): (f"blocks.{i}.", layer)
        for layer in layers_of(model.config, family_of(model))
        for i in range(model.config.n_layers)
    }
    pairs: dict[str, dict[str, FileTensor]] = {}
    for name, tensor in open_safetensors(path).items():
        own, part = _layer_and_part(name)
        if own not in layers:
            known = abbreviated(list(dict.fromkeys(name.rpartition(".")[2] for name in layers)), most=9)
            got = f"got {quoted(name, plain=True)} of shape {tensor.shape}"
            raise LamaError(f"{source} must change layers of this model, {known}; {got}")
        pairs.setdefault(own, {})[part] = tensor
    if not pairs:
        raise LamaError(f"{source} must hold matrices A and B; got none")
    found, read = places(model), []
    for name, pair in pairs.items():
        start, layer = layers[name]
        d_in = found[start + next(iter(layer.rows))].d_in
        rank = _checked_rank(pair, name, layer.d_out, d_in, source, dora)
        read.append((start, layer, pair, alpha_of(name, rank)))
    remove_adapter(model)
    for start, layer, pair, scale in read:
        a, b, *more = (read_weights(pair[part], "float32") for part in ENDS if part in pair)
        for end, rows in layer.rows.items():
            place, magnitude = found[start + end], more[0][rows] if more else None
            # If a layer holds several of lama's, only those that the adapter changes.
            used = np.asarray(b[rows].any(0) | (len(layer.rows) == 1))
            if magnitude is not None and not used.any():
                used[0] = not np.allclose(magnitude, magnitude_of(place), 1e-6)
            if used.any():
                add_change(place, a[used], b[rows][:, used], scale, magnitude)


def _layer_and_part(name: str) -> tuple[str, str]:
    """The layer's name and a key of ENDS; for another tensor, its name and an empty text."""
    for part, end in ENDS.items():
        if name.endswith(end):
            return name.removesuffix(end).removeprefix(PREFIX), part
    return name, ""


def _checked_rank(
    pair: Mapping[str, FileTensor], name: str, d_out: int, d_in: int, source: str, dora: bool
) -> int:
    """The rank of a layer's change. Raises LamaError for a missing matrix, and for wrong shapes."""
    shown = quoted(name, plain=True)
    if set(pair) != set(ENDS if dora else "AB"):
        wanted = "A, B and the magnitude of DoRA" if dora else "both A and B"
        raise LamaError(f"{source} must hold {wanted} of {shown}; got {', '.join(sorted(pair))}")
    a, b = pair["A"].shape, pair["B"].shape
    rank = a[0] if a else 0
    if (a, b) != ((rank, d_in), (d_out, rank)) or not 1 <= rank <= MOST_RANK:
        rule = f"have A (rank, {d_in}) and B ({d_out}, rank) of {shown}, rank from 1 to {MOST_RANK}"
        raise LamaError(f"{source} must {rule}; got {a} and {b}. Is it another model's?")
    if dora and pair["magnitude"].shape != (d_out,):
        got = pair["magnitude"].shape
        raise LamaError(f"{source} must have a magnitude ({d_out},) of {shown}; got {got}")
    return rank


def _scales(path: Path) -> tuple[Callable[[str, int], float], bool]:
    """A function of a layer's name and rank that gives its factor, and whether there are magnitudes (DoRA).

    Raises LamaError for an unsupported kind of adapter.
    """
    source = quoted_path(path)
    if not os.path.lexists(path):
        raise LamaError(f"an adapter must be a folder with {CONFIG}; got no {source}")
    fields = read_object(path)

    def refuse(key: str) -> LamaError:
        return LamaError(f"{source} has {key}={quoted(fields.get(key))}, which lama does not support")

    if fields.get("peft_type") != "LORA":
        raise refuse("peft_type")
    if fields.get("bias", "none") != "none":
        raise refuse("bias")
    for key in UNSUPPORTED:
        if fields.get(key):
            raise refuse(key)
    begins = fields.get("init_lora_weights")
    if isinstance(begins, str) and begins.lower().startswith(CHANGED_BASE):
        raise refuse("init_lora_weights")
    patterns = field(fields, "alpha_pattern", dict, source, {})
    for key in patterns:
        if set(key) & set("*+?()[]{}|\\^$"):
            raise refuse("alpha_pattern")
    is_rooted = field(fields, "use_rslora", bool, source, False)
    alphas = {"": field(fields, "lora_alpha", float, source), **patterns}
    for name, alpha in alphas.items():
        if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
            got = f"{quoted(alpha)} for {quoted(name or 'lora_alpha', plain=True)}"
            raise LamaError(f"{source} must have alphas above 0 and below 1,000,000; got {got}")

    def scale(name: str, rank: int) -> float:
        own = next((end for end in patterns if name == end or name.endswith(f".{end}")), "")
        return float(alphas[own]) / (math.sqrt(rank) if is_rooted else rank)

    return scale, field(fields, "use_dora", bool, source, False)
