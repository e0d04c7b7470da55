"""NVFP4: E2M1 nibbles, one E4M3 scale per 16 elements of a row, one FP32 scale per tensor (1-formats, section 2).

All arithmetic is FP32, in the order that section gives.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dsqjob.formats import FormatError, e2m1, e4m3

GROUP = 16
_SIX = np.float32(6)
_RANGE = np.float32(6 * 448)


def weight_scale_2(amax: float) -> np.float32:
    """``amax / 2688``. FormatError ``amax-value``, or ``amax-underflow`` where it would be 0."""
    if not math.isfinite(amax) or amax <= 0:
        raise FormatError("amax-value", f"an amax must be finite and positive, is {amax!r}")
    scale = np.float32(amax) / _RANGE
    if scale == 0:
        raise FormatError("amax-underflow", f"the amax {amax!r} is too small: its scale underflows to 0")
    return scale


def input_scale(amax: float) -> np.float32:
    """``amax / 2688``, with the same refusals."""
    return weight_scale_2(amax)


def unclamped_scale(block_amax: NDArray[np.float32], scale_2: np.float32) -> NDArray[np.float32]:
    """``max|w| / (6 * weight_scale_2)``, the product first."""
    with np.errstate(over="ignore"):
        return block_amax / (_SIX * scale_2)


def block_scale(block_amax: NDArray[np.float32], scale_2: np.float32) -> NDArray[np.uint8]:
    """E4M3 codes of the scales of blocks whose largest magnitudes are ``block_amax`` (section 2, step 2)."""
    s = unclamped_scale(block_amax, scale_2)
    s = np.where(s == 0, np.float32(1), s)
    return e4m3.encode_scale(np.clip(s, e4m3.SMALLEST, e4m3.MAX))


def encode(w: NDArray[np.float32], scales: NDArray[np.uint8], scale_2: np.float32) -> NDArray[np.uint8]:
    """E2M1 codes [..., n * 16] of ``w`` under block scales [..., n]: product first, one division (step 3)."""
    divisor = e4m3.VALUES[scales] * scale_2
    with np.errstate(over="ignore"):
        return e2m1.encode(np.divide(w, np.repeat(divisor, GROUP, axis=-1), dtype=np.float32))


def quantize(w: NDArray[np.float32], amax: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8], np.float32]:
    """Nibbles [out, in/2], E4M3 scales [out, in/16] and ``weight_scale_2`` of BF16 values ``w`` [out, in]."""
    scale_2 = weight_scale_2(amax)
    block_amax = np.abs(w).reshape(*w.shape[:-1], -1, GROUP).max(axis=-1)
    scales = block_scale(block_amax, scale_2)
    return e2m1.pack(encode(w, scales, scale_2)), scales, scale_2
