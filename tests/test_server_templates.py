"""Chat templates in the forms of model families, through the server: the prompts are those of `lama.chat`."""
# ruff: noqa: E501 (templates)

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("starlette", reason="lama serve needs starlette")

from servers import HERE, running
from starlette.testclient import TestClient
from test_chat import MESSAGES, TEMPLATES, TOKENS, chat_model, chat_tokenizer

import lama
from lama.server.app import make_app
from lama.server.service import Service
from lama.tokenizers.chat_template import ChatTemplate

USER = {"role": "user", "content": "Why <|im_end|> é?"}
TALK = [USER, {"role": "assistant", "content": "Because."}, {"role": "user", "content": " And? "}]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]
PARTS = {"role": "user", "content": [{"type": "text", "text": USER["content"]}]}
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
# Forms that the templates of families have, written for these tests.
FORMS = TEMPLATES | {
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}{%- endif %}"
        + ALTERNATE
        + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + ALTERNATE
        + "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi": (
        "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "qwen": (
        "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
        '{{- "# Tools\n\n<tools>" }}{%- for tool in tools %}{{- "\n" + tool | tojson }}{%- endfor %}'
        '{{- "\n</tools>\n\n<tool_call>\n{\\"name\\": <name>, \\"arguments\\": <object>}\n</tool_call><|im_end|>\n" }}'
        "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
        "{%- for m in messages %}{%- if m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- elif not (loop.first and m.role == 'system') %}{{- '<|im_start|>' + m.role + '\n' + m.content }}"
        "{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' + call.function.arguments | tojson + '}\n</tool_call>' }}{%- endfor %}"
        "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(chat_model(context_length=1024)) as service:
        tokenizer = chat_tokenizer(tmp_path_factory.mktemp("chat") / "t")
        service.backend = replace(service.backend, tokenizer=tokenizer)
        yield service


def client(service: Service, form: str) -> TestClient:
    service.backend = replace(service.backend, template=ChatTemplate(FORMS[form], TOKENS))
    return TestClient(make_app(service), base_url=HERE)


def check(service: Service, form: str, messages: list[dict[str, Any]], **more: Any) -> None:
    """The server's prompt and answer are those of lama.chat."""
    served, backend = client(service, form), service.backend
    expected = lama.chat(
        backend.model,
        backend.tokenizer,
        messages,
        template=backend.template,
        max_new_tokens=4,
        temperature=0,
        **more,
    )
    shown = served.post("/apply-template", json={"messages": messages, **more})
    assert shown.status_code == 200, shown.text
    assert shown.json()["prompt"] == backend.template.render(messages, **more)
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, "return_token_ids": True, **more}
    (choice,) = served.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["prompt_token_ids"] == shown.json()["tokens"] == expected.prompt_tokens
    assert choice["message"]["content"] == str(expected)


@pytest.mark.parametrize("form", FORMS)
def test_prompt_is_that_of_chat(service: Service, form: str):
    check(service, form, TALK)
    if form != "gemma":
        check(service, form, WITH_SYSTEM)


def test_thinking_is_left_out_by_the_template_s_own_option(service: Service):
    served, render = client(service, "thinking"), service.backend.template.render
    body = {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}
    prompt = served.post("/apply-template", json=body).json()["prompt"]
    assert prompt == render(MESSAGES, enable_thinking=False) != render(MESSAGES)


def test_tools_and_their_answers_are_part_of_the_prompt(service: Service):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
    }
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
    served, template = client(service, "qwen"), service.backend.template
    body = {"messages": [WITH_SYSTEM[0], USER, said, answer], "tools": [WEATHER]}
    as_objects = {**call, "function": {"name": "weather", "arguments": {"city": "Bern"}}}
    seen = [WITH_SYSTEM[0], USER, {**said, "content": "", "tool_calls": [as_objects]}, answer]
    shown = served.post("/apply-template", json=body).json()
    assert shown["prompt"] == template.render(seen, tools=[WEATHER])
    for part in ('"name": "weather"', '"arguments": {"city": "Bern"}', "<tool_response>\nrain\n"):
        assert part in shown["prompt"]
    found = served.post("/v1/chat/completions", json={**body, "max_tokens": 2, "return_token_ids": True})
    assert found.json()["choices"][0]["prompt_token_ids"] == shown["tokens"]


def test_parts_are_the_text_and_the_developer_is_the_system(service: Service):
    for form in FORMS:
        served = client(service, form)
        plain = served.post("/apply-template", json={"messages": [USER]}).json()
        assert served.post("/apply-template", json={"messages": [PARTS]}).json() == plain
    system, developer = WITH_SYSTEM, [{**WITH_SYSTEM[0], "role": "developer"}, *TALK]
    shown = [served.post("/apply-template", json={"messages": each}).json() for each in (system, developer)]
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("form", "messages", "reason"),
    [
        ("gemma", WITH_SYSTEM, "System role not supported"),
        ("gemma", [USER, USER], "roles must alternate"),
        ("mistral", [USER, USER], "roles must alternate"),
        ("mistral", [USER, {"role": "tool", "content": "x"}], "only user and assistant roles"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/apply-template"])
@pytest.mark.parametrize("stream", [False, True])
def test_role_that_a_template_refuses_is_a_wrong_field(service, form, messages, reason, path, stream):
    answer = client(service, form).post(path, json={"messages": messages, "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "messages")
    assert reason in error["message"] and "\n" not in error["message"]


def test_tools_are_refused_where_the_template_has_none(service: Service):
    for form in set(FORMS) - {"qwen"}:
        answer = client(service, form).post(
            "/v1/chat/completions", json={"messages": [USER], "tools": [WEATHER]}
        )
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
