"""What a family's modules need to be calibrated: quantizers, and a forward in blocks."""

from __future__ import annotations

from importlib import import_module

from dsqjob.calibration.wiring.face import Wiring

WIRINGS = {"deepseek-v4": "dsqjob.calibration.wiring.deepseek_v4"}
"""Family -> module that holds ``WIRING``."""


def wiring_class(family: str) -> type[Wiring]:
    """The wiring of that family; KeyError if there is none."""
    found: type[Wiring] = import_module(WIRINGS[family]).WIRING
    return found
