"""Scripts are sent; what came of it is kept in the workspace."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError

from dsqjob.engine.execute import STORAGE_ERRORS
from dsqjob.engine.fingerprint import digest_of
from dsqjob.engine.publish import publish_bytes
from dsqjob.engine.workspace import Workspace, unique_token
from dsqjob.errors import UsageError
from dsqjob.job.schema import Job
from dsqjob.launchers.slurm.client import missing
from dsqjob.launchers.slurm.faults import Faults
from dsqjob.launchers.slurm.handle import Handle, read_handle
from dsqjob.launchers.slurm.limits import refuse_short
from dsqjob.launchers.slurm.refusals import explained
from dsqjob.launchers.slurm.script import Need, Script, executor, write_script
from dsqjob.launchers.slurm.watch import alive, said_of


def resolved(job: Job) -> tuple[Path, bytes]:
    """The job as compute nodes read it, without variables, profile or overrides; named by its content, so that what a
    waiting job reads never changes. JSON, which is YAML."""
    value = job.model_dump(mode="json", exclude={"profile"})
    text = json.dumps(value, indent=1, ensure_ascii=False).replace("$", "$$") + "\n"
    return job.workspace / "state" / "jobs" / f"{digest_of(value)[:16]}.yaml", text.encode()


def render(job: Job, needs: Sequence[Need]) -> list[Script]:
    """What would be sent for these stages. UsageError ``job-invalid``, ``container-image``, ``time-too-short``."""
    _refuse(job)
    for need in needs:
        refuse_short(job, gang=need.gang)
    return [write_script(job, need, resolved(job)[0]) for need in needs]


def keep_job(job: Job) -> Path:
    """Write the resolved job where the scripts look for it."""
    path, data = resolved(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        publish_bytes(path, data, unique_token())
    return path


def queued(job: Job, stage: str, *, wanted: bool) -> Handle | None:
    """The stage's jobs where one of them still waits or runs.

    UsageError ``queued-otherwise`` where the stage is ``wanted`` and they were submitted with other settings.
    """
    handle = read_handle(Workspace(job.workspace), stage)
    if handle is None or not any(alive(one) for one in handle.jobs):
        return None
    if wanted and handle.job_file != str(resolved(job)[0]):
        raise UsageError(
            "queued-otherwise",
            f"{stage} is in the queue with other settings: job {', '.join(handle.jobs)}",
            where=handle.job_file,
            way_out="dsqjob cancel JOB first, or put the settings back",
        )
    return handle


def submit(job: Job, need: Need, after: Sequence[str]) -> Handle:
    """Send a stage that begins once the jobs ``after`` ended well. UsageError ``slurm-refused``, ``slurm-missing``."""
    keep_job(job)
    (script,) = render(job, [need])
    workspace = Workspace(job.workspace)
    Faults(workspace, need.stage).forget()
    _make_logs(job.slurm.logs)
    spares = 0 if job.slurm.requeue else job.slurm.spares
    ids: list[str] = []
    for _ in range(spares + 1):
        conditions = [f"afterok:{one}" for one in _known(after)] + ([] if job.slurm.requeue else ["singleton"])
        ids.append(_send(script, ",".join(conditions)))
        handle = Handle(
            need.stage, tuple(ids), script.name, time.time(), str(_sent(job, ids[0])), str(script.job_file), need.tasks,
            str(job.slurm.logs), tuple(after),
        )  # fmt: skip
        handle.keep(workspace)
    return handle


def last_of(handle: Handle) -> str:
    """The job that the next stage waits for: a spare job ends well only where the stage is done."""
    return handle.jobs[-1]


def _send(script: Script, dependency: str) -> str:
    if shutil.which("sbatch") is None:
        raise missing("sbatch")
    made = executor(script.logs, script.parameters)
    try:
        return made.send(script.command, dependency)
    except (FailedJobError, FailedSubmissionError) as error:
        raise explained(str(error), gang=script.need.gang) from None
    finally:
        if made.sent is not None and not made.sent.is_symlink():
            made.sent.unlink(missing_ok=True)


def _known(ids: Sequence[str]) -> list[str]:
    """Slurm drops a dependency on a job that it does not know without a word, and begins at once."""
    for one in ids:
        if not said_of(one):
            raise UsageError(
                "dependency-unknown",
                f"Slurm does not know job {one} any more, which this stage should wait for",
                where=f"job {one}",
                way_out="run the same command again",
            )
    return list(ids)


def _make_logs(folder: Path) -> None:
    """Slurm takes % for a pattern and \\ for a quote, and fails on the node where the folder is missing."""
    if set("%\\") & set(str(folder)):
        raise _unfit(folder, "Slurm would read its % or \\ otherwise")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            raise
        raise _unfit(folder, str(error.strerror)) from None


def _unfit(folder: Path, why: str) -> UsageError:
    return UsageError(
        "slurm-logs",
        f"Slurm's output cannot go there: {why}",
        where=f"slurm.logs: {folder}",
        way_out="set slurm.logs to a folder that all nodes share",
    )


def _sent(job: Job, first: str) -> Path:
    return job.slurm.logs / f"{first}_submission.sh"


def _refuse(job: Job) -> None:
    container = job.slurm.container
    if container.kind != "none" and not container.image:
        raise UsageError(
            "container-image",
            f"a container of kind {container.kind} needs an image",
            where="slurm.container.image",
            way_out="name the image, or set slurm.container.kind to none",
        )
