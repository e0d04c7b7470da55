"""E2M1 (FP4): sign, two exponent bits, one mantissa bit; two elements a byte, the even one in the low nibble."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])
"""Value of each code, float32 [16]; code 8 is -0.0."""
_MIDDLES = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
_EVEN_ABOVE = np.array([code % 2 == 0 for code in range(1, 8)])


def encode(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes of ``x`` (uint8, same shape): nearest, ties to the even code, saturating at 6; sign where ``x < 0``."""
    magnitude = np.abs(x)
    code = np.zeros(x.shape, np.uint8)
    for middle, even in zip(_MIDDLES, _EVEN_ABOVE, strict=True):
        code += magnitude >= middle if even else magnitude > middle
    return np.bitwise_or(code, np.left_shift((x < 0).astype(np.uint8), 3), dtype=np.uint8)


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes [..., 2n] of bytes [..., n]."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bytes [..., n] of codes [..., 2n]."""
    return np.bitwise_or(codes[..., ::2], np.left_shift(codes[..., 1::2], 4), dtype=np.uint8)
