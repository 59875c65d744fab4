"""Tokenizers in GGUF files. Their keys become a tokenizer.json, which `tokenizer_of_files` reads.

Source: ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lama.errors import LamaError, quoted
from lama.files import checked, field, parse_json
from lama.tokenizers.base import TableTokenizer, Tokenizer
from lama.tokenizers.chat_template import template_of
from lama.tokenizers.export import huggingface_files
from lama.tokenizers.huggingface import JsonFiles, tokenizer_of_files

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # values of token_type
RULE = "a tokenizer must be byte-level BPE with a pre-tokenizer of GGUF to be written as GGUF"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT, QWEN2_SPLIT = WORDS % "{1,3}", WORDS % ""
DEFAULT_SPLITS = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split(*patterns: str) -> dict[str, object]:
    steps: list[dict[str, object]] = [
        {"type": "Split", "pattern": {"Regex": each}, "behavior": "Isolated", "invert": False}
        for each in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*steps, {**BYTES, "use_regex": False}]}


_GPT2: dict[str, object] = {**BYTES, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
# The values of tokenizer.ggml.pre that lama knows, each with its pre-tokenizer.
_DIGITS_FIRST: dict[str, object] = {"type": "Sequence", "pretokenizers": [_DIGITS, _GPT2]}
PRE: dict[str, dict[str, object]] = {
    "default": _split(*DEFAULT_SPLITS),
    **dict.fromkeys(["gpt-2", "phi-2", "olmo", "jina-en", "jina-es", "jina-de"], _GPT2),
    **dict.fromkeys(
        ["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"], _DIGITS_FIRST
    ),
    **dict.fromkeys(
        ["llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3", "smollm3", "pixtral"],
        _split(LLAMA3_SPLIT),
    ),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"], _split(QWEN2_SPLIT)),
}
IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
WITH_BOS = (*IGNORE_MERGES, "smollm3")
NORMALIZED = ("qwen2", "deepseek-r1-qwen")  # to Unicode's NFC


def tokenizer_of_keys(keys: Mapping[str, object], source: str, folder: Path) -> TableTokenizer:
    """The tokenizer that the keys of a GGUF file describe. Raises LamaError."""

    def get(name: str, default: object = None) -> object:
        return keys.get(f"tokenizer.ggml.{name}", default)

    def switch(name: str, default: bool) -> bool:
        return checked(get(name, default), bool, f"tokenizer.ggml.{name} in {source}")

    kind = checked(get("model"), str, f"tokenizer.ggml.model in {source}")
    pre = checked(get("pre", "default"), str, f"tokenizer.ggml.pre in {source}")
    if kind not in ("gpt2", "llama"):
        raise LamaError(f"{source} must have tokenizer.ggml.model gpt2 or llama; got {quoted(kind)}")
    tokens = checked(get("tokens"), list, f"tokenizer.ggml.tokens in {source}")
    vocab = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocab) < len(tokens):
        got = "none" if not tokens else quoted(next(t for i, t in enumerate(tokens) if vocab[t] != i))
        raise LamaError(f"{source} must have distinct tokens; got {got}{' twice' if tokens else ''}")
    types = get("token_type", np.zeros(len(tokens), np.int32))
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise LamaError(
            f"{source} must have a token_type for each of {len(tokens)} tokens; got {quoted(types)}"
        )
    added = [
        {
            "id": i,
            "content": tokens[i],
            "special": int(types[i]) == CONTROL,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i in np.flatnonzero((types == CONTROL) | (types == USER_DEFINED)).tolist()
    ]
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named: dict[str, object] = {}
    for theirs, ours in roles.items():
        number = get(f"{theirs}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            rule = f"{theirs}_token_id must be below {len(tokens)}"
            raise LamaError(f"{source}: {rule}; got {quoted(number)}")
        named[f"{ours}_token"] = tokens[number]
    if kind == "llama":
        spec = _sentencepiece(tokens, get("scores"), switch("add_space_prefix", True), source)
    else:
        if pre not in PRE:
            known = ", ".join(PRE)
            raise LamaError(f"{source} must have tokenizer.ggml.pre among {known}; got {quoted(pre)}")
        merges = checked(get("merges", []), list, f"tokenizer.ggml.merges in {source}")
        model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre in IGNORE_MERGES}
        normalizer = {"type": "NFC"} if pre in NORMALIZED else None
        spec = {"model": model, "normalizer": normalizer, "pre_tokenizer": PRE[pre]}
    default_bos = kind == "llama" or pre in WITH_BOS
    frame = [switch("add_bos_token", default_bos), switch("add_eos_token", False)]
    spec |= {"added_tokens": added, "post_processor": _template(frame, named, vocab, source)}
    config: dict[str, object] = dict(named)
    template = keys.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    files = JsonFiles({"tokenizer.json": spec, "tokenizer_config.json": config})
    return tokenizer_of_files(files, folder, "")


def _template(
    frame: Sequence[bool], named: Mapping[str, object], vocab: Mapping[str, int], source: str
) -> dict[str, object] | None:
    """A post-processor that puts a token before the text, and one after it."""
    pieces: list[dict[str, object]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    special = {}
    for wanted, role, place in zip(frame, ("bos_token", "eos_token"), (0, 2), strict=True):
        if not wanted:
            continue
        if role not in named:
            raise LamaError(
                f"{source} must have a {role.replace('_token', '')}_token_id with add_{role}; got none"
            )
        token = str(named[role])
        special[token] = {"id": token, "ids": [vocab[token]], "tokens": [token]}
        pieces.insert(place, {"SpecialToken": {"id": token, "type_id": 0}})
    return (
        {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": special}
        if special
        else None
    )


def _sentencepiece(tokens: Sequence[str], scores: object, prefix: bool, source: str) -> dict[str, object]:
    """Byte-pair encoding from a vocabulary with scores: a merge for each way to split a token, best first."""
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise LamaError(f"{source} must have a score for each of {len(tokens)} tokens; got {quoted(scores)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    order = sorted(range(len(tokens)), key=lambda i: (-float(scores[i]), i))
    merges: list[list[str]] = []
    for i in order:
        token = tokens[i]
        cuts = [[token[:at], token[at:]] for at in range(1, len(token))]  # lists, as in JSON
        found = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        merges += sorted(found, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    steps: list[dict[str, object]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    if prefix:
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "fuse_unk": True}
    return {"model": model, "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}


def keys_of_tokenizer(tokenizer: Tokenizer, rows: int) -> dict[str, object]:
    """The keys of a byte-level tokenizer, with as many tokens as the model has rows.

    Raises LamaError for characters, WordPiece, SentencePiece, and a pre-tokenizer without a name in GGUF.
    """
    files = huggingface_files(tokenizer)
    if (
        not isinstance(tokenizer, TableTokenizer)
        and "tokenizer.json" not in files
        and "vocab.json" not in files
    ):
        raise LamaError(f"{RULE}; got a {type(tokenizer).__name__}")
    spec = _object(files, "tokenizer.json")
    model = field(spec, "model", dict, "tokenizer.json", {"type": "BPE"})
    inside = model if "vocab" in model else {"vocab": _object(files, "vocab.json")}
    vocab: dict[str, int] = field(inside, "vocab", dict, "tokenizer.json")
    merges: Sequence[object] = field(model, "merges", list, "tokenizer.json", [])
    if "merges.txt" in files:
        lines = files["merges.txt"].decode().split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise LamaError(f"{RULE}; got {quoted(model.get('type'))} that is not of bytes")
    pre = _pre_of(spec) if spec else "gpt-2"
    named = {token: i for token, i in vocab.items() if 0 <= i < rows}
    special: dict[str, int] = {}
    for token in field(spec, "added_tokens", list, "tokenizer.json", []):
        named[token["content"]] = token["id"]
        special[token["content"]] = CONTROL if token.get("special") else USER_DEFINED
    end = tokenizer.end_of_text
    by_id = {i: token for token, i in named.items()}
    if end in by_id:
        special.setdefault(by_id[end], CONTROL)
    keys: dict[str, object] = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [by_id.get(i, f"[PAD{i}]") for i in range(rows)],
        "token_type": [special.get(by_id[i], 1) if i in by_id else UNUSED for i in range(rows)],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],  # type: ignore[arg-type]
    }
    before = tokenizer.frame[0] if isinstance(tokenizer, TableTokenizer) else ()
    keys["add_bos_token"] = len(before) == 1
    if begin := before[0] if len(before) == 1 else end:
        keys["bos_token_id"] = begin
    if end is not None:
        keys["eos_token_id"] = end
    found = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    template = template_of(tokenizer)
    return found | ({} if template is None else {"tokenizer.chat_template": template.source})


def _object(files: Mapping[str, bytes], name: str) -> dict[str, object]:
    return checked(parse_json(files[name], name), dict, name) if name in files else {}


def _pre_of(spec: Mapping[str, object]) -> str:
    """The name of a tokenizer.json's pre-tokenizer. Raises LamaError."""
    wanted = _steps(spec.get("pre_tokenizer"))
    is_normalized = bool(_steps(spec.get("normalizer")))
    for name, step in PRE.items():
        if _steps(step) == wanted and (name in NORMALIZED) == is_normalized:
            return name
    raise LamaError(f"{RULE}; got the pre-tokenizer {quoted(spec.get('pre_tokenizer'))}")


def _steps(part: object) -> list[tuple[object, ...]]:
    """The steps of a pre-tokenizer: each with its type, and its pattern or switch."""
    match part:
        case {"pretokenizers": [*inner]} | {"normalizers": [*inner]}:
            return [step for each in inner for step in _steps(each)]
        case {"type": "Split", "pattern": {"Regex": pattern}}:
            return [("Split", pattern)]
        case {"type": "ByteLevel", "use_regex": bool(split), "add_prefix_space": bool(prefix)}:
            return [("ByteLevel", split, prefix)]
        case {"type": kind}:
            return [(kind,)]
    return []
