"""Number formats as numpy tables and exact arithmetic (1-formats). No torch."""

from __future__ import annotations


class FormatError(ValueError):
    """A value that a format cannot hold; ``id`` names the cause."""

    def __init__(self, id: str, what: str) -> None:
        super().__init__(what)
        self.id = id
