"""How a rank, and a node, ended: small files, since exit codes get lost on the way."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsqjob.errors import (
    BugError,
    DataError,
    DsqjobError,
    Interrupted,
    PeerError,
    StorageError,
    UsageError,
)

if TYPE_CHECKING:
    from dsqjob.gang.rank import Rank

SEVERITY = (65, 64, 74, 70, 75, 69, 0)
_CLASSES = {one.exit_code: one for one in (DataError, UsageError, StorageError, BugError, Interrupted, PeerError)}
_COLLATERAL = "collective-failed"


@dataclass(frozen=True)
class Ending:
    """Exit code, the error in words, and who it was: rank (-1: the node itself), host, phase."""

    code: int
    id: str = ""
    what: str = ""
    where: str = ""
    way_out: str = ""
    rank: int = -1
    host: str = ""
    phase: str = ""

    @staticmethod
    def of(rank: Rank, error: DsqjobError | None) -> Ending:
        about = (rank.index, rank.host, rank.phase_name)
        if error is None:
            return Ending(0, "", "", "", "", *about)
        return Ending(error.exit_code, error.id, error.what, error.where, error.way_out, *about)

    def write(self, path: Path) -> None:
        """``path`` is a file, or a folder in which ranks have one each."""
        target = path / f"rank{self.rank}.json" if path.is_dir() else path
        aside = target.with_name(f".{target.name}")
        aside.write_text(json.dumps(asdict(self)))
        aside.rename(target)

    @staticmethod
    def read(path: Path) -> Ending | None:
        try:
            return Ending(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def error(self) -> DsqjobError:
        """The error to end with; its first words name rank, host and phase."""
        who = f"rank {self.rank} on {self.host} in phase {self.phase}: " if self.rank >= 0 else ""
        return _CLASSES[self.code](self.id, who + self.what, where=self.where, way_out=self.way_out)


def worst(endings: Iterable[Ending], *, asked_to_stop: bool) -> Ending | None:
    """The ending that decides; None where all were well.

    75 counts only where somebody ``asked_to_stop`` (ranks are also told to stop when one of them died), and then
    before 70 and 69, which stopping may cause. A rank that died goes before those that noticed.
    """

    def order(ending: Ending) -> tuple[int, bool, int]:
        severity = (65, 64, 74, 75, 70, 69) if asked_to_stop else SEVERITY
        return severity.index(ending.code), ending.id == _COLLATERAL, ending.rank

    known = [one for one in endings if one.code and (one.code != Interrupted.exit_code or asked_to_stop)]
    return min(known, key=order, default=None)
