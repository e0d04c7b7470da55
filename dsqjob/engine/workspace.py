"""Every path under a workspace, and who owns which output folder."""

from __future__ import annotations

import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

from dsqjob.engine.publish import create_exclusively
from dsqjob.errors import DataError, UsageError

OWNER = ".dsqjob-owner"
"""In an output folder until its stage is finished: which workspace and stage write it."""


def unique_token() -> str:
    """A name that no other process uses: for partials and claims."""
    return uuid.uuid4().hex[:16]


class Workspace:
    """The folder that holds a job's state: ``state/``, ``logs/``, ``reports/``, and default outputs."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(self, name: str) -> Path:
        return self.root / "state" / name

    def stage_file(self, name: str) -> Path:
        return self.stage(name) / "stage.json"

    def records(self, name: str) -> Path:
        return self.stage(name) / "records"

    def claims(self, name: str) -> Path:
        return self.stage(name) / "claims"

    def ranks(self, name: str) -> Path:
        """What the ranks of a gang keep to resume from."""
        return self.stage(name) / "ranks"

    def attempts(self, name: str) -> Path:
        """A folder for each attempt of a gang."""
        return self.stage(name) / "gang"

    def gang(self, name: str, attempt: str) -> Path:
        """Where the nodes of one attempt tell each other how it ended."""
        return self.attempts(name) / attempt

    @property
    def launches(self) -> Path:
        """The claims of processes that start workers of this job on their machine, for as long as they live."""
        return self.claims("launch")

    def all_claims(self) -> list[Path]:
        """The claims' folders of every stage that was begun, and of launchers."""
        return sorted((self.root / "state").glob("*/claims"))

    @property
    def events(self) -> Path:
        return self.root / "logs" / "events"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    def prepare(self) -> None:
        """Make the folders. UsageError ``workspace-unwritable`` where that cannot be."""
        try:
            for folder in (self.root / "state", self.events, self.reports):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.root / "state" / f".probe-{unique_token()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE):
                raise
            raise UsageError(
                "workspace-unwritable",
                f"the workspace cannot be written: {error.strerror}",
                where=error.filename or self.root,
                way_out="set `workspace` to a folder on a writable, shared file system",
            ) from None

    def identity(self) -> str:
        """An id made once; it follows the workspace through moves and mounts."""
        path = self.root / "state" / "workspace.json"
        if not path.exists():
            token = unique_token()
            create_exclusively(path, json.dumps({"id": uuid.uuid4().hex}).encode(), token)
        return str(read_state(path)["id"])

    def own(self, output: Path, stage: str, *, finished: bool) -> None:
        """Make ``output`` this stage's folder, or refuse: UsageError ``output-foreign``.

        A folder is ours if its owner file says so, if it was empty, or if this workspace ``finished`` it before.
        """
        owner = output / OWNER
        mine = {"workspace": self.identity(), "stage": stage}
        output.mkdir(parents=True, exist_ok=True)
        if not owner.exists():
            strangers = any(not path.name.startswith(OWNER) for path in output.iterdir())
            if not finished and strangers and not owner.exists():
                raise UsageError(
                    "output-foreign",
                    "the output folder holds files that this job did not make",
                    where=output,
                    way_out="choose another folder, or empty this one yourself",
                )
            create_exclusively(owner, json.dumps(mine).encode(), unique_token())
        if read_state(owner) != mine:
            raise UsageError(
                "output-foreign",
                "another workspace or stage is writing this output folder",
                where=owner,
                way_out="choose another folder, or finish the other job; if its workspace is gone, remove this file",
            )


def read_state(path: Path) -> Any:
    """One of our own JSON files. DataError ``state-damaged`` where it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise DataError(
            "state-damaged",
            "a state file is not JSON",
            where=path,
            way_out="remove this file and run the same command again: what it described is done once more",
        ) from None


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write at the nearest folder of ``path`` that exists."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
