"""Adapters (LoRA): the formula and its gradients, training and its exact resume, files, errors of users."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import losses_until, normal
from reference import random_gpt2
from test_kernels import assert_all_close, both, needs_c, ran  # noqa: F401
from test_quantized import with_minima
from tinygrad import Tensor, dtypes
from tinygrad.nn.state import get_state_dict

import lama
from lama.checkpoints import export_gguf, load_adapter, save_adapter
from lama.cli import main
from lama.errors import LamaError, UsageError
from lama.kernels import Quantized
from lama.models.adapters import (
    add_adapter,
    add_change,
    changes_of,
    fold,
    matching,
    places,
    remove_adapter,
    rows_of,
    sharing_weights,
    size_of,
    trained_parameters,
)
from lama.models.gpt import GPT, GPTConfig
from lama.models.quantized import set_weight, without_rounding
from lama.models.registry import n_parameters
from lama.ops import dequantize, quantize
from lama.runtime.internals import Ops
from lama.tokenizers import CharacterTokenizer, huggingface_files, train_bpe
from lama.tokenizers.chat_template import template_of
from lama.training.budget import adapter_memory
from lama.training.folder import RunFolder
from lama.training.loss import Evaluator, language_model_loss
from lama.training.prepare import new_session, resumed_run
from lama.training.replica import Replica
from lama.training.settings import RunConfig
from lama.training.settings.base import TrainingConfig

LLAMA = GPTConfig(
    37,
    13,
    d_model=40,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    d_mlp=72,
    bias=False,
    norm_kind="rms",
    gated=True,
    activation="silu",
    positions="rope",
)
GPT2 = GPTConfig(37, 13, d_model=40, n_layers=2, n_heads=4)
RANK, SCALE = 3, 1.5
WEIGHTS = ("float32", "float16", "int8", "int4", "minima")


def model_of(
    config: GPTConfig, weights: str = "float32", patterns: tuple[str, ...] = (), dora: bool = False
) -> GPT:
    """A random model with such weights and an adapter that matters."""
    model = GPT(config)
    for name, p in get_state_dict(model).items():
        p.assign(Tensor(normal(*p.shape) / (p.shape[-1] if p.ndim > 1 else 9) ** 0.5)).realize()
        if weights == "float16" and p.ndim > 1:
            p.replace(p.half().contiguous().realize())
        elif weights not in ("float32", "float16") and p.ndim > 1 and "embed" not in name:
            set_weight(model, name, quantized(p, weights))
    without_rounding(model)
    add_adapter(model, matching(model, patterns), RANK, SCALE, 1, dora)
    vary(model)
    return model


def vary(model: GPT) -> None:
    """Give the adapter numbers that matter."""
    for i, p in enumerate(trained_parameters(model).values()):
        x = normal(*p.shape, seed=i)
        p.assign(Tensor(x / p.shape[1] ** 0.5 if p.ndim > 1 else np.abs(x) + 0.3)).realize()


def quantized(p: Tensor, weights: str) -> Quantized:
    if weights == "minima":
        return with_minima(int(p.shape[0]), int(p.shape[1]), 4, False)[0]
    found = quantize(p, int(weights.removeprefix("int")))
    Tensor.realize(*found.tensors())
    return found


def merged_twin(model: GPT) -> GPT:
    """A float model whose weights are W + scale · B A, with norms of the magnitudes, without an adapter."""
    twin = GPT(model.config)
    for name, p in get_state_dict(model, tensor_type=(Tensor, Quantized)).items():
        if ".adapter." not in name:
            value = dequantize(p) if isinstance(p, Quantized) else p.float()
            get_state_dict(twin)[name].replace(value.contiguous().realize())
    for name, change in changes_of(model).items():
        place = places(twin)[name]
        weight = place.linear.weight
        assert isinstance(weight, Tensor)
        new = weight.numpy()
        rows = slice(place.first, place.first + place.d_out)
        new[rows] += np.float32(change.scale) * change.b.numpy() @ change.a.numpy()
        if change.magnitude is not None:
            new[rows] *= (change.magnitude.numpy() / np.linalg.norm(new[rows], axis=1))[:, None]
        weight.replace(Tensor(new).realize())
    return twin


def tokens(rows: int = 4) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = np.random.default_rng(0).integers(0, 37, (2, rows, 13)).astype(np.int32)
    return inputs, targets


# --- the formula


def test_changes_of_parts_add_to_their_outputs(both):  # noqa: F811
    """Queries, keys and values lie in one matrix; a part without a change stays."""
    x = normal(5, 7)
    block = GPT(GPTConfig(5, 5, d_model=7, n_layers=1, n_heads=1))
    found = {name: place for name, place in places(block).items() if "attn" in name}
    assert [(place.first, place.d_out) for place in found.values()] == [(0, 7), (7, 7), (14, 7), (0, 7)]
    qkv = found["blocks.0.attn.k"]
    qkv.linear.weight.replace(Tensor(normal(21, 7)))  # type: ignore[union-attr]
    qkv.linear.bias = Tensor(normal(21))
    a, b, c, d = normal(2, 7), normal(7, 2), normal(3, 7), normal(7, 3)
    add_change(found["blocks.0.attn.v"], c, d, 0.25)
    add_change(found["blocks.0.attn.q"], a, b, 2.0)
    expected = x @ normal(21, 7).T.astype(float) + normal(21)
    expected[:, :7] += 2 * x @ a.T.astype(float) @ b.T
    expected[:, 14:] += 0.25 * x @ c.T.astype(float) @ d.T
    assert_all_close([qkv.linear(Tensor(x)).numpy()], [expected], 2e-6)


def check_gradients(model: GPT, modes: tuple[bool, ...]) -> None:
    """With W' = W + s B A: dA = s Bᵀ dW', dB = s dW' Aᵀ, whatever the weights are held in.

    With magnitudes, W' = m V / ‖V‖, V = W + s B A: dm = dW' · V / ‖V‖, and m / ‖V‖ is a constant.
    """
    inputs, targets = tokens()
    twin = merged_twin(model)
    assert_all_close([model(Tensor(inputs)).numpy()], [twin(Tensor(inputs)).numpy()], 1e-5)
    weights_of_twin = {name: place.linear.weight for name, place in places(twin).items()}
    loss = language_model_loss(twin, Tensor(inputs), Tensor(targets))
    whole = loss.gradient(*weights_of_twin.values())  # type: ignore[arg-type]
    Tensor.realize(loss, *whole)
    of_weights = dict(zip(weights_of_twin, whole, strict=True))
    for recompute in modes:
        replica = Replica(model, TrainingConfig(recompute=recompute), language_model_loss, 1)
        assert replica.add(0, np.zeros(2, np.uint32), tokens()) == pytest.approx(loss.item(), abs=1e-5)
        for name, change in changes_of(model).items():
            place = places(model)[name]
            rows = of_weights[name].numpy()[place.first : place.first + place.d_out]
            wanted = []
            if change.magnitude is not None:
                changed = rows_of(place) + np.float32(change.scale) * change.b.numpy() @ change.a.numpy()
                norms = np.linalg.norm(changed, axis=1, keepdims=True)
                wanted = [(rows * changed / norms).sum(1)]
                rows = rows * change.magnitude.numpy()[:, None] / norms
            of_a, of_b = change.scale * change.b.numpy().T @ rows, change.scale * rows @ change.a.numpy().T
            found = [g.numpy() for key, g in replica.gradients.items() if key.startswith(f"{name}.")]
            assert_all_close(found, [of_a, of_b, *wanted], 1e-4)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradients_are_those_through_the_merged_matrices(weights):
    check_gradients(model_of(LLAMA, weights), (False, True))


@pytest.mark.parametrize(("config", "weights"), [(LLAMA, "float16"), (GPT2, "int4"), (LLAMA, "minima")])
def test_gradients_with_magnitudes_are_those_through_the_merged_matrices(config, weights):
    patterns = ("q", "out", "up", "down") if config is GPT2 else ()
    check_gradients(model_of(replace(config, n_layers=1), weights, patterns, True), (config is LLAMA,))


@pytest.mark.parametrize("config", [replace(LLAMA, n_layers=1), replace(GPT2, n_layers=1)])
def test_gradients_without_kernels_are_those_through_the_merged_matrices(both, config):  # noqa: F811
    check_gradients(model_of(config, "minima"), (False,))


def test_gradient_is_the_slope_of_the_loss():
    """Central differences of some numbers, over weights of 4 bits."""
    model, (inputs, targets) = model_of(LLAMA, "int4"), tokens()
    replica = Replica(model, TrainingConfig(), language_model_loss, 1)
    replica.add(0, np.zeros(2, np.uint32), (inputs, targets))
    for name, p in list(trained_parameters(model).items())[::5]:
        before, gradient = p.numpy(), replica.gradients[name].numpy()
        at = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        losses = []
        for step in (0.05, -0.05):
            moved = before.copy()
            moved[at] += step
            p.assign(Tensor(moved)).realize()
            losses.append(language_model_loss(model, Tensor(inputs), Tensor(targets)).item())
        p.assign(Tensor(before)).realize()
        assert (losses[0] - losses[1]) / 0.1 == pytest.approx(gradient[at], rel=0.02)


def test_parts_of_a_batch_and_logits_in_pieces_give_the_same_gradients(monkeypatch):
    model = model_of(LLAMA)
    whole = Replica(model, TrainingConfig(), language_model_loss, 1)
    whole.add(0, np.zeros(2, np.uint32), tokens())
    monkeypatch.setattr("lama.training.recompute.LOGITS", 37 * 10)  # 10 tokens at a time
    for config in (TrainingConfig(recompute=True), TrainingConfig()):
        parts = Replica(model, config, language_model_loss, 2)
        for i in range(2):
            part = [array[2 * i : 2 * i + 2] for array in tokens()]
            parts.add(i, np.array([0, 2 * i], np.uint32), part)
        for name, gradient in whole.gradients.items():
            assert_all_close([parts.gradients[name].numpy()], [gradient.numpy()], 1e-5)


def test_held_out_loss_in_pieces_is_the_whole_loss(monkeypatch):
    model, arrays = model_of(LLAMA), tokens()
    whole = Evaluator(model, arrays, 4)()
    monkeypatch.setattr("lama.training.loss.LOGITS", 37 * 10)
    evaluator = Evaluator(model, arrays, 3, language_model_loss.in_pieces)
    assert [evaluator() for _ in range(2)] == pytest.approx([whole, whole], rel=1e-6)


def test_adapter_begins_as_no_change_and_can_be_removed_shared_and_folded():
    model, (inputs, _) = GPT(LLAMA), tokens()
    before = model(Tensor(inputs)).numpy()
    add_adapter(model, matching(model, ["q", "mlp.*"]), RANK, SCALE, seed=1)
    assert {name.rpartition(".")[2] for name in changes_of(model)} == {"q", "gate", "up", "down"}
    np.testing.assert_array_equal(model(Tensor(inputs)).numpy(), before)
    model = model_of(LLAMA)
    changed = model(Tensor(inputs)).numpy()
    plain = sharing_weights(model)
    remove_adapter(plain)
    assert not changes_of(plain) and changes_of(model)
    assert plain.blocks[0].attn.qkv.weight is model.blocks[0].attn.qkv.weight
    without = plain(Tensor(inputs)).numpy()
    assert np.abs(without - changed).max() > 0.1
    fold(model)
    assert not changes_of(model)
    assert_all_close([model(Tensor(inputs)).numpy()], [changed], 1e-5)
    quantised = model_of(LLAMA, "int8")
    with pytest.raises(LamaError, match="folded into weights of a float dtype; got int8"):
        fold(quantised)


# --- training

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
RATE = ["--learning-rate", "3e-2"]
FLAGS = ["--steps", "30", "--warmup", "5", "--batch-size", "4", "--sample-every", "1000", *RATE]
FLAGS += ["--context-length", "17"]
Train = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, gpt2/ as Hugging Face has it, and llama/."""
    here = tmp_path_factory.mktemp("adapters")
    (here / "text.txt").write_text(TEXT)
    config = random_gpt2.make_config(vocab_size=283, n_positions=97, n_embd=24, n_layer=2, n_head=2)
    random_gpt2.write_folder(here / "gpt2", config, random_gpt2.make_weights(config, std=0.3))
    for name, content in huggingface_files(train_bpe(TEXT, 280)).items():
        (here / "gpt2" / name).write_bytes(content)
    characters = CharacterTokenizer("".join(sorted(set(TEXT))))
    shape = {**vars(LLAMA), "vocab_size": characters.vocab_size, "context_length": 17}
    model = model_of(GPTConfig(**shape))
    remove_adapter(model)
    lama.save(here / "llama", model, characters)
    return here


@pytest.fixture
def train(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Train:
    """lama train in the folder of the models; its exit code and standard error."""
    monkeypatch.chdir(here)
    monkeypatch.setattr("lama.cli.train.SAMPLE_TOKENS", 2)

    def train(*flags: str) -> tuple[int, str]:
        out = ["--corpus", "text.txt", "--out", str(tmp_path / "out")]
        code = main(["train", *flags, *out, *FLAGS])
        return code, capfd.readouterr().err

    return train


@pytest.mark.parametrize(
    "flags",
    ["gpt2", "llama --dtype int4 --recompute", "llama --lora-on q v down", "llama --dtype int4 --dora"],
)
def test_adapter_learns_a_text(flags: str, train: Train, here: Path, tmp_path: Path, capfd):
    model, *more = flags.split()
    code, err = train("--from", model, "--lora", "4", *more)
    assert code == 0, err
    out = tmp_path / "out"
    losses = [record["loss"] for record in RunFolder(out).read_log() if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
    assert not (out / "model.safetensors").exists() and not (out / "config.json").exists()
    checkpoint = RunFolder(out).checkpoints()[-1]
    assert max(file.stat().st_size for file in checkpoint.iterdir()) < 200_000
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model and config["peft_type"] == "LORA"
    # The same model by its folder, by its base and the adapter, and fused; the base is as it was.
    dtype = ["--dtype", "int4", "--float-activations"] if "int4" in flags else []
    texts = []
    assert main(["fuse", "-m", model, str(out), "--out", str(tmp_path / "fused")]) == 0
    for words in (["-m", str(out), *dtype], ["-m", model, "--adapter", str(out), *dtype]):
        assert main(["generate", *words, "-p", "the quick", "-n", "9", "--temperature", "0"]) == 0
        texts.append(capfd.readouterr().out.splitlines()[-1])
    assert texts[0] == texts[1]
    fused, adapted = lama.load(tmp_path / "fused")[0], lama.load(out, dtype="float32")[0]
    assert not changes_of(fused) and not changes_of(adapted)
    for name, p in get_state_dict(fused).items():
        np.testing.assert_array_equal(p.numpy(), get_state_dict(adapted)[name].numpy())


def test_constants_of_dora_are_no_parameters():
    model = GPT(GPT2)
    before = n_parameters(model)
    add_adapter(model, matching(model, ()), RANK, SCALE, 1, dora=True)
    assert n_parameters(model) == before + size_of(trained_parameters(model))


def test_mfu_is_a_share_of_what_the_weights_type_allows(here: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setattr("lama.training.run.peak_flops", lambda device, bits: bits)
    settings = {"initial": "gpt2", "corpus": ["text.txt"], "context_length": 17, "lora": 3}
    for dtype, bits in (("file", 32), ("bfloat16", 16)):
        run = new_session(RunFolder(tmp_path / f"out{bits}"), {**settings, "dtype": dtype}, "")
        assert run.peak == bits


def test_resumed_adapter_has_the_same_bits(here: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(here / "gpt2", "gpt2")
    settings: dict[str, object] = {
        "context_length": 17,
        "initial": "gpt2",
        "corpus": [str(here / "text.txt")],
        "steps": 6,
        "batch_size": 4,
    }
    settings |= {"lora": 3, "dora": True, "learning_rate": 1e-2, "dropout": 0.1, "accumulation": 2}

    whole = losses_until(new_session(RunFolder(Path("whole")), settings, ""), 6)
    first = losses_until(new_session(RunFolder(Path("parts")), settings, ""), 3)
    assert first + losses_until(resumed_run(RunFolder(Path("parts")), {}), 6) == whole
    names = ("adapter_model.safetensors", "training.safetensors")
    for name in names:
        assert (Path("whole/checkpoints/step-000006") / name).read_bytes() == (
            Path("parts/checkpoints/step-000006") / name
        ).read_bytes()
    weights = Path("gpt2") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(LamaError, match="a resumed run must have the model it began with; got other weights"):
        resumed_run(RunFolder(Path("parts")), {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora 4", "lora needs a model to adapt; got none. Add --from MODEL"),
        ("--from gpt2 --lora -1", "lora must be at least 0; got -1"),
        ("--from gpt2 --lora 5000", "lora must be at most 4096; got 5000"),
        ("--from gpt2 --lora 25", "lora must be at most 24, the width of blocks.0.attn.q; got 25"),
        ("--from gpt2 --lora 4 --lora-alpha -2", "lora_alpha must be at least 0; got -2.0"),
        ("--from gpt2 --lora 4 --lora-alpha 1e7", "lora_alpha must be below 1000000.0; got 10000000.0"),
        ("--from gpt2 --lora 4 --lora-alpha nan", "lora_alpha must be a finite number; got nan"),
        ("--from gpt2 --lora-alpha 2", "lora_alpha must be given with lora, the rank of an adapter"),
        ("--from gpt2 --dtype int8", "dtype must be given with lora, the rank of an adapter"),
        (
            "--from gpt2 --lora 4 --lora-on q gate",
            "lora_on must name layers of the model: q, k, v, out, up, down, or blocks.0.attn.q, blocks.1.*; "
            "got 'gate', which matches none",
        ),
        ("--from gpt2 --lora 4 --dtype int4 --precision bfloat16", "precision must be float32 with quanti"),
        ("--from gpt2 --lora 4 --d-model 20", "d_model must be the model's own with --from, 24; got 20"),
    ],
)
def test_settings_out_of_range_are_one_line(flags: str, message: str, train: Train, tmp_path: Path):
    code, err = train(*flags.split())
    assert re.fullmatch(f"lama: .*{re.escape(message)}.*\n", err), err
    assert code == 2 and not (tmp_path / "out").exists()


# --- files of others


def written(folder: Path, config: dict | None = None, **tensors: np.ndarray) -> Path:
    """An adapter's folder with these tensors: of each name, `__` means a point."""
    folder.mkdir()
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "x", **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    header, content = {}, b""
    for name, array in tensors.items():
        key = "base_model.model." + name.replace("__", ".")
        places_here = [len(content), len(content) + array.nbytes]
        header[key] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": places_here}
        content += array.tobytes()
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)
    return folder


Q, GATE = "model__layers__1__self_attn__q_proj", "model__layers__0__mlp__gate_proj"


def pair(name: str, rank: int = 2, d_in: int = 40, d_out: int = 40) -> dict[str, np.ndarray]:
    a, b = normal(rank, d_in), normal(d_out, rank)
    return {f"{name}__lora_A__weight": a, f"{name}__lora_B__weight": b}


def test_adapter_of_peft_is_read(tmp_path: Path):
    model = GPT(LLAMA)
    folder = written(tmp_path / "a", {"alpha_pattern": {"gate_proj": 3}}, **pair(Q), **pair(GATE, 5, 40, 72))
    load_adapter(folder, model)
    found = {name: (change.a.shape, change.scale) for name, change in changes_of(model).items()}
    assert found == {"blocks.0.mlp.gate": ((5, 40), 0.6), "blocks.1.attn.q": ((2, 40), 2.0)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "has peft_type='IA3', which lama does not support"),
        ({"use_dora": True}, "must hold A, B and the magnitude of DoRA of "),
        ({"bias": "all"}, "has bias='all', which lama does not support"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save=['lm_head'], which lama does not support"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "has init_lora_weights='pissa_niter_4', which lama does not",
        ),
        ({"alpha_pattern": {"(.*)+x": 2}}, "has alpha_pattern={'(.*)+x': 2}, which lama does not support"),
        ({"lora_alpha": 0}, "must have alphas above 0 and below 1,000,000; got 0.0 for lora_alpha"),
        ({"lora_alpha": "4"}, "lora_alpha in"),
        (
            {"alpha_pattern": {"q_proj": None}},
            "must have alphas above 0 and below 1,000,000; got None for q_p",
        ),
        ({"alpha_pattern": 3}, "alpha_pattern in"),
    ],
)
def test_kind_of_adapter_that_is_not_supported_is_one_line(config: dict, message: str, tmp_path: Path):
    with pytest.raises(LamaError, match=re.escape(message)) as error:
        load_adapter(written(tmp_path / "a", config, **pair(Q)), GPT(LLAMA))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "must hold matrices A and B; got none"),
        (
            pair("model__layers__2__self_attn__q_proj"),
            "must change layers of this model, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
            "; got base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight of shape (2, 40)",
        ),
        (
            {f"{Q}__lora_magnitude_vector__weight": normal(40)},
            "got base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector.weight of shape",
        ),
        (
            {f"{Q}__lora_A__weight": normal(2, 40)},
            "must hold both A and B of model.layers.1.self_attn.q_proj; got A",
        ),
        (
            pair(Q, 2, 48, 48),
            "must have A (rank, 40) and B (40, rank) of model.layers.1.self_attn.q_proj, rank from 1 to 4096"
            "; got (2, 48) and (48, 2). Is it another model's?",
        ),
        (
            {f"{Q}__lora_A__weight": normal(2, 40), f"{Q}__lora_B__weight": normal(40, 3)},
            "(2, 40) and (40, 3)",
        ),
        (
            {f"{Q}__lora_A__weight": normal(0, 40), f"{Q}__lora_B__weight": normal(40, 0)},
            "(0, 40) and (40, 0)",
        ),
        (pair(Q, 4097), "(4097, 40) and (40, 4097)"),
        (
            {name: 0 * x + np.inf for name, x in pair(Q).items()},
            "weights must be finite; got NaN or infinity in",
        ),
    ],
)
def test_adapter_for_another_model_is_one_line(tensors: dict, message: str, tmp_path: Path):
    with pytest.raises(LamaError, match=re.escape(message)) as error:
        load_adapter(written(tmp_path / "a", **tensors), GPT(LLAMA))
    assert "\n" not in str(error.value)


def test_adapter_without_its_files_or_its_model_is_one_line(tmp_path: Path, here: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LamaError, match=r"an adapter must be a folder with adapter_config\.json; got no"):
        load_adapter(tmp_path / "empty", GPT(LLAMA))
    folder = written(tmp_path / "a", {"base_model_name_or_path": None}, **pair(Q))
    with pytest.raises(LamaError, match="must name its model, base_model_name_or_path; got none"):
        lama.load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LamaError, match=r"must have adapter_model\.safetensors beside"):
        load_adapter(folder, GPT(LLAMA))
    with pytest.raises(UsageError, match="a model can have only one adapter"):
        lama.load(folder, adapter=folder)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_adapter_is_read_as_it_was_written(config: GPTConfig, tmp_path: Path):
    """Without a family of Hugging Face's, the names are those of the model's export."""
    model = model_of(config, patterns=("q", "v", "down"))
    model.config = replace(model.config, end_tokens=(3, 5))
    save_adapter(tmp_path / "a", model, notes={"steps": 3})
    assert json.loads((tmp_path / "a" / "notes.json").read_text())["end_tokens"] == [3, 5]
    again = GPT(config)
    load_adapter(tmp_path / "a", again)
    assert list(changes_of(again)) == list(changes_of(model))
    for (name, found), expected in zip(changes_of(again).items(), changes_of(model).values(), strict=True):
        assert found.scale == pytest.approx(expected.scale), name
        np.testing.assert_array_equal(found.a.numpy(), expected.a.numpy(), name)
        np.testing.assert_array_equal(found.b.numpy(), expected.b.numpy(), name)


def test_adapter_of_a_gguf_has_the_names_of_its_family(tmp_path: Path):
    """The rows of queries and keys lie otherwise in the file, and as Hugging Face's in the model."""
    tokenizer = train_bpe(TEXT, 280)
    config = replace(LLAMA, vocab_size=280, d_model=64, d_head=16, d_rotated=16, d_mlp=96)
    model = GPT(config)
    export_gguf(tmp_path / "model.gguf", model, tokenizer, "model")
    loaded, _ = lama.load(tmp_path / "model.gguf")
    assert isinstance(loaded, GPT) and loaded.family == "llama"
    inputs, _ = tokens()
    for each in (model, loaded):
        add_adapter(each, matching(each, []), RANK, SCALE, seed=1)
        for i, p in enumerate(trained_parameters(each).values()):
            p.assign(Tensor(normal(*p.shape, seed=i) / p.shape[1] ** 0.5)).realize()
    assert_all_close([loaded(Tensor(inputs)).numpy()], [model(Tensor(inputs)).numpy()], 1e-5)
    save_adapter(tmp_path / "one", model)
    save_adapter(tmp_path / "other", loaded)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]


# --- memory


def arena_of(replica: Replica) -> int:
    """The bytes that tinygrad's plan gives to what a captured step computes in between."""
    captured = replica.step.jit.captured
    assert captured is not None
    found = {u for call in captured.linear.toposort() if call.op is Ops.CALL for u in call.toposort()}
    sizes = [u.buffer.nbytes for u in found if u.op is Ops.BUFFER and u.dtype == dtypes.int8]
    return max(sizes)


@needs_c
@pytest.mark.parametrize(
    ("config", "patterns", "dora"),
    [
        (LLAMA, (), False),
        (LLAMA, ("down",), False),
        (GPT2, (), False),
        (GPT2, ("v",), False),
        (LLAMA, (), True),
        (GPT2, ("v", "up"), True),
    ],
)
def test_activations_take_what_the_formula_says(config: GPTConfig, patterns: tuple[str, ...], dora: bool):
    """With and without recomputation, within 10 %: the plan leaves gaps."""
    shape = {"d_model": 64, "d_head": 16, "d_rotated": 16, "d_mlp": 192, "n_layers": 3, "context_length": 64}
    config = replace(config, vocab_size=300, **shape)
    arrays = list(np.random.default_rng(0).integers(0, 300, (2, 8, 64)).astype(np.int32))
    for recompute in (False, True):
        model = model_of(config, "int4", patterns, dora)
        settings = {"lora": RANK, "initial": "x", "batch_size": 8, "context_length": 64}
        run = RunConfig(**settings, recompute=recompute)
        replica = Replica(model, run, language_model_loss, 1)
        replica.add(0, np.zeros(2, np.uint32), arrays)
        assert 0.9 < adapter_memory(run, model).activations / arena_of(replica) < 1.1


PEAK = """
import re, resource, sys
from lama.cli import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


@needs_c
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("more", [[], ["--recompute"]], ids=["kept", "recomputed"])
def test_training_takes_the_memory_that_it_prints(more: list[str], tmp_path: Path):
    """Within 10 %, of a whole run with reports; the bundled model in 8 bits."""
    words = ["train", "--from", "lama-bpe", "--lora", "16", "--dtype", "int8", "--steps", "3", *more]
    words += ["--batch-size", "16", "--context-length", "128", "--evaluation-tokens", "4000", "--out", "out"]
    words += ["--learning-rate", "1e-3", "--warmup", "0"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    printed = re.search(r"memory: .*, ([\d,]+) MB$", done.stdout, re.MULTILINE)
    peak = re.search(r"^peak (\d+)", done.stdout, re.MULTILINE)
    assert printed and peak, done.stdout + done.stderr
    assert float(printed[1].replace(",", "")) == pytest.approx(int(peak[1]) / 1e6, rel=0.1)


def test_adapter_learns_conversations(here: Path, tmp_path: Path, monkeypatch, capfd):
    """With the template and the end token that they were written with, which the adapter keeps."""
    monkeypatch.chdir(here)
    monkeypatch.setattr("lama.cli.train.SAMPLE_TOKENS", 2)
    lines = []
    for animal in (
        "fox",
        "dog",
        "quick fox",
        "lazy dog",
        "brown fox",
        "brown dog",
        "ox",
        "owl",
        "cow",
        "bug",
    ):
        turns = [{"role": "user", "content": f"the {animal}?"}, {"role": "assistant", "content": "jumps."}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "chat.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    words = ["train", "--from", "gpt2", "--lora", "4", "--chat", str(tmp_path / "chat.jsonl")]
    words += ["--template", "plain", "--steps", "20", "--batch-size", "4", "--warmup", "2", *RATE]
    words += ["--validation", "0.4"]
    assert main([*words, "--out", str(out)]) == 0, capfd.readouterr().err
    losses = [record["loss"] for record in RunFolder(out).read_log() if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
    model, tokenizer = lama.load(out)
    assert isinstance(model, GPT) and template_of(tokenizer) is not None
    assert template_of(lama.load("gpt2")[1]) is None
