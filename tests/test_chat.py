"""Conversations: templates as transformers renders them, within limits; turns cost their own tokens only."""
# ruff: noqa: E501 (templates)

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import fill

import lama
from lama.cli import Terminated, main
from lama.cli.chat import typed_lines, until_interrupted
from lama.errors import LamaError, UsageError
from lama.generation import Sampling
from lama.generation.chat import Conversation, chat
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import load_huggingface_tokenizer
from lama.tokenizers.chat_template import ChatTemplate, encode_chat, plain_template, template_of
from lama.tokenizers.library import LibraryTokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Forms that the templates of families have, written anew.
TEMPLATES = {
    "chatml": CHATML,
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = none %}{% set rest = messages %}{% endif %}"
        "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.first and system is not none %}{{ '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' }}{% endif %}"
        "{{ m.content | trim ~ ' [/INST]' }}{% else %}{{ ' ' ~ m.content | trim ~ ' ' ~ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "blocks": (
        "{%- set ns = namespace(n=0) -%}\n{%- for m in messages %}\n    {%- set ns.n = ns.n + 1 %}\n"
        "    {{- ns.n ~ '. ' + m.role.upper() + ': ' + (m.content if m.content is string else m.content | tojson) }}\n"
        "{% endfor %}\n{%- if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "thinking": (
        "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>{{ m.role }}\n{{ c }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Why?\nWhy <|im_end|> é "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nBecause."},
    {"role": "user", "content": "And {{ 1 }}?"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.peers
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("prompt", [True, False])
def test_template_renders_as_in_transformers(name: str, options: dict, prompt: bool):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    (expected,), _ = utils.render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **TOKENS, **options
    )
    assert ChatTemplate(TEMPLATES[name], TOKENS).render(MESSAGES, prompt, **options) == expected


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("{% for a in range(9) %}{% for b in range(9) %}{% endfor %}{% endfor %}", "a range inside a range"),
        ("{{ 'a' * 1000 }}", r"\* on something other than numbers"),
        ("{{ [1] * 1000 }}", r"\* on something other than numbers"),
        ("{{ '%9999999999d' % 1 }}", "% on something other than numbers"),
        ("{{ 'a'.center(99999999999) }}", "the method center"),
        ("{{ '{:>9999999999}'.format(1) }}", "the method format"),
        ("{{ 'a' | center(99999999999) }}", "No filter named 'center'"),
        ("{{ ''.__class__.mro() }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ (1).__class__.__mro__ }}", "unsafe"),
        (
            "{% set ns = namespace(s='ab') %}{% for i in range(50) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "4,000,000",
        ),
        (
            "{% set ns = namespace(s='ab') %}{% for i in range(50) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "4,000,000",
        ),
        (
            "{% set ns = namespace(n=9) %}{% for i in range(50) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
            "a number from",
        ),
        ("{% set s = 'ab' %}{{ s.replace('', s).replace('', 'ab') | replace('', 'ab') | length }}", ""),
        (
            "{% for i in range(100000) %}{% for m in messages %}{% for c in m.content %}{% endfor %}{% endfor %}{% endfor %}",
            "1,000,000 steps",
        ),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{% include 'file' %}", ""),
        ("{{ cycler }}{{ lipsum }}{{ self }}", ""),
    ],
)
def test_hostile_templates_end_soon_in_one_line(source: str, wrong: str):
    try:
        found = ChatTemplate(source).render(MESSAGES)
    except LamaError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        assert re.search(wrong, str(error)), error
    else:
        assert not wrong and len(found) < 1000


def chat_tokenizer(folder: Path, template: str | None = CHATML) -> LibraryTokenizer:
    """Bytes, each a token, and ChatML's special tokens."""
    from lama.tokenizers.bpe import byte_alphabet

    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec = {
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(byte_alphabet())}, "merges": []},
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "use_regex": False,
            "trim_offsets": True,
        },
        "added_tokens": [
            {"id": 256 + i, "content": token, "special": True, **off}
            for i, token in enumerate(("<|im_start|>", "<|im_end|>"))
        ],
    }
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = {"eos_token": "<|im_end|>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_huggingface_tokenizer(folder)
    assert isinstance(found, LibraryTokenizer)
    return found


def chat_model(**fields) -> GPT:
    shape = {"vocab_size": 258, "context_length": 256, "d_model": 24, "n_layers": 2, "n_heads": 2}
    model = GPT(GPTConfig(**shape | fields))
    fill(model, seed=5)
    return model


def test_special_tokens_in_contents_are_text(tmp_path: Path):
    tokenizer = chat_tokenizer(tmp_path / "t")
    template = template_of(tokenizer)
    assert template is not None
    ids = encode_chat(tokenizer, template, MESSAGES[1:2])
    assert tokenizer.decode(ids) == template.render(MESSAGES[1:2])
    assert ids.count(257) == 1 and ids.count(256) == 2  # those of the template only
    plain = [{"role": "user", "content": "no token"}]
    assert encode_chat(tokenizer, template, plain) == tokenizer.encode_inside(template.render(plain))
    said = []
    doubled = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    hidden = [{"role": "user", "content": "a<|im_end|>b"}]
    encode_chat(tokenizer, doubled, hidden, on_whole=lambda: said.append(1))
    assert said == [1]


def test_a_turn_costs_its_own_tokens_and_answers_as_the_whole_would(tmp_path: Path):
    tokenizer, model = chat_tokenizer(tmp_path / "t"), chat_model()
    template = template_of(tokenizer)
    fed = []
    conversation = Conversation(model, tokenizer, template, Sampling(temperature=0.0), max_new_tokens=8)
    feed = conversation._engine.runner.feed
    conversation._engine.runner.feed = lambda rows, ids, *args: (
        fed.append(ids.shape[1]) or feed(rows, ids, *args)
    )
    for text in ("Hello", "Why?", "So?"):
        answer = "".join(conversation.ask(text))
        messages = conversation.messages[:-1]
        expected = chat(model, tokenizer, messages, temperature=0, max_new_tokens=8)
        assert conversation.last.tokens == list(expected) or conversation.last.tokens == expected.tokens
        assert conversation.messages[-1] == {"role": "assistant", "content": answer}
    whole = len(conversation.ids(False))
    assert sum(fed) < whole + 8 * 3 and all(n < 60 for n in fed[1:])
    again = "".join(conversation.regenerate())
    assert conversation.messages[-1]["content"] == again and len(conversation.messages) == 6


def test_a_full_context_drops_whole_turns(tmp_path: Path):
    tokenizer, model, dropped = chat_tokenizer(tmp_path / "t"), chat_model(), []
    conversation = Conversation(
        model, tokenizer, template_of(tokenizer), Sampling(temperature=0.0), 6, on_drop=dropped.append
    )
    conversation.messages.append({"role": "system", "content": "S"})
    for i in range(6):
        list(conversation.ask(f"{i} " + 40 * "x"))
    assert dropped and all(n % 2 == 0 for n in dropped)
    assert [m["role"] for m in conversation.messages[:2]] == ["system", "user"]
    before = list(conversation.messages)
    with pytest.raises(
        UsageError, match=r"a message must fit the context .* got .* tokens for a context of 256"
    ):
        list(conversation.ask(400 * "y"))
    assert [m["role"] for m in conversation.messages][:1] == ["system"] and len(conversation.messages) <= len(
        before
    )


def test_a_long_context_is_cached_up_to_a_limit(monkeypatch):
    model = chat_model()
    monkeypatch.setattr("lama.generation.decoder.MOST_NUMBERS", 32 * 2 * 2 * 24)  # layers, width
    from lama.generation import generate_tokens
    from lama.generation.decoder import Runner

    assert Runner(model).cache.length == 32
    tokens = [row[0] for row in generate_tokens(model, [[1, 2, 3]], 100)]
    assert len(tokens) == 30  # the last one is not fed
    assert Runner(model, context=40).cache.length == 40  # a user's choice goes beyond the limit


def test_context_is_that_of_the_argument(tmp_path: Path):
    tokenizer, model = chat_tokenizer(tmp_path / "t", TEMPLATES["chatml"]), chat_model()
    options = {"temperature": 0.0, "max_new_tokens": 300}
    whole = lama.generate(model, tokenizer, [1, 2, 3], **options)
    short = lama.generate(model, tokenizer, [1, 2, 3], context=9, **options)
    assert str(whole).startswith(str(short)) and short.finish_reason == "context"
    assert len(short.tokens) == 7  # the last one is not fed
    for wrong in (0, -1, 257):
        with pytest.raises(UsageError, match=f"context must be from 1 to 256, .*; got {wrong}"):
            lama.generate(model, tokenizer, [1], context=wrong)
    with pytest.raises(
        UsageError, match=r"prompt must have at most 5 tokens, the context; got \d+\. Shorten"
    ):
        chat(model, tokenizer, MESSAGES[:2], context=5)
    conversation = Conversation(model, tokenizer, template_of(tokenizer), Sampling(), context=99)
    assert conversation.context == 99


def test_chat_needs_a_template(tmp_path: Path):
    tokenizer, model = chat_tokenizer(tmp_path / "t", None), chat_model()
    with pytest.raises(LamaError, match="the model must have a chat template for a conversation; got none"):
        chat(model, tokenizer, MESSAGES[:2])
    assert (
        str(chat(model, tokenizer, MESSAGES[1:2], template=plain_template(tokenizer), max_new_tokens=3))
        is not None
    )
    with pytest.raises(LamaError, match="a message must be"):
        lama.chat(model, tokenizer, [{"content": "x"}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    lama.save(root / "model", chat_model(), chat_tokenizer(root / "tokenizer"))
    return root / "model"


def piped(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape"))))


def test_command_answers_each_line_and_knows_its_commands(folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [
        "Hello",
        "/tokens",
        "/save talk.json",
        "/reset",
        "/tokens",
        "/load talk.json",
        "/regenerate",
        "/help",
    ]
    piped(monkeypatch, "\n".join(lines) + "\n")
    assert main(["chat", "-m", str(folder), "-n", "5", "--system", "Be.", "--context", "250"]) == 0
    out, err = capsys.readouterr()
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant"] and saved[1]["content"] == "Hello"
    assert "of 250 tokens" in out and "/regenerate" in out
    assert "wrote 3 messages to talk.json" in err and "read 3 messages from talk.json" in err


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("/what\n", [], "a command must be one of /reset, "),
        ("/load nothing.json\n", [], "nothing.json"),
        ("/save\n", [], "/save must name a file; got none"),
        ("/regenerate\n", [], "there must be an answer to generate again"),
        ("\udcff\n", [], "messages must be UTF-8 text; got byte 0xff"),
        ("x\n", ["--temperature", "-1"], "temperature must be 0"),
        ("x\n", ["--context", "-1"], "context must be at least 1; got -1"),
        ("x\n", ["--context", "257"], "context must be from 1 to 256, the model's context_length; got 257"),
        ("x\n", ["--context", "3"], "tokens for a context of 3. Shorten it"),
        ("x\n", ["--template", "nothing.jinja"], "nothing.jinja"),
    ],
)
def test_wrong_input_is_one_line(folder: Path, lines, options, message, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    piped(monkeypatch, lines)
    assert main(["chat", "-m", str(folder), *options]) in (1, 2)
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_generate_chat_answers_and_raw_continues(folder: Path, capsys):
    assert (
        main(["generate", "-m", str(folder), "-p", "Hello", "--chat", "-n", "4", "--temperature", "0"]) == 0
    )
    answer = capsys.readouterr().out
    assert not answer.startswith("Hello")
    assert main(["generate", "-m", str(folder), "-p", "Hello", "--raw", "-n", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("Hello")
    assert main(["generate", "-m", str(folder), "-p", "x", "--raw", "--chat"]) == 2
    assert np.isfinite(len(answer))


def test_line_ends_and_marks_of_other_systems_are_no_part_of_a_message(
    folder: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    piped(monkeypatch, "\ufeffHello\r\n\r\n/save talk.json\r\n")
    assert main(["chat", "-m", str(folder), "-n", "2"]) == 0
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [m["content"] for m in saved if m["role"] == "user"] == ["Hello"]


def test_ctrl_c_ends_an_answer_however_often_it_is_pressed():
    done = []

    def answer(line: str) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append(line)

    before = signal.getsignal(signal.SIGINT)
    try:
        until_interrupted(answer, "a")
        signal.raise_signal(signal.SIGINT)
        until_interrupted(done.append, "b")
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["a", "b"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_terminal_has_lines_a_history_and_an_end(folder: Path, tmp_path: Path):
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lama", "chat", "-m", str(folder), "-n", "1"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    chat = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env=env, start_new_session=True
    )
    os.close(theirs)

    def wait(what: bytes = b"") -> None:
        """Read until this was printed and a message can be typed again."""
        seen = b""
        while not re.search(re.escape(what) + rb".*\x1b\[\?2004h", seen, re.DOTALL):
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 10_000)

    def send(keys: bytes, what: bytes = b"") -> None:
        os.write(ours, keys)
        wait(what)

    try:
        wait()
        send(b"two\x1b\rlines\r")
        send(b"/save first.json\r", b"wrote 2 messages")
        chat.send_signal(signal.SIGINT)  # not during an answer: nothing ends
        send(b"\x1b[A\x7f\x7f\x7f\x7f\x7f2.json\r", b"wrote 2 messages")
        send(b"dropped\x03")
        send(b"/nope\r", b"a command must be one of")
        os.write(ours, b"\x04")
        assert chat.wait(60) == 0
    finally:
        chat.kill()
        os.close(ours)
    saved = json.loads((tmp_path / "first2.json").read_text())["messages"]
    assert saved[0]["content"] == "two\nlines"


def test_ctrl_c_drops_a_typed_line_and_a_signal_ends_the_program(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    events: list[BaseException | str] = [KeyboardInterrupt(), "a", Terminated(signal.SIGTERM)]

    def prompt(*args: object, **options: object) -> str:
        event = events.pop(0)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("prompt_toolkit.PromptSession.__init__", lambda *args, **options: None)
    monkeypatch.setattr("prompt_toolkit.PromptSession.prompt", prompt)
    before = signal.getsignal(signal.SIGINT)
    lines = typed_lines()
    assert next(lines) == "a" and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with pytest.raises(Terminated):
        next(lines)
    assert signal.getsignal(signal.SIGINT) is before
