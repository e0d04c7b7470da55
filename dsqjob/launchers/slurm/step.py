"""The step of a job that starts its workers: one srun, whose tasks are supervisors of a gang or one pooled worker."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsqjob.job.schema import Job
from dsqjob.launchers.slurm.allocation import Allocation
from dsqjob.launchers.slurm.container import Inside, inside

_FIRST_PORT = 20000
_PORTS = 12000
"""Below those that kernels hand out."""
_STRIDE = 997


@dataclass(frozen=True)
class Step:
    """Words of the step's command, and of the one that tidies up behind it (empty: nothing outlives the step)."""

    argv: tuple[str, ...]
    afterwards: tuple[str, ...]


def step(job: Job, stage: str, *, gang: bool, job_file: Path, here: Allocation, attempt: str) -> Step:
    """How the workers of this attempt are started."""
    slurm, nodes = job.slurm, job.parallel.nodes if gang else 1
    inner = inside(
        slurm.container,
        _worker(job, stage, gang, job_file, here, attempt),
        name=f"dsqjob-{attempt}",
        gpus=gang and job.device != "cpu",
        environment=tuple(slurm.environment),
    )
    shape = ["--nodes", str(nodes), "--ntasks", str(nodes), "--ntasks-per-node", "1"]
    cores = ["--cpus-per-task", str(here.cores)] if here.cores else []
    flags = ["--kill-on-bad-exit=1", "--unbuffered", "--input=none", "--export=ALL"]
    command = ["srun", *shape, *cores, *flags, *inner.options, *slurm.srun, *inner.argv]
    return Step(tuple(command), _tidy(inner, shape))


def port(job: Job, here: Allocation) -> int:
    """Where the nodes of this job meet: two jobs on one node meet elsewhere, and so does a job that comes back, as its
    port may have been taken."""
    return job.slurm.port or _FIRST_PORT + (int(here.job) + _STRIDE * here.restarts) % _PORTS


def _worker(job: Job, stage: str, gang: bool, job_file: Path, here: Allocation, attempt: str) -> list[str]:
    slurm = job.slurm
    python = slurm.python or sys.executable if slurm.container.kind == "none" else slurm.container.python
    argv = [python, "-P", "-m", "dsqjob", "worker", stage, str(job_file), "--run", attempt]
    if gang:
        rendezvous = f"{here.nodes[0]}:{port(job, here)}"
        return [*argv, "--node", "slurm", "--rendezvous", rendezvous, "--attempt", attempt]
    return [*argv, "--worker", str(here.task), "--workers", str(here.tasks)]


def _tidy(inner: Inside, shape: Sequence[str]) -> tuple[str, ...]:
    return ("srun", *shape, "--overlap", "--input=none", *inner.afterwards) if inner.afterwards else ()
