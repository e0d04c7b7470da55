"""Who works on a unit: a file made by ``link``, kept alive by its modification time.

A claim is ``<unit>.<generation>``; the highest generation holds the unit. A dead claim is taken over by
making the next generation, which exactly one process can do; nothing is deleted to take over, so no live
claim can be deleted by mistake. Death is judged on the same machine by the process itself, elsewhere by
the file server's clock: a claim whose time lies ``stale_after`` seconds behind a file touched just now.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsqjob.engine.publish import PARTIAL, create_exclusively
from dsqjob.engine.workspace import unique_token

HEARTBEAT = 10.0
STALE_AFTER = 60.0


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot, or '' if there is none or it is a zombie."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def whoami(job: str = "") -> dict[str, Any]:
    """This process in words that another one can check: host, boot, pid namespace, pid, start time."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id").strip(),
        "namespace": namespace,
        "pid": pid,
        "started": _started(pid),
        "job": job,
    }


@dataclass(frozen=True)
class Claim:
    """A unit held by the process that wrote ``holder``; ``token`` marks its partials."""

    unit: str
    generation: int
    token: str
    path: Path


class Claims:
    """The claims of one stage, seen by one process."""

    def __init__(
        self, folder: Path, *, job: str = "", heartbeat: float = HEARTBEAT, stale_after: float = STALE_AFTER
    ) -> None:
        self.folder = folder
        self.stale_after = stale_after
        self._heartbeat = heartbeat
        self._me = whoami(job)
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, unit: str) -> tuple[Claim, list[str]] | None:
        """Claim ``unit`` and the tokens of dead claims whose partials may be swept; None where it is held."""
        held = self._generations(unit)
        if held and not self._dead(held[max(held)]):
            return None
        generation = max(held, default=-1) + 1
        claim = Claim(unit, generation, unique_token(), self.folder / f"{unit}.{generation}")
        data = json.dumps({**self._me, "token": claim.token}).encode()
        if not create_exclusively(claim.path, data, claim.token, durable=False):
            return None
        return claim, [token for path in held.values() if (token := self._holder(path).get("token"))]

    def release(self, claim: Claim) -> None:
        """Give the unit back, with the older generations that this claim outlived."""
        mine = self._holder(claim.path).get("token") == claim.token
        for generation, path in sorted(self._generations(claim.unit).items()):
            if generation < claim.generation or (generation == claim.generation and mine):
                with suppress(FileNotFoundError):
                    path.unlink()

    def lost(self, claim: Claim) -> bool:
        """Whether another process took the unit over, having judged this one dead (and perhaps finished it)."""
        overtaken = max(self._generations(claim.unit), default=claim.generation) > claim.generation
        return overtaken or self._holder(claim.path).get("token") != claim.token

    def holder(self, unit: str) -> dict[str, Any] | None:
        """Who holds ``unit`` now, or None."""
        held = self._generations(unit)
        return self._holder(held[max(held)]) if held else None

    def nearby(self, holder: dict[str, Any]) -> bool:
        """Whether a holder lives where this process can see it, so that its death is known at once."""
        return bool(self._me["boot"]) and all(holder.get(key) == self._me[key] for key in ("host", "boot", "namespace"))

    def live_tokens(self) -> set[str]:
        """Tokens of every claim that is not dead."""
        return {str(self._holder(path).get("token")) for path in self._paths() if not self._dead(path)}

    def alive(self) -> list[dict[str, Any]]:
        """Holders of every claim that is not dead."""
        return [self._holder(path) for path in self._paths() if not self._dead(path)]

    def dead(self) -> list[Path]:
        """Claims whose holder is dead."""
        return [path for path in self._paths() if self._dead(path)]

    @contextmanager
    def keeping(self, claim: Claim) -> Iterator[None]:
        """Keep ``claim`` alive, and give it back at the end."""
        try:
            with self.beating(claim):
                yield
        finally:
            self.release(claim)

    def sweep(self) -> list[Path]:
        """Remove dead claims, and partials that none of the live ones is making; what was removed."""
        live = self.live_tokens()
        partials = [path for path in self.folder.glob(f"*{PARTIAL}*") if path.name.rpartition(PARTIAL)[2] not in live]
        swept = sorted([*self.dead(), *partials])
        for path in swept:
            path.unlink(missing_ok=True)
        return swept

    def beating(self, claim: Claim) -> _Heart:
        """A context that keeps ``claim`` alive."""
        return _Heart(claim.path, self._heartbeat)

    def _paths(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.name.rpartition(".")[2].isdigit()]

    def _generations(self, unit: str) -> dict[int, Path]:
        found = {}
        for path in self.folder.glob(f"{_escape(unit)}.*"):
            tail = path.name[len(unit) + 1 :]
            if tail.isdigit():
                found[int(tail)] = path
        return found

    def _holder(self, path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def _dead(self, path: Path) -> bool:
        holder = self._holder(path)
        if self.nearby(holder):
            return bool(_started(int(holder["pid"])) != holder["started"])
        try:
            return self.age(path) > self.stale_after
        except FileNotFoundError:
            return True

    def age(self, path: Path) -> float:
        """Seconds since a file beside the claims was last touched, by the file server's clock."""
        return self._now() - path.stat().st_mtime

    def _now(self) -> float:
        """The file server's clock."""
        probe = self.folder / f".clock-{self._me['pid']}-{unique_token()}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()


class _Heart:
    """Touches a claim from a thread until left."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._path, self._seconds = path, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def _beat(self) -> None:
        while not self._stop.wait(self._seconds):
            with suppress(OSError):
                os.utime(self._path)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _escape(name: str) -> str:
    return "".join(f"[{char}]" if char in "[]*?" else char for char in name)
