"""FP8 with a scale per 128x128 block, multiplied out to BF16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsqjob.formats import e4m3

BLOCK = 128


def _bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """BF16 bits of finite FP32 values, nearest even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def multiply_out(weight: NDArray[np.uint8], e8m0: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """BF16 bits [rows, cols] of E4M3 ``weight`` times 2**(b-127) of its block, FP32 in between, rounded once.

    ``e8m0`` is [ceil(rows/128), ceil(cols/128)]; edge blocks may be partial. A block's 256 products are a table.
    """
    rows, columns = weight.shape
    out = np.empty((rows, columns), np.uint16)
    for i, j in np.ndindex(*e8m0.shape):
        with np.errstate(over="ignore", under="ignore"):
            products = np.ldexp(e4m3.VALUES, int(e8m0[i, j]) - 127)
        table = np.where(np.isnan(products), np.uint16(0x7FC0), _bf16(np.nan_to_num(products, nan=0.0)))
        block = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        out[block] = table[weight[block]]
    return out
