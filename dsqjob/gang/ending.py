"""How ranks and nodes end, and which of several ends decides for all. Light: no torch."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from dsqjob.errors import (
    BugError,
    DataError,
    DsqjobError,
    Interrupted,
    PeerError,
    StorageError,
    UsageError,
)

_ORDER = (65, 64, 74, 70, 75, 69)
_ORDER_ASKED = (65, 64, 74, 75, 70, 69)
_CLASSES = {one.exit_code: one for one in (DataError, UsageError, StorageError, BugError, Interrupted, PeerError)}
_MENTIONED = 3


@dataclass(frozen=True)
class Ending:
    """Exit code, the error in words, and who it was: rank (-1: the node itself), host, phase. A ``victim`` ended of
    what befell others, and is named only where nobody else is."""

    code: int
    id: str = ""
    what: str = ""
    where: str = ""
    way_out: str = ""
    rank: int = -1
    host: str = ""
    phase: str = ""
    victim: bool = False
    time: float = field(default_factory=time.time)

    @staticmethod
    def of(error: DsqjobError, *, rank: int = -1, host: str = "", phase: str = "", victim: bool = False) -> Ending:
        """The end that ``error`` is."""
        return Ending(
            error.exit_code, error.id, error.what, error.where, error.way_out, rank, host, phase, victim=victim
        )

    def shortened(self, characters: int) -> Ending:
        """The same in at most so many characters a text."""
        return replace(
            self,
            what=self.what[:characters],
            where=self.where[-characters:],
            way_out=self.way_out[: characters // 2],
            phase=self.phase[:100],
        )

    def to_json(self) -> str:
        """For ``Ending(**json.loads(...))``."""
        return json.dumps(asdict(self))

    @property
    def first_line(self) -> str:
        """Rank, host and phase, then what happened."""
        who = f"rank {self.rank} on {self.host} in phase {self.phase}: " if self.rank >= 0 else ""
        return who + self.what


@dataclass(frozen=True)
class Report:
    """How one node's part ended: ``asked`` says which signal came to its supervisor, and where; ``endings`` are the bad
    ones; ``well`` that every rank of it ended well."""

    asked: str = ""
    endings: tuple[Ending, ...] = ()
    well: bool = False


def verdict(reports: Sequence[Report], more: Iterable[Ending] = ()) -> DsqjobError | None:
    """What all supervisors end with, made by each from the same reports; None where every rank ended well.

    The first of 65, 64, 74, 70, 75, 69; where a supervisor was asked to stop, 75 comes before 70 and 69, which stopping
    may cause. A culprit comes before its victims, an earlier end before a later one.
    """
    endings = [ending for report in reports for ending in report.endings] + list(more)
    asked = next((report.asked for report in reports if report.asked), "")
    if not endings and all(report.well for report in reports):
        return None
    if asked:
        endings.append(Ending(Interrupted.exit_code, "interrupted", f"stopped by {asked}", time=0.0))
    order = _ORDER_ASKED if asked else _ORDER
    ranked = sorted(endings, key=lambda one: (order.index(one.code), one.victim, one.time, one.rank))
    if not ranked:
        return BugError("bug", "a node of the gang ended without a word", way_out="report this, with the ranks' logs")
    first = ranked[0]
    if first.code == Interrupted.exit_code:
        return Interrupted(first.id, first.what, way_out="run the same command again: it resumes")
    lines = [one.first_line.partition("\n")[0] for one in ranked if not one.victim and one.code != 75]
    others = [line for line in dict.fromkeys(lines) if line != first.first_line.partition("\n")[0]]
    also = "".join(f"\n  also: {line}" for line in others[:_MENTIONED])
    return _CLASSES[first.code](first.id, first.first_line + also, where=first.where, way_out=first.way_out)


def how_it_ended(code: int) -> str:
    """An exit code, negative for a signal, in words."""
    if code >= 0:
        return f"left with exit code {code} and without a word"
    return f"killed by {signal_name(-code)}"


def signal_name(number: int) -> str:
    """Such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
