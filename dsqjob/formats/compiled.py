"""Loops over nibbles, compiled by numba when first needed and kept in its cache. Imported late: numba is slow to."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_ONES = np.uint64(0x1111111111111111)
_NONE = np.uint64(0)
_MAGNITUDES = np.uint64(0x7777777777777777)
CHANGES, SATURATED = 256, 512
"""Flags above the scale's eight bits: a code other than negative zero changes; the magnitude exceeds the amax."""


@numba.njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _largest_code(word: np.uint64) -> int:
    """Largest magnitude code of the 16 nibbles of a word: bit by bit, among those that have all higher bits of it."""
    fours = (word >> np.uint64(2)) & _ONES
    left = fours if fours != _NONE else _ONES
    twos = (word >> np.uint64(1)) & left
    left = twos if twos != _NONE else left
    ones = word & left
    return int(fours != _NONE) * 4 + int(twos != _NONE) * 2 + int(ones != _NONE)


@numba.njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _without_negative_zeros(word: np.uint64) -> np.uint64:
    """The word with code 8 replaced by code 0, as rounding does."""
    not_zero = (word | (word >> np.uint64(1)) | (word >> np.uint64(2))) & _ONES
    signs = (word >> np.uint64(3)) & not_zero
    return (word & _MAGNITUDES) | (signs << np.uint64(3))


@numba.njit(cache=True, nogil=True)
def _requantize(words, e8m0, by_key, table, out, out_scales):  # type: ignore[no-untyped-def]
    rows, blocks = words.shape
    codes = np.empty(blocks, np.uint16)
    too_large = False
    for row in range(rows):
        for block in range(blocks):  # apart, since this loop becomes vector instructions
            codes[block] = _largest_code(words[row, block])
            out[row, block] = _without_negative_zeros(words[row, block])
        for block in range(blocks):
            key = int(e8m0[row, block >> 1]) * 8 + int(codes[block])
            what = by_key[key]
            out_scales[row, block] = np.uint8(what & 255)
            if what >= CHANGES:
                too_large |= what >= SATURATED
                word = words[row, block]
                new = np.uint64(0)
                for shift in range(0, 64, 8):
                    byte = (word >> np.uint64(shift)) & np.uint64(255)
                    new |= np.uint64(table[key, byte]) << np.uint64(shift)
                out[row, block] = new
    return too_large


@numba.njit(cache=True, nogil=True)
def _keys_present(words, e8m0, present):  # type: ignore[no-untyped-def]
    rows, blocks = words.shape
    for row in range(rows):
        for block in range(blocks):
            present[int(e8m0[row, block >> 1]) * 8 + _largest_code(words[row, block])] = True


def requantize(
    packed: NDArray[np.uint8],
    e8m0: NDArray[np.uint8],
    by_key: NDArray[np.uint16],
    table: NDArray[np.uint8],
    out: NDArray[np.uint8],
    out_scales: NDArray[np.uint8],
) -> bool:
    """Apply ``by_key`` [2048] (scale and flags) and ``table`` [2048, 256] (new byte of each old one) to every block of
    16; whether one saturated. A key whose block saturates must have both flags."""
    return bool(_requantize(packed.view(np.uint64), e8m0, by_key, table, out.view(np.uint64), out_scales))


def keys_present(packed: NDArray[np.uint8], e8m0: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which keys ``byte * 8 + largest code`` occur, bool [2048]; keys of zero blocks (code 0) are left out."""
    present = np.zeros(256 * 8, np.bool_)
    _keys_present(packed.view(np.uint64), e8m0, present)
    present[::8] = False
    return present


@numba.njit(cache=True, nogil=True)
def _bytes_present(data, present):  # type: ignore[no-untyped-def]
    for byte in data:
        present[byte] = True


def bytes_present(data: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which byte values occur, bool [256]."""
    present = np.zeros(256, np.bool_)
    _bytes_present(data.reshape(-1), present)
    return present
