"""Loops over nibbles, compiled by numba when first needed and kept in its cache. Imported late: numba is slow to."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_ONES = np.uint64(0x1111111111111111)
_NONE = np.uint64(0)
_MAGNITUDES = np.uint64(0x7777777777777777)


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
def _requantize(words, e8m0, scales, table, same, saturated, out, out_scales):  # type: ignore[no-untyped-def]
    rows, blocks = words.shape
    too_large = False
    for row in range(rows):
        for block in range(blocks):
            key = int(e8m0[row, block >> 1]) * 8 + _largest_code(words[row, block])
            too_large |= saturated[key]
            out_scales[row, block] = scales[key]
            word = words[row, block]
            if same[key]:
                out[row, block] = _without_negative_zeros(word)
                continue
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
    tables: tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]],
    out: NDArray[np.uint8],
    out_scales: NDArray[np.uint8],
) -> bool:
    """Apply scales [2048], bytes [2048, 256], same and saturated [2048] to every block of 16; whether one saturated."""
    return bool(_requantize(packed.view(np.uint64), e8m0, *tables, out.view(np.uint64), out_scales))


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
