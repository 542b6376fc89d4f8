"""One conversation, however it is written down, as a list of {role, content, tool_calls ...} messages."""

from __future__ import annotations

import json
import re

from finetune.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
# ShareGPT's `from`, and what its users write there.
_FROM = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
_FROM |= {"bot": "assistant", "model": "assistant", "system": "system", "developer": "developer", "tool": "tool"}
_FROM |= {"observation": "tool", "function_response": "tool", "function_call": "function_call"}
# Names under which templates read what the assistant thought before it answered.
REASONING = ("reasoning_content", "reasoning", "thinking")
_SURROGATE = re.compile("[\ud800-\udfff]")


def as_messages(where: str, column: str, value: object) -> list[dict]:
    """The messages of a conversation: {role, content} as in Hugging Face and OpenAI, or {from, value} as in ShareGPT.

    A ShareGPT function_call becomes an assistant message with `tool_calls`, an observation a tool message. Arguments
    of calls become objects. Raises UserError that names `where` and the message.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(f"{where}: `{column}`", value)  # as in a .csv
    if not isinstance(value, list | tuple) or not len(value):
        found = "an empty list" if isinstance(value, list) else kind_name(value)
        raise UserError(f"{where}: `{column}` must be a list of {{role, content}}, found {found}.")
    return [_message(f"{where}: message {number}", message) for number, message in enumerate(value, 1)]


def _message(place: str, message: object) -> dict:
    if isinstance(message, dict) and "from" in message and "value" in message:
        return _sharegpt(place, message)
    if not isinstance(message, dict) or "role" not in message:
        raise UserError(f"{place} must be an object with `role` and `content`, found {_found(message)}.")
    role = message["role"]
    if role not in ROLES:
        raise UserError(f"{place} has role {role!r}. Allowed: {', '.join(ROLES)}.")
    calls = message.get("tool_calls")
    if "content" not in message and not calls:
        raise UserError(f"{place} must be an object with `role` and `content`, found {_found(message)}.")
    result = {"role": role, "content": _content(f"{place} ({role}): `content`", message.get("content"), bool(calls))}
    for name in (*REASONING, "name", "tool_call_id"):
        if message.get(name) is not None:
            result[name] = _text(f"{place} ({role}): `{name}`", message[name])
    if calls:
        result["tool_calls"] = _calls(f"{place}: `tool_calls`", calls, role)
    return result


def _sharegpt(place: str, message: dict) -> dict:
    speaker = message["from"]
    role = _FROM.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{place} is from {speaker!r}. Allowed: {', '.join(_FROM)}.")
    text = _text(f"{place} ({speaker}): `value`", message["value"])
    if role == "function_call":
        calls = _calls(f"{place} (function_call)", _parsed(f"{place} (function_call): `value`", text), "assistant")
        return {"role": "assistant", "content": "", "tool_calls": calls}
    return {"role": role, "content": text}


def _content(what: str, value: object, may_be_empty: bool) -> str:
    if value is None and may_be_empty:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        for part in value:
            if part["type"] != "text":
                raise UserError(f"{what} has a part of type {part['type']!r}. Only text can be trained on.")
        return "".join(_text(what, part.get("text")) for part in value)
    return _text(what, value)


def _calls(what: str, value: object, role: str) -> list[dict]:
    if role != "assistant":
        raise UserError(f"{what}: only an assistant message calls tools, this one's role is {role}.")
    calls = []
    for call in value if isinstance(value, list | tuple) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{what} must hold calls with `name` and `arguments`, found {_found(call)}.")
        arguments = function.get("arguments", function.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = _parsed(f"{what}: `arguments` of {function['name']}", arguments)
        if not isinstance(arguments, dict):
            said = f"`arguments` of {function['name']} must be an object, found {kind_name(arguments)}"
            raise UserError(f"{what}: {said}.")
        _check_deep(what, [function["name"], arguments])
        result = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        calls.append(result | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return calls


def as_tools(what: str, value: object) -> tuple[dict, ...] | None:
    """The tools a conversation may use, in OpenAI's form; None where there are none. Raises UserError."""
    if isinstance(value, str):
        value = _parsed(what, value) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list | tuple):
        raise UserError(f"{what} must be a list of tools, found {kind_name(value)}.")
    for tool in value:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{what} must hold tools with a `name`, found {_found(tool)}.")
    _check_deep(what, value)
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def _parsed(what: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not valid JSON: {error}.") from error


def _text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} must be a string, found {kind_name(value)}.")
    check_unicode(what, value)
    return value


def check_unicode(what: str, value: str) -> None:
    """Raises UserError for half a surrogate pair, which JSON can write ("\\ud800") and no tokenizer takes."""
    if not value.isascii() and (found := _SURROGATE.search(value)):
        raise UserError(f"{what} holds half a character (\\u{ord(found.group()):x}, an unpaired surrogate).")


def _check_deep(what: str, value: object) -> None:
    if isinstance(value, str):
        check_unicode(what, value)
    elif isinstance(value, dict):
        _check_deep(what, [*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            _check_deep(what, part)


def _found(value: object) -> str:
    if not isinstance(value, dict):
        return kind_name(value)
    return ", ".join(f"`{key}`" for key in list(value)[:12]) or "none"


def kind_name(value: object) -> str:
    """What a JSON value is, in words."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
