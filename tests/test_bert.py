"""The encoder, its masked-language-model head and its classifier, against plain numpy and by what they must
and must not see.
"""

from pathlib import Path

import numpy as np
import pytest
from helpers import fill
from reference import numpy_bert
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

import lama
from lama.models.bert import Bert, BertConfig, Classifier, ClassifierConfig, Encoder
from lama.models.registry import describe, n_parameters
from lama.taps import Recorder
from lama.tokenizers import CharacterTokenizer

PAD, MASK = 3, 5
TOKENS = np.array([[7, 1, 4, 1, 5, 9, 2], [6, 5, 8, 10, PAD, PAD, PAD]], np.int32)
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]], np.int32)
SMALL = {
    "vocab_size": 11,
    "context_length": 13,
    "d_model": 6,
    "n_layers": 2,
    "n_heads": 3,
    "d_mlp": 17,
    "pad": PAD,
    "mask": MASK,
}
VARIANTS = [
    {"norm": "post", "activation": "gelu"},
    {"norm": "pre", "activation": "gelu_new", "segments": 0, "norm_epsilon": 1e-5},
]
LABELS = ("ham", "spam", "neither")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: str(v["norm"]))
def test_encoder_and_head_match_numpy(variant: dict):
    config = BertConfig(**SMALL, **variant)
    model = Bert(config)
    weights = fill(model)
    segments = SEGMENTS if config.segments else None
    as_tensor = None if segments is None else Tensor(segments)
    expected = numpy_bert.encoder(weights, config, TOKENS, segments)
    there = TOKENS != PAD  # what stands at padding is nobody's concern
    np.testing.assert_allclose(
        model.encoder(Tensor(TOKENS), as_tensor).numpy()[there], expected[there], atol=1e-5
    )
    expected = numpy_bert.masked_logits(weights, config, TOKENS, segments)
    np.testing.assert_allclose(
        model(Tensor(TOKENS), as_tensor).numpy()[there], expected[there], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: str(v["norm"]))
def test_classifier_matches_numpy(variant: dict, pooling: str):
    config = ClassifierConfig(**SMALL, **variant, labels=LABELS, pooling=pooling)
    model = Classifier(config)
    weights = fill(model)
    np.testing.assert_allclose(
        model(Tensor(TOKENS)).numpy(), numpy_bert.class_logits(weights, config, TOKENS), atol=1e-5, rtol=1e-5
    )


def test_logits_of_chosen_positions_are_those_of_all():
    model = Bert(BertConfig(**SMALL))
    fill(model)
    positions = np.array([[6, 0, 3], [2, 2, 1]], np.int32)
    whole = model(Tensor(TOKENS)).numpy()
    np.testing.assert_allclose(
        model.at(Tensor(TOKENS), Tensor(positions)).numpy(),
        np.take_along_axis(whole, positions[..., None], 1),
        atol=1e-6,
    )


def test_padding_changes_nothing():
    """More padding, fewer columns or other rows beside it: a row's numbers are the same."""
    model = Classifier(ClassifierConfig(**SMALL, labels=LABELS))
    fill(model)
    long = model(Tensor(TOKENS)).numpy()[1]
    short = model(Tensor(np.ascontiguousarray(TOKENS[1:, :4]))).numpy()[0]
    np.testing.assert_allclose(long, short, atol=1e-6)


@pytest.mark.parametrize(
    "model", [Bert(BertConfig(**SMALL)), Classifier(ClassifierConfig(**SMALL, labels=LABELS))]
)
def test_saved_and_loaded_it_is_the_same(model: Bert | Classifier, tmp_path: Path):
    weights = fill(model)
    tokenizer = CharacterTokenizer("abcdefghijk")
    lama.save(tmp_path / "model", model, tokenizer)
    loaded, same = lama.load(tmp_path / "model")
    assert (
        type(loaded) is type(model)
        and loaded.config == model.config
        and same.to_json() == tokenizer.to_json()
    )
    for name, p in get_state_dict(loaded).items():
        np.testing.assert_array_equal(p.numpy(), weights[name])


def test_every_position_reads_to_both_sides():
    model = Bert(BertConfig(**SMALL))
    fill(model)
    before = model(Tensor(TOKENS)).numpy()
    for changed in (0, 6):
        other = TOKENS.copy()
        other[0, changed] = 8
        moved = np.abs(model(Tensor(other)).numpy() - before).max(-1)
        assert (moved[0] > 1e-4).all() and (moved[1] < 1e-6).all()


def test_a_row_of_padding_gives_numbers():
    model = Classifier(ClassifierConfig(**SMALL, labels=LABELS))
    assert np.isfinite(model(Tensor(np.full((1, 7), PAD, np.int32))).numpy()).all()


def test_taps_have_the_names_of_the_other_models():
    names = Recorder()
    Bert(BertConfig(**SMALL))(Tensor(TOKENS), tap=names)
    assert {
        "embed",
        "pos_embed",
        "segment_embed",
        "blocks.0.attn.pattern",
        "blocks.1.resid_post",
        "logits",
    } <= set(names)
    np.testing.assert_allclose(names["blocks.0.attn.pattern"].numpy().sum(-1), 1, atol=1e-5)
    assert (names["blocks.1.attn.pattern"].numpy()[1, ..., TOKENS[1] == PAD] == 0).all()


def test_every_parameter_gets_a_gradient():
    config = ClassifierConfig(**SMALL, labels=LABELS)
    for model, loss in (
        (bert := Bert(BertConfig(**SMALL)), bert(Tensor(TOKENS), Tensor(SEGMENTS)).square().mean()),
        (classifier := Classifier(config), classifier(Tensor(TOKENS)).square().mean()),
    ):
        fill(model)
        parameters = get_state_dict(model)
        for (name, p), gradient in zip(parameters.items(), loss.gradient(*parameters.values()), strict=True):
            assert gradient.shape == p.shape and np.abs(gradient.numpy()).max() > 0, name


def test_base_has_the_published_size():
    """bert-base-uncased: 108,891,648 parameters without the pooler; with the head 109,514,298."""
    config = BertConfig()
    assert (config.d_mlp, config.norm, config.activation) == (3072, "post", "gelu")
    encoder, model = Encoder(config), Bert(config, seed=None)
    assert sum(int(p.numel()) for p in get_state_dict(encoder).values()) == 108_891_648
    assert n_parameters(model) == 109_514_298
    assert describe(model).startswith("BERT, 109,514,298 parameters: 12 layers x 12 heads, d_model 768")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad": 11}, "pad must be a token of the vocabulary; got pad=11, vocab_size=11"),
        ({"segments": -1}, "segments must be at least 0; got segments=-1"),
        ({"labels": ("a",)}, "labels must be two or more different names; got a"),
        ({"labels": ("a", "a")}, "labels must be two or more different names; got a, a"),
        ({"pooling": "max"}, "pooling must be one of mean, first; got 'max'"),
        ({"norm": "no"}, "norm must be one of pre, post, none; got 'no'"),
    ],
)
def test_config_refuses(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**SMALL | change)


def test_too_many_tokens_and_segments_that_are_not_there_are_refused():
    model = Encoder(BertConfig(**SMALL | {"segments": 0}))
    with pytest.raises(ValueError, match="got 14 tokens, context_length=13"):
        model(Tensor(np.ones((1, 14), np.int32)))
    with pytest.raises(ValueError, match="segments must be left out"):
        model(Tensor(TOKENS), Tensor(SEGMENTS))
