"""YAML as people mean it: YAML 1.2 scalars, no key twice. ``12:00:00`` and ``no`` stay text; ``012`` is refused."""

from __future__ import annotations

import re
from typing import Any

import yaml

from dsqjob.errors import UsageError

_FIX = "correct the file; `dsqjob schema` explains every field"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first) + ([""] if _tag == "null" else [])
    )


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node), 0)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if key in seen:
            raise UsageError(
                "job-doubled-key",
                f"the key {key!r} stands twice, in lines {seen[key]} and {line}",
                where=f"{key_node.start_mark.name}:{line}",
                way_out="remove one of them",
            )
        seen[key] = line
    loader.flatten_mapping(node)
    return dict(loader.construct_pairs(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse(text: str, name: str) -> Any:
    """The document. UsageError ``job-yaml``, ``job-doubled-key``."""

    class Named(_Loader):
        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.name = name

    try:
        return yaml.load(text, Loader=Named)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "; inside braces and brackets write '${NAME}' with quotes" if "${" in text else ""
        raise UsageError("job-yaml", f"not YAML: {problem}", where=where, way_out=_FIX + hint) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError("job-yaml", f"not YAML: {error}", where=name, way_out=_FIX) from None
