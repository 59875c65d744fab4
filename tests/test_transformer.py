"""The encoder-decoder against a numpy one, and a test for each fault that others' encoder-decoders had
without knowing.
"""

import dataclasses
import math

import numpy as np
import pytest
from helpers import fill
from reference import numpy_transformer
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

from lama.checkpoints import load, load_causal, save
from lama.dropout import Dropout
from lama.embeddings import sinusoids
from lama.errors import LamaError
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.models.registry import MODELS, describe, kind_of, make_model, n_parameters
from lama.ops import cross_entropy
from lama.taps import Recorder, replace
from lama.tokenizers import CharacterTokenizer, PairTokenizer

TOKENS = {"bert": {"mask": 3}, "classifier": {"mask": 3}}  # of a small vocabulary
SMALL = {
    "vocab_size": 13,
    "context_length": 17,
    "d_model": 6,
    "n_encoder_layers": 2,
    "n_decoder_layers": 3,
    "n_heads": 3,
    "d_mlp": 11,
}
PAD = 0
SOURCE = np.array([[3, 4, 5, 6, 2], [7, 8, 2, PAD, PAD]], np.int32)
TARGET = np.array([[1, 9, 4, 11, 12, 3, 5], [1, 10, 6, 7, PAD, PAD, PAD]], np.int32)
NORMS = ("post", "pre")


@pytest.fixture(params=NORMS, scope="module")
def model(request) -> Transformer:
    model = Transformer(TransformerConfig(**SMALL, norm=request.param))
    fill(model)
    return model


def run(
    model: Transformer, source: np.ndarray = SOURCE, target: np.ndarray = TARGET, **options
) -> np.ndarray:
    return model(Tensor(source), Tensor(target), **options).numpy()


def test_equals_numpy(model):
    weights = {name: p.numpy().astype(float) for name, p in get_state_dict(model).items()}
    expected = numpy_transformer.logits(weights, vars(model.config), SOURCE, TARGET)
    np.testing.assert_allclose(run(model), expected, atol=1e-5 * np.abs(expected).max())


def test_base_model_has_the_published_size():
    base = Transformer(TransformerConfig(), seed=None)
    assert n_parameters(base) == 44_138_496 + 37_000 * 512 == 63_082_496
    assert describe(base).startswith(
        "Transformer, 63,082,496 parameters: 6 + 6 layers x 8 heads, d_model 512, d_mlp 2048, post-norm"
    )


def test_state_dict_is_complete(model):
    """All that the layers hold is named: the parts of a block times the blocks, though they lie in Python
    lists.
    """
    c, names = model.config, set(get_state_dict(model))
    norm, linear = 2, 2  # weight and bias
    encoder_block = 2 * norm + 2 * linear + 2 * linear
    decoder_block = encoder_block + norm + 2 * linear
    final = 2 * norm if c.norm == "pre" else 0
    assert len(names) == 1 + c.n_encoder_layers * encoder_block + c.n_decoder_layers * decoder_block + final
    assert len({id(p) for p in get_state_dict(model).values()}) == len(names)  # no norm serves two sub-layers


def test_saved_model_comes_back(tmp_path, model):
    save(tmp_path, model, PairTokenizer(CharacterTokenizer("abcdefghij")))
    loaded, tokenizer = load(tmp_path)
    assert loaded.config == model.config and isinstance(tokenizer, PairTokenizer)
    np.testing.assert_array_equal(run(loaded), run(model))
    with pytest.raises(LamaError, match="the model must be a gpt here; got a transformer in"):
        load_causal(tmp_path)


def test_no_target_sees_later_ones(model):
    before = run(model)
    for t in range(1, TARGET.shape[1]):
        changed = TARGET.copy()
        changed[0, t] = 8
        after = run(model, target=changed)
        np.testing.assert_array_equal(after[0, :t], before[0, :t])
        assert (np.abs(after[0, t:] - before[0, t:]).max(-1) > 1e-6).all()


def test_every_target_sees_the_whole_source(model):
    """The look-ahead mask is for the targets' own attention: the first target reads the last of the
    source.
    """
    before = run(model)
    for s in range(SOURCE.shape[1]):
        changed = SOURCE.copy()
        changed[0, s] = 9
        after = run(model, source=changed)
        assert (np.abs(after[0] - before[0]).max(-1) > 1e-6).all()


def test_cross_attention_looks_at_the_last_source_token(model):
    record = Recorder("decoder.blocks.*.cross_attn.pattern")
    run(model, tap=record)
    for i in range(model.config.n_decoder_layers):
        pattern = record[f"decoder.blocks.{i}.cross_attn.pattern"].numpy()
        assert pattern.shape == (2, 3, 7, 5) and (pattern[0] > 0).all()
        assert (pattern[1, :, :, 3:] == 0).all()


def test_padding_changes_nothing(model):
    whole, before = slice(0, 4), run(model)
    alone = run(model, SOURCE[1:, :3], TARGET[1:, :4])
    np.testing.assert_allclose(before[1, whole], alone[0], atol=1e-5)
    further = np.pad(SOURCE, ((0, 0), (0, 3))), np.pad(TARGET, ((0, 0), (0, 2)))
    np.testing.assert_allclose(run(model, *further)[1, whole], alone[0], atol=1e-5)


def test_every_decoder_block_makes_keys_and_values_of_its_own(model):
    memory, _ = model.encode(Tensor(SOURCE))
    pairs = [k.numpy() for k, _ in model.keys_values(memory)]
    assert len(pairs) == 3 and not np.allclose(pairs[0], pairs[1]) and not np.allclose(pairs[1], pairs[2])


def test_cross_attention_asks_with_what_self_attention_wrote(model):
    name = "decoder.blocks.0."
    record, changed = Recorder(f"{name}cross_attn.q", f"{name}attn_out"), Recorder(f"{name}cross_attn.q")
    run(model, tap=record)
    edit = replace({f"{name}attn_out": lambda x: x + Tensor.arange(x.shape[-1])})
    run(model, tap=lambda key, value: changed(key, edit(key, value)))
    assert np.abs(record[f"{name}cross_attn.q"].numpy() - changed[f"{name}cross_attn.q"].numpy()).max() > 1e-3


def test_each_head_depends_on_the_whole_stream(model):
    """A head projects its input; one that cut a slice out of it would not see the others' numbers."""
    attn = model.encoder.blocks[0].attn
    x = np.random.default_rng(0).standard_normal((1, 2, 6)).astype(np.float32)
    before = attn.project(Tensor(x), None)[0].numpy()
    for j in range(6):
        changed = x.copy()
        changed[..., j] += 1
        difference = np.abs(attn.project(Tensor(changed), None)[0].numpy() - before)  # (1, H, 2, d_head)
        assert (difference.max((0, 2, 3)) > 1e-3).all()


def test_position_encodings_have_their_exact_values():
    table = sinusoids(50, 8).astype(float)
    assert table[0].tolist() == [0, 1] * 4
    for p, i in ((3, 0), (7, 1), (49, 3)):  # the exponent is that of the pair, not of the dimension
        assert table[p, 2 * i] == pytest.approx(math.sin(p / 10000 ** (2 * i / 8)), abs=1e-6)
        assert table[p, 2 * i + 1] == pytest.approx(math.cos(p / 10000 ** (2 * i / 8)), abs=1e-6)
    assert len(np.unique(table.round(6), axis=0)) == 50
    products = [table[p] @ table[p + 5] for p in range(45)]
    np.testing.assert_allclose(products, products[0], atol=1e-5)  # a function of the distance alone
    model = Transformer(TransformerConfig(**SMALL), seed=None)
    record = Recorder("*.pos_embed")
    run(Transformer(model.config), tap=record)
    for side, n in (("encoder", 5), ("decoder", 7)):
        np.testing.assert_allclose(record[f"{side}.pos_embed"].numpy(), sinusoids(17, 6)[:n], atol=1e-6)


def test_embeddings_are_scaled_and_shared(model):
    record = Recorder("*.embed")
    run(model, tap=record)
    rows = model.embed.weight.numpy()
    np.testing.assert_allclose(record["encoder.embed"].numpy(), rows[SOURCE] * math.sqrt(6), rtol=1e-5)
    np.testing.assert_allclose(record["decoder.embed"].numpy(), rows[TARGET] * math.sqrt(6), rtol=1e-5)
    assert [name for name in get_state_dict(model) if "embed" in name] == ["embed.weight"]


def test_every_parameter_gets_a_gradient(model):
    parameters = get_state_dict(model)
    loss = cross_entropy(model(Tensor(SOURCE), Tensor(TARGET)), Tensor(np.roll(TARGET, -1, 1))).mean()
    for name, gradient in zip(parameters, loss.gradient(*parameters.values()), strict=True):
        values = gradient.numpy()
        if name.endswith("qkv.bias"):  # a key's bias adds the same to all scores, which the softmax cancels
            q, _, v = np.split(values, 3)
            values = np.concatenate([q, v])
        assert np.abs(values).max() > 1e-6, name


def test_dropout_is_where_the_paper_has_it():
    """On the sum of embeddings and positions, and on what each sub-layer adds; not on attention patterns."""
    model = Transformer(TransformerConfig(**SMALL))
    sites: list[str] = []

    @dataclasses.dataclass(frozen=True)
    class Noted(Dropout):
        def __call__(self, site: str, x: Tensor) -> Tensor:
            sites.append(f"{self.scope}{site}")
            return x

    model(Tensor(SOURCE), Tensor(TARGET), dropout=Noted(0.1, Tensor(np.array([1, 0], np.uint32))))
    expected = {"encoder.embed", "decoder.embed"}
    for stack, n, parts in (("encoder", 2, ("attn", "mlp")), ("decoder", 3, ("attn", "cross_attn", "mlp"))):
        expected |= {f"{stack}.blocks.{i}.{part}_out" for i in range(n) for part in parts}
    assert sorted(sites) == sorted(expected)


def test_first_loss_is_near_that_of_guessing():
    model = Transformer(TransformerConfig(**SMALL | {"d_model": 48, "vocab_size": 97}))
    losses = cross_entropy(model(Tensor(SOURCE), Tensor(TARGET)), Tensor(TARGET)).numpy()
    # Unembedding by the embeddings: a token's own row has the largest product.
    assert abs(losses.mean() - math.log(97)) < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 4}, "d_model must be a multiple of n_heads; got d_model=6, n_heads=4"),
        ({"n_decoder_layers": 0}, "n_decoder_layers must be at least 1; got n_decoder_layers=0"),
        (
            {"end": 1},
            r"pad, begin and end must be three tokens below vocab_size; got \(0, 1, 1\), vocab_size=13",
        ),
        ({"pad": 13}, r"got \(13, 1, 2\), vocab_size=13"),
        ({"norm": "middle"}, "norm must be one of .*; got 'middle'"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SMALL, **changes})


def test_source_or_target_past_the_context_is_refused():
    model = Transformer(TransformerConfig(**SMALL), seed=None)
    with pytest.raises(ValueError, match="tokens must fit context_length; got 18 tokens, context_length=17"):
        model.encode(Tensor.ones(1, 18, dtype="int"))


def test_every_kind_of_model_is_made_from_its_config_and_found_by_its_name():
    for kind, (model_class, config_class) in MODELS.items():
        config = config_class(vocab_size=11, context_length=7, d_model=6, n_heads=2, **TOKENS.get(kind, {}))
        model = make_model(config, seed=None)
        assert type(model) is model_class and kind_of(model) == kind
        assert describe(model).endswith("vocabulary 11")
    with pytest.raises(ValueError, match="kinds gpt, transformer, bert, classifier; got int"):
        kind_of(3)
