"""Beside TransformerLens: the same activations under the same names, the same head scores, on a random
GPT-2.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_gpt2 import make_config, make_weights, with_prefix, write_folder

import lama
from lama.interp.heads import (
    composition,
    copying_score,
    duplicate_token_score,
    induction_score,
    previous_token_score,
)
from lama.interp.lens import attribute
from lama.interp.record import run_with_cache, short_name

SIZES = {"vocab_size": 50257, "n_positions": 31, "n_embd": 42, "n_layer": 3, "n_head": 7}
TOKENS = np.array(
    [[50256, 464, 318, 13, 464, 318, 13, 257, 11], [50256, 1, 22, 333, 4444, 1, 22, 333, 7]], np.int32
)
SPLIT = ("q", "k", "v", "z")  # theirs are (B, T, H, d_head)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2."""
    config = make_config(**SIZES)
    return write_folder(tmp_path_factory.mktemp("gpt2"), config, with_prefix(make_weights(config, seed=2)))


def bridge(folder: Path, **options: bool) -> Any:
    """It with TransformerLens's hooks."""
    pytest.importorskip(
        "transformer_lens", reason='TransformerLens is not installed; run: pip install -e ".[dev,peers]"'
    )
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    hooked = TransformerBridge.boot_transformers(str(folder), hf_model=model)
    hooked.enable_compatibility_mode(disable_warnings=True, **options)
    return hooked


@pytest.mark.peers
def test_activations_are_those_of_transformer_lens_under_its_names(folder):
    model, hooked = lama.load(folder)[0], bridge(folder, no_processing=True)
    import torch

    logits, cache = run_with_cache(model, TOKENS)
    with torch.no_grad():
        expected, theirs = hooked.run_with_cache(torch.tensor(TOKENS).long())
    np.testing.assert_allclose(logits, expected.numpy(), rtol=0, atol=1e-4 * np.abs(logits).max())
    compared = set()
    for name, value in theirs.items():
        # Before gain and bias; with them it is the norm's output, lama's `normalized`.
        if name.endswith(".hook_normalized"):
            value = theirs[name.replace("hook_normalized", "hook_out")]
        if name not in cache:  # what lama has no name for, such as a norm's divisor
            continue
        array = value.numpy()
        array = array.swapaxes(1, 2) if name.rpartition("hook_")[2] in SPLIT else array
        # What is hidden has no score.
        seen = np.tri(TOKENS.shape[1], dtype=bool) if name.endswith("scores") else np.ones((), bool)
        ours = np.where(seen, np.broadcast_to(cache[name], array.shape), 0)
        tolerance = 1e-4 * max(1, np.abs(ours).max())
        np.testing.assert_allclose(ours, np.where(seen, array, 0), rtol=0, atol=tolerance, err_msg=name)
        compared.add(short_name(name))
    assert compared == set(cache) - {"logits"}


@pytest.mark.peers
def test_head_scores_are_those_of_transformer_lens(folder):
    pytest.importorskip(
        "transformer_lens", reason='TransformerLens is not installed; run: pip install -e ".[dev,peers]"'
    )
    import torch
    from transformer_lens import head_detector

    model, _ = lama.load(folder)
    _, cache = run_with_cache(model, TOKENS[:1], "*.pattern")
    patterns = cache.layers("attn.pattern")[:, 0]
    ours = {
        "previous_token": lambda measure: previous_token_score(patterns, measure),
        "duplicate_token": lambda measure: duplicate_token_score(patterns, TOKENS[0], measure),
        "induction": lambda measure: induction_score(patterns, TOKENS[0], measure),
    }
    for name, score in ours.items():
        target = getattr(head_detector, f"get_{name}_head_detection_pattern")(torch.tensor(TOKENS[:1]).long())
        for measure in ("mul", "abs"):
            for layer in range(3):
                for head in range(7):
                    theirs = head_detector.compute_head_attention_similarity_score(
                        torch.tensor(patterns[layer, head]),
                        target,
                        exclude_bos=False,
                        exclude_current_token=False,
                        error_measure=measure,
                    )
                    # Abs is rounded there.
                    assert score(measure)[layer, head] == pytest.approx(theirs, abs=1e-3)


@pytest.mark.peers
def test_composition_and_copying_are_those_of_transformer_lens(folder):
    model, hooked = lama.load(folder)[0], bridge(folder)  # its norms folded, its weights centred
    for kind in "qkv":
        theirs = hooked.all_composition_scores(kind.upper())
        theirs = getattr(theirs, "scores", theirs).detach().numpy()
        np.testing.assert_allclose(composition(model, kind), theirs, rtol=0, atol=1e-4)
    for layer, head in ((0, 0), (1, 2), (2, 6)):
        small = (
            (hooked.W_O[layer, head] @ hooked.W_U @ hooked.W_E @ hooked.W_V[layer, head])
            .detach()
            .double()
            .numpy()
        )
        values = np.linalg.eigvals(small)
        assert copying_score(model)[layer, head] == pytest.approx(
            values.sum().real / np.abs(values).sum(), abs=1e-4
        )


@pytest.mark.peers
def test_attribution_is_that_of_transformer_lens(folder):
    model, hooked = lama.load(folder)[0], bridge(folder)
    import torch

    found = attribute(model, TOKENS[0].tolist(), answer := 262, against := 11)
    with torch.no_grad():
        _, cache = hooked.run_with_cache(torch.tensor(TOKENS[:1]).long())
        stack, labels = cache.decompose_resid(return_labels=True)
        theirs = cache.logit_attrs(stack, torch.tensor([answer]), incorrect_tokens=torch.tensor([against]))[
            :, 0, -1
        ].numpy()
    written = {"embed": "embed", "pos_embed": "pos_embed"}
    written |= {f"{i}_{part}_out": f"blocks.{i}.{part}_out" for i in range(3) for part in ("attn", "mlp")}
    assert sorted(labels) == sorted(written)
    for label, value in zip(labels, theirs, strict=True):
        assert found.parts[written[label]] == pytest.approx(value, abs=1e-4), label
