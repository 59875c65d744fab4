"""Chat templates: a conversation as the text that a model was trained on, by jinja2 as transformers uses it.

A template comes from a model's files and is not trusted: jinja2's immutable sandbox runs it, without methods
and filters that take much memory for little text, and with a limit on its steps and its text. Source:
transformers 5, utils/chat_template_utils.py.
"""

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from lama.errors import LamaError, first_line, quoted
from lama.files import checked, parse_json
from lama.tokenizers.base import TableTokenizer, Tokenizer

if TYPE_CHECKING:
    from jinja2 import Environment

Message: TypeAlias = Mapping[str, object]
"""{"role": "user", "content": "..."}; an assistant's may have more, such as tool_calls."""
STEPS = 1_000_000  # of all loops of a template
LONGEST = 4_000_000  # characters of its text
LARGEST = 10**18  # factor of a product
TEMPLATE_FILE = "tokenizer/chat_template.jinja"
CONFIG_FILES = ("tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json")
# Those that take much memory for little text, or look at the host.
REFUSED_FILTERS = ("center", "filesizeformat", "format", "pprint", "urlize", "wordwrap", "xmlattr")
REFUSED_METHODS = ("center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill")
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
"""A dialogue in plain text, for a model that knows no template."""


class ChatTemplate:
    """A template and the special tokens that it may name."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None):
        """`tokens`: bos_token and the like. The template is compiled when it is first rendered."""
        self.source, self.tokens = source, dict(tokens or {})

    @cached_property
    def _environment(self) -> "Environment":
        return _environment()

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
            return _joined(self._environment.from_string(self.source).generate(**values))
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
        """{% generation %} marks the assistant's text for training; here its content is only text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):  # type: ignore[no-untyped-def]
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

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
    """The ids of a conversation: transformers', but special tokens in contents are only text.

    Such contents are encoded by themselves. They are found in the text by rendering random markers in their
    places. Where the template changes them, the whole is encoded as it is, and `on_whole` called.
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


def _pieces(
    template: ChatTemplate,
    messages: Sequence[Message],
    text: str,
    prompt: bool,
    options: Mapping[str, object],
) -> list[tuple[str, bool]] | None:
    """The text in pieces, each with whether it is a content; None where contents are not found unchanged."""
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
