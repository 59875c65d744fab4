"""Structured output: whatever the logits are, the text keeps to its JSON schema; bad schemas are refused."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_tokenizer_families import SPECIAL, keys_of, spec_of
from test_tokenizer_pieces import saved

from lama.checkpoints import load_tokenizer
from lama.errors import LamaError
from lama.server import constraints
from lama.server.constraints import GrammarConstraint, constraint_of, tool_constraint
from lama.server.fields import BadField
from lama.server.tools import ToolStream
from lama.tokenizers import ByteTokenizer, Tokenizer, gpt2_tokenizer
from lama.tokenizers.basic import CharacterTokenizer
from lama.tokenizers.gguf import tokenizer_of_keys

pytest.importorskip("llguidance", reason="needs the package llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", "東京"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]},
    },
    "required": ["name", "age", "ok"],
    "additionalProperties": False,
    "$defs": {"leaf": {"type": "object", "properties": {"x": {"const": 1}}, "additionalProperties": False}},
}
FORMS = ["lama-bpe", "gpt2", "smollm", "llama 2", "gemma", "bytes"]


@pytest.fixture(scope="module", params=FORMS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizers")
    match request.param:
        case "lama-bpe":
            return load_tokenizer(Path(__file__).parent.parent / "weights" / "lama-bpe")
        case "gpt2":
            return gpt2_tokenizer()
        case "smollm":
            return tokenizer_of_keys(keys_of(spec_of("smollm"), "smollm"), "model.gguf", folder)
        case "bytes":
            return ByteTokenizer()
    return saved(folder / "files", metaspace=False, prefix=request.param == "llama 2")


def schema(value: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value, "strict": True}}


def is_person(value: object) -> bool:
    """Whether a value follows PERSON."""
    assert isinstance(value, dict) and {"name", "age", "ok"} <= value.keys() <= PERSON["properties"].keys()
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert type(value["ok"]) is bool
    tags = value.get("tags", [])
    assert isinstance(tags, list) and len(tags) <= 3 and set(tags) <= {"a", "é", "東京"}
    if "code" in value:
        letters, digits = value["code"].split("-")
        assert len(letters) == 2 and letters.isupper() and letters.isascii() and 1 <= len(digits) <= 3
        assert digits.isdigit()
    return value.get("next") in (None, {}, {"x": 1})


@functools.cache
def bias_of(tokenizer: Tokenizer) -> np.ndarray:
    """Fewer spaces, and more ends of strings and objects."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    return np.array([-6 * (not text.strip()) + 6 * text.endswith(('"', "}")) for text in texts], np.float32)


def sampled(constraint: GrammarConstraint, tokenizer: Tokenizer, seed: int, most: int = 1500) -> str:
    """A text of random logits; space, which has many tokens, is made rare, and the end likely."""
    rng = np.random.default_rng(seed)
    bias = bias_of(tokenizer)
    end = tokenizer.end_of_text
    tokens: list[int] = []
    for _ in range(most):
        allowed = constraint.allowed()
        assert allowed.shape == (tokenizer.vocab_size,) and allowed.dtype == bool
        if not allowed.any() or (end is not None and allowed[end]):
            return tokenizer.decode_bytes(tokens).decode()
        logits = np.where(allowed, 3 * rng.standard_normal(len(allowed), np.float32) + bias, -np.inf)
        tokens.append(int(logits.argmax()))
        constraint.accept(tokens[-1])
    raise AssertionError(tokenizer.decode(tokens))


def test_random_texts_follow_the_schema(tokenizer: Tokenizer) -> None:
    for seed in range(50):
        constraint = constraint_of(tokenizer, schema(PERSON))
        assert constraint is not None
        assert is_person(json.loads(sampled(constraint, tokenizer, seed)))


def test_objects_are_json(tokenizer: Tokenizer) -> None:
    ended = 0
    for seed in range(20):
        constraint = constraint_of(tokenizer, {"type": "json_object"})
        assert constraint is not None
        first = [tokenizer.decode([int(i)]).strip() for i in np.nonzero(constraint.allowed())[0]]
        assert all(text[:1] == "{" for text in first)
        try:
            value = json.loads(sampled(constraint, tokenizer, seed, 300))
        except AssertionError:
            continue  # objects in objects without an end
        assert isinstance(value, dict)
        ended += 1
    assert ended > 5


def test_calls_of_tools_are_calls(tokenizer: Tokenizer) -> None:
    functions = [
        {"name": "get.person", "parameters": PERSON},
        {"name": "stop-1", "parameters": {"const": {}}},
    ]
    names = set()
    for seed in range(12):
        text = sampled(tool_constraint(tokenizer, functions), tokenizer, seed)
        stream = ToolStream()
        assert stream.push(text) == ""
        rest, (call,) = stream.finish()
        function = call["function"]
        assert rest == "" and isinstance(function, dict)
        names.add(function["name"])
        arguments = json.loads(function["arguments"])
        assert arguments == {} if function["name"] == "stop-1" else is_person(arguments)
    assert names == {"get.person", "stop-1"}


def test_end_and_special_tokens_come_only_where_the_text_is_complete(tmp_path: Path) -> None:
    tokenizer = tokenizer_of_keys(keys_of(spec_of("smollm"), "smollm"), "model.gguf", tmp_path)
    ends = [tokenizer.encode(token)[0] for token in SPECIAL]
    constraint = constraint_of(tokenizer, schema({"type": "string", "maxLength": 40}), ends[1:])
    assert constraint is not None
    for token in tokenizer.encode('"<|im_'):
        assert not constraint.allowed()[ends].any()
        constraint.accept(token)
    assert not constraint.allowed()[ends].any()
    for token in tokenizer.encode('end|> <"'):
        constraint.accept(token)
    assert np.nonzero(constraint.allowed())[0].tolist() == ends[1:]
    constraint.accept(ends[1])
    with pytest.raises(LamaError, match="allowed by the schema"):
        constraint.accept(tokenizer.encode("x")[0])


def nested(n: int) -> dict[str, object]:
    found: dict[str, object] = {"type": "string"}
    for _ in range(n):
        found = {"type": "object", "properties": {"a": found}, "required": ["a"]}
    return found


PATTERNS = [{"type": "string", "pattern": f".*a{{{i}}}b.*"} for i in range(30)]
LOOP = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
BAD = [
    ({"type": "xml"}, "text, json_object or json_schema"),
    ("json_object", "text, json_object or json_schema"),
    ({"type": "json_schema"}, "an object schema"),
    (schema([1]), "an object schema"),
    (schema({"type": "strin"}), "Invalid type: strin"),
    (schema({"type": "string", "enum": [1]}), "Unsatisfiable"),
    (schema({"not": {"type": "string"}}), "Unimplemented keys"),
    (schema({"$ref": "http://127.0.0.1/x"}), "does not fetch"),
    (schema({"$ref": "#"}), "cannot be followed"),
    (schema(LOOP), "cannot be followed"),
    (schema(nested(200)), "recursion limit"),
    (schema(nested(50_000)), "nested too deep"),
    (schema({"enum": [f"v{i}" for i in range(20_000)]}), "64,000 characters"),
    (schema({"type": "string", "pattern": "(" * 500}), "regex parse error"),
    (schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
    (schema({"type": "integer", "minimum": -(10**5000)}), "nested too deep|can be|llguidance"),
]


@pytest.mark.parametrize(("response_format", "message"), BAD, ids=range(len(BAD)))
def test_bad_schemas_are_refused_in_one_line(response_format: object, message: str) -> None:
    with pytest.raises(BadField, match=message) as error:
        constraint_of(gpt2_tokenizer(), response_format)
    text = str(error.value)
    assert error.value.param == "response_format" and "\n" not in text and len(text) < 400


def test_grammar_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "TRIAL", constraints.TRIAL.replace("(3, 3 + 1)", "(1, 2)"))
    with pytest.raises(BadField, match="more than 3 seconds or 1024 MB"):
        constraint_of(gpt2_tokenizer(), schema({"allOf": PATTERNS}))

    def late(*args: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("python", 9)

    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(BadField, match="more than 3 seconds to read"):
        constraint_of(gpt2_tokenizer(), schema({"enum": ["another"]}))


def test_schema_cannot_leave_its_place_in_the_grammar() -> None:
    odd = '"\nstart: /.*/\n%json {'
    for value in ({"enum": [odd]}, {"const": odd, "x-guidance": {"whitespace_pattern": "x+"}}):
        constraint = constraint_of(gpt2_tokenizer(), schema(value))
        assert constraint is not None
        assert json.loads(sampled(constraint, gpt2_tokenizer(), 0)) == odd


def test_long_pattern_stays_within_its_limits() -> None:
    """Random texts of a pattern of many states either end, or the limit says so."""
    constraint = constraint_of(gpt2_tokenizer(), schema({"type": "string", "pattern": "(.*a.{500}b)"}))
    assert constraint is not None
    try:
        sampled(constraint, gpt2_tokenizer(), 1, 200)
    except (LamaError, AssertionError) as error:
        assert isinstance(error, AssertionError) or "within its limits" in str(error)


def test_tokenizer_without_the_letters_of_json_is_refused() -> None:
    with pytest.raises(BadField, match="cannot spell"):
        constraint_of(CharacterTokenizer("abc "), {"type": "json_object"})


def test_without_the_package_the_message_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(BadField, match="pip install llguidance"):
        constraint_of(gpt2_tokenizer(), {"type": "json_object"})


def test_text_needs_no_constraint() -> None:
    assert constraint_of(gpt2_tokenizer(), None) is constraint_of(gpt2_tokenizer(), {"type": "text"}) is None
