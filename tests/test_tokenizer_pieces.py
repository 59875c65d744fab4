"""SentencePiece's vocabularies: pieces of text with ▁ for a space, and bytes for what has no piece.

The oracles are the library `tokenizers`, transformers, and the package `sentencepiece`.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from lama.errors import LamaError
from lama.tokenizers import load_huggingface_tokenizer
from lama.tokenizers.gguf import tokenizer_of_keys
from lama.tokenizers.library import LibraryTokenizer

SOURCE = Path(__file__).read_text(encoding="utf-8") + " the theory of the thing: naïve café, Übung, 東京 です"
BYTES = [f"<0x{i:02X}>" for i in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]


def texts(n: int) -> list[str]:
    """Odd texts of all kinds: scripts, digits, spaces, emoji, lone marks, special tokens inside."""
    rng = random.Random(4)
    parts = [
        "the",
        " ",
        "  ",
        "\n",
        "\t",
        "é",
        "e\u0301",
        "\u0301",
        "東京",
        "😀",
        "👩‍💻",
        "123",
        "4",
        "▁",
        "<s>",
        "</s>",
    ]
    parts += [
        "<0x41>",
        "Ünï",
        "don't",
        "...",
        "\u200b",
        "\ufeff",
        "العربية",
        "हिन्दी",
        "A",
        "zz",
        "\x00",
        "\r\n",
    ]
    fixed = ["", " ", "  two", "two  ", "\n\n", "<s>", "a<s> b", "e\u0301", "\u0301"]
    return fixed + ["".join(rng.choices(parts, k=rng.randint(1, 12))) for _ in range(n)]


def saved(folder: Path, metaspace: bool, prefix: bool) -> LibraryTokenizer:
    """A tokenizer in Llama 2's form, or in Gemma's, trained on this file."""
    engine = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        engine.pre_tokenizer = hf.pre_tokenizers.Metaspace(
            prepend_scheme="first" if prefix else "never", split=False
        )
    else:
        steps = [hf.normalizers.Replace(" ", "▁")]
        engine.normalizer = hf.normalizers.Sequence([hf.normalizers.Prepend("▁")] * prefix + steps)
    trainer = hf.trainers.BpeTrainer(vocab_size=560, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
    engine.train_from_iterator([line for line in SOURCE.splitlines() if line], trainer)
    engine.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec = json.loads(engine.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    found = load_huggingface_tokenizer(folder, {})
    assert isinstance(found, LibraryTokenizer)
    return found


FORMS = [(False, True), (False, False), (True, True), (True, False)]


@pytest.mark.parametrize(("metaspace", "prefix"), FORMS)
def test_ids_are_the_library_s_and_the_text_comes_back(metaspace: bool, prefix: bool, tmp_path: Path):
    ours = saved(tmp_path / "t", metaspace, prefix)
    oracle = hf.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    for text in texts(1000):
        assert ours.encode(text) == oracle.encode(text).ids, text
    plain = "so the café is in 東京 😀"
    decoded = ours.decode(ours.encode(plain)[1:])
    assert decoded == (" " if prefix else "") + plain
    assert ours.encode("<s>").count(1) == 2 and ours.encode_ordinary("<s>").count(1) == 1


@pytest.mark.peers
@pytest.mark.parametrize(("metaspace", "prefix"), FORMS)
def test_ids_are_transformers(metaspace: bool, prefix: bool, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    ours = saved(tmp_path / "t", metaspace, prefix)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "t")
    for text in texts(10_000):
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.peers
@pytest.mark.parametrize("prefix", [True, False])
def test_scores_of_a_gguf_file_give_sentencepiece_s_ids(prefix: bool, tmp_path: Path):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(SOURCE)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "model"),
        vocab_size=520,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
    )
    oracle = spm.SentencePieceProcessor(model_file=str(tmp_path / "model.model"))
    pieces = range(oracle.vocab_size())
    kinds = [
        3 if oracle.is_control(i) else 2 if oracle.is_unknown(i) else 6 if oracle.is_byte(i) else 1
        for i in pieces
    ]
    keys = {
        "model": "llama",
        "tokens": [oracle.id_to_piece(i) for i in pieces],
        "scores": np.array([oracle.get_score(i) for i in pieces], np.float32),
        "token_type": np.array(kinds, np.int32),
        "bos_token_id": oracle.bos_id(),
        "eos_token_id": oracle.eos_id(),
        "unknown_token_id": oracle.unk_id(),
        "add_space_prefix": prefix,
    }
    ours = tokenizer_of_keys(
        {f"tokenizer.ggml.{key}": value for key, value in keys.items()}, "a file", tmp_path
    )
    for text in texts(1000):
        if "<s>" in text or "</s>" in text or "\x00" in text or not text:
            continue  # control pieces in a text are text for sentencepiece
        assert ours.encode(text) == [oracle.bos_id(), *oracle.encode(text)], text


def test_a_vocabulary_without_scores_is_one_line(tmp_path: Path):
    keys = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a"]}
    with pytest.raises(LamaError, match="must have a score for each of 2 tokens; got None"):
        tokenizer_of_keys(keys, "a file", tmp_path)
