"""Waiting for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 180.0
"""Seconds that a crowded machine may take; a wait that gives its own seconds holds a contract."""


def wait_until(
    true: Callable[[], object],
    seconds: float = PATIENCE,
    what: str | Callable[[], str] = "",
    pause: float = 0.02,
) -> None:
    """Wait for a condition of another process; AssertionError with ``what`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain: {what() if callable(what) else what}")
        time.sleep(pause)
