"""E4M3 (``float8_e4m3fn``): sign, four exponent bits (bias 7), three mantissa bits; largest 448, no infinity."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX = np.float32(448)
SMALLEST = np.float32(2.0**-9)


def _values() -> NDArray[np.float32]:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, np.ldexp(1 + mantissa / 8, exponent - 7)).astype(np.float32)
    magnitude[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)


VALUES = _values()
"""Value of each code, float32 [256]; 0x7F and 0xFF are NaN."""
_MIDDLES = (VALUES[1:127] + VALUES[:126]) / 2


def encode_scale(s: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of values in [0, 448] (uint8, same shape): nearest, ties to the even code."""
    below = np.searchsorted(_MIDDLES, s, "left")
    tie = (below < 126) & (_MIDDLES[np.minimum(below, 125)] == s) & (below % 2 == 1)
    return np.asarray(below + tie, np.uint8)


def power_of_two(k: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Code of ``2**k`` for k in [-9, 8]."""
    return np.where(k >= -6, (k + 7) << 3, 1 << np.clip(k + 9, 0, 2)).astype(np.uint8)
