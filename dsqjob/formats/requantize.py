"""MXFP4 -> NVFP4 by amax, as a lookup: bit-equal to ``nvfp4.quantize`` of the dequantized BF16 weight.

What becomes of a 16-element block depends on its E8M0 byte, its largest magnitude code and ``weight_scale_2`` only:
the arithmetic is done once for each such key, and a compiled loop applies the tables.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsqjob.formats import FormatError, e2m1, mxfp4, nvfp4

_KEYS = 256 * 8
_NEGATIVE_ZERO = 8


class Tables(NamedTuple):
    """By key ``byte * 8 + largest code``: E4M3 scale with flags above it (uint16 [2048], see ``compiled``), and the new
    byte of each old byte (uint8 [2048, 256])."""

    by_key: NDArray[np.uint16]
    bytes: NDArray[np.uint8]


def _magnitudes() -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return np.ldexp(e2m1.MAGNITUDES[None, :], (np.arange(256) - mxfp4.BIAS)[:, None])


_MAGNITUDES = _magnitudes()


def bytes_present(e8m0: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which E8M0 bytes occur, bool [256]. FormatError ``e8m0-nan``."""
    from dsqjob.formats import compiled

    present = compiled.bytes_present(e8m0)
    if present[255]:
        raise FormatError("e8m0-nan", "a block scale is 255 (NaN)")
    return present


def tables(amax: float, present: NDArray[np.bool_]) -> Tables:
    """Tables of a tensor with this ``amax`` for the E8M0 bytes that occur (bool [256]); other keys stay zero.

    FormatError: those of ``nvfp4.weight_scale_2``.
    """
    from dsqjob.formats import compiled

    exponents = np.flatnonzero(present)
    scale_2 = nvfp4.weight_scale_2(amax)
    block_amax = _MAGNITUDES[exponents]
    codes = nvfp4.block_scale(block_amax, scale_2)
    with np.errstate(over="ignore"):
        values = np.ldexp(e2m1.VALUES, (exponents - mxfp4.BIAS)[:, None].astype(np.int32))
    w = np.repeat(values[:, None, :], 8, axis=1)
    with np.errstate(invalid="ignore"):
        new = nvfp4.encode(w, codes[..., None], scale_2)
    reachable = np.arange(16) % 8 <= np.arange(8)[:, None]
    changes = ((new != np.arange(16)) & reachable & (np.arange(16) != _NEGATIVE_ZERO)).any(axis=-1)
    saturated = block_amax > np.float32(amax)
    flags = (changes | saturated) * compiled.CHANGES + saturated * compiled.SATURATED
    made = Tables(np.zeros(_KEYS, np.uint16), np.zeros((_KEYS, 256), np.uint8))
    keys = (exponents[:, None] * 8 + np.arange(8)).reshape(-1)
    made.by_key[keys] = (codes + flags).reshape(-1)
    made.bytes[keys] = (new[..., None, :] | (new[..., :, None] << 4)).reshape(-1, 256)
    return made


def requantize(
    packed: NDArray[np.uint8],
    e8m0: NDArray[np.uint8],
    tables: Tables,
    out: NDArray[np.uint8],
    out_scales: NDArray[np.uint8],
) -> bool:
    """Fill ``out`` [rows, in/2] and ``out_scales`` [rows, in/16] from ``packed`` [rows, in/2] and ``e8m0``
    [rows, in/32]; whether a block was larger than the tables' amax. ``tables`` must know every byte of ``e8m0``."""
    from dsqjob.formats import compiled

    return compiled.requantize(packed, e8m0, *tables, out, out_scales)


def largest(packed: NDArray[np.uint8], e8m0: NDArray[np.uint8]) -> float:
    """Largest magnitude of the dequantized weight, exact. FormatError ``e8m0-nan``, ``weight-overflow``."""
    from dsqjob.formats import compiled

    mxfp4.check_scales(e8m0)
    keys = np.flatnonzero(compiled.keys_present(packed, e8m0))
    if not len(keys):
        return 0.0
    found = float(_MAGNITUDES.reshape(-1)[keys].max())
    if not math.isfinite(found):
        raise FormatError("weight-overflow", "a weight is larger than BF16 can hold")
    return found
