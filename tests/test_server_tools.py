"""Tools in Hermes' form: what a request may ask for, and calls in an answer, whole or in pieces."""

import json
import random

import pytest

from lama.server.fields import BadField
from lama.server.tools import ToolStream, read_tools
from lama.tokenizers.chat_template import CHATML, ChatTemplate

HERMES = ChatTemplate("{% for t in tools %}{{ t | tojson }}{% endfor %}Call <tool_call>{...}</tool_call>")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TIME = {"type": "function", "function": {"name": "time", "description": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def functions(calls: list[dict]) -> list[tuple[str, object]]:
    assert all(call["type"] == "function" and str(call["id"]).startswith("call_") for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


PARIS = ("weather", {"city": "Paris"})
ANSWERS = [
    ("Hello.", "Hello.", []),
    ("", "", []),
    (CALL, "", [PARIS]),
    (f"Let me see.\n\n{CALL}\n", "Let me see.", [PARIS]),
    (f"\n{CALL}\n{CALL}", "", [PARIS, PARIS]),
    (f"{CALL} and more ", " and more", [PARIS]),
    ('<tool_call>{"name":"t","arguments":{}}</tool_call>', "", [("t", {})]),
    (
        '<tool_call>{"name":"t","arguments":{"a":"é\\ud800 </x>"}}</tool_call>',
        "",
        [("t", {"a": "é\ud800 </x>"})],
    ),
    ("<tool_call>{not json}</tool_call> x ", "<tool_call>{not json}</tool_call> x ", []),
    ('<tool_call>{"name":"t"}</tool_call>', '<tool_call>{"name":"t"}</tool_call>', []),
    ('<tool_call>{"name":"t","arguments":[1]}</tool_call>', None, []),
    ('<tool_call>{"name":"a b","arguments":{}}</tool_call>', None, []),
    ('<tool_call>{"name":"t","arguments":{"x":NaN}}</tool_call>', None, []),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", None, []),
    ('<tool_call>{"name":"t","arguments":{"x":' + "1" * 5000 + "}}</tool_call>", None, []),
    ('a <tool_call>{"name": "t", "argu', None, []),
    ("a < b, <tool, <tool_cal", None, []),
    (f"<tool_call>x</tool_call>\n{CALL}", "<tool_call>x</tool_call>", [PARIS]),
    ("two  spaces \n and an end \n", None, []),
]


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS, ids=range(len(ANSWERS)))
def test_calls_and_content_of_an_answer(text: str, content: str | None, calls: list) -> None:
    stream = ToolStream()
    begin = stream.push(text)
    rest, parsed = stream.finish()
    assert begin + rest == (text if content is None else content)
    assert functions(parsed) == calls


@pytest.mark.parametrize(("text", "content", "calls"), ANSWERS, ids=range(len(ANSWERS)))
def test_pieces_give_the_same_as_the_whole(text: str, content: str | None, calls: list) -> None:
    rng = random.Random(0)
    for longest in (1, 3, 20) if len(text) < 1000 else (5000,):
        stream, shown, rest = ToolStream(), "", text
        while rest:
            n = rng.randint(1, longest)
            shown += stream.push(rest[:n])
            rest = rest[n:]
            expected = text if content is None else content
            assert expected.startswith(shown)  # nothing is taken back
        last, parsed = stream.finish()
        assert shown + last == expected and functions(parsed) == calls if text else not last


def test_content_is_not_held_back_longer_than_needed() -> None:
    stream = ToolStream()
    assert [stream.push(piece) for piece in ("a", " b", " <", "tool", "s>", "x")] == [
        "a",
        " b",
        "",
        "",
        " <tools>",
        "x",
    ]


def test_tools_are_for_the_template_unless_the_choice_is_none() -> None:
    found = read_tools({"tools": [WEATHER, TIME]}, HERMES)
    assert found.tools == [WEATHER, TIME] and found.demanded == []
    assert read_tools({"tools": [WEATHER], "tool_choice": "auto"}, HERMES).demanded == []
    assert read_tools({"tools": [WEATHER], "tool_choice": "none"}, HERMES).tools == []
    required = read_tools({"tools": [WEATHER, TIME], "tool_choice": "required"}, HERMES)
    assert required.demanded == [WEATHER["function"], TIME["function"]]
    named = {"type": "function", "function": {"name": "time"}}
    assert read_tools({"tools": [WEATHER, TIME], "tool_choice": named}, HERMES).demanded == [TIME["function"]]
    for body in ({}, {"tools": []}, {"tools": None, "tool_choice": "none"}):
        assert read_tools(body, ChatTemplate(CHATML)).tools == []


def tool(**function: object) -> dict[str, object]:
    return {"tools": [{"type": "function", "function": function}]}


BAD = [
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": "weather"}, "tools"),
    ({"tools": [WEATHER] * 200}, "tools"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [{"type": "retrieval"}]}, "tools"),
    ({"tools": [3]}, "tools"),
    (tool(name=""), "tools"),
    (tool(name="a b"), "tools"),
    (tool(name="x" * 65), "tools"),
    (tool(name="x", parameters=[1]), "tools"),
    (tool(name="x", description=3), "tools"),
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
]


@pytest.mark.parametrize(("body", "param"), BAD, ids=range(len(BAD)))
def test_wrong_tools_are_refused_by_name(body: dict, param: str) -> None:
    with pytest.raises(BadField) as error:
        read_tools(body, HERMES)
    assert error.value.param == param and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("source", [CHATML, "{{ tools }} [TOOL_CALLS]", "tool_calls <tool_call>"])
def test_templates_of_another_form_are_refused(source: str) -> None:
    with pytest.raises(BadField, match="Hermes' form"):
        read_tools({"tools": [WEATHER]}, ChatTemplate(source))
