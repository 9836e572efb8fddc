"""Chat messages as chat templates take them: roles by their usual names, contents as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from optuna_lora_rl.errors import UserError

Turn = dict[str, Any]
# Who speaks, by the names that chats and ShareGPT's exports use; templates know the right side.
_SPEAKERS = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "chatbot", "bard", "bing", "model", "ai"),
        "assistant",
    ),
    **dict.fromkeys(("tool", "observation"), "tool"),
    **{name: name for name in ("system", "developer", "function", "ipython")},
}
_CALL = "function_call"
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Axolotl's and Swift's words for what is to be learnt.
_LEARNT = ("train", "loss")
_WEIGHTS = ("weight", *_LEARNT)


def turns(messages: Sequence[Mapping[str, Any]], column: str, where: str) -> list[Turn]:
    """Returns messages with ``role`` and ``content``, and whatever else a template may read.

    Args:
        messages: In OpenAI's words or in ShareGPT's (``from``, ``value``).
        column: Where they stand.
        where: Option and number of the example, for messages.

    Raises:
        UserError: When a role is not known, or a content is no text.
    """
    where = f"{where} has a message in the column {column!r}"
    return [_turn(message, where) for message in messages]


def parsed(text: str, column: str, where: str) -> Any:
    """Reads a chat that is kept as JSON text, as in CSV files; blank text is no chat.

    Raises:
        UserError: When it is none.
    """
    if not text.strip():
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise UserError(
            f"{where} has text in the column {column!r} that is no list of messages in JSON"
        )
    return found


def tools(value: Any, where: str) -> str | None:
    """Returns the tools of a chat as JSON, None where there are none.

    Raises:
        UserError: When they are text that is no JSON list.
    """
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        # As JSON, which TRL reads: a table would give each tool the arguments of all.
        return json.dumps(value, ensure_ascii=False)
    try:
        found = json.loads(value)
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise UserError(f"{where} has tools that are no list in JSON")
    return value if found else None


def counts_nothing(values: Mapping[str, Any]) -> bool:
    """Whether a row or a message says of itself that it has no weight."""
    return values.get("weight") in (0, "0", "0.0")


def is_missing(value: Any) -> bool:
    """Whether a cell has nothing in it, as JSON or as pandas writes that."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def says(value: Any) -> bool:
    """Whether there is anything in a cell."""
    return not is_missing(value) and value not in ("", [], {})


def _turn(message: Mapping[str, Any], where: str) -> Turn:
    if counts_nothing(message) or any(message.get(name) is False for name in _LEARNT):
        raise UserError(
            f"{where} that is not to be learnt ({', '.join(_WEIGHTS)}), but all messages of a "
            "chat are learnt; take such chats out"
        )
    shown = [name for name in MEDIA if says(message.get(name))]
    if shown:
        raise UserError(f"{where} with something under {shown[0]!r}; only text is learnt here")
    turn = {name: value for name, value in message.items() if name not in _WEIGHTS}
    if "from" in turn and "value" in turn:
        # ShareGPT's words for the same thing; what else stands there is about the message.
        turn = {"role": turn["from"], "content": turn["value"]}
    said = turn.get("role")
    if isinstance(said, str) and said.strip().casefold() == _CALL:
        return _called(turn.get("content"), where)
    calls = _calls(turn, where)
    if not isinstance(said, str) or ("content" not in turn and not calls):
        raise UserError(f"{where} without 'role' and 'content'")
    role = _SPEAKERS.get(said.strip().casefold())
    if role is None:
        allowed = ", ".join([*_SPEAKERS, _CALL])
        raise UserError(f"{where} of {said!r}, which is no role; the roles are {allowed}")
    turn = {**turn, "role": role, "content": _text(turn.get("content"), where)}
    turn.pop(_CALL, None)
    turn.pop("tool_calls", None)
    if calls:
        turn["tool_calls"] = calls
    return {name: value for name, value in turn.items() if value is not None}


def _calls(turn: Turn, where: str) -> list[Any]:
    calls = turn.get("tool_calls")
    if isinstance(calls, str):
        calls = _json(calls)
    if calls and not isinstance(calls, list):
        raise UserError(f"{where} whose 'tool_calls' are no list")
    if not calls and turn.get(_CALL):
        # OpenAI's older spelling, which templates do not know.
        calls = [{"type": "function", "function": turn[_CALL]}]
    return calls or []


def _called(value: Any, where: str) -> Turn:
    """ShareGPT's turn that calls one function or several."""
    found = _json(value) if isinstance(value, str) else value
    called = found if isinstance(found, list) else [found]
    if not called or not all(isinstance(call, dict) and "name" in call for call in called):
        raise UserError(f"{where} of {_CALL!r} that is no JSON with 'name' and 'arguments'")
    calls = [{"type": "function", "function": call} for call in called]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _text(content: Any, where: str) -> str:
    # A message that only calls tools may say null; templates join text.
    if is_missing(content):
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, int | float):
        return json.dumps(content)
    if not isinstance(content, list):
        raise UserError(
            f"{where} whose content is {type(content).__name__}; it must be text (of what a tool "
            "returned, its JSON)"
        )
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise UserError(f"{where} with a part of type {kind!r}; only text is learnt here")
    return str(part["text"])


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
