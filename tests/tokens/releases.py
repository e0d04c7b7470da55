"""Copies of the miniature's light files, changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsqjob.checkpoint.header import TensorSpec, encode

BOS_BEFORE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [0], "tokens": ["<|begin|>"]}},
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n{% if m.role == 'user' %}User: {{ m.content }}\n"
    "{% else %}{% generation %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endgeneration %}\n{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}A:{% endif %}"
)


def light(miniature: Path, folder: Path, *, post_processor: Any = None, **config: Any) -> Path:
    """config and tokenizer of the miniature without a shard; ``config`` changes ``tokenizer_config.json``."""
    folder.mkdir(parents=True)
    shutil.copyfile(miniature / "config.json", folder / "config.json")
    for name, changes in (("tokenizer.json", {"post_processor": post_processor}), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps({**json.loads((miniature / name).read_text()), **changes}))
    return folder


def lines(path: Path, *samples: Mapping[str, Any] | str) -> Path:
    """A file of JSON lines; text stands as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in samples))
    return path


def token_file(path: Path, ids: Any, dtype: str = "I64", name: str = "input_ids") -> Path:
    array = np.array(ids, {"I64": "<i8", "I32": "<i4", "F32": "<f4"}[dtype])
    path.write_bytes(encode([TensorSpec(name, dtype, array.shape)]) + array.tobytes())
    return path
