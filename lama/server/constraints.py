"""Structured output: restrict an answer's tokens to a JSON schema, with the package llguidance.

A schema comes from a client and is not trusted. The package limits the size of grammars and the work of each
step. But the intersection of many regular expressions can take minutes. So a new grammar is first built in a
process of its own, with limits of time and memory.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from lama.errors import LamaError, quoted
from lama.server.fields import BadField, refuse
from lama.shapes import Array
from lama.tokenizers import Tokenizer
from lama.tokenizers.base import TableTokenizer, encode_inside

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

LONGEST_SCHEMA = 64_000  # characters
SECONDS, MEGABYTES = 3, 1024  # for the trial of a grammar
STATES = 50_000  # of 1 to 2 kB each
WHITE_SPACE = r"[ \t\r\n]{0,24}"  # without a limit, small models write nothing else
TRIAL = f"""
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS} + 1))
    resource.setrlimit(resource.RLIMIT_AS, ({MEGABYTES} << 20, {MEGABYTES} << 20))
except (ImportError, OSError, ValueError):
    pass
from llguidance import LLMatcher, LLParserLimits
limits = LLParserLimits(max_lexer_states={STATES}, verbose_errors=False)
print(LLMatcher.validate_grammar(sys.stdin.buffer.read().decode(), limits=limits))
"""


class GrammarConstraint:
    """An engine's `Constraint` that follows a grammar. Not thread-safe.

    End tokens are allowed where the text is complete; other special tokens never are.
    """

    def __init__(self, matcher: "LLMatcher", vocab_size: int, end_tokens: Collection[int]):
        self._matcher, self._vocab_size = matcher, vocab_size
        self._end = [token for token in end_tokens if token < vocab_size]

    def allowed(self) -> Array:
        """A mask of the tokens that may follow, (vocab_size,); none where the text is complete.

        Raises LamaError where a step exceeds the limits, and where no token can continue the text.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            error = quoted(self._matcher.get_error().partition("\n")[0], plain=True)
            raise LamaError(f"the schema must stay within its limits: {error}. Simplify it")
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        if mask.sum() == 1 and not self._matcher.validate_tokens([int(mask.argmax())]):
            mask[:] = False  # llguidance's id for a byte that the tokenizer lacks
        is_complete = self._matcher.is_accepting()
        mask[self._end] = is_complete
        if not is_complete and not mask.any():
            raise LamaError("the model's tokens cannot spell what the schema demands; change the schema")
        return mask

    def accept(self, token: int) -> None:
        """Advance by an allowed token. Raises LamaError for any other."""
        if token not in self._end and not self._matcher.consume_token(token):
            raise LamaError(f"a token must be allowed by the schema; got id={token}")


class _Vocabulary:
    """A tokenizer as llguidance's TokenizerWrapper reads it; the id after the last ends every text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer):
        size = tokenizer.vocab_size
        added = tokenizer.added if isinstance(tokenizer, TableTokenizer) else ()
        special = {token.id for token in added if token.special} | {tokenizer.end_of_text}
        self.tokens = [b"" if i in special else tokenizer.decode_bytes([i]) for i in range(size)] + [b""]
        self.eos_token_id, self.special_token_ids = size, [size]
        self.tokenizer, self.engine = tokenizer, None

    engine: "LLTokenizer | None"

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text within another, which llguidance prefers where the grammar has no choice."""
        try:
            if self._spells(ids := encode_inside(self.tokenizer, text.decode(), added=False), text):
                return ids
        except LamaError:
            pass
        # A tokenizer that adds a space, or cannot spell all of it: llguidance's ids have 0 for such bytes.
        ids = [] if self.engine is None else self.engine.greedy_tokenize(text.decode())
        return ids if self._spells(ids, text) else []

    def _spells(self, ids: Sequence[int], text: bytes) -> bool:
        return b"".join([self.tokens[i] for i in ids]) == text


_tokenizers: "WeakKeyDictionary[Tokenizer, LLTokenizer]" = WeakKeyDictionary()


def _llguidance_tokenizer(tokenizer: Tokenizer) -> "LLTokenizer":
    """The tokenizer for llguidance, built once, in a tenth of a second for 50,000 tokens."""
    if tokenizer not in _tokenizers:
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary(tokenizer)
        vocabulary.engine = _tokenizers[tokenizer] = LLTokenizer(TokenizerWrapper(vocabulary))
    return _tokenizers[tokenizer]


def constraint_of(
    tokenizer: Tokenizer, response_format: object, end_tokens: Collection[int] | None = None
) -> GrammarConstraint | None:
    """The constraint of OpenAI's `response_format`: text (None), json_object or json_schema.

    `end_tokens` may follow a complete text, by default the tokenizer's end of text. A new schema takes a
    tenth of a second, a bad one up to SECONDS: not for the thread of an event loop. Raises BadField
    for a schema that is wrong, unsupported or too large, and without llguidance.
    """
    match response_format:
        case None | {"type": "text"}:
            return None
        case {"type": "json_schema", "json_schema": {"schema": Mapping() as schema}}:
            pass
        case {"type": "json_schema"}:
            raise refuse("response_format", "have a json_schema with an object schema", response_format)
        case {"type": "json_object", "schema": Mapping() as schema}:
            pass
        case {"type": "json_object"}:
            schema = {"type": "object"}
        case _:
            rule = "have the type text, json_object or json_schema"
            raise refuse("response_format", rule, response_format)
    return _constraint(tokenizer, [("", schema)], end_tokens, "response_format")


def tool_constraint(
    tokenizer: Tokenizer, functions: Sequence[Mapping[str, object]], end_tokens: Collection[int] | None = None
) -> GrammarConstraint:
    """The constraint that demands one call of one of these functions, in Hermes' form. Raises BadField.

    `functions` have a `name` without characters that JSON escapes, and may have `parameters`, a JSON schema.
    """
    calls = [(str(each["name"]), each.get("parameters") or {"type": "object"}) for each in functions]
    return _constraint(tokenizer, calls, end_tokens, "tools")


def _constraint(
    tokenizer: Tokenizer,
    schemas: Sequence[tuple[str, object]],
    end_tokens: Collection[int] | None,
    field: str,
) -> GrammarConstraint:
    try:
        import llguidance
    except ImportError:
        advice = "Install it with `pip install llguidance`"
        raise BadField(field, f"{field} requires the package llguidance; got none. {advice}") from None
    lines, total = [], 0
    for i, (name, schema) in enumerate(schemas):
        try:
            text = json.dumps(schema)
        except (RecursionError, ValueError):
            raise BadField(field, f"a schema in {field} must be simpler; got one nested too deep") from None
        total += len(text)
        if total > LONGEST_SCHEMA:
            rule = f"have at most {LONGEST_SCHEMA:,} characters"
            raise BadField(field, f"a schema in {field} must {rule}; got {total:,}. Shorten it")
        if isinstance(schema, dict):  # a client's own options would come first
            text = json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})
        lines.append(f"schema{i}: %json {text}")
        begin = json.dumps(f'<tool_call>\n{{"name": "{name}", "arguments": ')
        lines.append(f'answer{i}: {begin} schema{i} "}}\\n</tool_call>"' if name else f"answer{i}: schema{i}")
    lines.append("start: " + " | ".join(f"answer{i}" for i in range(len(schemas))))
    grammar = llguidance.LLMatcher.grammar_from_lark("\n".join(lines))
    if error := _error_of(grammar):
        raise BadField(field, f"a schema in {field} must be one that llguidance supports; got {error}")
    limits = llguidance.LLParserLimits(max_lexer_states=STATES, verbose_errors=False)
    matcher = llguidance.LLMatcher(_llguidance_tokenizer(tokenizer), grammar, log_level=0, limits=limits)
    if end_tokens is None:
        end_tokens = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    constraint = GrammarConstraint(matcher, tokenizer.vocab_size, end_tokens)
    try:
        constraint.allowed()
    except LamaError as error:
        raise BadField(field, f"{field} cannot be followed: {error}") from None
    return constraint


@functools.lru_cache(maxsize=64)
def _error_of(grammar: str) -> str:
    """The error of a grammar, or an empty text; found by building it in a process with limits."""
    command = [sys.executable, "-c", TRIAL]
    try:
        done = subprocess.run(command, input=grammar.encode(), capture_output=True, timeout=3 * SECONDS)
    except subprocess.TimeoutExpired:
        return f"one that takes more than {SECONDS} seconds to read"
    if done.returncode:
        return f"one that takes more than {SECONDS} seconds or {MEGABYTES} MB to read"
    found = re.sub(r"\s+", " ", done.stdout.decode("utf-8", "replace")).strip()
    if not found or found.startswith("WARNING"):
        return ""
    reason = re.sub(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?| \d+ \| .*", "", found)
    return quoted(reason, plain=True)
