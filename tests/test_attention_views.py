"""What `lama attention` shows: the patterns of every kind of model, with labels, as text and pictures."""

import sys

import numpy as np
import pytest
from helpers import SMALL, fill
from tinygrad import Tensor

import lama
from lama.cli import main
from lama.data.inputs import input_tokens
from lama.data.masked import MASK, PAD
from lama.errors import LamaError, UsageError
from lama.interp.attention import attention_of, chosen_heads, draw_pattern, panels, summary
from lama.interp.labels import token_labels
from lama.models.bert import Bert, BertConfig, Classifier, ClassifierConfig
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.models.gpt import GPT, GPTConfig
from lama.taps import Recorder
from lama.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    PairTokenizer,
    WordPieceTokenizer,
    gpt2_tokenizer,
    train_bpe,
)

TEXT = "baé\n bb"
LETTERS = CharacterTokenizer("\n $<ab/é>")


def gpt(**options):
    model = GPT(GPTConfig(**SMALL | options), seed=None)
    fill(model)
    return model


@pytest.fixture(scope="module")
def pairs():
    tokenizer = PairTokenizer(LETTERS)
    shape = {
        "context_length": 13,
        "d_model": 6,
        "n_encoder_layers": 1,
        "n_decoder_layers": 2,
        "n_heads": 3,
        "d_mlp": 17,
    }
    model = Transformer(TransformerConfig(tokenizer.vocab_size, **shape), seed=None)
    fill(model)
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    lama.save(path, gpt(), LETTERS)
    return path


def check_patterns(attention, n_layers, T, S):
    assert attention.patterns.shape == (n_layers, 3, T, S) and (
        len(attention.queries),
        len(attention.keys),
    ) == (T, S)
    np.testing.assert_allclose(attention.patterns.sum(-1), 1, atol=1e-5)
    assert not attention.causal or not np.triu(attention.patterns, 1).any()
    scores = attention.q @ attention.k.swapaxes(-1, -2) * attention.scale
    if attention.causal:
        scores = np.where(np.tri(T, S, dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(attention.patterns, e / e.sum(-1, keepdims=True), atol=1e-5)


def test_gpt_attends_to_itself_and_never_ahead():
    found = attention_of(gpt(), LETTERS, input_tokens(gpt(), LETTERS, TEXT))
    assert list(found) == ["self"] and found["self"].causal
    check_patterns(found["self"], 2, 7, 7)
    assert found["self"].queries == found["self"].keys == ["b", "a", "é", "↵", "·", "b", "b"]


def test_encoder_decoder_has_three_kinds_and_rows_of_cross_attention_are_what_is_written(pairs):
    model, tokenizer = pairs
    found = attention_of(model, tokenizer, input_tokens(model, tokenizer, "ab$"), tokenizer.encode("ba"))
    assert list(found) == ["encoder", "decoder", "cross"]
    for kind, shape in {"encoder": (1, 4, 4), "decoder": (2, 3, 3), "cross": (2, 3, 4)}.items():
        check_patterns(found[kind], *shape)
    assert [found[kind].causal for kind in found] == [False, True, False]
    assert found["encoder"].queries == found["cross"].keys == ["a", "b", "$", "<end>"]
    assert found["decoder"].queries == found["decoder"].keys == ["<begin>", "b", "a"]
    assert found["cross"].queries == ["b", "a", "<end>"]


def test_bert_and_classifier_read_to_both_sides_and_padding_changes_nothing():
    tokenizer = train_bpe("a fox and a dog", 265, (PAD, MASK))
    pad, mask = (tokenizer.encode(token)[0] for token in (PAD, MASK))
    shape = {
        "context_length": 13,
        "d_model": 6,
        "n_layers": 2,
        "n_heads": 3,
        "d_mlp": 17,
        "pad": pad,
        "mask": mask,
    }
    for model in (
        Bert(BertConfig(265, **shape), seed=None),
        Classifier(ClassifierConfig(265, **shape), seed=None),
    ):
        fill(model)
        tokens = input_tokens(model, tokenizer, "a fox")
        attention = attention_of(model, tokenizer, tokens)["self"]
        check_patterns(attention, 2, len(tokens), len(tokens))
        assert np.triu(attention.patterns, 1).any() and "".join(attention.queries).endswith("a·fox")
        record = Recorder("*.pattern")
        model(Tensor(np.array([tokens + [pad] * (13 - len(tokens))], np.int32)), tap=record)
        padded = np.stack([record[f"blocks.{i}.attn.pattern"].numpy()[0] for i in range(2)])
        assert not padded[..., len(tokens) :].any()
        np.testing.assert_allclose(padded[..., : len(tokens), : len(tokens)], attention.patterns, atol=1e-5)


def test_pattern_times_values_times_output_is_what_the_block_adds(pairs):
    model, _ = pairs
    record = Recorder()
    source, target = (Tensor(np.array([ids], np.int32)) for ids in ([5, 4, 6, 2], [1, 7, 5]))
    model(source, target, tap=record)
    names = {
        "encoder.blocks.0.attn": model.encoder.blocks[0].attn,
        "decoder.blocks.1.attn": model.decoder.blocks[1].attn,
    }
    names["decoder.blocks.1.cross_attn"] = model.decoder.blocks[1].cross_attn
    for name, module in names.items():
        z = record[f"{name}.pattern"].numpy()[0] @ record[f"{name}.v"].numpy()[0]  # (H, T, d_head)
        weight = module.out.weight.numpy().reshape(6, 3, 2)  # (d_model, H, d_head)
        written = np.einsum("htd,mhd->tm", z, weight) + module.out.bias.numpy()
        np.testing.assert_allclose(written, record[f"{name}_out"].numpy()[0], atol=1e-4)


def test_labels_show_white_space_and_half_characters():
    assert token_labels(ByteTokenizer(), "é \n\t\0".encode()) == ["\\xc3", "\\xa9", "·", "↵", "⇥", "\\x00"]
    assert token_labels(gpt2_tokenizer(), gpt2_tokenizer().encode(" the ☃")) == [
        "·the",
        "·\\xe2\\x98",
        "\\x83",
    ]
    assert token_labels(gpt2_tokenizer(), [50256]) == ["<|endoftext|>"]
    assert token_labels(PairTokenizer(LETTERS), [0, 1, 2, 3, 9]) == ["<pad>", "<begin>", "<end>", "↵", "a"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able"]
    assert token_labels(WordPieceTokenizer(vocabulary), [2, 5, 6, 3]) == ["[CLS]", "un", "##able", "[SEP]"]


def test_chosen_heads_are_one_a_layers_every_layers_or_all(pairs):
    model = gpt()
    assert chosen_heads(model, None, 1, 2) == ("self", [(1, 2)])
    assert chosen_heads(model, None, 1) == ("self", [(1, 0), (1, 1), (1, 2)])
    assert chosen_heads(model, "self", None, 2) == ("self", [(0, 2), (1, 2)])
    assert len(chosen_heads(model)[1]) == 6
    assert chosen_heads(pairs[0])[0] == "cross" and len(chosen_heads(pairs[0], "encoder")[1]) == 3


@pytest.mark.parametrize(
    "choice, message",
    [
        (("self", 2), "layer must be one of the model's 2, counted from 0; got 2. Choose 0 to 1"),
        (("self", None, -1), "head must be one of the model's 3, counted from 0; got -1. Choose 0 to 2"),
        (("cross",), "kind must be one that the model has: self; got cross"),
    ],
)
def test_chosen_heads_say_what_there_is(choice, message):
    with pytest.raises(UsageError) as error:
        chosen_heads(gpt(), *choice)
    assert str(error.value) == message


def test_panels_have_labels_while_there_is_room():
    model = gpt()
    attention = attention_of(model, LETTERS, LETTERS.encode("ab"))["self"]
    one, two = panels(attention, [(1, 2)])[0], panels(attention, [(0, 1), (1, 2)])
    assert (one.title, list(one.rows), one.low, one.high) == ("layer 1, head 2", ["a", "b"], 0, 1)
    np.testing.assert_array_equal(one.values, attention.patterns[1, 2])
    assert [panel.title for panel in two] == ["0.1", "1.2"]
    assert not panels(attention, [(0, 0)] * 26)[0].rows


def test_summary_finds_the_share_of_the_first_token_and_the_strongest_link():
    attention = attention_of(gpt(), LETTERS, LETTERS.encode("ab<$"))["self"]
    pattern = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0.3, 0.2, 0.5, 0], [0.1, 0.6, 0.1, 0.2]])
    attention.patterns[0, 1] = pattern
    lines = summary(attention, [(0, 1)]).splitlines()
    assert lines[0].split() == ["head", "first", "itself", "before", "strongest", "other", "links"]
    assert lines[1].split() == ["0.1", "0.20", "0.35", "0.15", "$", "→", "b", "0.60"]


def test_draw_pattern_reads_the_columns_labels_downwards():
    drawn = draw_pattern(
        np.array([[1.0, 0.0, 0.0], [0.5, 0.55, 0.1]]), ["·the", "b"], ["x", "·the", "a" * 12]
    )
    lines = drawn.splitlines()
    assert [line[6:] for line in lines[-2:]] == ["@", "+ + ."]
    assert [line[8:9] for line in lines[:10]] == [" "] * 6 + list("·the")
    assert "".join(line[10:11] for line in lines[:10]) == "a" * 9 + "…"


def test_input_tokens_refuse_no_text_and_too_much(pairs):
    with pytest.raises(LamaError, match=r"^the text must not be empty; got nothing\. Give some text$"):
        input_tokens(gpt(), LETTERS, "")
    with pytest.raises(
        LamaError, match=r"^the text must fit context_length; got 14 tokens, context_length=13\. Shorten it$"
    ):
        input_tokens(gpt(), LETTERS, "a" * 14)
    with pytest.raises(LamaError, match="got 14 tokens, context_length=13"):
        input_tokens(*pairs, "a" * 13)  # the end counts
    with pytest.raises(LamaError, match="got 14 tokens, context_length=13"):
        attention_of(*pairs, [3, 2], [3] * 13)  # so does the begin


def test_attention_draws_in_the_terminal_and_into_pictures(folder, tmp_path, capfd):
    assert main(["attention", "-m", str(folder), "ab<a", "--layer", "1", "--head", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert (
        lines[0].startswith("GPT, ")
        and lines[2:4] == ["layer 1, head 2", "   a b < a"]
        and [line[0] for line in lines[4:]] == list("ab<a")
    )
    assert main(["attention", "-m", str(folder), "ab<a"]) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()[3:9]] == [
        "0.0",
        "0.1",
        "0.2",
        "1.0",
        "1.1",
        "1.2",
    ]
    pytest.importorskip("matplotlib", reason="the package matplotlib (extra `plots`) is not installed")
    for name, options in (
        ("one.png", ["--layer", "0", "--head", "0"]),
        ("layer.svg", ["--layer", "0"]),
        ("all.png", []),
    ):
        assert main(["attention", "-m", str(folder), "ab<a", *options, "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


def test_attention_of_an_encoder_decoder_shows_what_it_writes_itself(pairs, tmp_path, capfd):
    lama.save(tmp_path, *pairs)
    assert (
        main(["attention", "-m", str(tmp_path), "ab", "--target", "ba", "--layer", "0", "--head", "0"]) == 0
    )
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()[-3:]] == ["b", "a", "<end>"]
    assert main(["attention", "-m", str(tmp_path), "ab", "--kind", "encoder"]) == 0
    assert main(["attention", "-m", str(tmp_path), "ab"]) == 0
    assert "strongest links" in capfd.readouterr().out


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["", "--layer", "0"], 2, "TEXT must not be empty; give a sentence"),
        (["a" * 14], 1, "the text must fit context_length; got 14 tokens, context_length=13. Shorten it"),
        (["c"], 1, "text must be made of the model's 9 characters '\\n $/<>abé'; got 'c' at character 0"),
        (
            ["ab", "--layer", "2"],
            2,
            "layer must be one of the model's 2, counted from 0; got 2. Choose 0 to 1",
        ),
        (["ab", "--kind", "cross"], 2, "kind must be one that the model has: self; got cross"),
        (["ab", "--target", "b"], 2, "--target is for encoder-decoders only; leave it out"),
        (["ab", "--out", "a.jpg"], 2, "--out must end in .html or .png or .svg; got a.jpg"),
        (
            ["ab", "--out", "nowhere/a.png"],
            1,
            "--out must be in an existing folder that can be written; got nowhere/a.png",
        ),
    ],
)
def test_attention_refuses_in_one_line(folder, words, code, message, capfd):
    assert main(["attention", "-m", str(folder), *words]) == code
    assert capfd.readouterr().err == f"lama: {message}\n"


def test_attention_without_matplotlib_says_how_to_get_it(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["attention", "-m", str(folder), "ab", "--out", str(tmp_path / "a.png")]) == 1
    assert "is not installed. Run: pip install matplotlib" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
