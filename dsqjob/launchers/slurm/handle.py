"""What was submitted for a stage, kept in its workspace: all that watching needs, later, from another shell."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from dsqjob.engine.publish import publish_json
from dsqjob.engine.workspace import Workspace, read_state, unique_token
from dsqjob.errors import DataError


@dataclass(frozen=True)
class Handle:
    """The jobs of a stage, the spare ones after the first. Times are seconds since 1970."""

    stage: str
    jobs: tuple[str, ...]
    name: str
    """The job's name in Slurm."""
    submitted: float
    script: str
    """What was sent."""
    job_file: str
    """The resolved job that compute nodes read."""
    tasks: int
    """Size of the array; 1: none."""
    logs: str
    """Folder of Slurm's output files."""
    after: tuple[str, ...] = ()
    """The jobs that it waits for."""

    def keep(self, workspace: Workspace) -> None:
        """Write it down, over the one before."""
        path = handle_file(workspace, self.stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        publish_json(path, asdict(self), unique_token())


def handle_file(workspace: Workspace, stage: str) -> Path:
    return workspace.stage(stage) / "handle.json"


def read_handle(workspace: Workspace, stage: str) -> Handle | None:
    """What was last submitted for the stage. DataError ``state-damaged``."""
    path = handle_file(workspace, stage)
    if not path.is_file():
        return None
    try:
        value = read_state(path)
        return Handle(**{**value, "jobs": tuple(map(str, value["jobs"])), "after": tuple(value.get("after", ()))})
    except (KeyError, TypeError, AttributeError):
        raise DataError(
            "state-damaged",
            "it is not what was submitted",
            where=path,
            way_out="remove the file; jobs that still wait are Slurm's to cancel (squeue --me, scancel)",
        ) from None
