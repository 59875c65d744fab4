"""The families' byte-level tokenizers give transformers' ids, from a folder and from GGUF's keys."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from test_tokenizer_pieces import texts

from lama.data import default_corpus
from lama.tokenizers import load_huggingface_tokenizer
from lama.tokenizers.gguf import IGNORE_MERGES, NORMALIZED, PRE, tokenizer_of_keys

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NORMAL, CONTROL = 1, 3  # GGUF's types of tokens
# One of each pre-tokenizer: Llama 2's and Gemma's SentencePiece forms are in test_tokenizer_pieces.
FAMILIES = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2"]


def spec_of(pre: str) -> dict:
    """tokenizer.json with merges learned by the library: a part of the Bible, and texts of many scripts."""
    tokenizer = hf.Tokenizer(hf.models.BPE(ignore_merges=pre in IGNORE_MERGES))
    whole = json.loads(tokenizer.to_str()) | {"pre_tokenizer": PRE[pre], "decoder": PRE["gpt-2"]}
    if pre in NORMALIZED:
        whole["normalizer"] = {"type": "NFC"}
    tokenizer = hf.Tokenizer.from_str(json.dumps(whole))
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([default_corpus().text[:100_000], *texts(500)], trainer)
    return json.loads(tokenizer.to_str())


def keys_of(spec: dict, pre: str) -> dict[str, object]:
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    merges = [each if isinstance(each, str) else " ".join(each) for each in spec["model"]["merges"]]
    types = np.array([CONTROL if token in SPECIAL else NORMAL for token in tokens], np.int32)
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": types}
    return {f"tokenizer.ggml.{name}": value for name, value in (keys | {"add_bos_token": False}).items()}


@pytest.mark.peers
@pytest.mark.parametrize("pre", FAMILIES)
def test_ids_of_10_000_texts_are_transformers(pre: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    spec = spec_of(pre)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0]})
    )
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    folder = load_huggingface_tokenizer(tmp_path)
    gguf = tokenizer_of_keys(keys_of(spec, pre), "model.gguf", tmp_path)
    found = set()
    bible = default_corpus().text
    for i, text in enumerate(texts(10_000)):
        if i % 2:
            text += bible[37 * i : 37 * i + i % 90]
        if i % 3 == 0:
            text = f"{text[: i % 7]}{SPECIAL[i % 9 // 3]}{text[i % 7 :]}"
        expected = theirs.encode(text)
        assert folder.encode(text) == expected, text
        assert gguf.encode(text) == expected, text
        assert folder.decode(expected) == theirs.decode(expected, clean_up_tokenization_spaces=False), text
        found.update(expected)
    assert found.issuperset(range(len(SPECIAL))) and len(found) > 400
