"""Recorded activations are the model's own, under both names, and recording changes nothing."""

import numpy as np
import pytest
from helpers import SMALL, TOKENS, fill
from tinygrad import Tensor

from lama.interp.record import Cache, run_with_cache, short_name
from lama.models.bert import Bert, BertConfig
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.models.gpt import GPT, GPTConfig

ENCODER = {"vocab_size": 11, "context_length": 13, "d_model": 6, "n_heads": 3, "d_mlp": 17}
SOURCE = np.array([[3, 1, 4, 0, 0], [6, 5, 3, 5, 2]], np.int32)  # 0 is padding


@pytest.fixture(scope="module")
def gpt():
    model = GPT(GPTConfig(**SMALL))
    fill(model)
    return model


@pytest.fixture(scope="module")
def transformer():
    model = Transformer(TransformerConfig(**ENCODER, n_encoder_layers=1, n_decoder_layers=2))
    fill(model)
    return model


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("hook_embed", "embed"),
        ("hook_pos_embed", "pos_embed"),
        ("blocks.0.hook_resid_pre", "blocks.0.resid_pre"),
        ("blocks.11.ln1.hook_normalized", "blocks.11.ln1.normalized"),
        ("blocks.0.attn.hook_attn_scores", "blocks.0.attn.scores"),
        ("blocks.0.attn.attn_scores", "blocks.0.attn.scores"),
        ("blocks.*.attn.hook_pattern", "blocks.*.attn.pattern"),
        ("blocks.3.mlp.hook_*", "blocks.3.mlp.*"),
        ("*", "*"),
    ],
)
def test_short_name_of_transformer_lens_name(theirs, ours):
    assert short_name(theirs) == ours
    assert short_name(ours) == ours


def test_recording_leaves_the_logits_as_they_are(gpt, transformer):
    logits, cache = run_with_cache(gpt, TOKENS)
    np.testing.assert_allclose(logits, gpt(Tensor(TOKENS)).numpy(), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(logits, cache["logits"])
    logits, _ = run_with_cache(transformer, (SOURCE, TOKENS))
    np.testing.assert_allclose(logits, transformer(Tensor(SOURCE), Tensor(TOKENS)).numpy(), rtol=0, atol=1e-5)
    bert = Bert(BertConfig(**ENCODER, n_layers=1, mask=10))
    logits, _ = run_with_cache(bert, TOKENS)
    np.testing.assert_allclose(logits, bert(Tensor(TOKENS)).numpy(), rtol=0, atol=1e-5)


def test_a_cache_has_what_matches_under_both_names(gpt):
    _, cache = run_with_cache(gpt, TOKENS, "blocks.*.attn.hook_pattern", "hook_embed")
    assert sorted(cache) == ["blocks.0.attn.pattern", "blocks.1.attn.pattern", "embed"]
    assert cache["blocks.1.attn.hook_pattern"] is cache["blocks.1.attn.pattern"]
    assert "hook_embed" in cache and "blocks.0.attn.hook_z" not in cache
    assert cache.layers("attn.pattern").shape == (2, 2, 3, 7, 7)
    np.testing.assert_array_equal(cache.layers("attn.hook_pattern")[1], cache["blocks.1.attn.pattern"])


def test_one_row_of_tokens_is_a_batch_of_one(gpt):
    _, cache = run_with_cache(gpt, TOKENS[1].tolist(), "blocks.0.attn.q")
    _, both = run_with_cache(gpt, TOKENS, "blocks.0.attn.q")
    np.testing.assert_allclose(cache["blocks.0.attn.q"], both["blocks.0.attn.q"][1:], atol=1e-6)


def test_names_that_are_not_there_are_refused_with_one_that_is(gpt):
    with pytest.raises(ValueError, match=r"got 'blocks.0.attn.patern'. Did you mean blocks.0.attn.pattern\?"):
        run_with_cache(gpt, TOKENS, "embed", "blocks.0.attn.patern")
    cache = Cache({"blocks.0.attn.z": np.zeros(1)})
    with pytest.raises(
        KeyError,
        match=r"blocks.0.attn.hook_q was not recorded; there are 1 activations. Did you mean "
        r"blocks.0.attn.z\?",
    ):
        cache["blocks.0.attn.hook_q"]
    with pytest.raises(KeyError, match=r"blocks.0.mlp.post was not recorded"):
        cache.layers("mlp.post")


def check_attention(cache: Cache, scope: str, out: str, layer) -> None:
    """The pattern's rows sum to 1, and pattern x values x output matrix is what attention adds."""
    pattern, v = cache[f"{scope}.pattern"].astype(float), cache[f"{scope}.v"].astype(float)
    np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)
    z = (pattern @ v).swapaxes(1, 2)  # (B, T, H, d_head)
    written = z.reshape(*z.shape[:2], -1) @ layer.out.weight.numpy().T + layer.out.bias.numpy()
    np.testing.assert_allclose(cache[out], written, rtol=0, atol=1e-4)


def test_pattern_times_values_times_output_matrix_is_what_attention_adds(gpt):
    _, cache = run_with_cache(gpt, TOKENS)
    for i, block in enumerate(gpt.blocks):
        check_attention(cache, f"blocks.{i}.attn", f"blocks.{i}.attn_out", block.attn)
        assert (cache[f"blocks.{i}.attn.pattern"][..., ~np.tri(7, dtype=bool)] == 0).all()


def test_pattern_times_values_is_what_attention_adds_in_encoder_and_decoder(transformer):
    _, cache = run_with_cache(transformer, (SOURCE, TOKENS))
    check_attention(
        cache, "encoder.blocks.0.attn", "encoder.blocks.0.attn_out", transformer.encoder.blocks[0].attn
    )
    for i, block in enumerate(transformer.decoder.blocks):
        scope = f"decoder.blocks.{i}"
        check_attention(cache, f"{scope}.attn", f"{scope}.attn_out", block.attn)
        check_attention(cache, f"{scope}.cross_attn", f"{scope}.cross_attn_out", block.cross_attn)
        assert cache[f"{scope}.cross_attn.pattern"].shape == (2, 3, 7, 5)
        assert (cache[f"{scope}.cross_attn.pattern"][0, ..., 3:] == 0).all()  # padding
