"""What Linux does to a process when the one that started it is gone."""

from __future__ import annotations

import ctypes

_PR_SET_PDEATHSIG, _PR_GET_PDEATHSIG = 1, 2


def die_with_parent(number: int) -> None:
    """Ask for a signal at the end of the thread that started this process; what ended before is not told."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def dies_with_parent() -> bool:
    """Whether that was asked for."""
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(_PR_GET_PDEATHSIG, ctypes.byref(number))
    return number.value != 0
