"""Conversations as tokens: what the assistant says is marked, and what is wrong has its file and line."""
# ruff: noqa: E501 (templates)

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_chat import CHATML, chat_tokenizer

from lama.data import open_corpus
from lama.data.conversations import messages_of, write_conversations
from lama.errors import LamaError
from lama.tokenizers import CharacterTokenizer, gpt2_tokenizer, train_bpe
from lama.tokenizers.chat_template import (
    ChatTemplate,
    encode_chat,
    encode_marked,
    plain_template,
    template_of,
)
from lama.tokenizers.export import huggingface_files, with_template
from lama.tokenizers.gguf import tokenizer_of_keys

ASKED = {"role": "user", "content": "Why?"}
TALK = [ASKED, {"role": "assistant", "content": "So."}, ASKED, {"role": "assistant", "content": " Yes.\n"}]
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\n{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)


def learned(tokenizer, template: ChatTemplate, messages: Sequence[dict[str, object]]) -> list[str]:
    """The runs of tokens that are learned."""
    ids, marks = encode_marked(tokenizer, template, messages)
    runs: list[list[int]] = []
    for i, (token, mark) in enumerate(zip(ids, marks, strict=True)):
        if mark and not (i and marks[i - 1]):
            runs.append([])
        if mark:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("source", [CHATML, MARKED], ids=["prefixes", "marks"])
def test_answers_and_the_ends_of_their_turns_are_learned(tmp_path: Path, source: str):
    tokenizer, template = chat_tokenizer(tmp_path / "t"), ChatTemplate(source)
    assert learned(tokenizer, template, TALK) == ["So.<|im_end|>", " Yes.\n<|im_end|>"]
    ids, marks = encode_marked(tokenizer, template, TALK)
    assert tokenizer.decode(ids) == template.render(TALK, False)
    # Up to an answer they are the prompt that a conversation gives.
    assert ids[: marks.index(True)] == encode_chat(tokenizer, template, TALK[:1])


@pytest.mark.peers
def test_marks_are_those_of_transformers(tmp_path: Path):
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers")
    tokenizer, template = chat_tokenizer(tmp_path / "t"), ChatTemplate(MARKED)
    (text,), (spans,) = utils.render_jinja_template(
        [TALK], chat_template=MARKED, return_assistant_tokens_mask=True
    )
    assert template.render(TALK, False) == text
    assert learned(tokenizer, template, TALK) == [text[begin:end] for begin, end in spans]


def test_special_tokens_in_contents_are_text_and_not_the_end_of_a_turn(tmp_path: Path):
    tokenizer, template = chat_tokenizer(tmp_path / "t"), ChatTemplate(CHATML)
    talk = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "a <|im_end|>\nb"}]
    ids, _marks = encode_marked(tokenizer, template, talk)
    assert ids.count(257) == 2 and tokenizer.decode(ids) == template.render(talk, False)
    assert learned(tokenizer, template, talk) == ["a <|im_end|>\nb<|im_end|>"]


def test_a_plain_dialogue_learns_the_line_end():
    tokenizer = train_bpe("User: Assistant: Why? So. Yes.\n" * 9, 262)
    assert learned(tokenizer, plain_template(tokenizer), TALK) == [" So.\n", "  Yes.\n\n"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for m in messages %}{{ m.content }}|{% endfor %}end",
            "or render a beginning as in the whole; got '.*' in place of",
        ),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "in place of '[0-9]"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}",
            "got no text of the assistant",
        ),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}x", "got no text of the assistant"),
        (
            "{% set x %}{% generation %} a {% endgeneration %}{% endset %}{{ x | length }}",
            "a text that depends on the marks",
        ),
        ("{{ raise_exception('no such roles') }}", "cannot render the messages: no such roles"),
    ],
)
def test_templates_that_cannot_mark_the_assistant_are_refused(tmp_path: Path, source: str, message: str):
    with pytest.raises(LamaError, match=message) as caught:
        encode_marked(chat_tokenizer(tmp_path / "t"), ChatTemplate(source), TALK)
    assert "\n" not in str(caught.value)


# --- rows

PAIR = [ASKED, {"role": "assistant", "content": "So."}]


def test_rows_may_be_messages_or_prompt_and_completion_or_text():
    assert messages_of({"messages": PAIR, "prompt": None}, "here") == PAIR
    assert messages_of({"prompt": "Why?", "completion": "So."}, "here") == PAIR
    assert messages_of({"text": "Once."}, "here") == "Once."
    system = [{"role": "system", "content": "s", "name": None}, *PAIR]
    assert messages_of({"messages": system}, "here") == [{"role": "system", "content": "s"}, *PAIR]
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    tools = [ASKED, *call, {"role": "tool", "content": "3"}, PAIR[1]]
    assert [m["role"] for m in messages_of({"messages": tools}, "here")] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1}, r"line 3 of x must have messages, prompt and completion, or text; got a"),
        ({"messages": []}, "must end with the assistant; got no messages in line 3 of x"),
        ({"messages": [ASKED]}, "must end with the assistant; got user last in line 3 of x"),
        ({"messages": [*PAIR, PAIR[1]]}, "got assistant after assistant in line 3 of x"),
        ({"messages": [PAIR[1]]}, "user and assistant in turn.*; got assistant at the beginning in line 3"),
        ({"messages": [ASKED, {"role": "system", "content": ""}]}, "got system after user in line 3 of x"),
        (
            {"messages": [{"role": "bot", "content": ""}]},
            "a role among system, .*; got {'role': 'bot'.* in line 3",
        ),
        ({"messages": ["hello"]}, "a message must have a role among .*; got 'hello' in line 3 of x"),
        ({"messages": "hello"}, "messages in line 3 of x must be a list; got 'hello'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be a text; got 3 in line 3 of x"),
        ({"prompt": "a", "completion": 4}, "completion in line 3 of x must be a text; got 4"),
    ],
)
def test_rows_that_are_wrong_have_their_line(row: dict[str, object], message: str):
    with pytest.raises(LamaError, match=message) as caught:
        messages_of(row, "line 3 of x")
    assert "\n" not in str(caught.value)


def written(folder: Path, rows: Sequence[object], held_out: Sequence[object] = (), most: int = 60):
    tokenizer = chat_tokenizer(folder / "t")
    corpora = []
    for name, some in (("train", rows), ("held", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        corpora.append(open_corpus([str(folder / f"{name}.jsonl")], read=False) if some else None)
    (folder / "data").mkdir()
    template = template_of(tokenizer)
    return tokenizer, write_conversations(
        corpora[0], corpora[1], tokenizer, template, folder / "data", most, 0.25
    )


def test_conversations_are_written_with_the_tokens_that_count(tmp_path: Path):
    rows = [{"prompt": f"{i}?", "completion": f"{i * i}."} for i in range(12)] + [{"text": "Once upon."}] * 2
    tokenizer, tokens = written(tmp_path, rows)
    assert tokens.notes == {"conversations": 14, "cut": 0, "dropped": 0}
    n = {part: len(ends) for part, ends in tokens.ends.items()}
    assert sum(n.values()) == 14 and n["validation"] in (4, 5)  # the two equal ones are on one side
    found = []
    for part, ids in (("train", tokens.train), ("validation", tokens.validation)):
        for begin, end in zip([0, *tokens.ends[part][:-1]], tokens.ends[part], strict=True):
            counted = tokens.counted[part][begin:end] > 0
            found.append(tokenizer.decode(ids[begin:end][counted].tolist()))
    expected = [f"{i * i}.<|im_end|>" for i in range(12)] + ["nce upon.<|im_end|>"] * 2
    assert sorted(found) == sorted(expected)


def test_long_conversations_are_cut_and_those_without_an_answer_dropped(tmp_path: Path):
    rows = [{"prompt": "?" * n, "completion": "!" * 30} for n in (1, 5, 20, 90)]
    _, tokens = written(tmp_path, rows, held_out=[{"prompt": "a", "completion": "b"}])
    assert tokens.notes == {"conversations": 5, "cut": 1, "dropped": 1}
    assert np.diff([0, *tokens.ends["train"]]).tolist() == [52, 56, 61]
    assert len(tokens.ends["validation"]) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}],
            "training conversations and held-out ones; got 0 and 1 of 1 in",
        ),
        (
            [{"prompt": "?" * 99, "completion": "b"}],
            "got 0 and 0 of 1 in .*, 1 without a token of the assistant in 61",
        ),
        ([{"prompt": "a"}], r"line 1 of .*train\.jsonl must have messages, prompt and completion, or text"),
    ],
)
def test_conversations_that_leave_nothing_are_refused(tmp_path: Path, rows: list[object], message: str):
    with pytest.raises(LamaError, match=message):
        written(tmp_path, rows)


# --- a template of one's own


def test_a_template_stays_with_the_tokenizer(tmp_path: Path):
    trained = train_bpe("Why? So.\n" * 9, 261)
    for tokenizer in (trained, gpt2_tokenizer(), chat_tokenizer(tmp_path / "t", None)):
        found = with_template(tokenizer, CHATML)
        assert template_of(tokenizer) is None and template_of(found).source == CHATML
        assert found.encode("Why? <|im_end|><|endoftext|>") == tokenizer.encode(
            "Why? <|im_end|><|endoftext|>"
        )
        assert (found.vocab_size, found.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
        assert huggingface_files(found)["chat_template.jinja"].decode() == CHATML
    with pytest.raises(LamaError, match="to keep a chat template; got a CharacterTokenizer"):
        with_template(CharacterTokenizer("ab"), CHATML)


def test_conversations_may_be_in_parquet_and_packed(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason="not installed: pip install lama[data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    talks = [[{"role": "system", "content": f"{i}"}, *PAIR] for i in range(6)]
    parquet.write_table(pyarrow.table({"id": list(range(6)), "messages": talks}), tmp_path / "a.parquet")
    lines = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    tokenizer = chat_tokenizer(tmp_path / "t")
    digests = []
    for name in ("a.parquet", "a.jsonl.gz"):
        (tmp_path / f"data-{name}").mkdir()
        corpus = open_corpus([str(tmp_path / name)], read=False)
        place = tmp_path / f"data-{name}"
        tokens = write_conversations(corpus, None, tokenizer, template_of(tokenizer), place, 60, 0.2)
        digests.append(tokens.digest)
        assert tokens.notes["conversations"] == 6 and len(tokens.ends["train"]) == 5
    assert digests[0] == digests[1]


def test_a_tokenizer_that_adds_a_space_marks_the_tokens_of_the_whole(tmp_path: Path):
    """As SentencePiece's do: an answer by itself would begin with another token."""
    texts = ["<unk>", "<s>", "</s>", "▁", *"INSTWhySoYe?.[/]", "So", "▁So", "▁So."]
    tokens = list(dict.fromkeys(texts))
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.arange(len(tokens), dtype=np.float32),
        "token_type": np.array([3, 3, 3] + [1] * (len(tokens) - 3), np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    tokenizer = tokenizer_of_keys(
        {f"tokenizer.ggml.{name}": value for name, value in keys.items()}, "x", tmp_path
    )
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    ids, _ = encode_marked(tokenizer, template, TALK[:2])
    assert ids == tokenizer.encode_inside(template.render(TALK[:2], False))
    assert learned(tokenizer, template, TALK[:2]) == [" So.</s>"]
