"""After a calibration: pictures of coverage and convergence, from what the ranks published. Without torch's model."""

from __future__ import annotations

from dsqjob.calibration import pictures
from dsqjob.calibration.coverage import History
from dsqjob.calibration.snapshot import RankState, history_of
from dsqjob.engine.workspace import unique_token
from dsqjob.errors import BugError
from dsqjob.stages.calibrate import Calibrate


def rank_state(stage: Calibrate, rank: int, **computing: str) -> RankState:
    """Where a rank of the stage publishes what it has measured, ``computing`` being with what it does."""
    path = stage.inputs.workspace.ranks(stage.name) / f"rank{rank}-mp{stage.n}.safetensors"
    about = {"fingerprint": stage.fingerprint.digest, "driver": "resident", "rank": str(rank), **computing}
    return RankState(path, about)


def batch_tokens(stage: Calibrate) -> list[int]:
    """Tokens of each batch, padding included; the last one may be smaller."""
    samples, length = stage.tokens.ids.shape
    size = stage.job.calibrate.batch_size
    return [min(size, samples - start) * length for start in range(0, samples, size)]


def draw_pictures(stage: Calibrate) -> None:
    """Into the workspace's reports. UsageError ``plot-missing``; BugError ``stage-incomplete`` where a rank left
    nothing."""
    newest = []
    for rank in range(stage.n):
        states = rank_state(stage, rank).load().snapshots
        if not states:
            raise BugError("stage-incomplete", "a rank published nothing", where=rank_state(stage, rank).path)
        newest.append(states[max(states)])
    history: History = history_of(newest, batch_tokens(stage))
    folder, token = stage.inputs.workspace.reports, unique_token()
    containers = stage.inputs.family.containers(stage.inputs.release)
    pictures.draw_coverage(history, folder / "coverage.svg", token, containers)
    pictures.draw_convergence(history, folder / "convergence.svg", token)
