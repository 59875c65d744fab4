"""Tools in the form of Hermes models: calls are JSON between <tool_call> and </tool_call>."""

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from lama.server.fields import BadField, Body, refuse
from lama.tokenizers.chat_template import ChatTemplate

BEGIN, END = "<tool_call>", "</tool_call>"
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST_TOOLS = 128
Call = dict[str, object]
"""OpenAI's form: {"id", "type": "function", "function": {"name", "arguments": JSON text}}."""


@dataclass(frozen=True)
class Tools:
    """The tools of a request."""

    tools: list[Mapping[str, object]]
    """For the chat template's `tools`; empty with tool_choice none."""
    demanded: list[Mapping[str, object]]
    """Functions for `tool_constraint`: one of them must be called. Empty with tool_choice auto."""


def read_tools(body: Body, template: ChatTemplate) -> Tools:
    """The fields `tools` and `tool_choice` of a request. Raises BadField.

    BadField is also raised if the model's template has no tools, or has another form than Hermes'.
    """
    tools = body.get("tools")
    if tools is None or tools == []:
        if body.get("tool_choice") not in (None, "none", "auto"):
            raise refuse("tool_choice", "be none or auto without tools", body["tool_choice"])
        return Tools([], [])
    if not isinstance(tools, list) or len(tools) > MOST_TOOLS:
        raise refuse("tools", f"be a list of at most {MOST_TOOLS} functions", tools)
    functions = [_function(tool) for tool in tools]
    by_name = {str(each["name"]): each for each in functions}
    if len(by_name) < len(functions):
        raise refuse("tools", "have different names", sorted(str(each["name"]) for each in functions))
    if not re.search(r"\btools\b", template.source) or BEGIN not in template.source:
        got = "got another chat template in the model's files. Leave tools out, or use such a model"
        raise BadField("tools", f"tools require a model with tool calls in Hermes' form, {BEGIN}; {got}")
    match body.get("tool_choice"):
        case None | "auto":
            return Tools(tools, [])
        case "none":
            return Tools([], [])
        case "required":
            return Tools(tools, functions)
        case {"type": "function", "function": {"name": str(name)}} if name in by_name:
            return Tools(tools, [by_name[name]])
    rule = "be none, auto, required, or the name of one of the tools"
    raise refuse("tool_choice", rule, body["tool_choice"])


def _function(tool: object) -> Mapping[str, object]:
    """The function of a tool, checked. Raises BadField."""
    match tool:
        case {"type": "function", "function": {"name": str(name), **others} as function}:
            if not NAME.fullmatch(name):
                raise refuse("tools", "have names of 1 to 64 letters, digits, _, . and -", name)
            for key, kind in (("description", str), ("parameters", Mapping)):
                if others.get(key) is not None and not isinstance(others[key], kind):
                    raise refuse("tools", f"have {key} of the right type", others[key])
            return function
    raise refuse("tools", 'hold {"type": "function", "function": {"name": ...}}', tool)


class ToolStream:
    """Split an answer that comes in pieces into content and calls.

    Text that may begin a call is held back, and so is white space around calls. A call that is not JSON with
    a name and arguments is content.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        """The calls so far."""
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certainly content, after one more piece."""
        self._held += piece
        content = ""
        while (begin := self._held.find(BEGIN)) >= 0:
            end = self._held.find(END, begin)
            if end < 0:
                if before := self._held[:begin].rstrip():
                    content, self._held = content + before, self._held[len(before) :]
                return content
            call, stop = _call(self._held[begin + len(BEGIN) : end]), end + len(END)
            if call is None:
                content += self._held[:stop]
            else:
                self.calls.append(call)
                content += self._held[:begin].rstrip()
            self._held = self._held[stop:]
        kept = max(n for n in range(len(BEGIN)) if self._held.endswith(BEGIN[:n]))
        ready = self._held[: len(self._held) - kept].rstrip()
        self._held = self._held[len(ready) :]
        return content + ready

    def finish(self) -> tuple[str, list[Call]]:
        """The content that was held back, and all calls."""
        rest, self._held = self._held, ""
        return rest.rstrip() if self.calls else rest, self.calls


def _call(text: str) -> Call | None:
    """A call in OpenAI's form; None for text that is not one."""
    try:
        found = json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError):
        return None
    match found:
        case {"name": str(name), "arguments": dict(arguments)} if NAME.fullmatch(name):
            function = {"name": name, "arguments": json.dumps(arguments)}  # ASCII escapes lone surrogates
            return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
    return None


def _refused(constant: str) -> object:
    raise ValueError(constant)
