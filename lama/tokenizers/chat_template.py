"""Chat templates: write a conversation in the form that a model was trained on, with jinja2.

A template comes from a model's files and is not trusted. It runs in jinja2's immutable sandbox, with a limit
on its steps and its text. Methods and filters that take much memory for little text are removed. Source:
transformers 5, utils/chat_template_utils.py.
"""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, TypeAlias

from lama.errors import LamaError, first_line, quoted
from lama.files import checked, parse_json
from lama.tokenizers.base import TableTokenizer, Tokenizer, encode_inside

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Message: TypeAlias = Mapping[str, object]
"""{"role": "user", "content": "..."}; an assistant's may have more, such as tool_calls."""
STEPS = 1_000_000  # of all loops of a template
LONGEST = 4_000_000  # characters of its text
LARGEST = 10**18  # factor of a product
# Variables of a template, empty unless the assistant's text is to be found.
BEGIN, END = "_begin_generation", "_end_generation"
TEMPLATE_FILE = "tokenizer/chat_template.jinja"
CONFIG_FILES = ("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json")
# They take much memory for little text, or look at the host.
REFUSED_FILTERS = ("center", "filesizeformat", "format", "pprint", "urlize", "wordwrap", "xmlattr")
REFUSED_METHODS = ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")
CANNOT_MARK = "the chat template must mark the assistant's part by {% generation %}"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, the form of most models."""
DIALOGUE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""A dialogue in plain text, for a model without a template."""


class ChatTemplate:
    """A template and the special tokens that it may name."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        """`tokens`: bos_token and the like. The template is compiled when it is first rendered."""
        self.source, self.tokens = source, dict(tokens or {})

    @property
    def has_marks(self) -> bool:
        """Whether {% generation %} marks the assistant's text."""
        return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self.source) is not None

    @cached_property
    def _compiled(self) -> "Template":
        return _environment().from_string(self.source)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **options: object
    ) -> str:
        """The text of a conversation. `options` are the template's own, such as enable_thinking or tools.

        `add_generation_prompt` adds the beginning of the assistant's answer. Raises LamaError for a template
        that is damaged, refuses the messages, or exceeds the limits.
        """
        from jinja2.exceptions import SecurityError, TemplateError

        values = {"tools": None, "documents": None, **self.tokens, **options}
        values |= {
            "messages": [dict(each) for each in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        _steps.set(0)
        try:
            return _joined(self._compiled.generate(**values))
        except SecurityError as error:
            raise LamaError(
                f"the chat template must stay within its limits; got {first_line(error)}"
            ) from None
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise LamaError(f"the chat template cannot render the messages: {first_line(error)}") from None


_steps = ContextVar("_steps", default=0)  # of the loops of this rendering


def _counted(items: Iterable[object]) -> Iterator[object]:
    from jinja2.exceptions import SecurityError

    for item in items:
        _steps.set(_steps.get() + 1)
        if _steps.get() > STEPS:
            raise SecurityError(f"more than {STEPS:,} steps of loops")
        yield item


def _check_length(n: int) -> None:
    from jinja2.exceptions import SecurityError

    if n > LONGEST:
        raise SecurityError(f"more than {LONGEST:,} characters")


def _environment() -> "Environment":
    """The environment of transformers, within limits."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """{% generation %} marks the assistant's text: the values of BEGIN and END are written around it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):  # type: ignore[no-untyped-def]
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.Name(name, "load")]) for name in (BEGIN, END))
            return [begin, *body, end]

    class Limits(NodeTransformer):
        """Loops count their steps, and `~` checks the length of its result."""

        def __init__(self) -> None:
            self.over_range = 0

        def visit_For(self, node, *args, **options):  # type: ignore[no-untyped-def]
            call = node.iter
            is_range = (
                isinstance(call, nodes.Call)
                and isinstance(call.node, nodes.Name)
                and call.node.name == "range"
            )
            if is_range and self.over_range:
                raise SecurityError("a range inside a range")
            self.over_range += is_range
            node = self.generic_visit(node, *args, **options)
            self.over_range -= is_range
            node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None)
            return node

        def visit_Concat(self, node, *args, **options):  # type: ignore[no-untyped-def]
            node = self.generic_visit(node, *args, **options)
            return nodes.Filter(nodes.List(node.nodes), "_concatenated", [], [], None, None)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _parse(self, source, name, filename):  # type: ignore[no-untyped-def]
            return Limits().visit(super()._parse(source, name, filename))

        def call_binop(self, context, operator, left, right):  # type: ignore[no-untyped-def]
            if operator in ("*", "**", "%") and not all(
                isinstance(each, int | float) for each in (left, right)
            ):
                raise SecurityError(f"{operator} on something other than numbers")
            if operator in ("*", "**") and not all(abs(each) < LARGEST for each in (left, right)):
                raise SecurityError(f"{operator} with a number from {LARGEST:,} on")
            if operator == "**" and abs(right) > 64:
                raise SecurityError("a power above 64")
            if (
                operator == "+"
                and isinstance(left, str | list | tuple)
                and isinstance(right, str | list | tuple)
            ):
                _check_length(len(left) + len(right))
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value):  # type: ignore[no-untyped-def]
            if isinstance(getattr(value, "__self__", None), str) and value.__name__ in REFUSED_METHODS:
                raise SecurityError(f"the method {value.__name__}")

        def call(self, context, function, *args, **options):  # type: ignore[no-untyped-def]
            owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
            if isinstance(owner, str):
                if name in REFUSED_METHODS:
                    raise SecurityError(f"the method {name}")
                if name == "replace":
                    return _replaced(owner, *args)
                if name == "join":
                    return _joined(args[0], owner)
            return super().call(context, function, *args, **options)

    def raise_exception(message: object) -> str:
        raise TemplateError(str(message))

    def tojson(
        value: object, ensure_ascii: bool = False, indent: int | None = None, **options: object
    ) -> str:
        separators, sort_keys = options.get("separators"), bool(options.get("sort_keys", False))
        indent = None if indent is None else min(indent, 16)
        pair = tuple(separators) if isinstance(separators, list | tuple) else None
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys
        )  # type: ignore[arg-type]

    def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        pad = width if isinstance(width, str) else " " * min(width, 100)
        _check_length(len(text) + (text.count("\n") + 1) * len(pad))
        return indent_of_jinja(text, width if isinstance(width, str) else min(width, 100), first, blank)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    indent_of_jinja = environment.filters["indent"]
    for name in REFUSED_FILTERS:
        environment.filters.pop(name, None)
    environment.filters |= {
        "tojson": tojson,
        "indent": indent,
        "replace": _replaced,
        "join": _joined,
        "_counted": _counted,
        "_concatenated": lambda parts: _joined(parts, ""),
    }
    environment.globals = {
        "range": environment.globals["range"],
        "dict": dict,
        "namespace": environment.globals["namespace"],
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form[:200]),
    }
    return environment


def _replaced(text: object, old: str, new: str, count: int | None = None) -> str:
    text = str(text)
    n = text.count(old) if old else len(text) + 1
    _check_length(len(text) + n * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _joined(parts: Iterable[object], separator: str = "", attribute: str | None = None) -> str:
    texts: list[str] = []
    length = 0
    for part in parts:
        if attribute is not None:
            part = part[attribute] if isinstance(part, Mapping) else getattr(part, attribute)
        texts.append(str(part))
        length += len(texts[-1]) + len(separator)
        _check_length(length)
    return separator.join(texts)


def template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template in a tokenizer's files; None if it has none. Raises LamaError for damaged files."""
    files = tokenizer.files if isinstance(tokenizer, TableTokenizer) else {}
    tokens: dict[str, str] = {}
    found: object = None
    for name in CONFIG_FILES:
        config = checked(parse_json(files[name], name), dict, name) if name in files else {}
        for key, value in config.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
        found = config.get("chat_template", found)
    if isinstance(found, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    if TEMPLATE_FILE in files:
        found = files[TEMPLATE_FILE].decode("utf-8", "replace")
    return ChatTemplate(found, tokens) if isinstance(found, str) else None


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    on_whole: Callable[[], None] = lambda: None,
    options: Mapping[str, object] | None = None,
) -> list[int]:
    """The ids of a conversation, as in transformers, but special tokens in contents are ordinary text.

    Such contents are encoded by themselves. They are found in the text by rendering random markers in their
    places. If the template changes them, special tokens in the whole text count, and `on_whole` is called.
    """
    options = options or {}
    text = template.render(messages, add_generation_prompt, **options)
    if not isinstance(tokenizer, TableTokenizer):
        return tokenizer.encode(text)
    contents = [each["content"] for each in messages if isinstance(each.get("content"), str)]
    if all(
        tokenizer.encode_inside(str(each)) == tokenizer.encode_inside(str(each), False) for each in contents
    ):
        return tokenizer.encode_inside(text)
    pieces = _pieces(template, messages, text, add_generation_prompt, options)
    if pieces is None:
        on_whole()
        return tokenizer.encode_inside(text)
    return [i for piece, is_content in pieces for i in tokenizer.encode_inside(piece, not is_content)]


def encode_marked(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and for each whether the assistant writes it, to be learned.

    The assistant writes its answers and the special tokens that end them, but no white space after these. The
    tokens before an answer equal those of a prompt. Special tokens in contents are ordinary text, as in
    `encode_chat`. Raises LamaError for a template that cannot mark the assistant's part.
    """
    text, spans = assistant_spans(template, messages)
    contents = [str(each["content"]) for each in messages if isinstance(each.get("content"), str)]
    pieces: list[tuple[str, bool]] = [(text, False)]
    if any(encode_inside(tokenizer, each) != encode_inside(tokenizer, each, False) for each in contents):
        pieces = _pieces(template, messages, text, False, {}) or pieces
    borders = sorted({0, len(text), *chain.from_iterable(spans)})
    segments: list[list[int]] = [[] for _ in borders[1:]]
    at = 0
    for piece, is_content in pieces:
        for i, (begin, end) in enumerate(pairwise(borders)):
            part = text[max(begin, at) : min(end, at + len(piece))]
            segments[i] += encode_inside(tokenizer, part, not is_content) if part else []
        at += len(piece)
    if len(pieces) == 1:
        segments = _as_whole(tokenizer, text, borders, segments)
    ids: list[int] = []
    marks: list[bool] = []
    for segment, begin in zip(segments, borders, strict=False):
        learned = 0
        if any(first == begin < last for first, last in spans):
            learned = _without_space_at_end(tokenizer, segment)
        ids += segment
        marks += [True] * learned + [False] * (len(segment) - learned)
    return ids, marks


def _as_whole(
    tokenizer: Tokenizer, text: str, borders: Sequence[int], segments: list[list[int]]
) -> list[list[int]]:
    """The segments, or those of the whole where they differ, as with tokenizers that add a space."""
    whole = encode_inside(tokenizer, text)
    if tokenizer.decode_bytes(chain.from_iterable(segments)) == tokenizer.decode_bytes(whole):
        return segments
    before = [encode_inside(tokenizer, text[:border]) for border in borders]
    if any(whole[: len(each)] != each for each in before):
        raise LamaError(f"{CANNOT_MARK}; got tokens across its borders")
    return [whole[len(first) : len(last)] for first, last in pairwise(before)]


def _without_space_at_end(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """The number of ids up to the last special token if only white space follows it, else of all ids."""
    special = {token.id for token in getattr(tokenizer, "added", ()) if token.special}
    n = len(ids)
    while n and ids[n - 1] not in special and not tokenizer.decode_bytes([ids[n - 1]]).strip():
        n -= 1
    return n if n and ids[n - 1] in special else len(ids)


def assistant_spans(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where the assistant's parts begin and end in it.

    They are between the template's {% generation %} marks. Without marks, an answer is the text that the
    conversation up to it has in addition to its prompt. Raises LamaError if a conversation's beginning is
    rendered differently when it is alone.
    """
    text, spans = template.render(messages, False), list[tuple[int, int]]()
    if template.has_marks:
        begin, end = secrets.token_hex(16), secrets.token_hex(16)
        first, *parts = template.render(messages, False, **{BEGIN: begin, END: end}).split(begin)
        found = first
        for part in parts:
            answer, _, rest = part.partition(end)
            spans.append((len(found), len(found) + len(answer)))
            found += answer + rest
        if found != text:
            raise LamaError(f"{CANNOT_MARK}; got a text that depends on the marks")
    else:
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            prompt = template.render(messages[:i], True)
            turn = template.render(messages[: i + 1], False)
            for shorter, longer in ((prompt, turn), (turn, text)):
                if not longer.startswith(shorter):
                    both = enumerate(zip(shorter, longer, strict=False))
                    at = next((n for n, (a, b) in both if a != b), len(longer))
                    got = f"got {quoted(longer[at:], 30)} in place of {quoted(shorter[at:], 30)}"
                    raise LamaError(f"{CANNOT_MARK}, or render a beginning as in the whole; {got}")
            spans.append((len(prompt), len(turn)))
    spans = [(begin, end) for begin, end in spans if begin < end]
    if not spans:
        raise LamaError(f"{CANNOT_MARK}; got no text of the assistant")
    return text, spans


def _pieces(
    template: ChatTemplate,
    messages: Sequence[Message],
    text: str,
    prompt: bool,
    options: Mapping[str, object],
) -> list[tuple[str, bool]] | None:
    """Pieces of the text, each with whether it is a content; None if contents are not found unchanged."""
    markers = {
        secrets.token_hex(16): each["content"] for each in messages if isinstance(each.get("content"), str)
    }
    names = iter(markers)
    marked = [
        {**each, "content": next(names)} if isinstance(each.get("content"), str) else each
        for each in messages
    ]
    try:
        rendered = template.render(marked, prompt, **options)
    except LamaError:
        return None
    pieces: list[tuple[str, bool]] = []
    rest = rendered
    for marker, content in markers.items():
        if rest.count(marker) != 1:
            if marker in rest:
                return None
            continue  # a message that the template leaves out
        before, _, rest = rest.partition(marker)
        pieces += [(before, False), (str(content), True)]
    pieces.append((rest, False))
    if "".join(piece for piece, _ in pieces) == text:
        return pieces
    stripped = [(piece.strip() if is_content else piece, is_content) for piece, is_content in pieces]
    return stripped if "".join(piece for piece, _ in stripped) == text else None


def plain_template(tokenizer: Tokenizer) -> ChatTemplate:
    """A template for a model without one: ChatML if the tokenizer knows its tokens, else plain text."""
    knows = isinstance(tokenizer, TableTokenizer) and len(tokenizer.encode_inside("<|im_start|>")) == 1
    return ChatTemplate(CHATML if knows else DIALOGUE)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise LamaError unless each message has a role and a content."""
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise LamaError(f'a message must be {{"role": ..., "content": ...}}; got {quoted(message)}')
