"""What Slurm gave to the job that this process runs in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsqjob.errors import UsageError
from dsqjob.job.schema import Job
from dsqjob.launchers.slurm.client import ask


@dataclass(frozen=True)
class Allocation:
    """``job`` is this job's own number; ``name`` is how Slurm's commands are told of it (``33_2`` of an array: the
    number alone could mean all of it)."""

    job: str
    name: str
    restarts: int
    nodes: tuple[str, ...]
    host: str
    task: int
    tasks: int
    cores: int
    gpus: int | None
    """On this node; None where Slurm does not say."""

    @staticmethod
    def of(environment: Mapping[str, str]) -> Allocation:
        """From the environment of the batch process. UsageError ``not-in-slurm``."""
        job = environment.get("SLURM_JOB_ID")
        if not job:
            raise UsageError(
                "not-in-slurm",
                "this command is what a Slurm job runs",
                where="SLURM_JOB_ID",
                way_out="dsqjob run JOB --on slurm submits",
            )
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        listed = environment.get("SLURM_JOB_NODELIST", "")
        cores = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or "0"
        gpus = environment.get("SLURM_GPUS_ON_NODE")
        return Allocation(
            job,
            f"{array}_{task}" if array and task else job,
            int(environment.get("SLURM_RESTART_COUNT") or 0),
            _hosts(listed),
            environment.get("SLURMD_NODENAME", ""),
            int(task or 0),
            int(environment.get("SLURM_ARRAY_TASK_COUNT") or 1),
            int(cores),
            int(gpus) if gpus else None,
        )

    def check(self, job: Job) -> None:
        """Refuse a gang that this allocation cannot hold. UsageError ``allocation-nodes``, ``allocation-gpus``."""
        wanted = job.parallel
        if len(self.nodes) != wanted.nodes:
            raise UsageError(
                "allocation-nodes",
                f"the job has {len(self.nodes)} nodes ({', '.join(self.nodes)}), model_parallel "
                f"{wanted.model_parallel} wants {wanted.nodes} x {wanted.gpus_per_node}",
                where="parallel.nodes",
                way_out="submit with dsqjob run, or with the script as dsqjob render wrote it",
            )
        if job.device == "cpu" or job.slurm.gpus == "none":
            return
        if (self.gpus or 0) < wanted.gpus_per_node:
            raise UsageError(
                "allocation-gpus",
                f"{self.host} gives {self.gpus or 0} GPUs, model_parallel {wanted.model_parallel} wants "
                f"{wanted.nodes} x {wanted.gpus_per_node}",
                where="parallel.gpus_per_node, slurm.gpus",
                way_out="ask for them by slurm.gpus and slurm.gpu_type; none where nodes are handed out whole",
            )


def _hosts(listed: str) -> tuple[str, ...]:
    try:
        return tuple(ask("scontrol", "show", "hostnames", listed).out.split())
    except UsageError:  # some sites have no scontrol on compute nodes
        from submitit.slurm.slurm import SlurmJobEnvironment

        return tuple(SlurmJobEnvironment().hostnames)
