"""Tokenizers in Hugging Face's files: byte-level BPE and WordPiece, with the same ids as transformers.

Source: transformers 5, tokenization_utils_base.py and tokenization_utils_tokenizers.py. `GPT2Tokenizer` and
`BertTokenizer` use only the vocabulary, the merges and the frame of tokenizer.json; their other steps are
fixed, or options of tokenizer_config.json.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from lama.errors import LamaError, quoted
from lama.files import Json, checked, field, parse_json, quoted_path, read_file, read_object
from lama.tokenizers.base import Common, Frame, TableTokenizer
from lama.tokenizers.bpe import BytePairTokenizer, byte_alphabet, is_one_training, ranks_of, spell
from lama.tokenizers.library import LibraryTokenizer, Pipeline, TokenModel
from lama.tokenizers.special import NO_ID, ROLES, check_id, number_tokens, special_tokens
from lama.tokenizers.wordpiece import BERT_SPLIT, OPTIONS, WordPieceTokenizer, bert_normalizer, text_lines

SAVED_IN = "tokenizer"  # the sub-folder of a lama checkpoint that holds the files
CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    CONFIG,
    "chat_template.jinja",
)
SWITCHES = ("fuse_unk", "ignore_merges", "byte_fallback")  # of a BPE model
FIELDS = ("type", "vocab", "unk_token")  # of a WordPiece model; other fields are options
END_OF_TEXT = "<|endoftext|>"
GPT2, BERT = "GPT2Tokenizer", "BertTokenizer"
# The classes of transformers that lama knows: the model of each, and its special tokens unless files differ.
MODELS = {GPT2: "BPE", BERT: "WordPiece"}
OWN_TOKENS: dict[str, dict[str, str]] = {
    GPT2: dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    BERT: {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")},
}


def load_huggingface_tokenizer(folder: Path, model: Mapping[str, object] | None = None) -> TableTokenizer:
    """Load the byte-level BPE or WordPiece tokenizer in a folder, with the same ids as transformers.

    It reads tokenizer.json; else vocab.json and merges.txt, or vocab.txt. The class of transformers is in
    tokenizer_config.json or `model`, the content of config.json. Added tokens come from every file. Raises
    LamaError for missing and damaged files, and for steps that lama does not support.
    """
    folder = Path(folder)
    files = tokenizer_files(folder)
    if model is None:
        model = read_object(folder / "config.json") if os.path.exists(folder / "config.json") else {}
    config = _object(files, folder, CONFIG)
    of_class = {"gpt2": GPT2, "bert": BERT}.get(str(model.get("model_type")), "")
    for name, fields in (("config.json", model), (CONFIG, config)):
        of_class = field(fields, "tokenizer_class", str, quoted_path(folder / name), of_class)
    return tokenizer_of_files(files, folder, of_class)


def load_wordpiece_tokenizer(folder: Path, model: Mapping[str, object] | None = None) -> WordPieceTokenizer:
    """Load a BERT's tokenizer. Raises LamaError as `load_huggingface_tokenizer`, and for another kind."""
    if os.path.exists(folder / "vocab.txt") or os.path.exists(folder / "tokenizer.json"):
        tokenizer = load_huggingface_tokenizer(folder, model)
        if isinstance(tokenizer, WordPieceTokenizer):
            return tokenizer
    rule = "have its vocab.txt, or a WordPiece tokenizer.json, beside it"
    raise LamaError(f"a BERT must {rule}; got neither in {quoted_path(folder)}")


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The content of Hugging Face's files in a folder. Raises LamaError."""
    if not os.path.isdir(folder):
        raise LamaError(f"a tokenizer must be a folder; got {quoted_path(folder)}")
    return {name: read_file(folder / name) for name in TOKENIZER_FILES if os.path.exists(folder / name)}


class JsonFiles(Mapping[str, bytes]):
    """Objects as JSON files, each written when it is read."""

    def __init__(self, objects: Mapping[str, dict[str, object]]):
        self.objects = objects

    def __getitem__(self, name: str) -> bytes:
        return json.dumps(self.objects[name]).encode()

    def __contains__(self, name: object) -> bool:
        return name in self.objects

    def __iter__(self) -> Iterator[str]:
        return iter(self.objects)

    def __len__(self) -> int:
        return len(self.objects)


def _object(files: Mapping[str, bytes], folder: Path, name: str) -> dict[str, object]:
    """The object in a file; an empty one without the file."""
    if isinstance(files, JsonFiles):
        return dict(files.objects.get(name, {}))
    source = quoted_path(folder / name)
    return checked(parse_json(files[name], source), dict, source) if name in files else {}


def tokenizer_of_files(
    files: Mapping[str, bytes], folder: Path, of_class: str | None = GPT2
) -> TableTokenizer:
    """`load_huggingface_tokenizer` for the content of the files; `folder` is for the error messages.

    `of_class` is a class of transformers; "" takes tokenizer.json unchanged. None reads the files as earlier
    versions of lama did: tokens of tokenizer_config.json only if they are in the vocabulary, without flags.
    """
    names = (CONFIG, "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
    config, older, added, spec = [_object(files, folder, name) for name in names]
    grow, source = of_class is not None, quoted_path(folder)
    if not grow:
        config, older = _without_flags(config), _without_flags(older)
    of_class, model = _model(files, folder, spec, str(of_class or "").removesuffix("Fast"))
    named, found = special_tokens(OWN_TOKENS.get(of_class, {}), config, older, added, spec, source)
    tokens = number_tokens(found, model.vocab, grow)
    ids = model.vocab | {token.content: token.id for token in tokens}

    def option(name: str, default: bool = False) -> bool:
        return field(config, name, bool, quoted_path(folder / CONFIG), default)

    def of_role(role: str) -> list[int]:
        token = named[f"{role}_token"]
        return [ids[token.content]] if token and token.content in ids else []

    normalizer = _only(spec.get("normalizer"), "normalizers")
    split = _only(spec.get("pre_tokenizer"), "pretokenizers")
    frame: Frame = ([], []) if of_class == BERT else _frame(spec.get("post_processor"), ids, source)
    chosen = config.keys() | older.keys()
    unknown = named["unk_token"].content if named["unk_token"] else None
    if of_class == GPT2:
        normalizer = None
        split = {"type": "ByteLevel", "add_prefix_space": option("add_prefix_space"), "trim_offsets": True}
        if not spec:
            begin = of_role("bos") if option("add_bos_token") else []
            frame = begin, of_role("eos") if option("add_eos_token") else []
            model = replace(model, unk_token=unknown if "unk_token" in chosen else None)
    elif of_class == BERT:
        normalizer = bert_normalizer(
            lowercase=option("do_lower_case", True),
            handle_chinese_chars=option("tokenize_chinese_chars", True),
            strip_accents=field(config, "strip_accents", bool, quoted_path(folder / CONFIG), None),
        )
        split = BERT_SPLIT
        model = replace(model, unk_token=unknown, options=OPTIONS)
        frame = of_role("cls"), of_role("sep")
    elif model.type == "WordPiece" and isinstance(normalizer, dict):
        is_bert = normalizer.get("type") in (None, "BertNormalizer")
        normalizer = bert_normalizer() | normalizer if is_bert else normalizer
    if model.type == "WordPiece" and model.unk_token not in model.vocab:
        got = f"got {quoted(model.unk_token)} in {source}"
        raise LamaError(f"a WordPiece vocabulary must have its unk_token; {got}")

    written = model.vocab.keys() | {token.content for token in found if token.id != NO_ID}
    end = ids[END_OF_TEXT] if END_OF_TEXT in written & ids.keys() else None
    if "eos_token" in chosen:
        end = next(iter(of_role("eos")), None)
    pipeline = Pipeline(model, normalizer, split, tokens, option("split_special_tokens"), source)
    saved = _saved(files)
    own_spec = {"kind": "huggingface"} | ({"class": of_class} if grow else {})
    common = Common(end, frame, own_spec, saved)
    if model.type == "WordPiece":
        return WordPieceTokenizer.of(pipeline, common)
    return _byte_pairs(pipeline, common)


def _saved(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The files under the names that `save` gives them."""
    if isinstance(files, JsonFiles):
        return JsonFiles({f"{SAVED_IN}/{name}": each for name, each in files.objects.items()})
    return {f"{SAVED_IN}/{name}": content for name, content in files.items()}


def _without_flags(fields: Mapping[str, object]) -> dict[str, object]:
    """The special tokens and add_prefix_space of a file, with tokens as texts."""
    used = {key: value for key, value in fields.items() if value and key in (*ROLES, "add_prefix_space")}
    return {key: value.get("content") if isinstance(value, dict) else value for key, value in used.items()}


def _model(
    files: Mapping[str, bytes], folder: Path, spec: Mapping[str, object], of_class: str
) -> tuple[str, TokenModel]:
    """The class that builds the tokenizer, "" for none, and its model. Raises LamaError."""
    source = quoted_path(folder)
    model: dict[str, object]
    if "tokenizer.json" in files:
        model = dict(field(spec, "model", dict, source))
        kind = model.setdefault("type", "BPE" if "merges" in model else "WordPiece")  # missing in old files
        if kind not in MODELS.values():
            raise _refused("model.type", "be BPE or WordPiece", kind, source)
        of_class = of_class if MODELS.get(of_class) == kind else ""
    elif files.keys() >= {"vocab.json", "merges.txt"} and not (of_class == BERT and "vocab.txt" in files):
        merges = text_lines(files["merges.txt"], quoted_path(folder / "merges.txt"))
        merges = [line for line in merges if line and not line.startswith("#version")]
        model = {"type": "BPE", "vocab": _object(files, folder, "vocab.json"), "merges": merges}
        of_class = GPT2
    elif "vocab.txt" in files:
        lines = text_lines(files["vocab.txt"], quoted_path(folder / "vocab.txt"))
        model = {"type": "WordPiece", "vocab": {token: i for i, token in enumerate(lines)}}
        of_class = BERT
    else:
        rule = "hold tokenizer.json, or vocab.json and merges.txt, or vocab.txt"
        found = ", ".join(sorted(files)) or "none of them"
        raise LamaError(f"a tokenizer folder must {rule}; got {found} in {source}")

    unknown = field(model, "unk_token", str, source, None)
    field(model, "continuing_subword_prefix", str, source, None)
    switches = {name: field(model, name, bool, source, False) for name in SWITCHES}
    vocab: dict[str, int] = field(model, "vocab", dict, source)
    if not vocab:
        raise LamaError(f"a vocabulary must not be empty; got none in {source}")
    for token, number in vocab.items():
        check_id(token, number, source)
    if model["type"] == "WordPiece":
        others = {name: value for name, value in model.items() if value is not None and name not in FIELDS}
        unknown = "[UNK]" if unknown is None else unknown
        return of_class, TokenModel("WordPiece", vocab, unknown, options={**OPTIONS, **others})
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name) and not of_class:
            raise _refused(f"model.{name}", "be off", model[name], source)
    steps = (*_types(spec.get("pre_tokenizer")), *_types(spec.get("normalizer")))
    is_bytes = bool(of_class) or not (switches["byte_fallback"] or "Metaspace" in steps)
    merges = field(model, "merges", list, source)
    if not _are_plain(merges, vocab, is_bytes):
        merges = list(_merges(merges, vocab, source, is_bytes))
    return of_class, TokenModel("BPE", vocab, unknown, merges, {} if of_class else switches)


def _byte_pairs(pipeline: Pipeline, common: Common) -> BytePairTokenizer | LibraryTokenizer:
    """A tokenizer on tiktoken's engine if that gives the same ids, else on the library's."""
    model, steps = pipeline.model, pipeline.pre_tokenizer
    vocabulary, merges = model.vocab, model.merges
    types = (*_types(steps), *_types(pipeline.normalizer))
    if "ByteLevel" not in types and (model.options.get("byte_fallback") or "Metaspace" in types):
        return LibraryTokenizer(pipeline, common, of_pieces=True)
    if "ByteLevel" not in types:
        raise _refused("pre_tokenizer", "be ByteLevel", ", ".join(_types(steps)) or "null", pipeline.source)
    split = steps if isinstance(steps, dict) else {}
    if split.get("type") != "ByteLevel" or pipeline.normalizer is not None:
        return LibraryTokenizer(pipeline, common)
    last = {token.content: token for token in pipeline.added}
    spelled = [*byte_alphabet(), *(merge.replace(" ", "") for merge in merges)]
    ids = [vocabulary.get(token, -1) for token in spelled]
    unmerged = {vocabulary[token]: spell(token) for token in vocabulary.keys() - spelled - last.keys()}
    flags = {(token.content, token.lstrip, token.rstrip, token.normalized) for token in pipeline.added}
    if (
        len(flags) > len(last)
        or any(token.single_word for token in pipeline.added)
        or pipeline.split_special
        or split.get("use_regex", True) is not True
        or (-1 in ids and model.unk_token in vocabulary)
        or (unmerged and model.options.get("ignore_merges"))
        or not is_one_training(merges)
    ):
        return LibraryTokenizer(pipeline, common)
    own_ids = None if ids == list(range(len(ids))) else ids  # often the ranks: then nothing is looked up
    prefix, added = bool(split.get("add_prefix_space", True)), list(last.values())
    return BytePairTokenizer(ranks_of(merges), added, common, own_ids, unmerged, prefix)


def _are_plain(merges: Sequence[object], vocabulary: Mapping[str, int], is_bytes: bool) -> bool:
    """Whether every merge is a text as `_merges` yields it. False may also mean that one is wrong."""
    texts = [merge for merge in merges if type(merge) is str]
    letters = {*byte_alphabet(), " "} if is_bytes else set("".join(texts))
    pairs = [merge.split(" ") for merge in texts]
    return (
        len(texts) == len(merges)
        and "" not in vocabulary
        and letters.issuperset("".join(texts))
        and all(map(vocabulary.__contains__, chain.from_iterable(pairs)))
        and all(len(pair) == 2 and pair[0] + pair[1] in vocabulary for pair in pairs)
    )


def _merges(
    merges: Iterable[object], vocabulary: Mapping[str, int], source: str, is_bytes: bool = True
) -> Iterator[str]:
    """Each merge as "first second". Raises LamaError unless its parts and its token are in the vocabulary.

    `is_bytes`: tokens must be spelled in GPT-2's alphabet of bytes.
    """
    letters = set(byte_alphabet())
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        pair = parts if isinstance(parts, list) else []
        if len(pair) != 2 or not type(pair[0]) is type(pair[1]) is str or not all(pair):
            raise _wrong_merge("a merge must be two tokens", merge, i, source)
        first, second = pair
        token = first + second
        if first not in vocabulary or second not in vocabulary or token not in vocabulary:
            without = next(part for part in (first, second, token) if part not in vocabulary)
            got = f"{source}, without {quoted(without)}"
            raise _wrong_merge("a merge's tokens must be in the vocabulary", merge, i, got)
        if is_bytes and not letters.issuperset(token):
            raise _wrong_merge("a merge must be spelled in GPT-2's byte alphabet", merge, i, source)
        yield f"{first} {second}"


def _wrong_merge(rule: str, merge: object, i: int, source: str) -> LamaError:
    return LamaError(f"{rule}; got {quoted(merge)}, merge {i} of {source}")


def _frame(processor: object, ids: Mapping[str, int], source: str) -> tuple[list[int], list[int]]:
    """The ids before and after a text. Raises LamaError for a post-processor that does something else."""
    parts: list[list[object]] = []
    match processor:
        case None | {"type": "ByteLevel"}:
            return [], []
        case {"type": "Sequence", "processors": [*inner]}:
            before: list[int] = []
            after: list[int] = []
            for each in inner:
                first, last = _frame(each, ids, source)
                before, after = first + before, after + last
            return before, after
        case {"type": "BertProcessing" | "RobertaProcessing", "cls": [_, start], "sep": [_, end]}:
            parts = [[start], [end]]
        case {"type": "TemplateProcessing", "single": [*pieces], "special_tokens": dict(tokens)}:
            parts = [[]]
            for piece in pieces:
                match piece:
                    case {"Sequence": {"id": "A"}}:
                        parts.append([])
                    case {"SpecialToken": {"id": str(name)}} if isinstance(tokens.get(name), dict):
                        found = tokens[name].get("ids")
                        parts[-1] += found if isinstance(found, list) else [None]
                    case _:
                        parts.append([None])
    known = set(ids.values())
    frame = [[i for i in part if type(i) is int and i in known] for part in parts]
    if len(parts) != 2 or frame != parts:
        got = f"got {quoted(processor)} in {source}"
        raise LamaError(f"post_processor must put known ids around one text; {got}")
    return frame[0], frame[1]


def _only(part: object, key: str) -> Json:
    """The step of a Sequence of one step; None for a Sequence of none; another part unchanged."""
    while isinstance(part, dict) and part.get("type") == "Sequence":
        steps = part.get(key)
        if not isinstance(steps, list) or len(steps) > 1:
            break
        part = steps[0] if steps else None
    return part if isinstance(part, dict | list | str | int | float) else None


def _types(part: object) -> list[str]:
    """The types of the steps of a part of tokenizer.json."""
    if not isinstance(part, dict):
        return []
    inner = part.get("pretokenizers") or part.get("normalizers")
    if isinstance(inner, list):
        return [kind for each in inner for kind in _types(each)]
    return [quoted(part.get("type"), plain=True)]


def _refused(what: str, rule: str, value: object, source: str) -> LamaError:
    got = f"got {quoted(value, plain=True)} in {source}. lama reads byte-level BPE and WordPiece"
    return LamaError(f"{what} must {rule}; {got}")
