"""Hugging Face's BERT checkpoints: loaded, and giving transformers' numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import numpy_bert
from tinygrad import Tensor
from tinygrad.nn.state import get_state_dict

import lama
from lama.checkpoints import load_model
from lama.checkpoints.bert import bert_name
from lama.checkpoints.safetensors_files import write_safetensors
from lama.checkpoints.tensor import FileTensor
from lama.cli import main
from lama.errors import LamaError, LamaWarning
from lama.models.bert import Bert, BertConfig
from lama.tokenizers import WordPieceTokenizer
from lama.tokenizers.wordpiece import SPECIAL

CONFIG = {
    "model_type": "bert",
    "vocab_size": 29,
    "hidden_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 31,
    "max_position_embeddings": 17,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.1,
}
TOKENS = np.array([[7, 1, 4, 1, 5, 9, 2], [6, 5, 8, 10, 0, 0, 0]], np.int32)
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]], np.int32)


def write_folder(folder: Path, tensors: dict[str, np.ndarray], **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    write_safetensors(
        folder / "model.safetensors",
        {
            name: FileTensor(name, "float32", value.shape, lambda value=value: value)
            for name, value in tensors.items()
        },
    )
    return folder


def their_weights(std: float = 0.3) -> dict[str, np.ndarray]:
    """Random, under BERT's names, with the tensors that lama leaves out."""
    rng = np.random.default_rng(0)
    shapes = {
        name: p.shape
        for name, p in get_state_dict(Bert(BertConfig(29, 17, 18, 2, 3, 31, mask=28), seed=None)).items()
    }
    found = {}
    for name, shape in shapes.items():
        value = (rng.standard_normal(shape) * std).astype(np.float32)
        if ".qkv." in name:
            for part, which in zip(np.split(value, 3), ("query", "key", "value"), strict=True):
                found[bert_name(name).replace("query", which)] = part.copy()
        else:
            found[bert_name(name)] = value
    return found | {
        "bert.pooler.dense.weight": np.zeros((18, 18), np.float32),
        "cls.predictions.decoder.bias": np.zeros(29, np.float32),
    }


def test_folder_is_loaded(tmp_path: Path):
    weights = their_weights()
    model = load_model(write_folder(tmp_path / "bert", weights))
    assert isinstance(model, Bert) and model.config == BertConfig(29, 17, 18, 2, 3, 31, mask=28)
    mine = {name: p.numpy() for name, p in get_state_dict(model).items()}
    q, k = (weights[f"bert.encoder.layer.1.attention.self.{part}.weight"] for part in ("query", "key"))
    np.testing.assert_array_equal(mine["encoder.blocks.1.attn.qkv.weight"][:36], np.concatenate([q, k]))
    expected = numpy_bert.masked_logits(mine, model.config, TOKENS, SEGMENTS)
    there = TOKENS != 0
    np.testing.assert_allclose(
        model(Tensor(TOKENS), Tensor(SEGMENTS)).numpy()[there], expected[there], atol=1e-4
    )


def test_folder_with_its_vocabulary_fills_in(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    folder = write_folder(tmp_path / "bert", their_weights())
    vocabulary = [*SPECIAL, *"abcdefghijklmnopqrstuvwx"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    model, tokenizer = lama.load(folder)
    assert isinstance(tokenizer, WordPieceTokenizer) and tokenizer.vocab_size == model.config.vocab_size
    row = np.array([tokenizer.framed("a [MASK] C")], np.int32)
    scores = model(Tensor(row)).numpy()[0, 2]
    scores[[0, 4]] = -np.inf  # [PAD], [MASK]
    likeliest = vocabulary[scores.argmax()]
    assert main(["fill", str(folder), "a [MASK] C", "-n", "1"]) == 0
    guessed, filled = capfd.readouterr().out.splitlines()
    assert guessed.startswith(likeliest) and filled == f"a {likeliest} C"


def test_first_conversions_names_are_read(tmp_path: Path):
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for name, v in their_weights().items()
    }
    assert isinstance(load_model(write_folder(tmp_path / "bert", old)), Bert)


def test_what_does_not_fit_is_refused(tmp_path: Path):
    weights = their_weights()
    headless = {name: value for name, value in weights.items() if not name.startswith("cls.")}
    with pytest.raises(LamaError, match=r"missing: cls.predictions.transform.dense.weight, .* and 1 more"):
        load_model(write_folder(tmp_path / "a", headless))
    with pytest.raises(LamaError, match="must have position_embedding_type='absolute'; got 'relative_key'"):
        load_model(write_folder(tmp_path / "b", weights, position_embedding_type="relative_key"))
    with pytest.raises(LamaError, match=r"must have hidden_act among .*; got 'mish'"):
        load_model(write_folder(tmp_path / "c", weights, hidden_act="mish"))
    with pytest.raises(LamaError, match=r"unknown: bert.encoder.layer.0.adapter.weight"):
        load_model(
            write_folder(
                tmp_path / "d", weights | {"bert.encoder.layer.0.adapter.weight": np.zeros(3, np.float32)}
            )
        )
    lacking = {
        name: value for name, value in weights.items() if "layer.1.attention.self.key.weight" not in name
    }
    with pytest.raises(LamaError, match=r"missing: bert.encoder.layer.1.attention.self.query.weight"):
        load_model(write_folder(tmp_path / "e", lacking))


@pytest.mark.peers
@pytest.mark.parametrize(
    "activation", ["gelu", "gelu_new", "relu", "gelu_fast", "swish", "tanh", "quick_gelu"]
)
def test_numbers_are_those_of_transformers(tmp_path: Path, activation: str):
    """The last hidden states and the masked-token logits of BertForMaskedLM, with padding and segments."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            **{key: value for key, value in CONFIG.items() if key != "model_type"}
            | {"hidden_act": activation}
        )
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "bert", safe_serialization=True)
    mine = load_model(tmp_path / "bert")
    tokens, segments = torch.tensor(TOKENS).long(), torch.tensor(SEGMENTS).long()
    there = TOKENS != 0
    with torch.no_grad():
        out = theirs(
            tokens, attention_mask=(tokens != 0).long(), token_type_ids=segments, output_hidden_states=True
        )
    for found, expected in (
        (mine.encoder(Tensor(TOKENS), Tensor(SEGMENTS)), out.hidden_states[-1]),
        (mine(Tensor(TOKENS), Tensor(SEGMENTS)), out.logits),
    ):
        scale = expected.abs().max().item()
        np.testing.assert_allclose(found.numpy()[there] / scale, expected.numpy()[there] / scale, atol=1e-4)


def test_tied_tensors_are_read_under_either_name_and_behind_wrappers(tmp_path: Path):
    weights = their_weights()
    del weights["bert.pooler.dense.weight"], weights["cls.predictions.decoder.bias"]
    plain = get_state_dict(load_model(write_folder(tmp_path / "plain", weights)))
    names = {
        "bert.embeddings.word_embeddings.weight": "cls.predictions.decoder.weight",
        "cls.predictions.bias": "cls.predictions.decoder.bias",
    }
    renamed = {f"module._orig_mod.{names.get(name, name)}": value for name, value in weights.items()}
    other = get_state_dict(load_model(write_folder(tmp_path / "other", renamed)))
    assert plain.keys() == other.keys()
    for name, parameter in plain.items():
        np.testing.assert_array_equal(parameter.numpy(), other[name].numpy(), name)
    different = weights | {
        "cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"] + 1
    }
    names = r"cls\.predictions\.decoder\.weight equal to bert\.embeddings\.word_embeddings\.weight"
    with pytest.raises(LamaError, match=f"must have {names}"):
        load_model(write_folder(tmp_path / "different", different))


def test_heads_for_other_tasks_are_left_out_with_a_warning(tmp_path: Path):
    heads = {"bert.pooler.dense.bias", "cls.seq_relationship.weight", "classifier.weight", "qa_outputs.bias"}
    weights = their_weights() | dict.fromkeys(heads, np.zeros(3, np.float32))
    with pytest.warns(
        LamaWarning,
        match=r"left out bert\.pooler\.dense\.weight, .* and 1 more, which belong to heads for other tasks",
    ):
        assert isinstance(load_model(write_folder(tmp_path / "bert", weights)), Bert)
