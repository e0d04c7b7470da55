"""The lossless cast MXFP4 -> NVFP4 (1-formats, section 3): nibbles stay, block scales become powers of two."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsqjob.formats import e2m1, e4m3, nvfp4
from dsqjob.formats.mxfp4 import BIAS

WINDOW = 17
"""How far below the largest exponent a block may lie: E4M3 holds 2**-9 to 2**8 exactly."""
_TOP = 8


def tensor_exponent(k_max: int | None) -> int:
    """``m`` of ``weight_scale_2 = 2**m``; ``k_max`` None (no scale byte above 0) counts as 0."""
    return (0 if k_max is None else k_max) - _TOP


def cast_tensor_scale(k_max: int | None) -> np.float32:
    """``weight_scale_2``, FP32."""
    return np.float32(np.ldexp(np.float32(1), tensor_exponent(k_max)))


def cast_scales(e8m0: NDArray[np.uint8], k_max: int) -> NDArray[np.uint8]:
    """E4M3 codes [rows, in/16] of E8M0 bytes [rows, in/32]: 2**(k - m) in range, 2**-9 out of it."""
    k = np.arange(256, dtype=np.int64) - BIAS
    table = e4m3.power_of_two(np.clip(k - tensor_exponent(k_max), -9, 8))
    both = (table.astype(np.uint16) << 8) | table
    return both[e8m0].view(np.uint8)


def out_of_range(e8m0: NDArray[np.uint8], k_max: int) -> NDArray[np.int64]:
    """(row, block) [n, 2] of the blocks more than the window below ``k_max``."""
    lowest = k_max - WINDOW + BIAS
    if lowest <= 0 or not e8m0.size or int(e8m0.min()) >= lowest:
        return np.empty((0, 2), np.int64)
    return np.argwhere(e8m0 < lowest)


def cast_blocks(
    nibbles: NDArray[np.uint8], e8m0: NDArray[np.uint8], k_max: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Out-of-range blocks: ``nibbles`` [n, 16] and ``e8m0`` [n] -> new nibbles [n, 16], whether no value changed [n].

    A block of zeros keeps its nibbles; another one is requantized with the scale 2**-9.
    """
    scale_2 = cast_tensor_scale(k_max)
    codes = e2m1.unpack(nibbles)
    w = np.ldexp(e2m1.VALUES[codes], (e8m0.astype(np.int32) - BIAS)[:, None])
    smallest = np.full((len(nibbles), codes.shape[1] // nvfp4.GROUP), e4m3.power_of_two(np.array(-9)), np.uint8)
    new = nvfp4.encode(w, smallest, scale_2)
    zero = ~(codes & 7).any(axis=1)
    new[zero] = codes[zero]
    value = e2m1.VALUES.astype(np.float64)[new] * (2.0**-9 * float(scale_2))
    return e2m1.pack(new), (value == w.astype(np.float64)).all(axis=1)
