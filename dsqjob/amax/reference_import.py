"""A process of its own: the reference's ``.pt`` files become a ledger. The one module outside calibration with torch.

``python -m dsqjob.amax.reference_import RANK_FILE... LEDGER``; on failure the last line of stderr is
``id<TAB>what<TAB>where`` and the exit code 64 or 65.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from dsqjob.amax.ledger import Ledger, Row, amax_value
from dsqjob.errors import DataError, DsqjobError, UsageError

_KEY = re.compile(r"(layers\.\d+\.ffn\.experts\.\d+\.w[123])_(weight|input)_quantizer\._amax")
_IGNORED = re.compile(r"mtp\.\d+\.")


def read_files(files: list[Path]) -> Ledger:
    """Every key of every rank once; values widened to FP32. DataError ``amax-pickle``, ``amax-key``, ``amax-value``,
    ``amax-duplicate``."""
    try:
        import torch
    except ImportError:
        raise UsageError("torch-missing", "importing the reference's .pt files needs torch", where=files[0]) from None

    values: dict[str, dict[str, float]] = {}
    for path in files:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # an unpickler that is fed with garbage raises anything
            raise DataError("amax-pickle", f"not a file of tensors: {_first_line(error)}", where=path) from None
        for key, value in _items(loaded, path, torch.Tensor):
            if _IGNORED.match(key):
                continue
            match = _KEY.fullmatch(key)
            if match is None:
                raise DataError("amax-key", "no routed expert's quantizer", where=f"{path}: {key}")
            if not value.is_floating_point() or value.numel() != 1:
                raise DataError("amax-pickle", "an amax must be one floating-point number", where=f"{path}: {key}")
            number = float(value.float())
            if not math.isfinite(number) or number <= 0:
                raise amax_value(path, key, number)
            row = values.setdefault(match[1], {})
            if match[2] in row:
                raise DataError("amax-duplicate", "two ranks hold this key", where=f"{path}: {key}")
            row[match[2]] = number
    rows = {name: Row(row.get("input"), row.get("weight")) for name, row in values.items()}
    return Ledger(rows, {"source": "reference", "ranks": str(len(files))})


def _items(loaded: Any, path: Path, tensor: type) -> list[tuple[str, Any]]:
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, tensor) for key, value in loaded.items()
    ):
        raise DataError("amax-pickle", "not a dictionary of tensors", where=path)
    return list(loaded.items())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def main(arguments: list[str]) -> NoReturn:
    *files, target = map(Path, arguments)
    try:
        read_files(files).save(target)
    except DsqjobError as error:
        print(f"{error.id}\t{error.what}\t{error.where}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
