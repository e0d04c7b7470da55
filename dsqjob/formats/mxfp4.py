"""MXFP4: E2M1 nibbles and one E8M0 byte (2**(b-127)) per 32 elements of a row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsqjob.formats import FormatError, e2m1

BLOCK = 32
BIAS = 127


def check_scales(e8m0: NDArray[np.uint8]) -> None:
    """FormatError ``e8m0-nan`` where a byte is 255."""
    if e8m0.size and int(e8m0.max()) == 255:
        raise FormatError("e8m0-nan", "a block scale is 255 (NaN)")


def max_exponent(e8m0: NDArray[np.uint8]) -> int | None:
    """Largest ``b - 127`` over bytes b > 0, or None where there is none. FormatError ``e8m0-nan``."""
    check_scales(e8m0)
    largest = int(e8m0.max()) if e8m0.size else 0
    return largest - BIAS if largest > 0 else None


def dequantize(packed: NDArray[np.uint8], e8m0: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Values float32 [out, in] of ``packed`` [out, in/2] and ``e8m0`` [out, in/32]; exact, subnormals included."""
    values = e2m1.VALUES[e2m1.unpack(packed)]
    exponents = np.repeat(e8m0.astype(np.int32) - BIAS, BLOCK, axis=-1)
    return np.asarray(np.ldexp(values, exponents), np.float32)
