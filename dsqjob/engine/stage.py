"""A stage as data: units with a fingerprint, and what the workspace remembers of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsqjob.engine.claims import Claims
from dsqjob.engine.fingerprint import Fingerprint
from dsqjob.engine.publish import PARTIAL, create_exclusively, json_bytes, partial_path, publish_json, sync_folder
from dsqjob.engine.workspace import OWNER, Workspace, free_bytes, read_state, unique_token
from dsqjob.errors import DataError, UsageError


@dataclass(frozen=True)
class Unit:
    """The smallest resumable piece: ``outputs`` are paths relative to the stage's folder."""

    id: str
    outputs: tuple[str, ...]
    bytes_in: int
    bytes_out: int

    @property
    def work(self) -> int:
        """Bytes that progress is counted in: those written, or those read where nothing is."""
        return self.bytes_out or self.bytes_in


@dataclass(frozen=True)
class Output:
    """A published file: path relative to the stage's folder, bytes, and SHA-256 where checksums are on."""

    path: str
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Record:
    """What a finished unit leaves."""

    unit: str
    fingerprint: str
    outputs: tuple[Output, ...]
    worker: str
    host: str
    seconds: float
    counts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Record:
        return Record(**{**value, "outputs": tuple(Output(**output) for output in value["outputs"])})


@dataclass(frozen=True)
class Done:
    """What a unit reports: files it published, and counts that the next stages and reports add up."""

    outputs: tuple[Output, ...]
    counts: Mapping[str, Any] = field(default_factory=dict)


class Context(ABC):
    """What the engine lends to a unit while it works."""

    token: str
    """Marks this claim's partials."""
    chunk_bytes: int
    """The largest piece to hold in memory at once."""

    @abstractmethod
    def tick(self, nbytes: int) -> None:
        """Report ``nbytes`` of progress; raises Interrupted when asked to stop."""


class Stage:
    """What is made once and remembered: units with a fingerprint. How it is done is said by its two kinds."""

    name: str
    folder: Path
    units: Sequence[Unit]
    owner: str | None = None
    """Under which name the folder is owned; None for a stage that writes into the workspace only."""

    disposable: bool = False
    """Whether nothing is lost by beginning again: then a changed fingerprint does so by itself."""

    @property
    def fingerprint(self) -> Fingerprint:
        """What the output depends on; asking needs everything that earlier stages make."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse to begin while what an earlier stage makes is missing (UsageError)."""

    def owned_before(self) -> bool:
        """Whether this workspace once finished ``folder``, although no owner file says so."""
        return False

    def wanted(self) -> bool:
        """Whether something is asked for although every unit has its record."""
        return False

    def settle(self) -> None:
        """Called once all units have records; may be called again."""

    def describe(self) -> Sequence[str]:
        """Lines for people about what will be made."""
        return ()

    def summary(self, records: Sequence[Record]) -> Sequence[str]:  # noqa: ARG002
        """Lines for people about the finished stage."""
        return ()


class PooledStage(Stage, ABC):
    """Units that are done once each, in any order, by any number of workers."""

    @abstractmethod
    def do(self, unit: Unit, context: Context) -> Done:
        """Make the unit's outputs, publishing each under its final name, and say what was made."""


class GangStage(Stage, ABC):
    """One unit that ranks on one or more nodes make together, all alive at the same time."""

    nodes: int
    ranks_per_node: int
    rendezvous_seconds: float
    """Until every node has arrived."""
    silence_seconds: float
    """A rank or a node that gives no sign of life for so long is given up."""

    @abstractmethod
    def work(self) -> Callable[[Any], None]:
        """Import what is heavy, read what all ranks share, and return what each rank of a node does (with its
        ``dsqjob.gang.rank.Rank``). Called once a node, before its ranks are forked."""

    def look_back(self) -> None:
        """Called on node 0 when all ranks ended well: what is nice to have, and may fail without losing their work."""


class StageState:
    """A stage's memory in a workspace: fingerprint, records, claims."""

    def __init__(self, workspace: Workspace, stage: Stage) -> None:
        self.workspace = workspace
        self.stage = stage
        self._file = workspace.stage_file(stage.name)

    def compare(self) -> bool:
        """Whether work with this fingerprint was begun before. UsageError ``fingerprint-changed`` where it was
        begun with another one and has made something since."""
        if not self._file.exists():
            return False
        before = read_state(self._file)
        parts = before.get("parts") if isinstance(before, dict) else None
        changed = self.stage.fingerprint.changes(parts if isinstance(parts, dict) else {})
        if changed and (self.stage.disposable or self._nothing_made()):
            return False
        if changed:
            raise UsageError(
                "fingerprint-changed",
                f"{self.stage.name} was begun with other inputs or settings; changed: {', '.join(changed)}",
                where=self._file,
                way_out="put them back to resume, or add --restart to remove this stage's output and begin again",
            )
        return True

    def _nothing_made(self) -> bool:
        """Whether neither a unit nor a rank has left anything that other settings could spoil."""
        folders = self.workspace.records(self.stage.name), self.workspace.ranks(self.stage.name)
        return not any(folder.is_dir() and any(folder.iterdir()) for folder in folders)

    def begin(self) -> None:
        """Take the output folder and write down the fingerprint, unless that was done before; once the stage is
        checked."""
        self.workspace.prepare()
        if not self.compare():
            try:
                self.restart()
            except UsageError:  # a rival began again first, and already works
                if not self.compare():
                    raise
        for folder in (self.workspace.records(self.stage.name), self.workspace.claims(self.stage.name)):
            folder.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            data = json_bytes({"parts": dict(self.stage.fingerprint.parts)})
            create_exclusively(self._file, data, unique_token())
            self.compare()
        if self.stage.owner is not None and self.missing():
            self.workspace.own(self.stage.folder, self.stage.owner, finished=self.stage.owned_before())

    def record_path(self, unit: Unit) -> Path:
        return self.workspace.records(self.stage.name) / f"{unit.id}.json"

    def record(self, unit: Unit) -> Record | None:
        """The unit's record if it was made by this fingerprint and its files are there in full."""
        path = self.record_path(unit)
        try:
            record = Record.from_json(read_state(path))
        except FileNotFoundError:
            return None
        except (TypeError, KeyError, AttributeError):
            raise DataError(
                "state-damaged", "a record has the wrong form", where=path, way_out="remove this file and run again"
            ) from None
        if record.fingerprint != self.stage.fingerprint.digest:
            return None
        for output in record.outputs:
            try:
                if (self.stage.folder / output.path).stat().st_size != output.bytes:
                    return None
            except FileNotFoundError:
                return None
        return record

    def write_record(self, unit: Unit, done: Done, *, worker: str, host: str, seconds: float, token: str) -> None:
        record = Record(
            unit.id, self.stage.fingerprint.digest, done.outputs, worker, host, round(seconds, 3), done.counts
        )
        publish_json(self.record_path(unit), record.to_json(), token)

    def missing(self) -> list[Unit]:
        """Units without a valid record."""
        return [unit for unit in self.stage.units if self.record(unit) is None]

    def refuse_running(self) -> None:
        """UsageError ``gang-running`` where a process that lives, and that this one can see, holds a unit."""
        claims = Claims(self.workspace.claims(self.stage.name))
        for holder in filter(claims.nearby, claims.alive()):
            raise self.running(holder)

    def running(self, holder: Mapping[str, Any]) -> UsageError:
        """The refusal of a second gang."""
        return UsageError(
            "gang-running",
            f"another gang is at work: process {holder.get('pid')} on {holder.get('host')}",
            where=self.workspace.claims(self.stage.name),
            way_out="wait for it, or stop it first",
        )

    def check_disk(self) -> None:
        """UsageError ``disk-too-small`` where the missing units do not fit on the output's file system."""
        need = sum(unit.bytes_out for unit in self.missing())
        self.refuse_disk(need)

    def refuse_disk(self, need: int) -> None:
        """UsageError ``disk-too-small`` where ``need`` bytes do not fit."""
        free = free_bytes(self.stage.folder)
        if need > free:
            raise UsageError(
                "disk-too-small",
                f"{self.stage.name} still writes {need:,} bytes, {free:,} are free",
                where=self.stage.folder,
                way_out="free space, or choose another folder",
            )

    def sweep(self, unit: Unit, token: str) -> None:
        """Remove the partials that a dead claim left."""
        paths = [self.stage.folder / output for output in unit.outputs] + [self.record_path(unit)]
        for path in paths:
            with suppress(FileNotFoundError):
                partial_path(path, token).unlink()

    def sweep_all(self) -> list[Path]:
        """Remove every partial and claim whose holder is dead; what was removed."""
        claims_folder = self.workspace.claims(self.stage.name)
        if not claims_folder.is_dir():
            return []
        claims = Claims(claims_folder)
        live = {token for folder in self.workspace.all_claims() for token in Claims(folder).live_tokens()}
        folders = {self.stage.folder / Path(output).parent for unit in self.stage.units for output in unit.outputs}
        folders |= {self.stage.folder, claims_folder.parent, claims_folder.parent.parent}
        folders |= {self.workspace.records(self.stage.name), self.workspace.ranks(self.stage.name)}
        swept = []
        for folder in sorted(folders):
            for path in sorted(folder.glob(f"*{PARTIAL}*")) if folder.is_dir() else []:
                if path.name.rpartition(PARTIAL)[2] not in live:
                    path.unlink(missing_ok=True)
                    swept.append(path)
        return swept + self._sweep_attempts(claims) + claims.sweep()

    def _sweep_attempts(self, claims: Claims) -> list[Path]:
        """Remove what the nodes of a gang told each other, where none of them has touched it for long."""
        folder, swept = self.workspace.attempts(self.stage.name), []
        for attempt in sorted(folder.iterdir()) if folder.is_dir() else []:
            words = sorted([*attempt.glob("node*.json"), *attempt.glob(".probe-*")])
            with suppress(OSError):  # somebody else sweeps, too
                if min(map(claims.age, [attempt, *words])) > claims.stale_after:
                    for path in words:
                        path.unlink(missing_ok=True)
                    attempt.rmdir()
                    swept.append(attempt)
        return swept

    def restart(self) -> list[Path]:
        """Forget the stage: remove the files that its records name, then its state. Nothing else is touched."""
        if not self._file.exists():
            return []
        claims = Claims(self.workspace.claims(self.stage.name))
        if claims.live_tokens():
            raise UsageError(
                "restart-while-running",
                f"a worker is still working on {self.stage.name}",
                where=self.workspace.claims(self.stage.name),
                way_out="stop it first",
            )
        removed = self.sweep_all()
        removed += self._remove_outputs()
        name = self.stage.name
        for folder in (self.workspace.records(name), self.workspace.claims(name), self.workspace.ranks(name)):
            for path in folder.iterdir() if folder.is_dir() else []:
                path.unlink()
        self._file.unlink()
        return removed

    def _remove_outputs(self) -> list[Path]:
        """The outputs of all records, in the reverse order of publishing (a commit file goes first)."""
        removed = []
        root = self.stage.folder.resolve()
        if self.stage.owner is not None and self.stage.folder.is_dir():
            self.workspace.own(self.stage.folder, self.stage.owner, finished=True)
        for path in sorted(self.workspace.records(self.stage.name).glob("*.json")):
            for output in reversed(_outputs_of(path)):
                target = self.stage.folder / output.path
                ours = not target.is_symlink() and target.parent.resolve().is_relative_to(root)
                if ours and target.is_file() and target.stat().st_size == output.bytes:
                    target.unlink()
                    removed.append(target)
        inside = {folder for path in removed for folder in path.parents if self.stage.folder in folder.parents}
        for folder in sorted(inside, reverse=True):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
        if self.stage.owner is not None and self.stage.folder.is_dir():
            if not any(path.name != OWNER for path in self.stage.folder.iterdir()):
                (self.stage.folder / OWNER).unlink(missing_ok=True)
            sync_folder(self.stage.folder)
        return removed


def _outputs_of(path: Path) -> tuple[Output, ...]:
    """The outputs that a record names; none where the record cannot be read."""
    try:
        return Record.from_json(read_state(path)).outputs
    except (DataError, TypeError, KeyError, AttributeError):
        return ()
