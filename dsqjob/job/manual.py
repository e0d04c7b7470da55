"""The job file's manual, from the fields' own docstrings."""

from __future__ import annotations

import textwrap
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dsqjob.job.schema import DERIVED, Job

_WIDTH = 100


def manual() -> str:
    """Every field with its type, default and meaning, as text."""
    head = textwrap.fill(" ".join((Job.__doc__ or "").split()), _WIDTH)
    return head + "\n\n" + "\n".join(_lines(Job, ""))


def _lines(model: type[BaseModel], indent: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        inner = _model(field.annotation)
        listed = inner is not None and inner is not field.annotation
        head = f"{indent}{name}:" + ("" if inner and not listed else f" {_type(field)}{_default(field)}")
        lines.append(head)
        text = " ".join((field.description or "").split())
        lines += textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}    ", subsequent_indent=f"{indent}    ")
        if listed:
            lines.append(f"{indent}  each item:")
        if inner is not None:
            lines += _lines(inner, indent + ("    " if listed else "  "))
    return lines


def _model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for one in get_args(annotation) if (found := _model(one)) is not None), None)


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " | ".join(choices)
    choices = tuple(getattr(one, "__origin__", one) for one in choices)  # Annotated[int, ...] is an int
    names = [one.__name__ for one in (choices or (annotation,)) if one is not None and hasattr(one, "__name__")]
    return (
        "list" if getattr(annotation, "__origin__", None) is list else " or ".join(n for n in names if n != "NoneType")
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    value = field.default
    if field.default_factory is not None or value is None or value == DERIVED:
        return ""
    if type(value) is int and value >= 1 << 30:
        return f", default {value >> 30}GiB"
    return f", default {str(value).lower() if isinstance(value, bool) else value}"
