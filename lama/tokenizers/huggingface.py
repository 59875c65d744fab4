"""Tokenizers in Hugging Face's files, old and new: byte-level BPE and WordPiece, with the ids that transformers gives.

Source: transformers 5, tokenization_utils_base.py and tokenization_utils_tokenizers.py: which file names a token, and
which file counts. `GPT2Tokenizer` and `BertTokenizer` take from tokenizer.json only the vocabulary, the merges and the
tokens that frame a text; their other steps are fixed, or options of tokenizer_config.json.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lama.errors import LamaError, quoted
from lama.files import checked, field, parse_json, quoted_path, read_file, read_object
from lama.tokenizers.base import Frame, TableTokenizer
from lama.tokenizers.bpe import AddedToken, BytePairTokenizer, byte_alphabet, is_one_training, ranks_of, spell
from lama.tokenizers.library import LibraryTokenizer, Pipeline
from lama.tokenizers.special import MOST_IDS, ROLES, check_id, number_tokens, special_tokens
from lama.tokenizers.wordpiece import BERT_SPLIT, WordPieceTokenizer, bert_normalizer, text_lines, wordpiece_model

SAVED_IN = "tokenizer"  # the sub-folder of a lama checkpoint that holds the files
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
END_OF_TEXT = "<|endoftext|>"
GPT2, BERT = "GPT2Tokenizer", "BertTokenizer"
# The classes of transformers that lama knows: the model of each, and its special tokens where no file names others.
MODELS = {GPT2: "BPE", BERT: "WordPiece"}
OWN_TOKENS: dict[str, dict[str, str]] = {
    GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    BERT: {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")},
}


def load_huggingface_tokenizer(folder: Path) -> TableTokenizer:
    """The tokenizer in `folder`, byte-level BPE or WordPiece; gives the ids that transformers gives.

    Reads `tokenizer.json`; else `vocab.json` and `merges.txt`, or `vocab.txt`. tokenizer_config.json or config.json names
    the class of transformers. Added and special tokens are those of every file that names some. Raises LamaError for
    files that are missing or broken, and for what lama does not do.
    """
    folder = Path(folder)
    files = _files(folder)
    model = read_object(folder / "config.json") if os.path.exists(folder / "config.json") else {}
    classes = [{"gpt2": GPT2, "bert": BERT}.get(str(model.get("model_type")), "")]
    for name, fields in (("config.json", model), ("tokenizer_config.json", _object(files, folder, "tokenizer_config.json"))):
        classes.append(field(fields, "tokenizer_class", str, quoted_path(folder / name), classes[-1]))
    return tokenizer_of_files(files, folder, classes[-1])


def load_wordpiece_tokenizer(folder: Path) -> WordPieceTokenizer:
    """The tokenizer in a BERT's folder. Raises LamaError as `load_huggingface_tokenizer` does, and for another kind."""
    if os.path.exists(folder / "vocab.txt") or os.path.exists(folder / "tokenizer.json"):
        tokenizer = load_huggingface_tokenizer(folder)
        if isinstance(tokenizer, WordPieceTokenizer):
            return tokenizer
    raise LamaError(f"a BERT must have its vocab.txt, or a WordPiece tokenizer.json, beside it; got neither in {quoted_path(folder)}")


def load_saved_tokenizer(folder: Path, of_class: str | None) -> TableTokenizer:
    """The tokenizer whose `save` wrote into `folder`; None is the class of one that an earlier version wrote."""
    return tokenizer_of_files(_files(folder), folder, of_class)


def _files(folder: Path) -> dict[str, bytes]:
    if not os.path.isdir(folder):
        raise LamaError(f"a tokenizer must be a folder; got {quoted_path(folder)}")
    return {name: read_file(folder / name) for name in TOKENIZER_FILES if os.path.exists(folder / name)}


def _object(files: Mapping[str, bytes], folder: Path, name: str) -> dict[str, Any]:
    """The object in a file; an empty one where there is no such file."""
    source = quoted_path(folder / name)
    return checked(parse_json(files[name], source), dict, source) if name in files else {}


def tokenizer_of_files(files: Mapping[str, bytes], folder: Path, of_class: str | None = GPT2) -> TableTokenizer:
    """`load_huggingface_tokenizer` once the files are read; `folder` is for the error messages.

    `of_class` is a class of transformers; "" takes tokenizer.json as it stands. None reads the files as earlier versions
    of lama did: tokens of tokenizer_config.json only where they are in the vocabulary, and without their flags.
    """
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
    config, older, added, spec = (_object(files, folder, name) for name in names)
    grow, source = of_class is not None, quoted_path(folder)
    if not grow:
        config, older = ({k: _text(v) for k, v in fields.items() if v and k in (*ROLES, "add_prefix_space")} for fields in (config, older))
    of_class, model = _model(files, folder, spec, str(of_class or "").removesuffix("Fast"))
    named, found = special_tokens(OWN_TOKENS.get(of_class, {}), config, older, added, spec, source)
    tokens = number_tokens(found, model["vocab"], grow)
    ids = model["vocab"] | {token["content"]: token["id"] for token in tokens}

    def option(name: str, default: bool | None = False) -> Any:
        return field(config, name, bool, quoted_path(folder / names[0]), default)

    def of_role(role: str) -> list[int]:
        token = named[f"{role}_token"]
        return [ids[token["content"]]] if token and token["content"] in ids else []

    normalizer, split = _only(spec.get("normalizer"), "normalizers"), _only(spec.get("pre_tokenizer"), "pretokenizers")
    frame: Frame = ([], []) if of_class == BERT else _frame(spec.get("post_processor"), ids, source)
    chosen, unknown = config.keys() | older.keys(), (named["unk_token"] or {}).get("content")
    if of_class == GPT2:
        normalizer, split = None, {"type": "ByteLevel", "add_prefix_space": option("add_prefix_space"), "trim_offsets": True}
        if not spec:
            frame = of_role("bos") if option("add_bos_token") else [], of_role("eos") if option("add_eos_token") else []
            model["unk_token"] = unknown if "unk_token" in chosen else None
    elif of_class == BERT:
        switches = {"lowercase": option("do_lower_case", True), "handle_chinese_chars": option("tokenize_chinese_chars", True)}
        normalizer, split = bert_normalizer(**switches, strip_accents=option("strip_accents", None)), BERT_SPLIT
        model = wordpiece_model(model["vocab"], unk_token=unknown)
        frame = of_role("cls"), of_role("sep")
    elif model["type"] == "WordPiece" and isinstance(normalizer, dict) and normalizer.get("type") in (None, "BertNormalizer"):
        normalizer = bert_normalizer() | normalizer
    if model["type"] == "WordPiece" and model["unk_token"] not in model["vocab"]:
        raise LamaError(f"a WordPiece vocabulary must have its unk_token; got {quoted(model['unk_token'])} in {source}")

    written = model["vocab"].keys() | {token["content"] for token in found if token["id"] is not None}
    end = of_role("eos") if "eos_token" in chosen else [ids[END_OF_TEXT]] if END_OF_TEXT in written & ids.keys() else []
    pipeline = Pipeline(model, normalizer, split, tokens, option("split_special_tokens"), source)
    saved = {f"{SAVED_IN}/{name}": content for name, content in files.items()}
    make = WordPieceTokenizer.of if model["type"] == "WordPiece" else _byte_pairs
    return make(pipeline, end[0] if end else None, frame, {"kind": "huggingface"} | ({"class": of_class} if grow else {}), saved)


def _model(files: Mapping[str, bytes], folder: Path, spec: Mapping[str, Any], of_class: str) -> tuple[str, dict[str, Any]]:
    """The class that builds the tokenizer, "" for none, and its model as tokenizer.json writes it."""
    source = quoted_path(folder)
    if "tokenizer.json" in files:
        model = dict(field(spec, "model", dict, source))
        model.setdefault("type", "BPE" if "merges" in model else "WordPiece")  # the first versions did not write it
        if model["type"] not in MODELS.values():
            raise _refused("model.type", "be BPE or WordPiece", model["type"], source)
        of_class = of_class if MODELS.get(of_class) == model["type"] else ""
        for name, kind in (("unk_token", str), ("continuing_subword_prefix", str), ("fuse_unk", bool), ("ignore_merges", bool)):
            field(model, name, kind, source, None)
    elif files.keys() >= {"vocab.json", "merges.txt"} and not (of_class == BERT and "vocab.txt" in files):
        lines = text_lines(files["merges.txt"], quoted_path(folder / "merges.txt"))
        merges = [line for line in lines if line and not line.startswith("#version")]
        of_class, model = GPT2, {"type": "BPE", "vocab": _object(files, folder, "vocab.json"), "merges": merges}
    elif "vocab.txt" in files:
        lines = text_lines(files["vocab.txt"], quoted_path(folder / "vocab.txt"))
        of_class, model = BERT, {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(lines)}}
    else:
        found = f"{', '.join(sorted(files)) or 'none of them'} in {source}"
        raise LamaError(f"a tokenizer folder must hold tokenizer.json, or vocab.json and merges.txt, or vocab.txt; got {found}")

    if not field(model, "vocab", dict, source):
        raise LamaError(f"a vocabulary must not be empty; got none in {source}")
    for token, number in model["vocab"].items():
        if type(number) is not int or not 0 <= number < MOST_IDS:
            check_id(token, number, source)
    if model["type"] == "WordPiece":
        return of_class, wordpiece_model({}) | {name: value for name, value in model.items() if value is not None}
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name) and not of_class:
            raise _refused(f"model.{name}", "be off", model[name], source)
    kept = {name: model.get(name) for name in ("type", "vocab", "unk_token")} | {"merges": list(_merges(model, source))}
    return of_class, kept | ({} if of_class else {name: bool(model.get(name)) for name in ("fuse_unk", "ignore_merges")})


def _byte_pairs(
    pipeline: Pipeline, end_of_text: int | None, frame: Frame, spec: Mapping[str, Any], files: Mapping[str, bytes]
) -> BytePairTokenizer | LibraryTokenizer:
    """A tokenizer on tiktoken's engine where that gives the same ids, else on the library's."""
    model, split = pipeline.model, pipeline.pre_tokenizer
    vocabulary, merges = model["vocab"], model["merges"]
    if "ByteLevel" not in (*_types(split), *_types(pipeline.normalizer)):
        raise _refused("pre_tokenizer", "be ByteLevel", ", ".join(_types(split)) or "null", pipeline.source)
    last = {token["content"]: token for token in pipeline.added}
    spelled = [*byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    ids = [vocabulary.get(token, -1) for token in spelled]
    unmerged = {vocabulary[token]: spell(token) for token in vocabulary.keys() - spelled - last.keys()}
    flags = {(t["content"], t["lstrip"], t["rstrip"], t["normalized"]) for t in pipeline.added}
    if (
        len(flags) > len(last)
        or any(token["single_word"] for token in pipeline.added)
        or pipeline.normalizer is not None
        or pipeline.split_special
        or split["type"] != "ByteLevel"
        or split.get("use_regex", True) is not True
        or (-1 in ids and model["unk_token"] in vocabulary)
        or (unmerged and model.get("ignore_merges"))
        or not is_one_training(merges)
    ):
        return LibraryTokenizer(pipeline, end_of_text, frame, spec, files)
    own_ids = None if ids == list(range(len(ids))) else ids  # a rank often is the id; that saves looking it up
    added = [AddedToken(t["content"], t["id"], t["lstrip"], t["rstrip"], t["normalized"]) for t in last.values()]
    prefix = bool(split.get("add_prefix_space", True))
    return BytePairTokenizer(ranks_of(merges), added, end_of_text, own_ids, unmerged, prefix, spec, files, frame)


def _merges(model: Mapping[str, Any], source: str) -> Iterable[str]:
    """Each merge as "first second". Raises LamaError for one that is not two parts, or whose tokens are not there."""
    vocabulary, letters = model["vocab"], set(byte_alphabet())
    for i, merge in enumerate(field(model, "merges", list, source)):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(parts, list) and len(parts) == 2 and type(parts[0]) is type(parts[1]) is str and all(parts)):
            raise LamaError(f"a merge must be two tokens; got {quoted(merge)}, merge {i} of {source}")
        first, second = parts
        token = first + second
        if first not in vocabulary or second not in vocabulary or token not in vocabulary:
            without = next(part for part in (first, second, token) if part not in vocabulary)
            where = f"merge {i} of {source}, without {quoted(without)}"
            raise LamaError(f"a merge's tokens must be in the vocabulary; got {quoted(merge)}, {where}")
        if not letters.issuperset(token):
            raise LamaError(f"a merge must be spelled in GPT-2's byte alphabet; got {quoted(merge)}, merge {i} of {source}")
        yield f"{first} {second}"


def _frame(processor: Any, ids: Mapping[str, int], source: str) -> tuple[list[int], list[int]]:
    """The ids before and after a text. Raises LamaError for a post-processor that does something else."""
    match processor:
        case None | {"type": "ByteLevel"}:
            return [], []
        case {"type": "Sequence", "processors": [*inner]}:
            before: list[int] = []
            after: list[int] = []
            for part in inner:
                first, last = _frame(part, ids, source)
                before, after = first + before, after + last
            return before, after
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, first], "sep": [_, last]}:
            parts = [[first], [last]]
        case {"type": "TemplateProcessing", "single": [*pieces], "special_tokens": dict(tokens)}:
            parts = [[]]
            for piece in pieces:
                match piece:
                    case {"Sequence": {"id": "A"}}:
                        parts.append([])
                    case {"SpecialToken": {"id": name}} if isinstance(tokens.get(name), dict):
                        ids_there = tokens[name].get("ids")
                        parts[-1] += ids_there if isinstance(ids_there, list) else [None]
                    case _:
                        parts.append([None])
        case _:
            parts = []
    known = set(ids.values())
    if len(parts) != 2 or not all(type(number) is int and number in known for part in parts for number in part):
        raise LamaError(f"post_processor must put known ids around one text; got {quoted(processor)} in {source}")
    return parts[0], parts[1]


def _only(part: Any, key: str) -> Any:
    """The step of a Sequence of one; None for a Sequence of none."""
    while isinstance(part, dict) and part.get("type") == "Sequence" and isinstance(part.get(key), list) and len(part[key]) < 2:
        part = part[key][0] if part[key] else None
    return part


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _types(part: Any) -> list[str]:
    """The types of the steps of a part of tokenizer.json."""
    if not isinstance(part, dict):
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    return [kind for each in inner for kind in _types(each)] if isinstance(inner, list) else [quoted(part.get("type"), plain=True)]


def _refused(what: str, rule: str, value: object, source: str) -> LamaError:
    return LamaError(f"{what} must {rule}; got {quoted(value, plain=True)} in {source}. lama reads byte-level BPE and WordPiece")
