"""Messages become text by the release's chat template, rendered as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsqjob.errors import UsageError

CHAT_TEMPLATE = "chat_template.jinja"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        return str(caller())


class ChatTemplate:
    """The chat template of a release; ``tokens`` are its special tokens by name, such as ``bos_token``.

    ``strftime_now``, which transformers offers, is left out: the same inputs must give the same tokens tomorrow.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str], where: Path) -> None:
        self._sources, self._tokens, self._where = sources, tokens, where
        self._templates: dict[str, jinja2.Template] = {}

    def render(self, messages: Sequence[Any], tools: Any, line: str) -> str:
        """The text of one conversation, no generation prompt added. ``line`` says where it stands.

        UsageError ``chat-template-missing`` where the release has none, ``chat-template-failed``.
        """
        try:
            template = self._template("tool_use" if tools is not None and "tool_use" in self._sources else "default")
            return template.render(
                messages=[_prepared(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=False,
                **self._tokens,
            )
        except UsageError as error:
            error.where = line
            raise
        except Exception as error:  # a template is a program: it raises anything
            raise UsageError(
                "chat-template-failed",
                f"the chat template of {self._where} refuses these messages: {type(error).__name__}: {error}",
                where=line,
                way_out="render the messages yourself and give them as `text`",
            ) from None

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._sources:
            raise UsageError(
                "chat-template-missing",
                f"messages need a chat template, and {self._where} has none",
                way_out="render the messages yourself (a DeepSeek-V4 release has `encoding/` for it) and give them as "
                "`text`",
            )
        if name not in self._templates:
            environment = ImmutableSandboxedEnvironment(  # what comes out is text for a tokenizer, not HTML
                trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
            )
            environment.filters["tojson"] = _tojson
            environment.globals["raise_exception"] = _raise
            self._templates[name] = environment.from_string(self._sources[name])
        return self._templates[name]


def template_sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template name -> source: ``chat_template.jinja``, else the tokenizer configuration's; empty where there is
    none."""
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        return {"default": path.read_text(encoding="utf-8")}
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    items = found if isinstance(found, list) else []
    return {str(item["name"]): str(item["template"]) for item in items if isinstance(item, dict)}


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _prepared(message: Any) -> Any:
    """A message as ModelOpt (tool calls' arguments are objects) and transformers (no nulls, one name for reasoning)
    hand it to the template."""
    if not isinstance(message, dict):
        raise TypeError(f"a message must be an object, not {type(message).__name__}")
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_prepared_call(call) for call in message["tool_calls"]]
    if (reasoning := next((message[key] for key in _REASONING if key in message), None)) is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _prepared_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    call = _with_object(call)
    return {**call, "function": _with_object(call["function"])} if isinstance(call.get("function"), dict) else call


def _with_object(holder: dict[str, Any]) -> dict[str, Any]:
    if "arguments" not in holder or isinstance(holder["arguments"], dict):
        return holder
    try:
        parsed = json.loads(holder["arguments"])
    except (TypeError, ValueError):
        parsed = None
    return {**holder, "arguments": parsed if isinstance(parsed, dict) else {}}
