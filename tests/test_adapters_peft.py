"""Adapters of every family load in PEFT and PEFT's load here, with equal logits."""

from pathlib import Path

import numpy as np
import pytest
from test_families import SHAPES, checkpoint, close, theirs, tokens_of
from tinygrad import Tensor

from lama.checkpoints import load_adapter, load_model, save_adapter
from lama.models.adapters import add_adapter, changes_of, matching
from lama.models.gpt import GPT

peft = pytest.importorskip("peft", reason="PEFT is the peer; pip install peft")

GPT2 = {"vocab_size": 211, "n_positions": 60, "n_embd": 48, "n_layer": 2, "n_head": 4}
# The first OPT: the projections of the other are linear layers outside of the blocks.
FAMILIES = {**{name: shapes[name != "opt"] for name, shapes in SHAPES.items()}, "gpt2": GPT2}
RANK = 3


def vary(model: GPT, names: list[str], dora: bool = False) -> None:
    """Give these places changes that matter."""
    add_adapter(model, names, RANK, 1.5, 1, dora)
    rng = np.random.default_rng(2)
    for change in changes_of(model).values():
        if change.magnitude is not None:
            factors = rng.uniform(0.5, 1.5, change.magnitude.shape).astype(np.float32)
            change.magnitude.assign(change.magnitude * Tensor(factors)).realize()
        for matrix in (change.a, change.b):
            values = rng.standard_normal(matrix.shape) / matrix.shape[1] ** 0.5
            matrix.assign(Tensor(values.astype(np.float32))).realize()


@pytest.mark.peers
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("patterns", [[], ["v", "blocks.0.mlp.*"]], ids=["all", "some"])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapter_of_lama_in_peft(name: str, patterns: list[str], dora: bool, tmp_path: Path):
    reference = checkpoint(tmp_path / "model", name, FAMILIES[name])
    model = load_model(tmp_path / "model")
    assert isinstance(model, GPT)
    vary(model, matching(model, patterns), dora)
    save_adapter(tmp_path / "adapter", model)
    tokens = tokens_of(model.config.vocab_size, 2, 19)
    before, ours = theirs(reference, tokens), model(Tensor(tokens)).numpy()
    assert np.abs(ours - before).max() > 0.05 * np.abs(before).max()
    adapted = peft.PeftModel.from_pretrained(reference, str(tmp_path / "adapter")).eval()
    close(ours, theirs(adapted, tokens))
    again = load_model(tmp_path / "model")
    assert isinstance(again, GPT)
    load_adapter(tmp_path / "adapter", again)
    assert list(changes_of(again)) == list(changes_of(model))
    for found, expected in zip(changes_of(again).values(), changes_of(model).values(), strict=True):
        np.testing.assert_array_equal(found.a.numpy(), expected.a.numpy())
        np.testing.assert_array_equal(found.b.numpy(), expected.b.numpy())
        if found.magnitude is not None and expected.magnitude is not None:
            np.testing.assert_array_equal(found.magnitude.numpy(), expected.magnitude.numpy())
    close(again(Tensor(tokens)).numpy(), ours)


@pytest.mark.peers
@pytest.mark.parametrize(("rooted", "dora"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", FAMILIES)
def test_adapter_of_peft_in_lama(name: str, rooted: bool, dora: bool, tmp_path: Path):
    torch = pytest.importorskip("torch")
    reference = checkpoint(tmp_path / "model", name, FAMILIES[name])
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=5,
        target_modules="all-linear",
        use_rslora=rooted,
        use_dora=dora,
        alpha_pattern={"layers.1.self_attn.q_proj": 2} if name == "llama" else {},
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(reference, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_magnitude" in key:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
            elif "lora_" in key:
                parameter.normal_().div_(2 * parameter.shape[1] ** 0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "model")
    assert isinstance(model, GPT)
    load_adapter(tmp_path / "adapter", model)
    tokens = tokens_of(model.config.vocab_size, 2, 19)
    close(model(Tensor(tokens)).numpy(), theirs(adapted, tokens))
