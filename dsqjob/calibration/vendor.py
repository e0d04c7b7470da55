"""The vendor's inference code: imported as it is from the user's folder, once a process, and never written to."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dsqjob.checkpoint.release import read_json
from dsqjob.errors import BugError, DataError, UsageError
from dsqjob.families.known_code import NEEDED, code_digests

_imported: dict[str, Path] = {}
"""Family -> folder: the code's modules have bare names and globals, so a process can hold one family only."""


def import_code(family: str, folder: Path, expected: Mapping[str, str]) -> ModuleType:
    """The vendor's module ``model`` from ``folder``, whose files must have the ``expected`` SHA-256.

    DataError ``vendor-code-changed``; UsageError ``vendor-code-shadowed`` where another module of that name is on the
    path; BugError ``two-families`` where this process already imported other code.
    """
    if _imported and _imported != {family: folder}:
        raise BugError("two-families", f"this process already holds the code of {_imported}", where=folder)
    if (found := code_digests(folder)) != dict(expected):
        changed = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise DataError(
            "vendor-code-changed",
            "the vendor's code is not what it was when the job was planned",
            where=folder / changed[0],
            way_out="put it back, or run with --restart",
        )
    _imported[family] = folder
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    module = importlib.import_module("model")
    for name in (Path(one).stem for one in NEEDED):
        origin = Path(sys.modules[name].__file__ or "")
        if origin.parent.resolve() != folder.resolve():
            raise UsageError(
                "vendor-code-shadowed",
                f"`import {name}` found {origin}, not the vendor's file",
                where=folder / f"{name}.py",
                way_out="remove that file from the path, or run in a clean environment",
            )
    return module


def model_args(module: ModuleType, config: Path, *, batch_size: int, sequence_length: int) -> Any:
    """The vendor's ``ModelArgs`` from its JSON, with buffers for batches of [batch_size, sequence_length].

    DataError ``inference-config`` naming a key that the code does not know.
    """
    values, _ = read_json(config, "inference-config")
    known = {field.name for field in dataclasses.fields(module.ModelArgs)}
    if unknown := sorted(values.keys() - known):
        raise DataError(
            "inference-config",
            f"the vendor's ModelArgs has no field {unknown[0]!r}",
            where=config,
            way_out="use the configuration and the code of one release",
        )
    args = module.ModelArgs(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    args.max_batch_size = max(args.max_batch_size, batch_size)
    args.max_seq_len = max(args.max_seq_len, sequence_length)
    return args


def build_model(module: ModuleType, args: Any, device: torch.device) -> torch.nn.Module:
    """The vendor's ``Transformer`` of this rank, parameters uninitialised, on ``device``.

    The process group must exist before, since the constructor reads rank and size from it into globals that forward
    uses.
    """
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: torch.nn.Module = module.Transformer(args)
    torch.set_default_device(device)
    return model.eval()
