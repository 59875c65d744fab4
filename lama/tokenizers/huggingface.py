"""Tokenizers that Hugging Face saved: byte-level BPE from `tokenizer.json`, or from `vocab.json` and `merges.txt`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lama.errors import LamaError
from lama.tokenizers.base import Tokenizer
from lama.tokenizers.bpe import AddedToken, BytePairTokenizer, byte_alphabet, gpt2_files

SAVED_IN = "tokenizer"  # the sub-folder of a lama checkpoint that holds the files


def load_huggingface_tokenizer(folder: Path) -> BytePairTokenizer:
    """The byte-level BPE in `folder`; gives the ids that the `tokenizers` package gives.

    Reads `tokenizer.json`, else `vocab.json` + `merges.txt` (+ `added_tokens.json`), and from `tokenizer_config.json` or
    `special_tokens_map.json` which token ends a text. Raises LamaError if the files are missing or broken, or ask for
    something lama does not do: another kind of model, a normalizer, another pre-tokenizer, tokens put around the text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LamaError(f"a tokenizer must be a folder; got {folder}")
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    return tokenizer_of_files(files, folder)


def tokenizer_of_files(files: Mapping[str, bytes], folder: Path) -> BytePairTokenizer:
    """`load_huggingface_tokenizer` once the files are read; `folder` is for the error messages."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            config |= _object(_json(files[name], folder / name), folder / name)
    if "tokenizer.json" in files:
        path = folder / "tokenizer.json"
        spec = _object(_json(files["tokenizer.json"], path), path)
    elif "vocab.json" in files and "merges.txt" in files:
        path = folder / "vocab.json"
        spec = _spec_of_parts(files, config, folder)
    else:
        raise LamaError(f"a tokenizer folder must hold tokenizer.json, or vocab.json and merges.txt; got {folder} with {sorted(files)}")
    return _build(spec, config, path, files)


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """A tokenizer as Hugging Face's files; none for a character tokenizer, which byte-level BPE cannot express."""
    match tokenizer.to_json():
        case {"kind": "bytes"}:  # an alphabet and no merges
            return {"vocab.json": json.dumps(byte_alphabet(), ensure_ascii=False).encode(), "merges.txt": b"#version: 0.2\n"}
        case {"kind": "gpt2"}:
            return gpt2_files()
        case {"kind": "huggingface"} if isinstance(tokenizer, BytePairTokenizer):
            return {Path(name).name: content for name, content in tokenizer.files.items()}
    return {}


TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _spec_of_parts(files: Mapping[str, bytes], config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What tokenizer.json would say, from the older files."""
    vocabulary = _vocabulary(_json(files["vocab.json"], folder / "vocab.json"), folder / "vocab.json")
    try:
        lines = files["merges.txt"].decode().split("\n")
    except UnicodeDecodeError as error:
        raise LamaError(f"{folder / 'merges.txt'} must be UTF-8; got a bad byte at {error.start}") from None
    added = {}
    if "added_tokens.json" in files:
        added = _vocabulary(_json(files["added_tokens.json"], folder / "added_tokens.json"), folder / "added_tokens.json")
    special = {_content(config[name]) for name in _SPECIAL if config.get(name)} | {"<|endoftext|>"}
    added |= {token: vocabulary[token] for token in special if token in vocabulary}
    return {
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [line for line in lines if line.strip() and not line.startswith("#version")],
        },
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": bool(config.get("add_prefix_space", False))},
        "added_tokens": [{"content": content, "id": i} for content, i in added.items()],
    }


def _build(spec: Mapping[str, Any], config: Mapping[str, Any], path: Path, files: Mapping[str, bytes]) -> BytePairTokenizer:
    def refuse(what: str, rule: str, value: object) -> None:
        raise LamaError(f"{what} must {rule}; got {value} in {path}. lama reads byte-level BPE as GPT-2 uses it")

    model = _object(spec.get("model"), path)
    if model.get("type", "BPE") != "BPE":
        refuse("model.type", "be BPE", model["type"])
    if spec.get("normalizer") is not None:
        refuse("normalizer", "be null", _type(spec["normalizer"]))
    splitting = spec.get("pre_tokenizer")
    if _type(splitting) != "ByteLevel":
        refuse("pre_tokenizer", "be ByteLevel", _type(splitting))
    if not splitting.get("use_regex", True):  # type: ignore[union-attr]
        refuse("pre_tokenizer.use_regex", "be true", False)
    if _type(spec.get("post_processor")) not in ("null", "ByteLevel"):
        refuse("post_processor", "be ByteLevel or null", _type(spec["post_processor"]))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            refuse(f"model.{option}", "be off", model[option])

    vocabulary = _vocabulary(model.get("vocab"), path)
    added = list(_added_tokens(spec.get("added_tokens") or [], path))
    if not vocabulary:
        raise LamaError(f"a vocabulary must not be empty; got model.vocab={{}} in {path}")
    merges = list(_merges(model.get("merges"), vocabulary, path))
    alphabet = byte_alphabet()
    spelled = dict.fromkeys([c for c in alphabet if c in vocabulary] + [merge.replace(" ", "") for merge in merges])  # in merge order
    missing = [bytes([byte]) for character, byte in alphabet.items() if character not in vocabulary]
    # tiktoken wants every byte; those that the vocabulary lacks come last, where nothing merges them, and have no id.
    ranks = {token: rank for rank, token in enumerate([_spell(token) for token in spelled] + missing)}
    ids = [vocabulary[token] for token in spelled] + [-1] * len(missing)

    names = {token.content for token in added}
    unreached = {token: i for token, i in vocabulary.items() if token not in spelled and token not in names}
    if model.get("ignore_merges") and unreached:
        refuse("model.ignore_merges", "be false where merges do not make every token", f"true with {sorted(unreached)[:3]}")
    unmerged = {i: _spell(token) for token, i in unreached.items()}
    end = _content(config.get("eos_token") or "<|endoftext|>")
    known = {token.content: token.id for token in added} | unreached
    files = {f"{SAVED_IN}/{name}": content for name, content in files.items()}
    prefix = bool(splitting.get("add_prefix_space", True))  # type: ignore[union-attr]
    own_ids = None if ids == list(range(len(ids))) else ids  # a rank often is the id; that saves looking it up
    return BytePairTokenizer(ranks, added, known.get(end), own_ids, unmerged, prefix, {"kind": "huggingface"}, files)


def _merges(merges: Any, vocabulary: Mapping[str, int], path: Path) -> Iterable[str]:
    """Each merge as "first second". Raises LamaError for one that is not two parts, or whose tokens are not there."""
    if not isinstance(merges, list):
        raise LamaError(f"merges must be a list; got {type(merges).__name__} in {path}")
    bytes_only = set(byte_alphabet())
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts)):
            raise LamaError(f"a merge must be two tokens; got {merge!r}, merge {i} of {path.parent}")
        for token in (*parts, "".join(parts)):
            if token not in vocabulary:
                raise LamaError(f"a merge's tokens must be in the vocabulary; got {merge!r}, merge {i} of {path.parent}, without {token!r}")
        if not bytes_only.issuperset("".join(parts)):
            raise LamaError(f"a merge must be spelled in GPT-2's byte alphabet; got {merge!r}, merge {i} of {path.parent}")
        yield " ".join(parts)


def _added_tokens(tokens: Any, path: Path) -> Iterable[AddedToken]:
    if not isinstance(tokens, list):
        raise LamaError(f"added_tokens must be a list; got {type(tokens).__name__} in {path}")
    for token in tokens:
        fields = _object(token, path)
        content, number = fields.get("content"), fields.get("id")
        if not (isinstance(content, str) and content and isinstance(number, int) and number >= 0):
            raise LamaError(f"an added token must have content and an id; got {token} in {path}")
        if fields.get("single_word"):
            raise LamaError(f"an added token must not be single_word; got {content!r} in {path}. lama does not do that")
        yield AddedToken(content, number, bool(fields.get("lstrip")), bool(fields.get("rstrip")), bool(fields.get("normalized")))


def _vocabulary(value: Any, path: Path) -> dict[str, int]:
    for token, number in _object(value, path).items():
        if not isinstance(number, int) or number < 0:
            raise LamaError(f"a vocabulary must give every token an id from 0; got {token!r}: {number!r} in {path}")
    return value


def _json(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LamaError(f"{path} must be JSON; got {error}") from None


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LamaError(f"{path} must hold JSON objects; got {type(value).__name__} where one should be")
    return value


def _type(part: Any) -> str:
    return "null" if part is None else str(part.get("type")) if isinstance(part, dict) else repr(part)


def _content(token: Any) -> str:
    """The text of a special token, which the files write plainly or as an object."""
    return str(token["content"]) if isinstance(token, dict) and "content" in token else str(token)


def _spell(token: str) -> bytes:
    """The bytes of a vocabulary entry; one that is not in the byte alphabet stands for its own text."""
    alphabet = byte_alphabet()
    return bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
