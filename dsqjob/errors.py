"""One class per reaction of the caller (an exit code), one id per cause."""

from __future__ import annotations


class DsqjobError(Exception):
    """An error that a person can act on: what is wrong, where, and the way out.

    ``id`` is stable and greppable (``DESIGN.md`` lists them); tests assert ids and places, not prose.
    """

    exit_code = 70

    def __init__(self, id: str, what: str, *, where: object = "", way_out: str = "") -> None:
        super().__init__(what)
        self.id = id
        self.what = what
        self.where = str(where)
        self.way_out = way_out

    def __str__(self) -> str:
        text = f"[{self.id}] {self.what}"
        if self.where:
            text += f"\n  where: {self.where}"
        if self.way_out:
            text += f"\n  way out: {self.way_out}"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.id, self.what, self.where, self.way_out))


def _rebuild(cls: type[DsqjobError], id: str, what: str, where: str, way_out: str) -> DsqjobError:
    return cls(id, what, where=where, way_out=way_out)


class UsageError(DsqjobError):
    """The command, the job file or the machine does not fit the work: nothing was started."""

    exit_code = 64


class DataError(DsqjobError):
    """A file says something impossible, or a verification failed."""

    exit_code = 65


class PeerError(DsqjobError):
    """Another process, a node or the network failed; trying again may help."""

    exit_code = 69


class BugError(DsqjobError):
    """Ours: a promise inside the program does not hold."""

    exit_code = 70


class StorageError(DsqjobError):
    """The storage refused (full, quota, I/O error); progress is kept."""

    exit_code = 74


class Interrupted(DsqjobError):
    """Asked to stop; the same command continues."""

    exit_code = 75


EXIT_CODES = {
    0: "done",
    64: "usage or configuration",
    65: "bad data, or a failed verification",
    69: "a peer, node or network fault",
    70: "a bug in dsqjob",
    74: "storage: full, quota or I/O error",
    75: "interrupted: run the same command again",
}
