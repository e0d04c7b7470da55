"""The formulas of the formats, element by element in FP32, compiled by numba.

Written from the definitions, for checking: no tables of results, nothing shared with the code that writes. Importing
this module imports numba, so it is imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

_BYTES = NDArray[np.uint8]
_Loop = TypeVar("_Loop", bound=Callable[..., Any])

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], np.float32)
_E4M3 = np.array([(b % 8) * 2.0**-9 if b < 8 else (8 + b % 8) * 2.0 ** (b // 8 - 10) for b in range(127)], np.float32)
"""Values of the bytes without sign that are not NaN: mantissa * 2^-9, or (8 + mantissa) * 2^(exponent - 10)."""
_SIX = np.float32(6.0)
_SMALLEST, _LARGEST = np.float32(2.0**-9), np.float32(448.0)
_WINDOW = 17

# Places in a tally.
_S_BAD, _S_ROW, _S_COL, _S_WANT, _S_HAVE = 0, 1, 2, 3, 4
_N_BAD, _N_ROW, _N_COL, _N_WANT, _N_HAVE = 5, 6, 7, 8, 9
_LOSSLESS = 10
_TALLY = 11


def _jit(loop: _Loop) -> _Loop:
    compiled: _Loop = numba.njit(cache=True, nogil=True, error_model="numpy")(loop)
    return compiled


def _inline(loop: _Loop) -> _Loop:
    compiled: _Loop = numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")(loop)
    return compiled


class Mismatch(NamedTuple):
    """How many elements differ, and the first of them: row, column, the code or byte expected and found."""

    wrong: int
    row: int
    column: int
    expected: int
    found: int


class Outcome(NamedTuple):
    """What comparing some rows gave. ``lossless`` counts source blocks of 32 whose values are kept exactly."""

    scales: Mismatch | None
    nibbles: Mismatch | None
    lossless: int


class Sanity(NamedTuple):
    """Block scales that no server can use: NaN, with the sign bit, or zero over nibbles that are not zero."""

    nan: int
    negative: int
    zero: int


@_inline
def _power(exponent: Any) -> Any:
    """2^exponent in FP32, subnormal ones too."""
    return np.float32(math.ldexp(1.0, exponent))


@_jit
def _to_e4m3(value: Any) -> int:
    """Nearest byte of a value in [0, 448], ties to the even mantissa."""
    low, high = 0, 126
    while high - low > 1:
        middle = (low + high) // 2
        if _E4M3[middle] <= value:
            low = middle
        else:
            high = middle
    down = np.float64(value) - np.float64(_E4M3[low])
    up = np.float64(_E4M3[high]) - np.float64(value)
    if down < up or (down == up and low % 2 == 0):
        return low
    return high


@_inline
def _to_e2m1(x: Any) -> Any:
    """Nearest code, ties to the even one, saturating at 6; the sign bit where x < 0."""
    a = abs(x)
    code = np.uint8(a > np.float32(0.25))
    code += np.uint8(a >= np.float32(0.75))
    code += np.uint8(a > np.float32(1.25))
    code += np.uint8(a >= np.float32(1.75))
    code += np.uint8(a > np.float32(2.5))
    code += np.uint8(a >= np.float32(3.5))
    code += np.uint8(a > np.float32(5.0))
    return code | np.uint8(np.uint8(x < np.float32(0.0)) << np.uint8(3))


@_jit
def _check_scale(row: int, column: int, expected: Any, found: Any, tally: Any) -> None:
    if expected != found:
        if tally[_S_BAD] == 0:
            tally[_S_ROW], tally[_S_COL], tally[_S_WANT], tally[_S_HAVE] = row, column, expected, found
        tally[_S_BAD] += 1


@_jit
def _note_nibble(row: int, column: int, expected: Any, found: Any, tally: Any) -> None:
    if tally[_N_BAD] == 0:
        tally[_N_ROW], tally[_N_COL], tally[_N_WANT], tally[_N_HAVE] = row, column, expected, found
    tally[_N_BAD] += 1


@_jit
def _check_equal(source: Any, nibbles: Any, row: int, first: int, tally: Any) -> None:
    """The 16 bytes from ``first`` on are the source's."""
    differs = np.uint8(0)
    for i in range(first, first + 16):
        differs |= source[row, i] ^ nibbles[row, i]
    if differs:
        for column in range(2 * first, 2 * first + 32):
            shift = 4 * (column % 2)
            want = (source[row, column // 2] >> shift) & 15
            have = (nibbles[row, column // 2] >> shift) & 15
            if want != have:
                _note_nibble(row, column, want, have, tally)


@_jit
def _check_cast(source: Any, e8m0: Any, nibbles: Any, scales: Any, k_max: int, tally: Any) -> None:
    m = k_max - 8
    step = _power(m - 9)
    for row in range(e8m0.shape[0]):
        for j in range(e8m0.shape[1]):
            k = np.int64(e8m0[row, j]) - 127
            in_range = k_max - k <= _WINDOW
            scale = _to_e4m3(_power(k - m)) if in_range else 1
            _check_scale(row, 2 * j, scale, np.int64(scales[row, 2 * j]), tally)
            _check_scale(row, 2 * j + 1, scale, np.int64(scales[row, 2 * j + 1]), tally)
            values = np.uint8(0)
            for i in range(16 * j, 16 * j + 16):
                values |= source[row, i] & np.uint8(0x77)
            if in_range or values == 0:
                tally[_LOSSLESS] += 1
                _check_equal(source, nibbles, row, 16 * j, tally)
                continue
            kept = True
            for column in range(32 * j, 32 * j + 32):
                shift = 4 * (column % 2)
                w = _E2M1[(source[row, column // 2] >> shift) & 15] * _power(k)
                want = _to_e2m1(w / step)
                have = (nibbles[row, column // 2] >> shift) & 15
                kept &= np.float64(_E2M1[want]) * np.float64(step) == np.float64(w)
                if want != have:
                    _note_nibble(row, column, want, have, tally)
            if kept:
                tally[_LOSSLESS] += 1


@_jit
def _check_requantize(source: Any, e8m0: Any, nibbles: Any, scales: Any, scale_2: Any, tally: Any) -> None:
    w = np.empty(16, np.float32)
    have = np.empty(16, np.uint8)
    for row in range(scales.shape[0]):
        for block in range(scales.shape[1]):
            power = _power(np.int64(e8m0[row, block // 2]) - 127)
            largest = np.float32(0.0)
            for i in range(8):
                byte, stored = source[row, 8 * block + i], nibbles[row, 8 * block + i]
                w[2 * i] = _E2M1[byte & 15] * power
                w[2 * i + 1] = _E2M1[byte >> 4] * power
                have[2 * i] = stored & 15
                have[2 * i + 1] = stored >> 4
            for i in range(16):
                largest = max(largest, abs(w[i]))
            s = largest / (_SIX * scale_2)
            if s == 0:
                s = np.float32(1.0)
            scale = _to_e4m3(min(max(s, _SMALLEST), _LARGEST))
            _check_scale(row, block, scale, np.int64(scales[row, block]), tally)
            step = _E4M3[scale] * scale_2
            differs = np.uint8(0)
            for i in range(16):
                differs |= _to_e2m1(w[i] / step) ^ have[i]
            if differs:
                for i in range(16):
                    want = _to_e2m1(w[i] / step)
                    if want != have[i]:
                        _note_nibble(row, 16 * block + i, want, have[i], tally)


@_jit
def _amax(source: Any, e8m0: Any) -> Any:
    largest = np.float32(0.0)
    for row in range(e8m0.shape[0]):
        for j in range(e8m0.shape[1]):
            magnitude = np.float32(0.0)
            for i in range(16 * j, 16 * j + 16):
                byte = source[row, i]
                magnitude = max(magnitude, _E2M1[byte & 7], _E2M1[(byte >> 4) & 7])
            largest = max(largest, magnitude * _power(np.int64(e8m0[row, j]) - 127))
    return largest


@_jit
def _sanity(nibbles: Any, scales: Any, found: Any) -> None:
    for row in range(scales.shape[0]):
        for block in range(scales.shape[1]):
            byte = scales[row, block]
            magnitude = byte & 0x7F
            if magnitude == 0x7F:
                found[0] += 1
            elif byte >= 0x80:
                found[1] += 1
            elif magnitude == 0:
                values = np.uint8(0)
                for i in range(8 * block, 8 * block + 8):
                    values |= nibbles[row, i] & np.uint8(0x77)
                found[2] += values != 0


def check_cast(source: _BYTES, e8m0: _BYTES, nibbles: _BYTES, scales: _BYTES, k_max: int) -> Outcome:
    """Compare rows of a cast projection with the lossless cast of its source.

    ``source`` and ``nibbles`` [rows, in/2], ``e8m0`` [rows, in/32], ``scales`` [rows, in/16] E4M3 bytes; ``k_max`` is
    the largest exponent over the projections that share ``weight_scale_2``.
    """
    tally = np.zeros(_TALLY, np.int64)
    _check_cast(source, e8m0, nibbles, scales, k_max, tally)
    return _outcome(tally)


def check_requantize(source: _BYTES, e8m0: _BYTES, nibbles: _BYTES, scales: _BYTES, scale_2: np.float32) -> Outcome:
    """Compare rows with the source quantized anew by ``scale_2`` (``weight_scale_2``); shapes as in ``check_cast``."""
    tally = np.zeros(_TALLY, np.int64)
    _check_requantize(source, e8m0, nibbles, scales, np.float32(scale_2), tally)
    return _outcome(tally)


def amax_of(source: _BYTES, e8m0: _BYTES) -> float:
    """max|w| of MXFP4 rows: ``source`` [rows, in/2], ``e8m0`` [rows, in/32]; an FP32 value."""
    return float(_amax(source, e8m0))


def sanity_of(nibbles: _BYTES, scales: _BYTES) -> Sanity:
    """Count unusable block scales: ``nibbles`` [rows, in/2], ``scales`` [rows, in/16] E4M3 bytes."""
    found = np.zeros(3, np.int64)
    _sanity(nibbles, scales, found)
    return Sanity(*found.tolist())


def _outcome(tally: NDArray[np.int64]) -> Outcome:
    values = tally.tolist()
    scales = Mismatch(*values[_S_BAD:_N_BAD]) if values[_S_BAD] else None
    nibbles = Mismatch(*values[_N_BAD:_LOSSLESS]) if values[_N_BAD] else None
    return Outcome(scales, nibbles, values[_LOSSLESS])
